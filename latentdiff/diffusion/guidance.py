"""Guidance: two answers of a network, or of two, made into one, and at which noise levels that is done.

Classifier-free guidance: Ho & Salimans 2022 (arXiv 2207.12598); its rescaling: Lin et al. 2023 (arXiv 2305.08891);
within an interval of noise levels: Kynkäänniemi et al. 2024 (arXiv 2404.07724); by a worse version of the same network
(autoguidance): Karras et al. 2024 (arXiv 2406.02507).
"""

from collections.abc import Callable

import torch

GuidanceScale = float | Callable[[float], float]


def guide(
    negative: torch.Tensor, positive: torch.Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """e_n + w (e_p - e_n): away from one answer, towards and past the other.

    Args:
        negative: (B, C, H, W), the network's output without the prompt (or with a negative one), or the output of a
            worse network with the prompt.
        positive: (B, C, H, W), the network's output with the prompt.
        guidance_scale: w; 1 gives `positive`.
        guidance_rescale: phi in [0, 1] of arXiv 2305.08891, eq. 14-16; 1 gives the result the deviation of `positive`,
            0 leaves it as it is.
    """
    guided = negative + guidance_scale * (positive - negative)
    if guidance_rescale > 0.0:
        dims = list(range(1, positive.ndim))
        rescaled = guided * (positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
        guided = guidance_rescale * rescaled + (1 - guidance_rescale) * guided
    return guided


def guidance_weight(
    guidance_scale: GuidanceScale, sigma: float, guidance_interval: tuple[float, float] | None = None
) -> float:
    """w at a noise level: 1, which is no guidance, outside the interval.

    Args:
        guidance_scale: w, or a function of sigma that gives it.
        sigma: the noise level sqrt((1 - abar) / abar), see `noise_schedule.noise_level`.
        guidance_interval: (sigma_lo, sigma_hi): guided while sigma_lo < sigma <= sigma_hi (arXiv 2404.07724).
    """
    if guidance_interval is not None and not guidance_interval[0] < sigma <= guidance_interval[1]:
        return 1.0
    return guidance_scale(sigma) if callable(guidance_scale) else guidance_scale


def check_guidance_interval(guidance_interval: tuple[float, float] | None) -> None:
    """Raises ValueError unless it is None or two noise levels, 0 <= sigma_lo < sigma_hi."""
    if guidance_interval is None:
        return
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] < guidance_interval[1]:
        raise ValueError(
            f"guidance_interval={guidance_interval}: it must be two noise levels (sigma_lo, sigma_hi), "
            "0 <= sigma_lo < sigma_hi; sigma_hi may be math.inf"
        )
