"""Training pictures per second, side by side in one run: `make bench`.

Four ways on the same UNet, batch and precision, in turn so that what else the machine does hits all of them alike:
the bare UNet (forward, backward, optimizer) on made-up latents, which is the limit; latentdiff's whole step from the
cache; latentdiff's step without a cache; and diffusers' way, with VAE, text encoder and its EMAModel in every step.
"""

import time
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

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
    for turn in range(settings.turns + 1):
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
    print(f"{'way':22} pictures/s  (lowest-highest)  of diffusers' way")
    for name, found in rates.items():
        print(f"{name:22} {median(found):10.1f}  ({min(found):.1f}-{max(found):.1f})  {median(found) / base:.2f}x")


class Steps:
    """One optimizer step, in each of the ways."""

    def __init__(self, accelerator, unet, optimizer, scheduler: DDPMScheduler, parts, pictures, batch: int):
        self._accelerator, self._unet, self._optimizer = accelerator, unet, optimizer
        self._scheduler, self._parts, self._pictures, self._batch = scheduler, parts, pictures, batch
        self._ema = EMA(unet, 0.999)
        self._their_ema = EMAModel(unet.parameters(), decay=0.999)
        size, device = unet.config.sample_size, accelerator.device
        self._latents = torch.randn(batch, unet.config.in_channels, size, size, device=device)
        self._hidden = encode_prompt(parts, [""] * batch).to(device)

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
