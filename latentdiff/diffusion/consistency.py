"""Consistency models: a network whose answer at every point of a trajectory is where the trajectory ends, so that one
step draws a picture (Song et al. 2023, arXiv 2303.01469; in latents, guided: Luo et al. 2023, arXiv 2310.04378).

    loss = d(f(x_t, t), f(x_s, s)),  s < t two neighbours on one trajectory, the second held fixed,

where x_s comes from x_t by a step of a teacher's probability flow (distillation), or from the same picture and noise
(training without a teacher).
"""

import math
from collections.abc import Callable

import torch

from .guidance import guide
from .noise_schedule import predict_x0_and_epsilon, signal_and_noise_levels
from .scheduling_consistency import boundary_scalings

# (x_t, timesteps (B,)) -> what a network puts out for them, all (B, C, h, w)
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def neighbours(timesteps: torch.Tensor, skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform timesteps (B,) -> those of the solver's grid that they fall to, and the ones before: both (B,).

    The grid is k - 1, 2 k - 1, … with k = `skip`; before its first one comes 0, where f(x, 0) = x.
    """
    upper = (timesteps // skip + 1) * skip - 1
    return upper, (upper - skip).clamp(min=0)


def consistency_function(
    network: Network, alphas_cumprod: torch.Tensor, prediction_type: str, x_t: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """f(x_t, t) = c_skip x_t + c_out x_0(x_t, t) (arXiv 2310.04378, eq. 9), float32 (B, C, h, w); `timesteps` (B,)."""
    x_0, _ = predict_x0_and_epsilon(alphas_cumprod, network(x_t, timesteps), x_t, timesteps, prediction_type)
    c_skip, c_out = (c.reshape(-1, *[1] * (x_t.ndim - 1)) for c in boundary_scalings(timesteps))
    return c_skip * x_t.float() + c_out * x_0


def guided(teacher: Network, led_away_from: Network, guidance_scales: torch.Tensor) -> Network:
    """What the teacher puts out under guidance, e_n + w (e_p - e_n).

    Args:
        teacher, led_away_from: the network with the captions, and with the empty one; or a worse network with the
            captions (autoguidance, arXiv 2406.02507).
        guidance_scales: w (B,); that of arXiv 2310.04378 is one less.
    """

    def network(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        negative, positive = led_away_from(x_t, timesteps), teacher(x_t, timesteps)
        return guide(negative.float(), positive.float(), guidance_scales.reshape(-1, *[1] * (x_t.ndim - 1)))

    return network


def ddim_step(
    teacher: Network,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    to_timesteps: torch.Tensor,
) -> torch.Tensor:
    """One step of DDIM (arXiv 2010.02502, eq. 13) along the teacher's probability flow, x_t at `timesteps` (B,) -> x_s
    at `to_timesteps` (B,): the solver of arXiv 2310.04378, eq. 13-14."""
    x_0, epsilon = predict_x0_and_epsilon(alphas_cumprod, teacher(x_t, timesteps), x_t, timesteps, prediction_type)
    signal, sigma = signal_and_noise_levels(alphas_cumprod, to_timesteps, x_t)
    return (signal * x_0 + sigma * epsilon).to(x_t.dtype)


def ddim_trajectory(
    teacher: Network, alphas_cumprod: torch.Tensor, prediction_type: str, noise: torch.Tensor, grid: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """From noise (B, C, h, w), taken for x at the last timestep of the ascending `grid`, to the picture it flows to.

    Returns:
        x_t at each timestep of the grid (N, B, C, h, w), and the end (B, C, h, w).
    """
    points, x_t = {}, noise
    for t, s in zip(reversed(grid), [*reversed(grid[:-1]), None], strict=True):
        points[t], timesteps = x_t, torch.full((len(noise),), t, device=noise.device)
        if s is not None:
            x_t = ddim_step(teacher, alphas_cumprod, prediction_type, x_t, timesteps, torch.full_like(timesteps, s))
    end, _ = predict_x0_and_epsilon(alphas_cumprod, teacher(x_t, timesteps), x_t, timesteps, prediction_type)
    return torch.stack([points[t] for t in grid]), end.to(noise.dtype)


def pseudo_huber(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sqrt(||a - b||^2 + c^2) - c of each sample, c = 0.00054 sqrt(d) for d numbers (Song & Dhariwal 2023, arXiv
    2310.14189, section 3.3): (B, …) -> float32 (B,). Its gradient does not grow with the distance."""
    difference = (a.float() - b.float()).flatten(1)
    c = 0.00054 * math.sqrt(difference.shape[1])
    return (difference.square().sum(dim=1) + c**2).sqrt() - c


def discretization_steps(step: int, total_steps: int, first: int, last: int) -> int:
    """Into how many steps the noise levels are divided when training without a teacher: doubled from `first` to `last`
    in equal parts of the run (arXiv 2310.14189, section 3.4)."""
    parts = math.ceil(math.log2(last / first)) + 1
    return min(first * 2 ** (step * parts // total_steps), last)
