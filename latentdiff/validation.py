"""How a run looks while it trains: pictures from fixed prompts and noise, and a loss at fixed timesteps and noise."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from . import random_streams
from .data import CaptionedPictures
from .grid import labelled_grid
from .latent_cache import HiddenStates, Moments
from .latents import sample_latents
from .losses import denoising_loss, training_target
from .models import UNetWithTextEncoder

TIMESTEPS_PER_PICTURE = 8


class HeldOutLoss:
    """The unweighted denoising loss on pictures that are never trained on, under their own captions.

    Every picture is measured at TIMESTEPS_PER_PICTURE timesteps, stratified over the pictures so that together they
    cover 0 .. T-1 evenly, with noise that is the same at every call. Without held-out pictures there is no loss.

    Args:
        pictures, moments, hidden_states: as in `Batches`; without hidden states the model is given captions. Rows
            marked `held_out` are measured, `max_pictures` at most.
        vae_config: `vae.config`.
        num_train_timesteps: T.
    """

    def __init__(
        self,
        pictures: CaptionedPictures,
        moments: Moments,
        hidden_states: HiddenStates | None,
        *,
        vae_config,
        num_train_timesteps: int,
        max_pictures: int = 256,
    ):
        rows = np.flatnonzero(pictures.held_out)[:max_pictures]
        self.pictures = len(rows)
        if not self.pictures:
            return
        generator = random_streams.generator(0, "held-out loss")
        count = TIMESTEPS_PER_PICTURE * len(rows)
        # One timestep from each of `count` equal strata, dealt out to the pictures in a drawn order.
        strata = (torch.arange(count) + 0.5) / count * num_train_timesteps
        timesteps = strata.long()[torch.randperm(count, generator=generator)]
        self._groups = []  # pictures of one size each: latents, noise, timesteps, text, and whose they are
        for size in np.unique(pictures.size_of[rows]):
            places = np.flatnonzero(pictures.size_of[rows] == size)
            mean, std = moments(rows[places].tolist())
            latents = sample_latents(vae_config, mean, std, torch.randn(mean.shape, generator=generator))
            of = torch.arange(len(places)).repeat(TIMESTEPS_PER_PICTURE)
            noise = torch.randn(len(of), *mean.shape[1:], generator=generator)
            if hidden_states is None:
                text = [pictures.captions[row][0] for row in rows[places].tolist()]
            else:
                text = hidden_states(rows[places].tolist(), [0] * len(places))
            self._groups.append((latents, noise, timesteps[: len(of)], text, of))
            timesteps = timesteps[len(of) :]

    @torch.no_grad()
    def __call__(
        self, model: UNet2DConditionModel | UNetWithTextEncoder, scheduler, batch_size: int = 64, autocast=nullcontext
    ) -> float:
        """The mean over pictures and timesteps, under the model's present weights."""
        was_training, device = model.training, model.device
        model.eval()
        losses = []
        for all_latents, all_noise, all_timesteps, all_text, of in self._groups:
            for part in torch.arange(len(of)).split(batch_size):
                latents, text = all_latents[of[part]].to(device), _text_of(all_text, of[part], device)
                noise, timesteps = all_noise[part].to(device), all_timesteps[part].to(device)
                with autocast():
                    output = model(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
                kind, abar = scheduler.config.prediction_type, scheduler.alphas_cumprod
                losses.append(denoising_loss(output, training_target(kind, latents, noise, abar, timesteps)).cpu())
        model.train(was_training)
        return float(torch.cat(losses).mean())


def _text_of(text: torch.Tensor | list[str], pictures: torch.Tensor, device: torch.device) -> torch.Tensor | list[str]:
    if isinstance(text, list):
        return [text[i] for i in pictures.tolist()]
    return text[pictures].to(device)


def validation_pictures(
    pipeline, prompts: Sequence[str], *, seed: int, num_inference_steps: int, guidance_scale: float
) -> Image.Image:
    """One picture for each prompt, picture i from the noise of seed + i, as a labelled grid."""
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    images = pipeline(
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generators,
    ).images
    pipeline.unet.train(was_training)
    return labelled_grid(images, prompts, columns=min(4, len(prompts)))
