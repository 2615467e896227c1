"""The cache gives to the last bit what the frozen networks give, and is never taken for another's."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import tiny_components
from latentdiff import latent_cache
from latentdiff.latent_cache import HiddenStates, Moments
from latentdiff.latents import encode_moments, to_pixels
from latentdiff.models import FrozenParts, encode_prompt, freeze


class Pictures:
    """Twenty pictures of noise with a caption or two."""

    def __init__(self, count: int = 20, size: int = 16, first: int = 0):
        seeds = range(first, first + count)
        draws = [torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._images = [Image.fromarray((draw * 255).byte().numpy()) for draw in draws]
        self.captions = [[f"cat {seed}", "a dog"] for seed in seeds]
        self.repeats, self.held_out = [1] * count, [False] * count

    def image(self, row: int) -> Image.Image:
        return self._images[row]


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


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_cached_moments_are_the_vae_s_own_to_the_last_bit(parts, tmp_path):
    """Training from the cache would differ from training without it."""
    pictures = Pictures()
    cached, anew = Moments(pictures, parts, False, tmp_path), Moments(pictures, parts, False, None)
    for rows in (range(20), [3], [19, 0, 0, 7], list(range(17))):
        for ours, theirs in zip(cached(rows), anew(rows), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == torch.float32
            # With other strides the UNet takes other kernels, and other last bits.
            assert ours.stride() == theirs.stride() and theirs.is_contiguous()
    mean, std = encode_moments(parts.vae, to_pixels([pictures.image(row) for row in range(16)]))
    assert torch.equal(cached(range(16))[0], mean) and torch.equal(cached(range(16))[1], std)


def test_cached_hidden_states_are_the_text_encoder_s_own(parts, tmp_path):
    """The same for words; and caption 0, which stands for a dropped one, must be the empty one."""
    pictures = Pictures()
    cached, anew = HiddenStates(pictures.captions, parts, tmp_path), HiddenStates(pictures.captions, parts, None)
    # 0 is the empty caption; then in order of appearance cat 0, a dog, cat 1, cat 2, ...
    assert cached.ids == anew.ids == [[1, 2]] + [[row + 2, 2] for row in range(1, 20)]
    ids = [caption for row in cached.ids for caption in row]
    said = [caption for row in pictures.captions for caption in row]
    assert torch.equal(cached(ids), anew(ids)) and anew(ids).is_contiguous()
    torch.testing.assert_close(cached(ids), encode_prompt(parts, said))
    torch.testing.assert_close(cached([0]), encode_prompt(parts, [""]))
    assert 0 not in ids


def test_mirror_images_are_encoded_not_flipped_afterwards(parts, tmp_path):
    """The latent of a mirrored picture is not the mirrored latent."""
    pictures = Pictures(4)
    moments = Moments(pictures, parts, True, tmp_path)
    assert moments.rows == 8
    mirrored = [pictures.image(row % 4).transpose(Image.Transpose.FLIP_LEFT_RIGHT) for row in range(16)]
    mean, _ = encode_moments(parts.vae, to_pixels(mirrored))
    torch.testing.assert_close(moments([4, 5, 6, 7])[0], mean[:4])
    assert not torch.allclose(moments([0])[0].flip(-1), moments([4])[0])
    assert torch.equal(moments([2, 6])[0], Moments(pictures, parts, True, None)([2, 6])[0])


def test_a_second_run_encodes_nothing(parts, tmp_path, encoded):
    """A new learning rate, another order of the steps or a used tokenizer would encode everything again."""
    pictures = Pictures()
    Moments(pictures, parts, False, tmp_path)
    HiddenStates(pictures.captions, parts, tmp_path)
    assert encoded
    encoded.clear()
    Moments(pictures, parts, False, tmp_path)(range(5))
    HiddenStates(pictures.captions, parts, tmp_path)([0, 1])
    HiddenStates(pictures.captions, frozen(), tmp_path)([0, 1])
    assert not encoded and len(caches(tmp_path)) == 2


def test_the_cache_holds_raw_moments(tmp_path):
    """Latents would be scaled twice, and another scaling_factor would read latents scaled with the old one."""
    pictures, parts = Pictures(4), frozen()
    before = Moments(pictures, parts, False, tmp_path)([1])
    parts.vae.register_to_config(scaling_factor=123.0)
    after = Moments(pictures, parts, False, tmp_path)([1])
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and len(caches(tmp_path)) == 1


def test_whatever_changes_the_latents_changes_the_cache(parts, tmp_path):
    """Stale latents: of other pictures, another resolution, another VAE or without mirror images."""
    Moments(Pictures(4), parts, False, tmp_path)
    changed = Pictures(4)
    changed._images[3].putpixel((15, 15), tuple(255 - c for c in changed._images[3].getpixel((15, 15))))
    for pictures, model, flip in (
        (changed, parts, False),
        (Pictures(3), parts, False),
        (Pictures(4, size=32), parts, False),
        (Pictures(4), frozen(1), False),
        (Pictures(4), parts, True),
    ):
        known = len(caches(tmp_path))
        moments = Moments(pictures, model, flip, tmp_path)
        assert len(caches(tmp_path)) == known + 1
        assert torch.equal(moments([0, 2])[0], Moments(pictures, model, flip, None)([0, 2])[0])


def test_whatever_changes_the_words_changes_the_cache(parts, tmp_path):
    """Stale hidden states: of other captions, another text encoder or another tokenizer."""
    HiddenStates([["a cat"]], parts, tmp_path)
    HiddenStates([["a cat."]], parts, tmp_path)
    HiddenStates([["a cat"]], frozen(1), tmp_path)
    assert len(caches(tmp_path)) == 3
    shorter = frozen()
    shorter.tokenizer.model_max_length = 6
    assert HiddenStates([["a cat"]], shorter, tmp_path)([1]).shape == (1, 6, 16)
    added = frozen()
    added.tokenizer.add_tokens(["cat"])
    added.text_encoder.resize_token_embeddings(len(added.tokenizer))
    HiddenStates([["a cat"]], added, tmp_path)
    assert len(caches(tmp_path)) == 5


def test_a_half_written_cache_is_built_anew(parts, tmp_path, encoded):
    """A run that was stopped while encoding would leave latents that are missing or zero."""
    pictures = Pictures()
    whole = Moments(pictures, parts, False, tmp_path)(range(20))
    (folder,) = tmp_path.iterdir()
    (folder / "manifest.json").unlink()
    (folder / "shard-00000.safetensors").write_bytes(b"cut")
    encoded.clear()
    again = Moments(pictures, parts, False, tmp_path)(range(20))
    assert encoded and torch.equal(whole[0], again[0]) and (folder / "manifest.json").exists()
    assert caches(tmp_path) == [folder.name]


def test_a_run_that_stops_while_encoding_leaves_no_cache(parts, tmp_path, monkeypatch):
    """What it had written would be taken for the whole."""

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(latent_cache, "encode_moments", stop)
    with pytest.raises(KeyboardInterrupt):
        Moments(Pictures(4), parts, False, tmp_path)
    assert not list(tmp_path.glob("latents-*"))
    monkeypatch.undo()
    assert torch.equal(
        Moments(Pictures(4), parts, False, tmp_path)([3])[0], Moments(Pictures(4), parts, False, None)([3])[0]
    )


def test_shards(parts, tmp_path, monkeypatch):
    """A row past the first shard would be read from the wrong place."""
    monkeypatch.setattr(latent_cache, "SHARD_ROWS", 8)
    pictures = Pictures()
    moments = Moments(pictures, parts, False, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("shard-*.safetensors"))) == 3  # 8 + 8 + 4
    assert json.loads((folder / "manifest.json").read_text()) == {"rows": 20, "shard_rows": 8}
    rows = [19, 8, 7, 0, 16, 15]
    torch.testing.assert_close(moments(rows)[0], Moments(pictures, parts, False, None)(rows)[0], rtol=0, atol=0)
