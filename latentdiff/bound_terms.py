"""The terms of DDPM's variational bound on the likelihood of latents, and which of them to measure.

Ho et al. 2020 (arXiv 2006.11239), eq. 5. Timesteps count as in the schedulers, from 0 to T - 1, so that x_t here is
DDPM's x_{t+1}; x_0 are the latents:

    -log p(x_0) <= KL(q(x_{T-1} | x_0) || N(0, I))                                    the prior, L_T of the paper
                   + sum over t >= 1 of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))                        L_t
                   - log p(x_0 | x_{t=0})                                                   the decoder, L_0

p is the chain that `DDPMScheduler.step` draws from: the posterior's mean at the predicted x_0, and the variance that
`variance_type` says. Latents are real numbers, not bytes, so nothing is discretised: the decoder is a Gaussian around
the predicted x_0 with one fixed variance v. Every v > 0 makes it a density, and so the sum a bound on the negative log
density, which may well be negative; by default v = beta_0, DDPM's larger choice for its last step.

How far the bound lies above the truth even with a perfect network is up to the variances. beta_t is exact for data of
unit variance and close for any that are broad beside the noise of the first steps; beta-tilde_t is exact for a single
point. Per dimension, with T = 1000, data N(0, s^2) and the schedule of emoji64, fixed_large costs 0.003 nats at s = 0.3
and 0.001 at 2, fixed_small 0.27 and 0.30, nine tenths of it in the first ten timesteps, where the two differ most.
"""

import math

import torch

from .noise_schedule import bound_x0, predict_x0_and_epsilon
from .scheduling_ddpm import DDPMScheduler

# ------------------------------------------------------------------------------------------------------ the terms


def reverse_process(scheduler, variance_type: str | None = None) -> DDPMScheduler:
    """The chain to measure: DDPM on a scheduler's settings, with its noise levels in float64.

    In float32 the difference 1 - abar_t / abar_{t-1} of a small step keeps three digits.

    Args:
        scheduler: of this library or of diffusers, with DDPM's settings and `alphas_cumprod`.
        variance_type: see `DDPMScheduler`; by default the scheduler's own, and "fixed_large" where it has none.

    Raises:
        ValueError: the noise does not grow at every timestep, or all is noise before the last.
    """
    known = DDPMScheduler._get_init_keys(DDPMScheduler)
    settings = {name: value for name, value in scheduler.config.items() if name in known}
    settings["variance_type"] = variance_type or settings.get("variance_type", "fixed_large")
    process = DDPMScheduler.from_config(settings)
    process.alphas_cumprod = scheduler.alphas_cumprod.detach().cpu().double()
    levels = torch.cat([torch.ones(1), process.alphas_cumprod])
    if not (levels.diff() < 0).all() or levels[:-1].min() <= 0:
        raise ValueError(
            "alphas_cumprod must fall at every timestep, and be 0 at none but the last: else there is no Gaussian "
            "between two timesteps to measure"
        )
    return process


def gaussian_kl(
    squared_distance: torch.Tensor, variance_q: torch.Tensor, variance_p: torch.Tensor | float
) -> torch.Tensor:
    """KL(N(m, variance_q) || N(m', variance_p)) of each dimension in nats, where squared_distance = (m - m')^2."""
    ratio = variance_q / variance_p
    return 0.5 * (squared_distance / variance_p + ratio - 1 - ratio.log())


def prior_term(process: DDPMScheduler, latents: torch.Tensor) -> torch.Tensor:
    """KL(q(x_{T-1} | x_0) || N(0, I)), in which no network has a part: (B, C, h, w) -> (B,) float64 nats."""
    abar = process.alphas_cumprod[-1]
    return gaussian_kl(abar * latents.double().square(), 1 - abar, 1.0).flatten(1).sum(dim=1)


def denoising_term(
    process: DDPMScheduler,
    model_output: torch.Tensor,
    latents: torch.Tensor,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    decoder_variance: float,
) -> torch.Tensor:
    """L_t of each sample at its own timestep, for one x_t ~ q(x_t | x_0): (B,) float64 nats.

    With t >= 1 the distance of the two means is sqrt(abar_{t-1}) beta_t / (1 - abar_t) times that of x_0 and its
    prediction (DDPM, eq. 7 and 8); with an epsilon and the posterior's own variance this is eq. 12.

    Args:
        process: of `reverse_process`.
        model_output: for x_t, (B, C, h, w), or (B, 2C, h, w) where the variance is learned.
        latents, noisy_latents: x_0 and x_t, (B, C, h, w).
        timesteps: (B,) int64.
        decoder_variance: v.
    """
    prediction, learned = process._split_learned(model_output.double(), latents)
    abar, kind = process.alphas_cumprod, process.config.prediction_type
    predicted_x_0, _ = predict_x0_and_epsilon(abar, prediction, noisy_latents.double(), timesteps, kind)
    squared_error = (latents.double() - bound_x0(predicted_x_0, process.config)).square()
    # At t = 0 the posterior is a point: what the next lines give there is not used.
    posterior = _variances(process, timesteps, "fixed_small")
    variance = _variances(process, timesteps, process.variance_type, learned)
    before = abar[timesteps.clamp(min=1) - 1].view_as(posterior)
    squared_distance = before * (posterior / (1 - before)).square() * squared_error
    divergence = gaussian_kl(squared_distance, posterior, variance)
    decoder = 0.5 * (squared_error / decoder_variance + math.log(2 * math.pi * decoder_variance))
    return torch.where(timesteps == 0, decoder.flatten(1).sum(dim=1), divergence.flatten(1).sum(dim=1))


def _variances(
    process: DDPMScheduler, timesteps: torch.Tensor, variance_type: str, learned: torch.Tensor | None = None
) -> torch.Tensor:
    """What `step` draws with at each sample's own timestep: (B, 1, 1, 1), or shaped as `learned`."""
    if learned is not None:
        return torch.stack([process._get_variance(t, own) for t, own in zip(timesteps.tolist(), learned, strict=True)])
    different, which = timesteps.unique(return_inverse=True)
    table = torch.stack([process._get_variance(t, variance_type=variance_type) for t in different.tolist()])
    return table[which].reshape(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------- which timesteps


def stratified_timesteps(
    alphas_cumprod: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending timesteps (count,), and weights (count,) under which the sum of their L_t is unbiased for all of them.

    The decoder's is always there. The others are drawn one from each of count - 1 parts of 1 … T-1 that are alike in
    log(1 + SNR), the share of each L_t where the data have unit variance and the network is perfect. Drawn evenly, the
    few first timesteps, which hold most of the sum, would seldom be among them.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} timesteps for each picture; it must be at least 2, of which one is the decoder's")
    share = (1 - alphas_cumprod.double()).log().diff()  # of t = 1 … T-1, since 1 + SNR = 1 / (1 - abar)
    share = share / share.sum()
    places = (torch.arange(count - 1) + torch.rand(count - 1, generator=generator, dtype=torch.float64)) / (count - 1)
    drawn = torch.searchsorted(share.cumsum(0), places, right=True).clamp(max=len(share) - 1)
    timesteps = torch.cat([torch.zeros(1, dtype=torch.int64), drawn + 1])
    return timesteps, torch.cat([torch.ones(1, dtype=torch.float64), 1 / ((count - 1) * share[drawn])])
