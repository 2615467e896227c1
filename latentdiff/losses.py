"""The denoising loss, one value per sample, and the weights that may stand before it."""

import torch

from .noise_schedule import snr


def denoising_loss(model_output: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """L_simple, the epsilon loss (Ho et al. 2020, arXiv 2006.11239, eq. 14), in float32.

    Args:
        model_output: the UNet's estimate of the noise, (B, C, h, w).
        noise: the noise that was added, (B, C, h, w).

    Returns:
        (B,) mean squared errors, so that the caller may weight, drop or log samples.
    """
    return (model_output.float() - noise.float()).square().mean(dim=(1, 2, 3))


def min_snr_weight(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, gamma) / SNR, min-SNR's weight on the epsilon loss (Hang et al. 2023, arXiv 2303.09556).

    Written as min(1, gamma / SNR), which stays finite where SNR = 0.

    Args:
        alphas_cumprod: (T,).
        timesteps: (B,) int64.

    Returns:
        (B,) weights in (0, 1].
    """
    return (gamma / snr(alphas_cumprod, timesteps)).clamp(max=1.0)
