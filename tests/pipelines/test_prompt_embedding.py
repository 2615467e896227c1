"""Weighted and long prompts: harmless when absent, and what compel, which many use for it, makes of them."""

import logging

import pytest
import torch

from latentdiff import LatentDiffPipeline
from latentdiff.pipelines import prompt_embedding
from latentdiff.pipelines.prompt_embedding import cut_between_words, parse_weights
from tiny import tiny_components

WORDS = "a cat a dog a red cat a red dog a cat"  # of 12 tokens, where the text encoder reads 6 and two marks
BOTH = {"prompt_weights": True, "long_prompts": True}


@pytest.fixture(scope="module")
def pipe():
    pipe = LatentDiffPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embed(pipe, prompt, negative=None, guided=False, **options):
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, guided, negative, **options)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red:1.3) apple", [("a ", 1.0), ("red", 1.3), (" apple", 1.0)]),
        ("(a (red:2) apple:1.5)", [("a ", 1.5), ("red", 3.0), (" apple", 1.5)]),
        ("a (red : .5 )", [("a ", 1.0), ("red ", 0.5)]),
        ("a cat (the animal)", [("a cat (the animal)", 1.0)]),
        (r"a \(red:1.3\) apple", [("a (red:1.3) apple", 1.0)]),
        ("((a) b:2)", [("(a) b", 2.0)]),
        ("a ) b ( c:3 d:1.2)", [("a ) b ", 1.0), (" c:3 d", 1.2)]),
        ("12:30) and (10:15", [("12:30) and (10:15", 1.0)]),
        (r"back\slash :) (", [(r"back\slash :) (", 1.0)]),
        ("(red:0)", [("red", 0.0)]),
        ("", []),
    ],
)
def test_weights_are_read_and_everything_else_is_text(prompt, parts):
    """Else a smiley or a time of day changes a picture, or a weight stays in the text."""
    assert parse_weights(prompt) == parts


def test_long_texts_are_cut_between_words():
    """Else half a word stands in each piece and means nothing in either."""
    ends = [True, False, True, True, False, False, False, False, True]
    assert list(cut_between_words(ends, 3)) == [slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 9)]
    assert list(cut_between_words([], 3)) == []


@pytest.mark.parametrize("prompt", ["a cat", "", "a cat and a red dog and a cat", "(red)", ["a dog", "red"]])
def test_harmless_when_absent(pipe, prompt):
    """Else asking for weights and long prompts changes pictures that have neither."""
    plain = embed(pipe, prompt)[0]
    assert torch.equal(embed(pipe, prompt, prompt_weights=True)[0], plain)
    assert torch.equal(embed(pipe, prompt, long_prompts=True)[0][:, :1], plain[:, :1])
    tokens = pipe.tokenizer(prompt, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(plain, pipe.text_encoder(tokens.input_ids.reshape(-1, 8))[0])


def test_a_long_prompt_is_its_pieces_one_behind_the_other(pipe):
    """Else the end of a long prompt is lost, or told in another order."""
    whole, _ = embed(pipe, WORDS, long_prompts=True)
    pieces = [embed(pipe, part)[0] for part in ("a cat a dog a red", "cat a red dog a cat")]
    assert whole.shape == (1, 16, 16)
    torch.testing.assert_close(whole, torch.cat(pieces, dim=1))


def test_shorter_texts_are_filled_up_with_empty_ones(pipe):
    """Else a batch of prompts of different lengths, or a short negative prompt, cannot be drawn."""
    prompt, negative = embed(pipe, [WORDS, "a cat"], "red", guided=True, long_prompts=True)
    empty = embed(pipe, "")[0]
    torch.testing.assert_close(prompt[1:], torch.cat([embed(pipe, "a cat")[0], empty], dim=1))
    torch.testing.assert_close(negative[:1], torch.cat([embed(pipe, "red")[0], empty], dim=1))
    long_negative = embed(pipe, "a cat", WORDS, guided=True, long_prompts=True)
    assert long_negative[0].shape == long_negative[1].shape == (1, 16, 16)
    given = embed(pipe, None, "red", guided=True, prompt_embeds=prompt[:1])
    torch.testing.assert_close(given[1], negative[:1])
    images = pipe(WORDS, long_prompts=True, num_inference_steps=1, output_type="pt", seeds=[0]).images
    cut = pipe(WORDS, num_inference_steps=1, output_type="pt", seeds=[0]).images
    assert torch.isfinite(images).all() and not torch.equal(images, cut)


def test_weights_lead_away_from_the_empty_text(pipe):
    """Else a weight is not what its formula says: z_0 + w (z - z_0)."""
    plain, empty = embed(pipe, "a red dog")[0], embed(pipe, "")[0]
    weighted = embed(pipe, "a (red:1.5) dog", prompt_weights=True)[0]
    changed = (weighted != plain).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [2]  # the mark of the beginning, "a", "red"
    torch.testing.assert_close(weighted[0, 2], empty[0, 2] + 1.5 * (plain[0, 2] - empty[0, 2]))
    torch.testing.assert_close(embed(pipe, "a (red:0) dog", prompt_weights=True)[0][0, 2], empty[0, 2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ours", "theirs"), [("a (red:1.3) dog", "a (red)1.3 dog"), ("(a cat:2) red", "(a cat)2.0 red"), (WORDS, WORDS)]
)
def test_equals_compel(pipe, ours, theirs):
    """Else people who come from compel get other pictures. Weights below 1 it mixes with the text without the word."""
    compel = pytest.importorskip("compel")
    encoder = compel.Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False)
    with torch.no_grad():
        torch.testing.assert_close(embed(pipe, ours, **BOTH)[0], encoder(theirs), rtol=0, atol=1e-5)


def test_what_is_cut_is_said(pipe, caplog, monkeypatch):
    """Else a weighted prompt's end is silently without effect."""
    monkeypatch.setattr(prompt_embedding, "logger", logging.getLogger("test.prompts"))
    embed(pipe, WORDS, prompt_weights=True)
    embed(pipe, WORDS, long_prompts=True)
    (record,) = [record for record in caplog.records if record.name == "test.prompts"]
    assert "cat a red dog a cat" in record.getMessage()


def test_lengths_that_cannot_go_together_are_named(pipe):
    """Else a shape error comes from inside the network."""
    with pytest.raises(ValueError, match=r"prompt_embeds \(1, 12, 16\).*differ in shape"):
        embed(pipe, None, "red", guided=True, prompt_embeds=torch.zeros(1, 12, 16))
