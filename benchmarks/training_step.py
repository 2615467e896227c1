"""Training pictures per second, side by side in one run:

    python benchmarks/training_step.py                                              # emoji64's shapes
    python benchmarks/training_step.py --mixed-precision bf16 --dynamo-backend inductor
    python benchmarks/training_step.py --shapes sd15 --train-batch-size 8 --mixed-precision bf16    # on a GPU

Ways to train the same UNet take turns, so that what else the machine does hits all of them alike: the bare UNet
(forward, backward, optimizer) on made-up latents, which is the limit; latentdiff's whole step from the cache, without a
cache, and compiled; diffusers' way, with VAE, text encoder and its EMAModel in every step; and where the precision is a
lower one, diffusers' way in fp32. Ratios are of neighbouring turns: their median, with the lowest and the highest. A
large matrix product takes its turn, too, and says which share of that rate the arithmetic of the UNet reaches.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from diffusers.training_utils import EMAModel
from PIL import Image
from sampling_speed import make_pipeline, spread, wait
from torch.utils.flop_counter import FlopCounterMode

from latentdiff import DDPMScheduler
from latentdiff.config.train import TrainConfig
from latentdiff.diffusion.losses import denoising_loss
from latentdiff.models.latents import to_pixels
from latentdiff.models.parts import FrozenParts, encode_prompt
from latentdiff.models.unet import UNet, compile_blocks
from latentdiff.training.data import load_data
from latentdiff.training.ema import EMA
from latentdiff.training.optimizers import make_optimizer
from latentdiff.training.setup import load_networks, make_output_dir
from latentdiff.utils.flags import run_cli

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    shapes: Literal["emoji64", "sd15"] = "emoji64"
    """emoji64's UNet, or Stable Diffusion 1.5's networks at 512x512 with random weights, which wants a GPU."""
    train_batch_size: int = 32
    """Pictures per step."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the UNet's arithmetic."""
    dynamo_backend: str | None = None
    """Backend of torch.compile for one more way, such as inductor."""
    channels_last: bool = False
    """Memory layout of the UNet, of all ways."""
    steps: int = 3
    """Steps per turn."""
    turns: int = 5
    """Turns of each way, after one that warms up."""


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            train_batch_size=settings.train_batch_size,
            mixed_precision=settings.mixed_precision,
            train_data_dir=folder,
            output_dir=f"{folder}/run",
            cache_dir=f"{folder}/cache",
            resolution=512 if settings.shapes == "sd15" else 64,
            held_out_fraction=0.0,
        )
        draw_noise(Path(folder), config.resolution, count=2 * settings.train_batch_size)
        make_output_dir(config)  # which is told what the pictures are
        ways, flops, device = make_ways(settings, config)
        rates, products = take_turns(settings, ways, device)
    product = median(products)
    print(f"{settings.shapes}, {settings.mixed_precision} on {device}, {settings.train_batch_size} pictures a step")
    print(f"a matrix product makes {product / 1e9:.0f} GFLOP/s, a step has {flops / 1e9:.1f} GFLOP\n")
    print("| way | pictures/s | / bare UNet | / diffusers' way | of the matrix product |")
    print("| --- | --- | --- | --- | --- |")
    for name, found in rates.items():
        cells = [spread(found, rates[base]) for base in ("bare UNet", "diffusers' way")]
        share = median(found) / settings.train_batch_size * flops / product
        print(f"| {name} | {median(found):.1f} | {' | '.join(cells)} | {share:.0%} |")


def make_ways(settings: Settings, config: TrainConfig) -> tuple[dict[str, Callable[[int], None]], int, torch.device]:
    """What takes turns, operations of the UNet in a step, and where that is."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    parts, unet, scheduler = load_networks(config)
    if settings.shapes == "sd15":
        pipeline = make_pipeline("sd15")
        parts, unet = FrozenParts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer), pipeline.unet
    if settings.channels_last:
        unet.to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(unet) if settings.dynamo_backend else None
    unet = accelerator.prepare(unet)
    cached = load_data(config, accelerator, parts, unet, scheduler)
    parts.to(accelerator.device)
    fresh = load_data(replace(config, cache_latents=False), accelerator, parts, unet, scheduler)
    step = Steps(accelerator, unet, scheduler, parts, fresh.pictures, config)
    ways = {
        "bare UNet": step.bare,
        "latentdiff": lambda i: step.ours(cached.batches, i),
        "latentdiff, no cache": lambda i: step.ours(fresh.batches, i),
        "diffusers' way": step.diffusers,
    }
    if compiled is not None:
        compile_blocks(compiled, settings.dynamo_backend)
        faster = Steps(accelerator, accelerator.prepare(compiled), scheduler, parts, fresh.pictures, config)
        ways["latentdiff, compiled"] = lambda i: faster.ours(cached.batches, i)
    if config.mixed_precision != "no":
        ways["diffusers' way, fp32"] = step.diffusers_in_fp32
    return ways, step.flops(), accelerator.device


def take_turns(
    settings: Settings, ways: dict[str, Callable[[int], None]], device: torch.device
) -> tuple[dict[str, list[float]], list[float]]:
    """Pictures per second of each way in each turn, and operations a second of a matrix product."""
    rates, products = {name: [] for name in ways}, []
    for turn in range(settings.turns + 1):
        products.append(matrix_product_rate(settings.mixed_precision, device))
        for name, way in ways.items():
            started = time.perf_counter()
            for i in range(settings.steps):
                way(turn * settings.steps + i)
            wait(device)
            if turn:
                seconds = time.perf_counter() - started
                rates[name].append(settings.steps * settings.train_batch_size / seconds)
    return rates, products


def draw_noise(folder: Path, resolution: int, count: int) -> None:
    """Pictures with a caption each."""
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")


def matrix_product_rate(mixed_precision: str, device: torch.device, size: int = 2048, repeats: int = 3) -> float:
    """Operations a second of a product of square matrices in the precision of a step, the best of a few."""
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[mixed_precision])
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


class Steps:
    """One optimizer step, in each of the ways."""

    def __init__(
        self, accelerator: Accelerator, unet: UNet, scheduler: DDPMScheduler, parts: FrozenParts, pictures, config
    ):
        self._accelerator, self._unet, self._optimizer = accelerator, unet, make_optimizer(config, unet)
        self._scheduler, self._parts, self._pictures = scheduler, parts, pictures
        self._batch, self._dtype = config.train_batch_size, DTYPES[config.mixed_precision]
        size, device = config.resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1), accelerator.device
        self._latents = torch.randn(self._batch, unet.config.in_channels, size, size, device=device)
        self._hidden = encode_prompt(parts, [""] * self._batch).to(device)

    @cached_property
    def _ema(self) -> EMA:
        return EMA(self._unet, 0.999)

    @cached_property
    def _their_ema(self) -> EMAModel:
        return EMAModel(self._unet.parameters(), decay=0.999)

    @cached_property
    def _their_parts(self) -> FrozenParts:
        """In the precision of the step, as in diffusers' example."""
        vae, text_encoder = (copy.deepcopy(m).to(self._dtype) for m in (self._parts.vae, self._parts.text_encoder))
        return FrozenParts(vae, text_encoder, self._parts.tokenizer)

    def _update(self, latents, noise, timesteps, hidden, autocast: bool = True) -> None:
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        with self._accelerator.autocast(AutocastKwargs(enabled=autocast)):
            output = self._unet(noisy, timesteps, hidden).sample
        self._accelerator.backward(denoising_loss(output, noise).mean())
        torch.nn.utils.clip_grad_norm_(self._unet.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def bare(self, i: int) -> None:
        """Forward, backward, optimizer; nothing else."""
        timesteps = torch.full((self._batch,), 500, device=self._latents.device)
        with self._accelerator.autocast():
            output = self._unet(self._latents, timesteps, self._hidden).sample
        self._accelerator.backward(F.mse_loss(output.float(), self._latents))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def flops(self) -> int:
        """Operations of the UNet's forward and backward pass."""
        with FlopCounterMode(display=False) as counter:
            self.bare(0)
        return counter.get_total_flops()

    def ours(self, batches, i: int) -> None:
        """As train_text2img.py does it."""
        batch = batches.at(i)
        self._update(batch.latents, batch.noise, batch.timesteps, batch.encoder_hidden_states)
        self._ema.update(self._unet, i + 1)

    def diffusers(self, i: int) -> None:
        """As diffusers' own example does it: the frozen networks run in every step."""
        self._diffusers(i, self._their_parts, self._dtype)

    def diffusers_in_fp32(self, i: int) -> None:
        """The same without a lower precision."""
        self._diffusers(i, self._parts, torch.float32)

    def _diffusers(self, i: int, parts: FrozenParts, dtype: torch.dtype) -> None:
        rows = [(i * self._batch + k) % len(self._pictures.captions) for k in range(self._batch)]
        device, vae = self._accelerator.device, parts.vae
        pixels = to_pixels([self._pictures.image(row) for row in rows]).to(device, dtype)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        hidden = encode_prompt(parts, [self._pictures.captions[row][0] for row in rows])
        timesteps = torch.randint(self._scheduler.config.num_train_timesteps, (self._batch,), device=device)
        noise = torch.randn_like(latents)
        self._update(latents.float(), noise.float(), timesteps, hidden.float(), autocast=dtype != torch.float32)
        self._their_ema.step(self._unet.parameters())


if __name__ == "__main__":
    run_cli(main, Settings)
