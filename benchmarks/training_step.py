"""Training pictures per second, side by side in one run: `make bench`.

Four ways on the same UNet, batch and precision, in turn so that what else the machine does hits all of them alike:
the bare UNet (forward, backward, optimizer) on made-up latents, which is the limit; latentdiff's whole step from the
cache; latentdiff's step without a cache; and diffusers' way, with VAE, text encoder and its EMAModel in every step. A
large matrix product takes its turn, too, and says which share of that rate the arithmetic of the UNet reaches.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from latentdiff import DDPMScheduler
from latentdiff.config import TrainConfig
from latentdiff.ema import EMA
from latentdiff.latents import to_pixels
from latentdiff.losses import denoising_loss
from latentdiff.models import encode_prompt
from latentdiff.optimizers import make_optimizer
from latentdiff.training import load_networks
from latentdiff.training_data import load_data


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    train_batch_size: int = 32
    """Pictures per step."""
    mixed_precision: str = "bf16"
    """no, fp16 or bf16."""
    pictures: int = 64
    """How many emoji are read."""
    steps: int = 3
    """Steps per turn."""
    turns: int = 5
    """Turns of each way; the median counts."""


def main(settings: Settings) -> None:
    config = TrainConfig(
        train_batch_size=settings.train_batch_size,
        mixed_precision=settings.mixed_precision,
        max_train_samples=settings.pictures,
    )
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    parts, unet, scheduler = load_networks(config)
    unet = accelerator.prepare(unet)
    optimizer = make_optimizer(config, unet)
    cached = load_data(config, accelerator, parts, unet, scheduler).batches
    parts.to(accelerator.device)
    fresh = load_data(replace(config, cache_latents=False), accelerator, parts, unet, scheduler)
    step = Steps(accelerator, unet, optimizer, scheduler, parts, fresh.pictures, settings.train_batch_size)
    ways = {
        "bare UNet": step.bare,
        "latentdiff": lambda i: step.ours(cached, i),
        "latentdiff, no cache": lambda i: step.ours(fresh.batches, i),
        "diffusers' way": step.diffusers,
    }
    rates = {name: [] for name in ways}
    flops, products = step.flops(), []  # operations of the UNet in a step; operations a second of a matrix product
    for turn in range(settings.turns + 1):
        products.append(matrix_product_rate(settings.mixed_precision, accelerator.device))
        for name, way in ways.items():
            started = time.perf_counter()
            for i in range(settings.steps):
                way(turn * settings.steps + i)
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                seconds = time.perf_counter() - started
                rates[name].append(settings.steps * settings.train_batch_size / seconds)
    base = median(rates["diffusers' way"])
    limit, product = median(rates["bare UNet"]), median(products)
    print(f"a matrix product makes {product / 1e9:.0f} GFLOP/s, a step has {flops / 1e9:.1f} GFLOP")
    print("| way | pictures/s | lowest … highest | of the bare UNet | of diffusers' way | of the matrix product |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in rates.items():
        rate, share = median(found), median(found) / settings.train_batch_size * flops / product
        print(
            f"| {name} | {rate:.1f} | {min(found):.1f} … {max(found):.1f} | {rate / limit:.2f} | {rate / base:.2f} "
            f"| {share:.0%} |"
        )


def matrix_product_rate(mixed_precision: str, device: torch.device, size: int = 2048, repeats: int = 3) -> float:
    """Operations a second of a product of square matrices in the precision of a step, the best of a few."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


class Steps:
    """One optimizer step, in each of the ways."""

    def __init__(self, accelerator, unet, optimizer, scheduler: DDPMScheduler, parts, pictures, batch: int):
        self._accelerator, self._unet, self._optimizer = accelerator, unet, optimizer
        self._scheduler, self._parts, self._pictures, self._batch = scheduler, parts, pictures, batch
        size, device = unet.config.sample_size, accelerator.device
        self._latents = torch.randn(batch, unet.config.in_channels, size, size, device=device)
        self._hidden = encode_prompt(parts, [""] * batch).to(device)

    @cached_property
    def _ema(self) -> EMA:
        return EMA(self._unet, 0.999)

    @cached_property
    def _their_ema(self) -> EMAModel:
        return EMAModel(self._unet.parameters(), decay=0.999)

    def _update(self, latents, noise, timesteps, hidden) -> None:
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        with self._accelerator.autocast():
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
        rows = [(i * self._batch + k) % len(self._pictures.captions) for k in range(self._batch)]
        device, vae = self._accelerator.device, self._parts.vae
        pixels = to_pixels([self._pictures.image(row) for row in rows]).to(device)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        hidden = encode_prompt(self._parts, [self._pictures.captions[row][0] for row in rows])
        timesteps = torch.randint(self._scheduler.config.num_train_timesteps, (self._batch,), device=device)
        self._update(latents, torch.randn_like(latents), timesteps, hidden)
        self._their_ema.step(self._unet.parameters())


if __name__ == "__main__":
    main(tyro.cli(Settings))
