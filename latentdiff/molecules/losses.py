"""AlphaFold3's diffusion loss on molecules (supplement, 3.7.1): the error of the structure, wherever it lies."""

import torch

from ..diffusion.noise_schedule import predict_x0_and_epsilon, signal_and_noise_levels
from .batches import MoleculeBatch
from .denoiser import centred
from .geometry import aligned


def denoising_loss(model: torch.nn.Module, scheduler, batch: MoleculeBatch) -> torch.Tensor:
    """The weighted squared error of each molecule's denoised coordinates, the mean over atoms and axes: (B,).

    The true structure is first laid onto the denoised one (algorithm 28), without gradient: which way a structure turns
    that was all but lost in noise cannot be known. The weight is 1 / (1 - abar), EDM's (sigma^2 + 1) / sigma^2 for
    coordinates of unit variance, under which the error is that of v.

    Args:
        model: called as `MoleculeDenoiser`.
        scheduler: of the noise, with `prediction_type` v_prediction.
    """
    mask = batch.graph.mask[..., None].to(batch.places.dtype)
    count = mask.sum(dim=1, keepdim=True)
    noisy = scheduler.add_noise(batch.places, centred(batch.noise, mask, count), batch.timesteps)
    abar = scheduler.alphas_cumprod
    v = model(noisy, batch.timesteps, batch.graph).sample.float()
    denoised, _ = predict_x0_and_epsilon(abar, v, noisy, batch.timesteps, "v_prediction")
    _, sigma = signal_and_noise_levels(abar, batch.timesteps, denoised)
    error = (denoised - aligned(batch.places, denoised, batch.graph.mask)) / sigma
    return (error * mask).square().sum(dim=(1, 2)) / (3 * count[:, 0, 0])
