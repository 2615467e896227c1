"""What the loop trains on at (step, micro-batch): everything that is drawn follows from the seed, the step and the
global sample index, so it is the same on any number of processes and after any resume."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..models.latents import inpainting_conditions, sample_latents
from ..utils import randomness
from .buckets import BucketOrder
from .latent_cache import HiddenStates, Moments, Pixels
from .masks import random_masks
from .pictures import CaptionedPictures


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch, on its device."""

    latents: torch.Tensor  # (B, C, h, w) scaled
    noise: torch.Tensor  # (B, C, h, w)
    timesteps: torch.Tensor  # (B,) int64
    encoder_hidden_states: torch.Tensor | None  # (B, L, D); None where the text encoder is trained, too
    captions: list[str] | None  # B for a text encoder that is trained, "" where the caption is dropped
    conditions: torch.Tensor | None = None  # (B, 1 + C, h, w) for inpainting: masks, and latents of masked pictures
    guidance_scales: torch.Tensor | None = None  # (B,) of the teacher, where there is one

    @property
    def text(self) -> torch.Tensor | list[str]:
        """What the network is told of the captions: their hidden states, or themselves where it encodes them."""
        return self.captions if self.encoder_hidden_states is None else self.encoder_hidden_states


class _Read(NamedTuple):
    """What of a batch comes from the data rather than from drawing noise."""

    mean: torch.Tensor
    std: torch.Tensor
    hidden_states: torch.Tensor | None
    captions: list[str] | None
    pixels: torch.Tensor | None
    masks: torch.Tensor | None


def dropped_captions(seed: int, step: int, batch: int, probability: float) -> torch.Tensor:
    """Which samples of a global batch are trained without their caption, drawn anew at every step -> (batch,) bool.

    What classifier-free guidance needs (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1).
    """
    generator = randomness.generator(seed, "caption dropout", step)
    return torch.rand(batch, generator=generator) < probability


class Batches:
    """The training data in its drawn order.

    Args:
        pictures: rows, their sizes and repeats, and which are held out.
        moments, hidden_states: the frozen networks' results; without hidden states the batches have none.
        vae_config: `vae.config`, for the latents' scale.
        num_train_timesteps: T of the noise schedule.
        seed, caption_dropout, random_flip, noise_offset, shuffle_buffer: of the run.
        micro_batch, accumulation, processes, process: pictures per micro-batch and process, micro-batches per
            optimizer step, number of processes and which one this is.
        device: where the batches go.
        inpainting_vae: to learn inpainting, the VAE on this device, which encodes the masked pictures of each batch:
            their masks are new each time, so there is nothing to cache.
        guidance_range: what guidance scales are drawn from evenly, where there is a teacher to be guided.
    """

    def __init__(
        self,
        pictures: CaptionedPictures,
        moments: Moments,
        hidden_states: HiddenStates | None,
        *,
        vae_config,
        num_train_timesteps: int,
        seed: int,
        caption_dropout: float,
        random_flip: bool,
        micro_batch: int,
        accumulation: int = 1,
        processes: int = 1,
        process: int = 0,
        noise_offset: float = 0.0,
        shuffle_buffer: int | None = None,
        device: torch.device | str = "cpu",
        inpainting_vae: AutoencoderKL | None = None,
        guidance_range: tuple[float, float] | None = None,
    ):
        self._moments, self._hidden_states = moments, hidden_states
        self._vae_config, self._num_train_timesteps = vae_config, num_train_timesteps
        self._seed, self._caption_dropout, self._random_flip = seed, caption_dropout, random_flip
        self._micro_batch, self._processes, self._process = micro_batch, processes, process
        self._accumulation, self._ahead = accumulation, {}
        # What has to be encoded is not: two networks at a time would take the device from each other.
        kept = moments.kept and (hidden_states is None or hidden_states.kept)
        self._reader = ThreadPoolExecutor(1) if kept else None
        self._noise_offset, self._device, self._guidance_range = noise_offset, device, guidance_range
        self._inpainting_vae, self._pixels = inpainting_vae, Pixels(pictures)
        self._captions, self._caption_counts = pictures.captions, pictures.caption_counts
        self._crops, self.name = pictures.crops, pictures.name
        self.global_batch = micro_batch * accumulation * processes
        trained = np.flatnonzero(~pictures.held_out).astype(np.int32)
        epoch = np.repeat(trained, pictures.repeats[trained])
        buckets = [epoch[pictures.size_of[epoch] == size] for size in range(len(pictures.sizes))]
        self._order = BucketOrder(buckets, self.global_batch, seed, shuffle_buffer)

    @property
    def epoch_length(self) -> int:
        """Samples in an epoch, repeats counted."""
        return self._order.epoch_length

    def rows_at(self, step: int) -> list[int]:
        """The rows of the data that make up optimizer step `step` on all processes together."""
        return self._order.rows(step)

    def at(self, step: int, micro_step: int = 0) -> Batch:
        """This process's share of micro-batch `micro_step` of optimizer step `step`, both counted from 0.

        Where the data come from the cache, those of the micro-batch after it are read meanwhile.
        """
        data = self._ahead.pop((step, micro_step), None)
        read = data.result() if data else self._read(step, micro_step)
        if self._reader:
            after = (step, micro_step + 1) if micro_step + 1 < self._accumulation else (step + 1, 0)
            self._ahead = {after: self._reader.submit(self._read, *after)}

        whole, mine = self.global_batch, self._mine(micro_step)
        shape = (whole, *read.mean.shape[1:])
        mean, std = read.mean.to(self._device), read.std.to(self._device)
        posterior_noise = self._normal("posterior", step, shape)[mine]
        drawn = self._generator("timesteps", step, "cpu")
        timesteps = torch.randint(self._num_train_timesteps, (whole,), generator=drawn)[mine]
        return Batch(
            latents=sample_latents(self._vae_config, mean, std, posterior_noise),
            noise=self._noise(step, shape)[mine],
            timesteps=timesteps.to(self._device),
            encoder_hidden_states=None if read.hidden_states is None else read.hidden_states.to(self._device),
            captions=read.captions,
            conditions=None if read.masks is None else self._conditions(read, step, shape, mine),
            guidance_scales=self._guidance_scales(step, mine),
        )

    def _read(self, step: int, micro_step: int) -> _Read:
        """The moments, the captions' hidden states or where there are none the captions themselves, and for inpainting
        pixels and masks."""
        mine = self._mine(micro_step)
        rows = self.rows_at(step)[mine]
        flips = ((self._uniform("flip", step)[mine] < 0.5) & self._random_flip).tolist()
        crops = (self._uniform("crop", step)[mine] * self._crops).int().tolist()
        choices = self._draw_captions(rows, step, mine)
        hidden_states = said = pixels = masks = None
        if self._hidden_states is not None:
            hidden_states = self._hidden_states(rows, choices)
        else:
            said = ["" if i < 0 else self._captions[row][i] for row, i in zip(rows, choices, strict=True)]
        if self._inpainting_vae is not None:
            pixels = self._pixels(rows, crops, flips)
            masks = self._masks(step, mine, size=(pixels.shape[-1], pixels.shape[-2]))
        return _Read(*self._moments(rows, crops, flips), hidden_states, said, pixels, masks)

    def _masks(self, step: int, mine: slice, size: tuple[int, int]) -> torch.Tensor:
        """Of the whole step's samples, each of which has a stream of its own, this process's."""
        samples = range(self.global_batch)[mine]
        return random_masks((randomness.generator(self._seed, "mask", step, i) for i in samples), size)

    def _conditions(self, read: _Read, step: int, shape: tuple[int, ...], mine: slice) -> torch.Tensor:
        noise = self._normal("masked posterior", step, shape)[mine]
        pixels, masks = read.pixels.to(self._device), read.masks.to(self._device)
        return inpainting_conditions(self._inpainting_vae, pixels, masks, noise)

    def _guidance_scales(self, step: int, mine: slice) -> torch.Tensor | None:
        if self._guidance_range is None:
            return None
        low, high = self._guidance_range
        return (low + (high - low) * self._uniform("guidance", step)[mine]).to(self._device)

    def _mine(self, micro_step: int) -> slice:
        """This process's share of what is drawn for the whole step."""
        first = (micro_step * self._processes + self._process) * self._micro_batch
        return slice(first, first + self._micro_batch)

    def _draw_captions(self, rows: list[int], step: int, mine: slice) -> list[int]:
        """For each row the number of one of its captions, -1 (the empty one) where it is dropped."""
        choice = self._uniform("caption", step)[mine].tolist()
        dropped = dropped_captions(self._seed, step, self.global_batch, self._caption_dropout)[mine].tolist()
        counts = self._caption_counts[rows].tolist()
        return [-1 if drop else int(u * count) for count, u, drop in zip(counts, choice, dropped, strict=True)]

    def _noise(self, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal, and with `noise_offset` one more draw for each whole channel of a picture."""
        noise = self._normal("noise", step, shape)
        if self._noise_offset:
            noise = noise + self._noise_offset * self._normal("noise offset", step, (*shape[:2], 1, 1))
        return noise

    def _generator(self, stream: str, step: int, device: torch.device | str) -> torch.Generator:
        return randomness.generator(self._seed, stream, step, device=device)

    def _uniform(self, stream: str, step: int) -> torch.Tensor:
        return torch.rand(self.global_batch, generator=self._generator(stream, step, "cpu"))

    def _normal(self, stream: str, step: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator(stream, step, self._device), device=self._device)
