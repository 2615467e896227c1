"""The frozen networks run once: the VAE's raw posterior mean and std, and captions' hidden states, on disk.

An entry stands under a digest of what it follows from: the bytes of a picture's file and the part of it that is taken,
or a caption's text; and the folder it stands in is named by the network: its weights, its dtype and those of its
settings that count. So a new picture is one new entry, a new learning rate none, and a new VAE cannot be missed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..models.latents import encode_moments, to_pixels
from ..models.parts import FrozenParts, encode_prompt, fingerprint
from .entry_store import ENCODE_BATCH, EntryStore, as_keys, key_of
from .pictures import CaptionedPictures


class Pixels:
    """The pictures' pixels, decoded at each call."""

    def __init__(self, pictures: CaptionedPictures):
        self._pictures, self._pool = pictures, ThreadPoolExecutor()  # Pillow decodes outside Python's lock

    def __call__(self, rows: Sequence[int], crops: Sequence[int], flips: Sequence[bool]) -> torch.Tensor:
        """These rows' crops, mirrored or not; the rows are of one size -> (B, 3, H, W) in [-1, 1]. From any thread."""
        pixels = to_pixels(list(self._pool.map(self._pictures.image, rows, crops)))
        mirrored = torch.tensor([bool(flip) for flip in flips])[:, None, None, None]
        return torch.where(mirrored, pixels.flip(-1), pixels)


class Moments:
    """Raw posterior moments of every crop of every picture, and of its mirror image where flips are wanted.

    Args:
        pictures: the data.
        vae: on the device it is to encode on.
        random_flip: whether the mirror images will be asked for.
        folder: where caches live; None encodes anew at each call.

    Attributes:
        bytes: what all of them take on the disk; 0 without a cache.
    """

    def __init__(self, pictures: CaptionedPictures, vae: AutoencoderKL, random_flip: bool, folder: Path | None):
        self._pictures, self._vae, self._flips, self.bytes = pictures, vae, 1 + random_flip, 0
        self._store, self._pixels = None, Pixels(pictures)
        if folder is not None:
            self._store = EntryStore(folder / f"latents-{_vae_key(vae)}")
            kinds = np.repeat(pictures.size_of, pictures.crops * self._flips)
            self._positions = self._store.fill(
                as_keys(self._keys(), len(kinds)), self._encode, "encoding pictures", kinds
            )
            self.bytes = self._store.bytes_of(self._positions)

    @property
    def kept(self) -> bool:
        """Whether they are read from the disk."""
        return self._store is not None

    def __call__(
        self, rows: Sequence[int], crops: Sequence[int] | None = None, flips: Sequence[bool] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std of these rows' crops (the first ones by default), mirrored or not; the rows are of one size.

        Returns:
            Two of (B, C, h, w) float32 on the CPU.
        """
        crops, flips = crops or [0] * len(rows), flips or [False] * len(rows)
        variants = [
            (row * self._pictures.crops + crop) * self._flips + flip
            for row, crop, flip in zip(rows, crops, flips, strict=True)
        ]
        moments = self._store.read(self._positions[variants]) if self._store else self._encode(variants)
        return moments["mean"], moments["std"]

    def _keys(self) -> Iterator[bytes]:
        for digest in self._pictures.digests():
            for flip in range(self._flips):
                yield key_of(digest, "mirrored" if flip else "")

    def _encode(self, variants: Sequence[int]) -> dict[str, torch.Tensor]:
        def encode(batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            places = [divmod(variant // self._flips, self._pictures.crops) for variant in batch]
            pixels = self._pixels(*zip(*places, strict=True), [variant % self._flips for variant in batch])
            return encode_moments(self._vae, pixels)

        mean, std = _in_fixed_batches(encode, variants)
        return {"mean": mean, "std": std}


class HiddenStates:
    """The text encoder's last hidden states of captions, encoded anew at each call until `keep`.

    Args:
        pictures: the data.
        parts: tokenizer and text encoder, on the device it is to encode on.

    Attributes:
        different: how many different captions there are, the empty one included.
        bytes: what their hidden states take, or would take, on the disk.
    """

    def __init__(self, pictures: CaptionedPictures, parts: FrozenParts):
        self._captions, self._parts, self._store = pictures.captions, parts, None
        # Where each row's captions start among all of them; the empty one, for caption dropout, is the last.
        self._starts = _RunningSums(pictures.caption_counts)
        self.different = len(np.unique(self._keys()))
        self.bytes = 4 * self.different * parts.tokenizer.model_max_length * parts.text_encoder.config.hidden_size

    def keep(self, folder: Path) -> None:
        """Encode every caption once, each different one in one entry, and read them from `folder` from now on."""
        store = EntryStore(folder / f"text-{_text_key(self._parts)}")
        self._positions = store.fill(self._keys(), self._encode, "encoding captions")
        self._store = store

    @property
    def kept(self) -> bool:
        """Whether they are read from the disk."""
        return self._store is not None

    def __call__(self, rows: Sequence[int], choices: Sequence[int]) -> torch.Tensor:
        """Of these rows the captions with these numbers, -1 for the empty one -> (B, L, D) float32 on the CPU."""
        numbers = [
            self._starts.before(row) + choice if choice >= 0 else self._starts.total
            for row, choice in zip(rows, choices, strict=True)
        ]
        states = self._store.read(self._positions[numbers]) if self._store else self._encode(numbers)
        return states["hidden_states"]

    def _keys(self) -> np.ndarray:
        said = chain.from_iterable(chain(self._captions, [[""]]))
        return as_keys(map(key_of, said), self._starts.total + 1)

    def _text(self, number: int) -> str:
        if number == self._starts.total:
            return ""
        row, choice = self._starts.split(number)
        return self._captions[row][choice]

    def _encode(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        def encode(batch: Sequence[int]) -> tuple[torch.Tensor]:
            return (encode_prompt(self._parts, [self._text(number) for number in batch]),)

        return {"hidden_states": _in_fixed_batches(encode, numbers)[0]}


class _RunningSums:
    """Sums of the first counts of many, of which only those of whole blocks are kept."""

    _BLOCK = 256

    def __init__(self, counts: np.ndarray):
        self._counts = counts
        blocks = np.add.reduceat(counts, np.arange(0, len(counts), self._BLOCK), dtype=np.int64)
        self._sums = np.concatenate([[0], np.cumsum(blocks)])
        self.total = int(self._sums[-1])

    def before(self, row: int) -> int:
        """The sum of all counts before the row's."""
        block = row // self._BLOCK
        return int(self._sums[block]) + int(self._counts[block * self._BLOCK : row].sum(dtype=np.int64))

    def split(self, number: int) -> tuple[int, int]:
        """The row among whose numbers this one is, and which of them it is."""
        block = int(np.searchsorted(self._sums, number, side="right")) - 1
        first = block * self._BLOCK
        ends = self._sums[block] + np.cumsum(self._counts[first : first + self._BLOCK], dtype=np.int64)
        row = first + int(np.searchsorted(ends, number, side="right"))
        return row, number - self.before(row)


def _in_fixed_batches(encode: Callable, numbers: Sequence[int]) -> tuple[torch.Tensor, ...]:
    chunks = []
    for start in range(0, len(numbers), ENCODE_BATCH):
        batch = list(numbers[start : start + ENCODE_BATCH])
        filled = batch + [batch[-1]] * (ENCODE_BATCH - len(batch))
        chunks.append([tensor[: len(batch)].cpu() for tensor in encode(filled)])
    # Contiguous, as what is read from disk: the UNet takes other kernels, and so other last bits, for other strides.
    return tuple(torch.cat(tensors).contiguous() for tensors in zip(*chunks, strict=True))


# Settings of a VAE that the way from pixels to raw moments does not depend on, and of a text encoder its hidden states.
_AFTER_ENCODING = {
    "up_block_types", "out_channels", "use_post_quant_conv", "force_upcast", "sample_size",
    "scaling_factor", "shift_factor", "latents_mean", "latents_std",
}  # fmt: skip
_NOT_OF_THE_NETWORK = {
    "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "problem_type",
    "output_hidden_states", "output_attentions", "return_dict", "projection_dim",
    "initializer_range", "initializer_factor",
}  # fmt: skip


def _vae_key(vae: AutoencoderKL) -> str:
    """The encoder and its settings: another decoder makes no other latents."""
    weights = (fingerprint(part) for name, part in vae.named_children() if name in ("encoder", "quant_conv"))
    return key_of(*weights, _settings(dict(vae.config), _AFTER_ENCODING)).hex()


def _text_key(parts: FrozenParts) -> str:
    """The text encoder, its settings, and what decides a caption's tokens."""
    settings = _settings(parts.text_encoder.config.to_dict(), _NOT_OF_THE_NETWORK)
    # Padding and truncation are what the last call left, and set at the next.
    rules = json.loads(parts.tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    rules = json.dumps([rules, parts.tokenizer.model_max_length])
    return key_of(fingerprint(parts.text_encoder), settings, rules).hex()


def _settings(config: dict, without: set[str]) -> str:
    kept = {name: value for name, value in config.items() if name not in without and not name.startswith("_")}
    return json.dumps(kept, sort_keys=True, default=str)
