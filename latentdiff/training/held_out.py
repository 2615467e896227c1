"""The loss on pictures that are never trained on, always from the same noise."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..data.batches import Batch
from ..data.latent_cache import HiddenStates, Moments, Pixels
from ..data.masks import random_masks
from ..data.pictures import CaptionedPictures
from ..diffusion.losses import denoising_loss, training_target
from ..diffusion.noise_schedule import predict_x0_and_epsilon
from ..models.latents import inpainting_conditions, sample_latents
from ..models.parts import UNetWithTextEncoder, in_eval_mode
from ..objectives.prediction import predict
from ..utils import randomness

TIMESTEPS_PER_PICTURE = 8
# Noise levels that the schedules in use reach, as log-SNR: from next to nothing of the picture to next to no noise.
LOG_SNRS = (-7.0, 6.0)
_ENCODED_AT_A_TIME = 16


class HeldOutErrors(NamedTuple):
    """How wrong a network is, one value for each question: (K,) each, on the CPU."""

    timesteps: torch.Tensor
    """int64."""
    loss: torch.Tensor
    """The mean squared error of what the network predicts."""
    epsilon: torch.Tensor
    """That of the noise, whatever the network predicts."""
    x_0: torch.Tensor
    """That of the latents: the noise's error divided by the SNR."""

    @classmethod
    def joined(cls, pieces: Iterable["HeldOutErrors"]) -> "HeldOutErrors":
        """All of them in their order."""
        return cls(*map(torch.cat, zip(*pieces, strict=True)))


class HeldOutLoss:
    """The unweighted denoising loss on pictures that are never trained on, under their own captions.

    Every picture is measured at TIMESTEPS_PER_PICTURE timesteps, stratified over the pictures so that together they
    cover 0 .. T-1 evenly, with noise that is the same at every call. Without held-out pictures there is no loss.

    Args:
        pictures, moments, hidden_states: as in `Batches`; without hidden states the model is given captions. Rows
            marked `held_out` are measured, `max_pictures` at most.
        vae_config: `vae.config`.
        num_train_timesteps: T.
        inpainting_vae: to measure inpainting, what encodes the masked pictures; each has one mask for all calls.
        alphas_cumprod: of a noise schedule, to ask at noise levels that cover `LOG_SNRS` evenly, each at the nearest
            timestep of that schedule, in place of timesteps that cover 0 .. T-1 evenly. Another schedule is asked about
            the same pictures, noise and levels; one that it does not reach is left out.
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
        inpainting_vae: AutoencoderKL | None = None,
        alphas_cumprod: torch.Tensor | None = None,
    ):
        rows = np.flatnonzero(pictures.held_out)[:max_pictures]
        self.pictures = len(rows)
        if not self.pictures:
            return
        generator = randomness.generator(0, "held-out loss")
        count = TIMESTEPS_PER_PICTURE * len(rows)
        # One timestep from each of `count` equal strata, dealt out to the pictures in a drawn order.
        strata = (torch.arange(count) + 0.5) / count
        if alphas_cumprod is None:
            timesteps = (strata * num_train_timesteps).long()
        else:
            timesteps = _timesteps_at(alphas_cumprod, LOG_SNRS[0] + strata * (LOG_SNRS[1] - LOG_SNRS[0]))
        timesteps = timesteps[torch.randperm(count, generator=generator)]
        self._groups = []  # pictures of one size each: latents, noise, timesteps, text, whose they are, conditions
        for size in np.unique(pictures.size_of[rows]):
            places = np.flatnonzero(pictures.size_of[rows] == size)
            mean, std = moments(rows[places].tolist())
            latents = sample_latents(vae_config, mean, std, torch.randn(mean.shape, generator=generator))
            conditions = None
            if inpainting_vae is not None:
                conditions = _conditions(pictures, rows[places].tolist(), inpainting_vae, latents.shape)
            of = torch.arange(len(places)).repeat(TIMESTEPS_PER_PICTURE)
            noise = torch.randn(len(of), *mean.shape[1:], generator=generator)
            if hidden_states is None:
                text = [pictures.captions[row][0] for row in rows[places].tolist()]
            else:
                text = hidden_states(rows[places].tolist(), [0] * len(places))
            its, timesteps = timesteps[: len(of)], timesteps[len(of) :]
            reached = its >= 0
            self._groups.append((latents, noise[reached], its[reached], text, of[reached], conditions))

    def __call__(
        self, model: UNet2DConditionModel | UNetWithTextEncoder, scheduler, batch_size: int = 64, autocast=nullcontext
    ) -> float:
        """The mean over pictures and timesteps, under the model's present weights."""
        errors = self.errors(model, scheduler, batch_size, autocast)
        return float(HeldOutErrors.joined(errors.values()).loss.mean())

    @torch.no_grad()
    def errors(
        self,
        model: UNet2DConditionModel | UNetWithTextEncoder,
        scheduler,
        batch_size: int = 64,
        autocast=nullcontext,
        share: tuple[int, int] = (0, 1),
    ) -> dict[int, HeldOutErrors]:
        """The errors of each batch, by its number.

        Args:
            share: (which, of how many) to ask a part of the batches alone.
        """
        device = model.device
        batches = [(group, part) for group in self._groups for part in torch.arange(len(group[4])).split(batch_size)]
        found = {}
        with in_eval_mode(model):
            for number in range(share[0], len(batches), share[1]):
                (all_latents, all_noise, all_timesteps, all_text, of, all_conditions), part = batches[number]
                latents, noise, timesteps = (
                    t.to(device) for t in (all_latents[of[part]], all_noise[part], all_timesteps[part])
                )
                conditions = None if all_conditions is None else all_conditions[of[part]].to(device)
                batch = Batch(latents, noise, timesteps, *_text_of(all_text, of[part], device), conditions)
                noisy = scheduler.add_noise(latents, noise, timesteps)
                with autocast():
                    output = predict(model, batch, noisy, timesteps).sample
                kind, abar = scheduler.config.prediction_type, scheduler.alphas_cumprod
                loss = denoising_loss(output, training_target(kind, latents, noise, abar, timesteps))
                x_0, epsilon = predict_x0_and_epsilon(abar, output.float(), noisy, timesteps, kind)
                errors = (timesteps, loss, denoising_loss(epsilon, noise), denoising_loss(x_0, latents))
                found[number] = HeldOutErrors(*(values.cpu() for values in errors))
        return found


def _timesteps_at(alphas_cumprod: torch.Tensor, log_snrs: torch.Tensor) -> torch.Tensor:
    """The timestep nearest to each log-SNR, -1 for those outside of what the schedule reaches: (K,) int64."""
    levels = torch.logit(alphas_cumprod.cpu().double())  # log abar - log(1 - abar)
    timesteps = (levels[:, None] - log_snrs).abs().argmin(dim=0)
    return torch.where((log_snrs >= levels.min()) & (log_snrs <= levels.max()), timesteps, -1)


def _conditions(
    pictures: CaptionedPictures, rows: list[int], vae: AutoencoderKL, shape: tuple[int, ...]
) -> torch.Tensor:
    """Each row's mask and masked picture, the same at every call."""
    pixels = Pixels(pictures)(rows, [0] * len(rows), [False] * len(rows))
    size = (pixels.shape[-1], pixels.shape[-2])
    masks = random_masks((randomness.generator(0, "held-out mask", row) for row in rows), size)
    noise = torch.randn(shape, generator=randomness.generator(0, "held-out masked posterior", *size))
    parts = zip(*(tensor.split(_ENCODED_AT_A_TIME) for tensor in (pixels, masks, noise)), strict=True)
    return torch.cat([inpainting_conditions(vae, *part).cpu() for part in parts])


def _text_of(
    text: torch.Tensor | list[str], pictures: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor | None, list[str] | None]:
    """Hidden states and captions, as a batch has them: one of the two."""
    if isinstance(text, list):
        return None, [text[i] for i in pictures.tolist()]
    return text[pictures].to(device), None
