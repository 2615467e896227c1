"""How long a text may be, whatever a tokenizer's files say of it."""

from types import SimpleNamespace

import pytest
import torch

from latentdiff import LatentDiffPipeline
from latentdiff.utils.tokens import token_limit
from tiny import tiny_components

READS_8 = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))


def said(length):
    return SimpleNamespace(model_max_length=length)


@pytest.mark.parametrize(("length", "limit"), [(8, 8), (5, 5), (10**30, 8), (1e30, 8), (77, 8), (5.0, 5)])
def test_what_the_text_encoder_takes_is_the_most(length, limit):
    """transformers says 10 ** 30 where the files say nothing, and a tensor of that length was asked for."""
    assert token_limit(said(length), READS_8) == limit


@pytest.mark.parametrize("length", [0, 1, 2, -1, "77", None, True, 2.5, float("nan"), []])
def test_what_is_no_length_is_refused(length):
    """With 0 a text was cut into pieces of nothing for ever."""
    with pytest.raises(ValueError, match="model_max_length is .*; it may be 3 or more, or left out"):
        token_limit(said(length), READS_8)


def test_a_pipeline_asks_for_it():
    components = tiny_components()
    pipeline = LatentDiffPipeline(**components)
    embedded = pipeline.encode_prompt("a cat", torch.device("cpu"), 1, False)[0]
    components["tokenizer"].model_max_length = 10**30
    assert torch.equal(pipeline.encode_prompt("a cat", torch.device("cpu"), 1, False)[0], embedded)
    components["tokenizer"].model_max_length = 0
    with pytest.raises(ValueError, match="model_max_length is 0"):
        pipeline.encode_prompt("a cat", torch.device("cpu"), 1, False)
