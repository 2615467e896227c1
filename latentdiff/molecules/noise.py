"""The noise that AlphaFold3 trains on, as a schedule of this project.

There the noise level of a sample is drawn as sigma = sigma_data exp(-1.2 + 1.5 n) with n normal (supplement, 3.7.1).
Here a timestep is drawn evenly, as for pictures; so that the two are the same, timestep t of T has the level of the
quantile (t + 1/2) / T of that distribution, in units of sigma_data.
"""

import torch


def log_sigmas(timesteps: torch.Tensor, num_train_timesteps: int, mean: float, deviation: float) -> torch.Tensor:
    """log(sigma / sigma_data) of timesteps of any shape, whole or not: float32."""
    return _exact(timesteps, num_train_timesteps, mean, deviation).float()


def _exact(timesteps: torch.Tensor, num_train_timesteps: int, mean: float, deviation: float) -> torch.Tensor:
    quantile = (timesteps.double() + 0.5) / num_train_timesteps
    return mean + deviation * torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))


def betas(num_train_timesteps: int, mean: float, deviation: float) -> list[float]:
    """The schedule's betas, for a scheduler's `trained_betas`: abar_t = 1 / (1 + sigma_t^2)."""
    sigma = _exact(torch.arange(num_train_timesteps), num_train_timesteps, mean, deviation).exp()
    abar = 1 / (1 + sigma.square())
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return (1 - abar / before).tolist()
