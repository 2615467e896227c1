"""The cache gives to the last bit what the frozen networks give, and is never taken for another's."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentdiff.data import latent_cache
from latentdiff.data.entry_store import key_of
from latentdiff.data.latent_cache import HiddenStates, Moments
from latentdiff.models.latents import encode_moments, to_pixels
from latentdiff.models.parts import FrozenParts, encode_prompt, freeze
from tiny import tiny_components


class Pictures:
    """Pictures of noise with a caption of their own and one that they share."""

    crops = 1

    def __init__(self, count: int = 20, size: int = 16, first: int = 0):
        seeds = range(first, first + count)
        draws = [torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._images = [Image.fromarray((draw * 255).byte().numpy()) for draw in draws]
        self.captions = [[f"cat {seed}", "a dog"] for seed in seeds]
        self.caption_counts = np.full(count, 2)
        self.sizes, self.size_of = [(size, size)], np.zeros(count, int)

    def image(self, row: int, crop: int = 0) -> Image.Image:
        return self._images[row]

    def digests(self):
        return (hashlib.sha256(image.tobytes() + bytes(image.size)).digest() for image in self._images)


def said(*captions: str) -> Pictures:
    """Pictures with these captions, one each."""
    pictures = Pictures(len(captions))
    pictures.captions, pictures.caption_counts = [[caption] for caption in captions], np.ones(len(captions), int)
    return pictures


def frozen(seed: int = 0) -> FrozenParts:
    made = tiny_components(seed)
    return FrozenParts(freeze(made["vae"]), freeze(made["text_encoder"]), made["tokenizer"])


@pytest.fixture(scope="module")
def parts():
    return frozen()


@pytest.fixture
def encoded(monkeypatch):
    """How many batches the networks encoded."""
    calls = []
    for name in ("encode_moments", "encode_prompt"):
        real = getattr(latent_cache, name)
        monkeypatch.setattr(latent_cache, name, lambda *args, real=real: (calls.append(1), real(*args))[1])
    return calls


def entries(folder: Path) -> dict[str, int]:
    """How many entries each store in the folder has."""
    shards = {store.name: [load_file(path) for path in store.glob("*.safetensors")] for store in folder.iterdir()}
    return {name: sum(len(shard["keys"]) for shard in found) for name, found in shards.items()}


def kept(pictures, parts, folder) -> HiddenStates:
    states = HiddenStates(pictures, parts)
    states.keep(folder)
    return states


def test_cached_moments_are_the_vae_s_own_to_the_last_bit(parts, tmp_path):
    """Training from the cache would differ from training without it."""
    pictures = Pictures()
    cached, anew = Moments(pictures, parts.vae, False, tmp_path), Moments(pictures, parts.vae, False, None)
    for rows in (range(20), [3], [19, 0, 0, 7], list(range(17))):
        for ours, theirs in zip(cached(rows), anew(rows), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == torch.float32
            # With other strides the UNet takes other kernels, and other last bits.
            assert ours.stride() == theirs.stride() and theirs.is_contiguous()
    mean, std = encode_moments(parts.vae, to_pixels([pictures.image(row) for row in range(16)]))
    assert torch.equal(cached(range(16))[0], mean) and torch.equal(cached(range(16))[1], std)
    assert cached.bytes == 20 * (mean[0].nbytes + std[0].nbytes + 16) and anew.bytes == 0


def test_cached_hidden_states_are_the_text_encoder_s_own(parts, tmp_path):
    """The same for words; and what stands for a dropped caption must be the empty one."""
    pictures = Pictures()
    cached, anew = kept(pictures, parts, tmp_path), HiddenStates(pictures, parts)
    assert cached.kept and not anew.kept
    rows, choices = [*range(20), *range(20), 3], [0] * 20 + [1] * 20 + [-1]
    assert torch.equal(cached(rows, choices), anew(rows, choices)) and anew(rows, choices).is_contiguous()
    words = [*(f"cat {row}" for row in range(20)), *["a dog"] * 20, ""]
    torch.testing.assert_close(cached(rows, choices), encode_prompt(parts, words))
    # 20 of their own, one in common and the empty one, 8 tokens of width 16 each
    assert cached.different == 22 and cached.bytes == anew.bytes == 22 * 8 * 16 * 4
    assert list(entries(tmp_path).values()) == [22]


def test_mirror_images_are_encoded_not_flipped_afterwards(parts, tmp_path):
    """The latent of a mirrored picture is not the mirrored latent."""
    pictures, rows = Pictures(4), [0, 1, 2, 3]
    moments = Moments(pictures, parts.vae, True, tmp_path)
    mirrored = [pictures.image(row % 4).transpose(Image.Transpose.FLIP_LEFT_RIGHT) for row in range(16)]
    mean, _ = encode_moments(parts.vae, to_pixels(mirrored))
    torch.testing.assert_close(moments(rows, [0] * 4, [True] * 4)[0], mean[:4])
    assert not torch.allclose(moments([0])[0].flip(-1), moments([0], [0], [True])[0])
    anew = Moments(pictures, parts.vae, True, None)
    assert torch.equal(moments([2, 2], [0, 0], [False, True])[0], anew([2, 2], [0, 0], [False, True])[0])
    # The same pictures without mirror images take what is there.
    assert list(entries(tmp_path).values()) == [8]
    Moments(pictures, parts.vae, False, tmp_path)
    assert list(entries(tmp_path).values()) == [8]


def test_every_crop_is_an_entry_of_its_own(parts, tmp_path):
    """Only the first crop would ever be trained on."""

    class Cropped(Pictures):
        crops = 3

        def image(self, row, crop=0):
            return super().image(row).transpose(crop + 2)  # a quarter, half and three quarters of a turn

        def digests(self):
            return (key_of(digest, str(crop)) for digest in super().digests() for crop in range(3))

    pictures = Cropped(5)
    cached, anew = Moments(pictures, parts.vae, True, tmp_path), Moments(pictures, parts.vae, True, None)
    asked = [4, 4, 4, 0], [0, 1, 2, 2], [False, True, False, True]
    assert torch.equal(cached(*asked)[0], anew(*asked)[0]) and list(entries(tmp_path).values()) == [30]
    alone, _ = encode_moments(parts.vae, to_pixels([pictures.image(4, 2)] * 16))
    assert torch.equal(cached(*asked)[0][2], alone[0])


def test_a_second_run_encodes_nothing(parts, tmp_path, encoded):
    """A new learning rate, another order of the steps or a used tokenizer would encode everything again."""
    pictures = Pictures()
    Moments(pictures, parts.vae, False, tmp_path)
    kept(pictures, parts, tmp_path)
    assert encoded
    encoded.clear()
    Moments(pictures, parts.vae, False, tmp_path)(range(5))
    kept(pictures, parts, tmp_path)([0, 1], [0, 1])
    kept(pictures, frozen(), tmp_path)([0, 1], [-1, 0])
    assert not encoded and len(entries(tmp_path)) == 2


def test_one_changed_picture_is_one_new_entry(parts, tmp_path, encoded):
    """A set of a million would be encoded again for one picture, in a new folder as large as the first."""
    before = Moments(Pictures(), parts.vae, False, tmp_path)
    encoded.clear()
    changed = Pictures()
    changed._images[3].putpixel((15, 15), tuple(255 - c for c in changed._images[3].getpixel((15, 15))))
    after = Moments(changed, parts.vae, False, tmp_path)
    assert len(encoded) == 1 and list(entries(tmp_path).values()) == [21]
    assert torch.equal(after([3])[0], Moments(changed, parts.vae, False, None)([3])[0])
    assert not torch.equal(after([3])[0], before([3])[0]) and torch.equal(after([4])[0], before([4])[0])
    encoded.clear()
    Moments(Pictures(5, first=2), parts.vae, False, tmp_path)  # fewer of them, in another order
    assert not encoded


def test_one_changed_caption_is_one_new_entry(parts, tmp_path, encoded):
    kept(said("a cat", "a dog", "a cat"), parts, tmp_path)
    encoded.clear()
    states = kept(said("a dog", "a red cat", "a cat"), parts, tmp_path)
    assert len(encoded) == 1 and list(entries(tmp_path).values()) == [4]
    torch.testing.assert_close(states([0, 1], [0, 0]), encode_prompt(parts, ["a dog", "a red cat"]))


@pytest.mark.parametrize("change", ["scaling_factor", "sample_size", "decoder", "path"])
def test_what_does_not_change_the_latents_changes_nothing(tmp_path, encoded, change):
    """A VAE whose decoder was trained further would encode everything again, to the same numbers."""
    pictures, parts = Pictures(4), frozen()
    before = Moments(pictures, parts.vae, False, tmp_path)([1])
    encoded.clear()
    if change == "decoder":
        parts.vae.decoder.conv_out.bias.data += 1
    else:
        name, value = {"path": ("_name_or_path", "elsewhere")}.get(change, (change, 123))
        parts.vae.register_to_config(**{name: value})
    after = Moments(pictures, parts.vae, False, tmp_path)([1])
    # Raw moments: latents would have been scaled with the factor of the first run.
    assert not encoded and torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def other_encoder(parts):
    parts.vae.encoder.conv_in.bias.data[0] += 1e-3


def other_quant_conv(parts):
    parts.vae.quant_conv.weight.data *= 1.001


def other_groups(parts):
    parts.vae.register_to_config(norm_num_groups=4)
    for module in parts.vae.encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = 4


def other_dtype(parts):
    parts.vae.to(torch.bfloat16)


@pytest.mark.parametrize("change", [other_encoder, other_quant_conv, other_groups, other_dtype])
def test_whatever_changes_the_latents_changes_the_cache(tmp_path, change):
    """Stale latents of another VAE would be trained on."""
    pictures, parts = Pictures(4), frozen()
    Moments(pictures, parts.vae, False, tmp_path)
    change(parts)
    moments = Moments(pictures, parts.vae, False, tmp_path)
    assert list(entries(tmp_path).values()) == [4, 4]
    assert torch.equal(moments([0, 2])[0], Moments(pictures, parts.vae, False, None)([0, 2])[0])


def other_text_encoder(parts):
    next(parts.text_encoder.parameters()).data[0] += 1e-3


def other_activation(parts):
    parts.text_encoder.config.hidden_act = "gelu"


def shorter(parts):
    parts.tokenizer.model_max_length = 6


def other_words(parts):
    parts.tokenizer.add_tokens(["cat"])
    parts.text_encoder.resize_token_embeddings(len(parts.tokenizer))


@pytest.mark.parametrize("change", [other_text_encoder, other_activation, shorter, other_words])
def test_whatever_changes_the_words_changes_the_cache(tmp_path, change):
    """Stale hidden states: of another text encoder or another tokenizer."""
    parts = frozen()
    kept(said("a cat"), parts, tmp_path)
    change(parts)
    states = kept(said("a cat"), parts, tmp_path)
    assert list(entries(tmp_path).values()) == [2, 2]
    assert torch.equal(states([0], [0]), HiddenStates(said("a cat"), parts)([0], [0]))


def test_captions_in_any_script(parts, tmp_path):
    """Two captions that differ in one letter, or in none that is text, would share their hidden states."""
    words = ["猫", "cat ", "cat", " cat", "кошка", "🐈", "a\0b", "a", "x" * 100_000]
    states = kept(said(*words), parts, tmp_path)
    assert states.different == len(words) + 1
    torch.testing.assert_close(states(range(len(words)), [0] * len(words)), encode_prompt(parts, words))


def test_captions_of_many_rows_keep_their_numbers():
    """A picture would be trained under another's words, far down in the data alone."""
    counts = np.random.default_rng(0).integers(1, 5, 1000)
    sums = latent_cache._RunningSums(counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    assert [sums.before(row) for row in range(1000)] == starts[:-1].tolist() and sums.total == starts[-1]
    wanted = [(row, choice) for row in range(1000) for choice in range(counts[row])]
    assert [sums.split(number) for number in range(sums.total)] == wanted
