"""The denoising loss."""

import torch

from ..config.train import TrainConfig
from ..data.batches import Batch
from ..diffusion.losses import denoising_loss, min_snr_weight, training_target
from .objective import Objective
from .prediction import predict


class Denoising(Objective):
    """The weighted squared error of what the UNet predicts."""

    def __call__(self, model: torch.nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """See `training_loss`."""
        return training_loss(model, self._scheduler, batch, self.config)


def training_loss(model: torch.nn.Module, scheduler, batch: Batch, config: TrainConfig) -> torch.Tensor:
    """The weighted loss of each sample of a batch in what the UNet predicts -> (B,).

    Where the UNet learns its uncertainty u of each noise level, loss / exp(u) + u (arXiv 2312.02696, eq. 21): at its
    least u is the logarithm of the loss there, so that all levels count the same.

    Args:
        model: the UNet, or one with a text encoder in front of it, for batches without hidden states.
    """
    noisy_latents = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    output = predict(model, batch, noisy_latents, batch.timesteps)
    kind, abar = scheduler.config.prediction_type, scheduler.alphas_cumprod
    losses = denoising_loss(output.sample, training_target(kind, batch.latents, batch.noise, abar, batch.timesteps))
    if (u := getattr(output, "log_variance", None)) is not None:
        losses = losses / u.exp() + u
    if config.snr_gamma is not None:
        losses = losses * min_snr_weight(abar, batch.timesteps, config.snr_gamma, kind)
    return losses
