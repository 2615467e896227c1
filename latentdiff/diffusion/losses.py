"""The denoising loss, one value per sample, and the weights that may stand before it."""

import torch

from .noise_schedule import PREDICTION_TYPES, check_choice, snr, velocity


def training_target(
    prediction_type: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """What the UNet is to put out for x_t: the noise, the latents, or v = sqrt(abar) noise - sqrt(1 - abar) latents.

    v is Salimans & Ho's (2022, arXiv 2202.00512, section 4). All (B, ...); `timesteps` (B,). Raises ValueError for
    an unknown prediction type.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    return velocity(alphas_cumprod, latents, noise, timesteps)


def denoising_loss(model_output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each sample, in float32; with the noise as the target it is L_simple
    (Ho et al. 2020, arXiv 2006.11239, eq. 14).

    Args:
        model_output: the network's output, (B, ...): latents of pictures or frames, or coordinates.
        target: what it should be, (B, ...).

    Returns:
        (B,), so that the caller may weight, drop or log samples.
    """
    error = model_output.float() - target.float()
    return error.square().mean(dim=tuple(range(1, error.ndim)))


def min_snr_weight(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float, prediction_type: str = "epsilon"
) -> torch.Tensor:
    """min-SNR's weight on the loss in the network's own target (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    In each of the three it weighs errors of x_0 by min(SNR, gamma): epsilon min(SNR, gamma) / SNR, v min(SNR, gamma) /
    (SNR + 1), sample min(SNR, gamma). Finite where SNR = 0, as under zero terminal SNR: 1, 0 and 0.

    Args:
        alphas_cumprod: (T,).
        timesteps: (B,) int64.

    Returns:
        (B,) weights, not negative.
    """
    ratio = snr(alphas_cumprod, timesteps)
    if prediction_type == "epsilon":
        return (gamma / ratio).clamp(max=1.0)
    weight = ratio.clamp(max=gamma)
    return weight if prediction_type == "sample" else weight / (ratio + 1)
