"""Multistep consistency sampling: from the noise of any timestep to a picture in one step, and in a few to a better one
(Song et al. 2023, arXiv 2303.01469, algorithm 1; in latents Luo et al. 2023, arXiv 2310.04378, algorithm 3).

Constructor, config and `step` have the names of diffusers' LCMScheduler, so that either library loads the other's
scheduler_config.json and draws the same picture.
"""

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .announced_timesteps import AnnouncedTimesteps
from .noise_schedule import (
    PREDICTION_TYPES,
    add_noise,
    alphas_cumprod,
    at_least_float32,
    bound_x0,
    check_choice,
    choose_timesteps,
    make_betas,
    predict_x0_and_epsilon,
)

SIGMA_DATA = 0.5  # of arXiv 2310.04378; with timesteps in the place of noise levels it is no measure of the data


def boundary_scalings(timesteps: torch.Tensor, timestep_scaling: float = 10.0) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out of f(x, t) = c_skip x + c_out x_0(x, t), which make f(x, 0) = x (arXiv 2310.04378, section 4.1).

    c_skip = sd^2 / ((s t)^2 + sd^2), c_out = s t / sqrt((s t)^2 + sd^2) with sd = 0.5 and s = `timestep_scaling`: at
    the default from the first timesteps on 0 and 1 to three digits.

    Args:
        timesteps: of any shape.

    Returns:
        float32 in the shape of `timesteps`.
    """
    scaled = timesteps.to(torch.float32) * timestep_scaling
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def solver_timesteps(num_train_timesteps: int, original_inference_steps: int) -> list[int]:
    """The ascending timesteps k - 1, 2 k - 1, … that a consistency model was distilled at, k = T // N.

    Raises ValueError unless 1 <= N <= T.
    """
    if not 1 <= original_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"original_inference_steps is {original_inference_steps}; it must lie in 1 … {num_train_timesteps}"
        )
    skip = num_train_timesteps // original_inference_steps
    return [number * skip - 1 for number in range(1, original_inference_steps + 1)]


class ConsistencyScheduler(AnnouncedTimesteps, SchedulerMixin, ConfigMixin):
    """x_s = sqrt(abar_s) f(x_t, t) + sqrt(1 - abar_s) noise, from timestep to timestep, and f(x_t, t) in the end.

    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see `make_betas`.
    original_inference_steps: N of `solver_timesteps`, from which those of a call are taken.
    clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: see `bound_x0`.
    prediction_type: what the network predicts, "epsilon", "sample" or "v_prediction"; see `predict_x0_and_epsilon`.
    timestep_scaling: see `boundary_scalings`.
    set_alpha_to_one, steps_offset, timestep_spacing: of diffusers' scheduler, which makes no use of them either.

    Attributes: betas, alphas, alphas_cumprod: float32 (T,); timesteps: int64 (N,), all T before `set_timesteps`.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ):
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        solver_timesteps(num_train_timesteps, original_inference_steps)
        self.betas = make_betas(
            beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas, rescale_betas_zero_snr
        )
        self.alphas = 1 - self.betas
        self.alphas_cumprod = alphas_cumprod(self.betas)
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Announces the timesteps to sample at: the given ones, or `num_inference_steps` spread over those of training.

        original_inference_steps: N of `solver_timesteps`, by default the config's.
        strength: in (0, 1], the share of those N that the steps are spread over, from below; there are then fewer steps
            than asked for where that share holds fewer.
        Raises ValueError for more steps than N, and for a strength beside given timesteps or out of its range.
        """
        if not 0 < strength <= 1 or (timesteps is not None and strength < 1):
            raise ValueError(f"strength is {strength}; it must lie above 0 and at most at 1, with timesteps at 1")
        if timesteps is None and num_inference_steps is not None:
            solved = solver_timesteps(len(self), original_inference_steps or self.config.original_inference_steps)
            if not 1 <= num_inference_steps <= len(solved):
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps}; it must lie in 1 … {len(solved)}, the number of "
                    "steps that the model was distilled at (original_inference_steps)"
                )
            # 0.58 * 50 is 28.999… in floating point; and never none.
            solved = solved[: max(int(round(len(solved) * strength, 6)), 1)]
            count = min(num_inference_steps, len(solved))
            places = np.linspace(0, len(solved), count, endpoint=False)  # rounded as diffusers does
            chosen = [solved[-1 - int(place)] for place in places]
        else:
            chosen = choose_timesteps(num_inference_steps, timesteps, len(self), self.config)
        self._announce(chosen, device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: torch.Tensor | None = None,
    ) -> LCMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from x_t = `sample` (B, C, …): to f(x_t, t), and with new noise to the timestep announced next.

        From one that was not announced it leads to the largest announced below it.

        model_output: (B, C, …). Half precision is computed in float32.
        generator: of the noise, or the noise itself (B, C, …) as `variance_noise`; the last step has none.
        Returns prev_sample and denoised = f(x_t, t), both (B, C, …) in the dtype of `sample`.
        Raises ValueError for a timestep outside 0 … T - 1, before `set_timesteps`, or for both sources of noise.
        """
        if generator is not None and variance_noise is not None:
            raise ValueError("generator and variance_noise were both given; the noise can come from only one of them")
        t = int(timestep)
        previous = self.previous_timestep(t)
        x_0, _ = predict_x0_and_epsilon(self.alphas_cumprod, model_output, sample, t, self.config.prediction_type)
        c_skip, c_out = boundary_scalings(torch.tensor(t), self.config.timestep_scaling)
        denoised = c_out * bound_x0(x_0, self.config) + c_skip * at_least_float32(sample)
        prev_sample = denoised
        if previous >= 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            prev_sample = add_noise(self.alphas_cumprod, denoised, variance_noise, previous)
        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return LCMSchedulerOutput(prev_sample=prev_sample, denoised=denoised)
