"""The frozen networks run once: the VAE's raw posterior mean and std, and captions' hidden states, on disk.

A cache is a folder of safetensors shards named by what its contents depend on: the pixels of the pictures after the
transform and the VAE's weights, or the captions, the tokenizer and the text encoder's weights. Nothing else is in the
name, so a new learning rate encodes nothing again, and a new resolution cannot be missed. `manifest.json` is written
last; a folder without it is not a cache yet and is built anew.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .data import CaptionedPictures
from .latents import encode_moments, to_pixels
from .models import FrozenParts, encode_prompt, fingerprint

SHARD_ROWS = 4096
# Everything is encoded in batches of exactly this many, the last one filled up: floating-point sums may differ with the
# size of a batch, and a row must come out the same to the last bit wherever it is encoded.
ENCODE_BATCH = 16

Encode = Callable[[Sequence[int]], dict[str, torch.Tensor]]


class Moments:
    """Raw posterior moments of every picture, and of its mirror image where flips are wanted.

    Rows 0 .. n-1 are the pictures, rows n .. 2n-1 their mirror images.

    Args:
        pictures: the data.
        parts: the frozen networks; only the VAE is used, on the device it is on.
        random_flip: whether the mirror images will be asked for.
        folder: where caches live; None encodes anew at each call.
    """

    def __init__(self, pictures: CaptionedPictures, parts: FrozenParts, random_flip: bool, folder: Path | None):
        self._pictures, self._vae = pictures, parts.vae
        count = len(pictures.captions)
        self.rows = 2 * count if random_flip else count
        self._read = self._encode if folder is None else None
        if folder is not None:
            key = hashlib.sha256(fingerprint(parts.vae).encode())
            for row in range(count):
                image = pictures.image(row)
                key.update(f"{image.size}".encode() + image.tobytes())
            key.update(f"{self.rows}".encode())
            self._read = _cached(
                folder / f"latents-{key.hexdigest()[:32]}", self.rows, self._encode, "encoding pictures"
            )

    def __call__(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std of these rows, each (B, C, h, w) float32 on the CPU."""
        moments = self._read(rows)
        return moments["mean"], moments["std"]

    def _encode(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        count = len(self._pictures.captions)

        def encode(batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            pixels = to_pixels([self._pictures.image(row % count) for row in batch])
            mirrored = torch.tensor([row >= count for row in batch])[:, None, None, None]
            return encode_moments(self._vae, torch.where(mirrored, pixels.flip(-1), pixels))

        mean, std = _in_fixed_batches(encode, rows)
        return {"mean": mean, "std": std}


class HiddenStates:
    """The text encoder's last hidden states of every caption; caption 0 is the empty one, for caption dropout.

    Args:
        captions: for each row of the data its captions.
        parts: the frozen networks; tokenizer and text encoder are used.
        folder: where caches live; None encodes anew at each call.

    Attributes:
        ids: for each row the numbers of its captions among the unique ones.
    """

    def __init__(self, captions: Sequence[Sequence[str]], parts: FrozenParts, folder: Path | None):
        self._parts = parts
        self._unique = list(dict.fromkeys(["", *(caption for row in captions for caption in row)]))
        number = {caption: i for i, caption in enumerate(self._unique)}
        self.ids = [[number[caption] for caption in row] for row in captions]
        self._read = self._encode
        if folder is not None:
            words = "\0".join([fingerprint(parts.text_encoder), _rules(parts.tokenizer), *self._unique])
            key = hashlib.sha256(words.encode()).hexdigest()[:32]
            self._read = _cached(folder / f"text-{key}", len(self._unique), self._encode, "encoding captions")

    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        """(B, L, D) float32 on the CPU."""
        return self._read(ids)["hidden_states"]

    def _encode(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        def encode(batch: Sequence[int]) -> tuple[torch.Tensor]:
            return (encode_prompt(self._parts, [self._unique[i] for i in batch]),)

        return {"hidden_states": _in_fixed_batches(encode, ids)[0]}


def _rules(tokenizer) -> str:
    """What decides a caption's tokens; padding and truncation are what the last call left, and set at the next."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return json.dumps([rules, tokenizer.model_max_length])


def build_in_turn(accelerator: Accelerator, build: Callable[[], object]):
    """Call `build` on the main process of each machine first, so that the others find its cache on disk."""
    with accelerator.local_main_process_first():
        return build()


def _in_fixed_batches(encode: Callable, rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
    chunks = []
    for start in range(0, len(rows), ENCODE_BATCH):
        batch = list(rows[start : start + ENCODE_BATCH])
        filled = batch + [batch[-1]] * (ENCODE_BATCH - len(batch))
        chunks.append([tensor[: len(batch)].cpu() for tensor in encode(filled)])
    # Contiguous, as what is read from disk: the UNet takes other kernels, and so other last bits, for other strides.
    return tuple(torch.cat(tensors).contiguous() for tensors in zip(*chunks, strict=True))


def _cached(folder: Path, count: int, encode: Encode, description: str) -> Encode:
    """A reader of rows 0 .. count-1 of the cache in `folder`, which is built first where it is not whole."""
    if not (folder / "manifest.json").exists():
        _build(folder, count, encode, description)
    shards = [_open(path) for path in sorted(folder.glob("shard-*.safetensors"))]

    def read(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        # Copies only the rows asked for: the shards are memory maps.
        return {name: torch.stack([shards[r // SHARD_ROWS][name][r % SHARD_ROWS] for r in rows]) for name in shards[0]}

    return read


def _open(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - not a dict


def _build(folder: Path, count: int, encode: Encode, description: str) -> None:
    """Encode all rows into shards aside and rename the folder when it is whole."""
    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with tqdm(total=count, desc=description, unit="row") as bar:
        for number, start in enumerate(range(0, count, SHARD_ROWS)):
            pieces = []
            for first in range(start, min(start + SHARD_ROWS, count), 16 * ENCODE_BATCH):
                rows = range(first, min(first + 16 * ENCODE_BATCH, start + SHARD_ROWS, count))
                pieces.append(encode(rows))
                bar.update(len(rows))
            shard = {name: torch.cat([piece[name] for piece in pieces]).contiguous() for name in pieces[0]}
            save_file(shard, aside / f"shard-{number:05d}.safetensors")
    (aside / "manifest.json").write_text(json.dumps({"rows": count, "shard_rows": SHARD_ROWS}))
    if not (folder / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what is there is not whole
    try:
        os.replace(aside, folder)
    except OSError:  # another run built the same cache meanwhile
        shutil.rmtree(aside)
