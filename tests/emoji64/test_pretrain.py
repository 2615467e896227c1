"""How the small VAE and text encoder of the default are made: their losses, their tokens, their latents."""

import math

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer
from transformers.models.clip.modeling_clip import image_text_contrastive_loss as image_text_loss

from latentdiff.data import emoji
from latentdiff.emoji64 import clip as pretrain_clip
from latentdiff.emoji64.clip import (
    MAX_LENGTH,
    LockedTextBatches,
    augment,
    build_around,
    build_clip,
    clip_loss,
    contrastive_loss,
    draw_batch,
    load_text_encoder,
    locked_text_loss,
    tokenize,
    train_tokenizer,
)
from latentdiff.emoji64.pretrain import warmup_cosine
from latentdiff.emoji64.vae import PretrainVAEConfig, blend, compose, normalise_latents, reconstruction_psnr, vae_loss
from latentdiff.models.latents import encode_moments
from tiny import tiny_components

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy_set() -> emoji.EmojiSet:
    """Twenty-four made-up emoji in two styles, at least one of them held out."""
    concepts = [
        emoji.Concept(key=f"{i:x}", names=(f"thing {i}",), category=emoji.CATEGORIES[0], emoji_version=1.0)
        for i in range(60)
    ]
    concepts = sorted(concepts, key=lambda concept: not concept.held_out)[:24]
    rows = [(concept, style) for concept in concepts for style in emoji.STYLES]
    pictures = np.random.default_rng(0).integers(0, 256, (len(rows), 64, 64, 4), dtype=np.uint8)
    built = emoji.EmojiSet(pictures, rows, {})
    assert built.indices(held_out=True) and built.indices()
    return built


# ---- tokenizer ------------------------------------------------------------------------------------------------------

TEXTS = ["a cat, twemoji style", "a red apple on a blue background", "the cat's hat"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab_size=600)


@pytest.mark.parametrize(
    "text", ["a cat", "ein käse", "猫", "кошка и кот", "🐈‍⬛", "قطة", "zażółć gęślą", "x" * 15, "100 !?"]
)
def test_every_text_survives_its_tokens(tokenizer, text):
    """Letters that the training texts lack would all be the same unknown token: the same prompt to the model."""
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1])
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.split())


def test_tokens_of_a_saved_tokenizer(tokenizer, tmp_path):
    """The loaded tokenizer would number words otherwise than the text encoder learned."""
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "猫 кошка", "Two  CATS"]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert len(loaded) == len(tokenizer) <= 600 and loaded.model_max_length == MAX_LENGTH
    assert loaded("A  CAT").input_ids == tokenizer("a cat").input_ids  # lower case, one space
    assert len(tokenizer("cat").input_ids) == 3  # a word of the training texts is one token


def test_the_same_texts_give_the_same_tokens_every_time(tokenizer):
    """A resumed run, or a second process, would number its tokens otherwise than the weights were trained with."""
    for _ in range(5):
        assert train_tokenizer(TEXTS * 3, vocab_size=600).get_vocab() == tokenizer.get_vocab()


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_contrastive_loss_in_closed_form():
    """Orthogonal pairs at scale s: each row's loss is log(1 + (B - 1) e^-s); all alike it is log B."""
    eye = torch.eye(4) * 7
    assert contrastive_loss(eye, 3 * eye, torch.tensor(2.0)).item() == pytest.approx(math.log(1 + 3 * math.exp(-2)))
    same = torch.ones(4, 5)
    assert contrastive_loss(same, same, torch.tensor(9.0)).item() == pytest.approx(math.log(4))


def test_clip_loss_is_that_of_transformers(tokenizer):
    """The towers would be compared otherwise than CLIP compares them, and not be usable as a CLIP."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_clip(tokenizer).eval()
    pixels = torch.randn(3, 3, 64, 64, generator=seeded())
    words = tokenize(tokenizer, TEXTS)
    with torch.no_grad():
        peer = image_text_loss(model(input_ids=words, pixel_values=pixels).logits_per_text)
        texts = model.get_text_features(words).pooler_output
        between_texts = contrastive_loss(texts, texts, model.logit_scale.exp())
        ours = clip_loss(model, pixels, torch.cat([words, words]))
    torch.testing.assert_close(ours, (2 * peer + between_texts) / 3)


def test_padding_changes_nothing(tokenizer):
    """A caption's meaning would depend on the longest caption beside it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_clip(tokenizer).eval()
    with torch.no_grad():
        alone = model.get_text_features(tokenize(tokenizer, ["a cat"])).pooler_output
        beside = model.get_text_features(tokenize(tokenizer, ["a cat", TEXTS[1] * 9])).pooler_output
    torch.testing.assert_close(alone[0], beside[0])
    assert tokenize(tokenizer, [TEXTS[1] * 9]).shape == (1, MAX_LENGTH)


def test_drawn_batches_keep_to_the_splits(toy_set):
    """Held-out pairs of emoji and colour would be learned, or a caption stand beside another's picture."""
    concepts = [[i for i in toy_set.indices() if toy_set.rows[i][0] is concept] for concept in
                dict.fromkeys(toy_set.rows[i][0] for i in toy_set.indices())]  # fmt: skip
    rows = torch.arange(len(concepts))
    for seed in range(5):
        pixels, first, second = draw_batch(toy_set, concepts, rows, seeded(seed))
        assert pixels.shape == (len(first), 3, 64, 64) and len(first) == len(second) == 4 * len(rows)
        assert pixels.min() >= -1 and pixels.max() <= 1
        for i, caption in enumerate(first):
            concept = toy_set.rows[concepts[i // 4][0]][0]
            for said in (caption, second[i]):
                assert concept.names[0] in said
                assert not any(f"on a {c} background" in said for c in emoji.COLOURS if concept.pair_held_out(c))


def test_locked_text_loss_counts_no_true_caption_as_wrong(tiny_pipeline_folder):
    """With towers that all say the same, the loss is the logarithm of how many captions a picture has to choose from:
    B + N less those that are true, too, and the same among the B pictures. A true caption would be pushed away.
    """
    model = build_around(load_text_encoder(str(tiny_pipeline_folder))[0])
    for projection in (model.visual_projection, model.text_projection):
        projection.weight.data.fill_(1.0)
    model.vision_model.post_layernorm.weight.data.zero_()
    model.vision_model.post_layernorm.bias.data.fill_(1.0)
    also_true = torch.zeros(4, 4, dtype=torch.bool)
    also_true[0, 1] = also_true[0, 2] = also_true[3, 1] = True
    with torch.no_grad():
        loss = locked_text_loss(model, torch.zeros(4, 3, 64, 64), torch.ones(10, 16), also_true)
    pictures = sum(math.log(n) for n in (8, 10, 10, 9)) / 4
    captions = sum(math.log(n) for n in (4, 2, 3, 4)) / 4
    assert loss.item() == pytest.approx((pictures + captions) / 2, rel=1e-5)


def test_locked_text_loss_without_others_is_that_of_the_pairs(tiny_pipeline_folder):
    """Pictures and captions would be compared otherwise than CLIP compares them."""
    text_encoder, tokenizer = load_text_encoder(str(tiny_pipeline_folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_around(text_encoder)
    pixels, ids = torch.randn(3, 3, 64, 64, generator=seeded()), tokenize(tokenizer, TEXTS)
    with torch.no_grad():
        peer = image_text_loss(model(input_ids=ids, pixel_values=pixels).logits_per_text)
        pooled = text_encoder(ids).pooler_output
        ours = locked_text_loss(model, pixels, pooled, torch.zeros(3, 3, dtype=torch.bool))
    torch.testing.assert_close(ours, peer)


class Numbering:
    """Stands for tokenizer and text tower: what it says of a caption is how many it was given before."""

    device = torch.device("cpu")

    def __init__(self):
        self.said = []

    def tokenize(self, tokenizer, texts):
        self.said += texts
        return torch.arange(len(self.said) - len(texts), len(self.said))

    def __call__(self, numbers):
        return type("Output", (), {"pooler_output": numbers[:, None]})


def test_drawn_captions_beside_a_locked_text(toy_set, monkeypatch):
    """A picture would stand beside another's caption, or a true caption count as wrong; the others be too few."""
    concepts = [[i for i in toy_set.indices() if toy_set.rows[i][0] is concept] for concept in
                dict.fromkeys(toy_set.rows[i][0] for i in toy_set.indices())]  # fmt: skip
    tower = Numbering()
    monkeypatch.setattr(pretrain_clip, "tokenize", tower.tokenize)
    batches = LockedTextBatches(toy_set, concepts, tower, None)
    assert len(set(tower.said)) == len(tower.said)  # each once

    true_of = {}  # caption -> the pictures that it is true of
    for concept, views in enumerate(concepts):
        for i in views:
            for colour in emoji.BACKGROUNDS:
                for caption in emoji.captions(*toy_set.rows[i], colour):
                    true_of.setdefault(caption, set()).add((concept, i, colour))

    rows, count = torch.arange(3), 12
    for seed in range(5):
        pixels, pooled, also_true = batches.draw(rows, seeded(seed))
        said = [tower.said[int(number)] for number in pooled[:, 0]]
        assert pixels.shape == (count, 3, 64, 64)
        assert len(said) == count + len(concepts) - len(rows)
        of = [{concept for concept, *_ in true_of[caption]} for caption in said]
        assert of[:count] == [{row % 3} for row in range(count)]
        assert of[count:] == [{concept} for concept in range(3, len(concepts))]
        same = torch.tensor([[a == b for b in said[:count]] for a in said[:count]]).fill_diagonal_(False)
        may = torch.tensor([[bool(true_of[a] & true_of[b]) for b in said[:count]] for a in said[:count]])
        assert (also_true | ~same).all()  # the same words are true of both
        assert (may | ~also_true).all() and not also_true.diagonal().any()
        assert also_true.any()
        held_out = [concept.pair_held_out(c) for concept, c in (
            (toy_set.rows[i][0], c) for caption in said for _, i, c in true_of[caption])]  # fmt: skip
        assert not any(held_out)


def test_what_augmentation_does():
    """Half of the pictures would not be blurred or half not noisy: those of a sampler would be like none of them."""
    flat = augment(torch.full((400, 3, 16, 16), 0.5), seeded())
    deviation = (flat - 0.5).flatten(1).std(dim=1)
    noisy = deviation > 1e-5  # neither moving nor blurring changes a flat picture
    assert 0.4 < noisy.float().mean() < 0.6 and deviation.max() < 0.33
    assert deviation[noisy].mean().item() == pytest.approx(0.15, abs=0.02)

    edge = torch.ones(400, 3, 64, 64)
    edge[..., 32:] = -1
    steepest = augment(edge, seeded())[~noisy].diff(dim=-1).abs().amax(dim=(1, 2, 3))
    assert 0.4 < (steepest < 1).float().mean() < 0.6  # a sharp edge falls by 2 within two pixels
    # Of a blurred edge of height 2 the slope is 2 / (sqrt(2 pi) sigma), at its least with sigma = 3
    assert steepest.min().item() == pytest.approx(2 / (2 * math.pi) ** 0.5 / 3, rel=0.1)


def test_blend():
    """Alpha over a colour: a F + (1 - a) B, then [0, 1] to [-1, 1]."""
    pictures = torch.tensor([[[[255, 0, 0, 51]]]], dtype=torch.uint8)
    wanted = torch.tensor([0.2 + 0.8 * 0.5, 0.8 * 0.5, 0.8]) * 2 - 1
    torch.testing.assert_close(blend(pictures, torch.tensor([[0.5, 0.5, 1.0]])).flatten(), wanted)


def test_composed_backgrounds_are_shared_out_as_said():
    """Three in ten on white besides the named ones, three in ten on any colour, half of all mirrored."""
    count = 20_000
    pictures = torch.zeros(count, 1, 2, 4, dtype=torch.uint8)
    pictures[:, :, 0] = torch.tensor([0, 0, 0, 255], dtype=torch.uint8)  # left black, right see-through
    pixels = compose(pictures, seeded())
    left_is_black = (pixels[:, :, 0, 0] == -1).all(dim=1)
    right_is_black = (pixels[:, :, 0, 1] == -1).all(dim=1)
    assert (left_is_black ^ right_is_black).all()
    ground = torch.where(left_is_black[:, None], pixels[:, :, 0, 1], pixels[:, :, 0, 0])
    white = (ground == 1).all(dim=1).float().mean().item()
    named = torch.tensor(list(emoji.BACKGROUNDS.values())) / 255 * 2 - 1
    is_named = torch.stack([torch.isclose(ground, colour).all(dim=1) for colour in named]).any(dim=0)
    for share, expected in (
        (right_is_black.float().mean().item(), 0.5),
        (white, 0.3 + 0.4 / 13),
        (is_named.float().mean().item(), 0.7),
    ):
        assert abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


def test_vae_loss_term_by_term():
    """A weight would weigh another term, or the gradient flow through another draw than from the posterior."""
    vae = tiny_components()["vae"].requires_grad_(False)
    pixels = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=seeded(1))
    drawn = vae.decode(posterior.mean + (posterior.logvar / 2).exp() * noise).sample
    dx = ((drawn[..., 1:] - drawn[..., :-1]) - (pixels[..., 1:] - pixels[..., :-1])).abs().mean()
    dy = ((drawn[..., 1:, :] - drawn[..., :-1, :]) - (pixels[..., 1:, :] - pixels[..., :-1, :])).abs().mean()
    # KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2 per dimension
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    config = PretrainVAEConfig(kl_weight=0.3, edge_weight=0.7)
    expected = (drawn - pixels).abs().mean() + 0.7 * (dx + dy) + 0.3 * kl
    torch.testing.assert_close(vae_loss(vae, pixels, seeded(1), config), expected)


def test_learning_rate():
    """Linear to the peak, then half a cosine to nothing."""
    assert [warmup_cosine(step, warmup=4, total=104) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert warmup_cosine(54, warmup=4, total=104) == pytest.approx(0.5)
    assert warmup_cosine(104, warmup=4, total=104) == pytest.approx(0)


# ---- the normalised VAE ---------------------------------------------------------------------------------------------


def test_normalised_latents_are_unit_and_pictures_unchanged():
    """The UNet would see channels of other scales, or the VAE decode its own latents wrongly."""
    vae = tiny_components()["vae"].requires_grad_(False)
    pixels = torch.rand(32, 3, 16, 16, generator=seeded()) * 2 - 1
    mean, std = encode_moments(vae, pixels)
    drawn = torch.randn(mean.shape, generator=seeded(1))
    before = vae.decode(mean + std * drawn).sample

    normalise_latents(vae, pixels)
    new_mean, new_std = encode_moments(vae, pixels)
    torch.testing.assert_close(new_mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(new_mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    channel_std = mean.std(dim=(0, 2, 3))[:, None, None]
    torch.testing.assert_close(new_std, std / channel_std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(new_mean + new_std * drawn).sample, before, rtol=1e-3, atol=1e-4)

    latents = (new_mean + new_std * torch.randn(mean.shape, generator=seeded(2))) * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=5 / latents.numel() ** 0.5)


def test_psnr_in_closed_form():
    """-10 log10 of the mean squared error over [0, 1]."""

    class Same(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def encode(self, pixels):
            dist = type("D", (), {"mean": pixels, "std": pixels})
            return type("E", (), {"latent_dist": dist})

        def decode(self, latents):
            return type("O", (), {"sample": latents + 0.2})

    assert reconstruction_psnr(Same(), torch.zeros(2, 3, 4, 4)).tolist() == pytest.approx(
        [20.0, 20.0]
    )  # an error of 0.1 of 1
