"""The noise schedule: how much noise each timestep holds, and every formula that follows from that alone.

Symbols as in DDPM (Ho et al. 2020, arXiv 2006.11239): T training steps, beta_t, alpha_t = 1 - beta_t,
abar_t = alpha_0 … alpha_t,
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon,    SNR(t) = abar_t / (1 - abar_t).
Further: arXiv 2102.09672 (cosine), 2202.00512 (v), 2305.08891 (zero terminal SNR, spacing), 2205.11487 (thresholding).

Tables are built in float32, in the order of operations that diffusers uses, so that a scheduler_config.json means the
same noise to the last bit in both libraries. Float64, rounded back, would move abar by 5e-7, and betas under zero
terminal SNR by 7e-6, where sqrt(abar) - sqrt(abar_T) cancels: away from what existing networks were trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ValueError, naming the option, its value and the allowed ones, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


# ---- the tables -----------------------------------------------------------------------------------------------------


def make_betas(
    beta_schedule: str = "scaled_linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    trained_betas: np.ndarray | Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
) -> torch.Tensor:
    """beta_t for t = 0 … T-1: float32 (T,).

    linear: evenly spaced from `beta_start` to `beta_end` (DDPM, section 4).
    scaled_linear: the square of what is evenly spaced between their roots (latent diffusion, arXiv 2112.10752).
    squaredcos_cap_v2: the cosine schedule (arXiv 2102.09672, eq. 17); `beta_start` and `beta_end` have no part in it.
    `trained_betas` replaces all of these. Raises ValueError for an unknown schedule, for trained betas that are not one
    row within (0, 1], and unless 0 < beta_start <= beta_end <= 1.
    """
    check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}; it must be at least 1")
    if not 0 < beta_start <= beta_end <= 1:
        raise ValueError(f"beta_start is {beta_start} and beta_end {beta_end}; they must lie in (0, 1] and not descend")
    if trained_betas is not None:
        betas = torch.as_tensor(trained_betas).to(torch.float32, copy=True)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"trained_betas must be one row of numbers within (0, 1]; got {trained_betas}")
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    else:
        betas = cosine_betas(num_train_timesteps)
    return rescale_zero_terminal_snr(betas) if rescale_betas_zero_snr else betas


def cosine_betas(num_train_timesteps: int, offset: float = 0.008, max_beta: float = 0.999) -> torch.Tensor:
    """f(t) = cos^2((t/T + s) / (1 + s) * pi/2), abar_t = f(t) / f(0), beta_t = min(1 - abar_t / abar_{t-1}, 0.999).

    arXiv 2102.09672, eq. 17; `offset` is s. The cap keeps the last step, where f is 0, from being singular. -> (T,).
    """
    # The one table in float64: f falls to 0 at the end, where a quotient of neighbours in float32 would be noise.
    t = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    f = torch.cos((t + offset) / (1 + offset) * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta).float()


def alphas_cumprod(betas: torch.Tensor) -> torch.Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s) (DDPM, below eq. 3): (T,) -> (T,)."""
    return torch.cumprod(1 - betas, dim=0)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas whose last abar is exactly 0 and whose first is kept (arXiv 2305.08891, algorithm 1): (T,) -> (T,).

    sqrt(abar) is shifted so that it ends at 0, then scaled so that it starts where it did. Raises ValueError for T < 2.
    """
    if len(betas) < 2:
        raise ValueError(f"zero terminal SNR needs a first and a last beta; got {len(betas)} of them")
    root = alphas_cumprod(betas).sqrt()
    first, last = root[0], root[-1]
    abar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


# ---- noise in and noise out -----------------------------------------------------------------------------------------


def snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """SNR(t) = abar_t / (1 - abar_t), float32 in the shape and on the device of `timesteps`; 0 at zero terminal SNR."""
    abar = alphas_cumprod.to(timesteps.device, non_blocking=True)[timesteps]
    return abar / (1 - abar)


def noise_level(alphas_cumprod: torch.Tensor, timestep: float) -> float:
    """sigma(t) of one timestep as a number; see `noise_levels`."""
    return noise_levels(alphas_cumprod.cpu(), torch.tensor([float(timestep)])).item()


def noise_levels(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """sigma(t) = sqrt((1 - abar_t) / abar_t): the noise in x_t, in units of the picture; infinite where abar_t is 0.

    Between whole timesteps, at which some schedulers stand, it is interpolated linearly.

    Args:
        alphas_cumprod: (T,), on the device of `timesteps`.
        timesteps: of any shape, whole or not, from 0 to T - 1.

    Returns:
        float32 in the shape of `timesteps`.
    """
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    below = timesteps.long().clamp(max=len(sigmas) - 1)
    if not timesteps.is_floating_point():
        return sigmas[below]
    above = (below + 1).clamp(max=len(sigmas) - 1)
    share = timesteps - below
    between = (1 - share) * sigmas[below] + share * sigmas[above]
    return torch.where(share == 0, sigmas[below], between)  # 0 times infinity would be no number


def signal_and_noise_levels(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor | int, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sqrt(abar_t), sqrt(1 - abar_t)) in float32, shaped to multiply `sample`.

    timesteps: int for the whole batch, or integers (B,). sample: (B, …), read for its rank and its device.
    """
    if not isinstance(timesteps, torch.Tensor):
        abar = alphas_cumprod[timesteps]  # a 0-dim tensor on the CPU multiplies one on any device, without a copy
    else:
        # non_blocking: the table is small and never written to, so there is nothing to wait for
        abar = alphas_cumprod.to(sample.device, non_blocking=True)[timesteps.to(sample.device)]
        abar = abar.reshape(-1, *[1] * (sample.ndim - 1))
    return abar**0.5, (1 - abar) ** 0.5


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as float32 if it is narrower, so that half precision is rounded once, not in every operation."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def add_noise(
    alphas_cumprod: torch.Tensor, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | int
) -> torch.Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon (DDPM, eq. 4).

    original_samples, noise: (B, …); timesteps: (B,) or one for all -> (B, …) in the dtype of `original_samples`.
    """
    signal, sigma = signal_and_noise_levels(alphas_cumprod, timesteps, original_samples)
    noisy = signal * at_least_float32(original_samples) + sigma * at_least_float32(noise)
    return noisy.to(original_samples.dtype)


def velocity(
    alphas_cumprod: torch.Tensor, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | int
) -> torch.Tensor:
    """v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0 (arXiv 2202.00512, section 4); arguments as in `add_noise`."""
    signal, sigma = signal_and_noise_levels(alphas_cumprod, timesteps, original_samples)
    v = signal * at_least_float32(noise) - sigma * at_least_float32(original_samples)
    return v.to(original_samples.dtype)


def predict_x0_and_epsilon(
    alphas_cumprod: torch.Tensor,
    model_output: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor | int,
    prediction_type: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model's output says of x_0 and epsilon, both (B, …) and at least float32.

    model_output, sample: (B, …), `sample` being x_t; timesteps: (B,) or one for all.
        epsilon:       x_0 = (x_t - sqrt(1 - abar) epsilon) / sqrt(abar)                                  (DDPM, eq. 15)
        sample:        epsilon = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)
        v_prediction:  x_0 = sqrt(abar) x_t - sqrt(1 - abar) v,  epsilon = sqrt(abar) v + sqrt(1 - abar) x_t
    Where abar_t = 0, x_t is all noise and epsilon says nothing of x_0: x_0 is then 0, the mean of centred data.
    Raises ValueError for an unknown `prediction_type`.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    signal, sigma = signal_and_noise_levels(alphas_cumprod, timesteps, sample)
    model_output, sample = at_least_float32(model_output), at_least_float32(sample)
    if prediction_type == "epsilon":
        # Divided by infinity, value and gradient are both 0; 0/0 would spread NaN through the picture.
        return (sample - sigma * model_output) / signal.masked_fill(signal == 0, torch.inf), model_output
    if prediction_type == "sample":
        return model_output, (sample - signal * model_output) / sigma
    return signal * sample - sigma * model_output, signal * model_output + sigma * sample


def bound_x0(x_0: torch.Tensor, config: Any) -> torch.Tensor:
    """The predicted x_0 (B, …), kept in range as the scheduler's `config` asks; thresholding goes before clipping.

    thresholding: the dynamic kind (arXiv 2205.11487, section 2.3): s is a quantile of |x_0| over each picture, at least
        1 and at most `sample_max_value`; x_0 is clamped to [-s, s] and divided by s.
    clip_sample: clamped to [-clip_sample_range, clip_sample_range].
    """
    if config.thresholding:
        s = torch.quantile(x_0.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
        s = s.clamp(min=1, max=config.sample_max_value).reshape(-1, *[1] * (x_0.ndim - 1))
        return torch.clamp(x_0, -s, s) / s
    if config.clip_sample:
        return x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
    return x_0


# ---- which timesteps, and which comes before ------------------------------------------------------------------------


def spaced_timesteps(
    num_inference_steps: int, num_train_timesteps: int, timestep_spacing: str, steps_offset: int = 0
) -> list[int]:
    """N timesteps out of T, descending (arXiv 2305.08891, table 2).

    leading:  i * (T // N) + steps_offset, the offset cut to what fits below T; as a rule stays below T - 1
    trailing: round(i * T / N) - 1 for i = N … 1; always starts from T - 1
    linspace: N points from T - 1 down to 0, rounded; a single step is T - 1
    Raises ValueError for an unknown spacing or a count outside 1 … T.
    """
    check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
    n, total = num_inference_steps, num_train_timesteps
    if not 1 <= n <= total:
        raise ValueError(f"num_inference_steps is {n}; it must lie in 1 … {total} (num_train_timesteps)")
    if timestep_spacing == "leading":
        spaced = np.arange(n) * (total // n)
        spaced += min(steps_offset, total - 1 - spaced[-1])
    elif timestep_spacing == "trailing":
        # Counted in whole steps and divided once: adding up T/N gives a step too many, at -1, for N = 61 of 1000.
        spaced = np.rint(np.arange(1, n + 1) * total / n) - 1
    else:
        spaced = np.rint(np.linspace(0, total - 1, n)) if n > 1 else np.array([total - 1])
    return [int(t) for t in spaced[::-1]]


def choose_timesteps(
    num_inference_steps: int | None, timesteps: Sequence[int] | None, num_levels: int, config: Any
) -> list[int]:
    """The timesteps that a scheduler announces: `timesteps`, or `num_inference_steps` of them spaced as `config` says.

    num_levels: the length of the table of noise levels, which every timestep must index.
    Raises ValueError unless exactly one of the two is given and the timesteps descend within 0 … num_levels - 1.
    """
    if (num_inference_steps is None) == (timesteps is None):
        raise ValueError(
            f"give either num_inference_steps or timesteps; got num_inference_steps={num_inference_steps} and "
            f"timesteps={timesteps}"
        )
    if timesteps is None:
        chosen = spaced_timesteps(
            num_inference_steps, config.num_train_timesteps, config.timestep_spacing, config.steps_offset
        )
    else:
        chosen = [int(t) for t in timesteps]
    if not chosen or any(later >= earlier for earlier, later in zip(chosen, chosen[1:], strict=False)):
        raise ValueError(f"timesteps must be a descending list without repetition; got {chosen}")
    if chosen[0] >= num_levels or chosen[-1] < 0:
        raise ValueError(f"timesteps go from {chosen[0]} to {chosen[-1]}; they must lie in 0 … {num_levels - 1}")
    return chosen


def link_timesteps(timesteps: Sequence[int]) -> dict[int, int]:
    """Each announced timestep -> the one that a step from it arrives at; the last -> -1, which stands for x_0."""
    return dict(zip(timesteps, [*timesteps[1:], -1], strict=True))


def look_up_previous(previous: Mapping[int, int], timestep: torch.Tensor | int, num_levels: int) -> int:
    """The timestep that a step from `timestep` arrives at. A tensor on a GPU is waited for.

    From an announced one that is by `link_timesteps`, from any other the largest that is announced below it, or -1.

    num_levels: T, the length of the table of noise levels.
    Raises ValueError for a timestep outside 0 … T - 1.
    """
    t = int(timestep)
    if t in previous:
        return previous[t]
    if not 0 <= t < num_levels:
        raise ValueError(f"timestep is {t}; it must lie in 0 … {num_levels - 1}")
    return max((announced for announced in previous if announced < t), default=-1)
