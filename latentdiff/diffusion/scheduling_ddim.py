"""Denoising diffusion implicit models (Song et al. 2020, arXiv 2010.02502): few steps, deterministic with eta = 0.

Constructor, config and `step` have the names of diffusers' DDIMScheduler, so that either library loads the other's
scheduler_config.json. The previous timestep is looked up in the timesteps that `set_timesteps` announced: t - T // N,
which diffusers takes, is another one on linspace grids, and on trailing grids unless N divides T.
"""

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .announced_timesteps import AnnouncedTimesteps
from .noise_schedule import (
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    alphas_cumprod,
    at_least_float32,
    bound_x0,
    check_choice,
    make_betas,
    predict_x0_and_epsilon,
)


class DDIMScheduler(AnnouncedTimesteps, SchedulerMixin, ConfigMixin):
    """x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma_t^2) epsilon + sigma_t noise (DDIM, eq. 12).

    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see `make_betas`.
    clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: see `bound_x0`.
    set_alpha_to_one: the last step arrives at x_0 itself (abar = 1); False: at the noise level of timestep 0.
    prediction_type: what the network predicts, "epsilon", "sample" or "v_prediction"; see `predict_x0_and_epsilon`.
    timestep_spacing, steps_offset: see `spaced_timesteps`.

    Attributes: betas, alphas, alphas_cumprod: float32 (T,); timesteps: int64 (N,), all T before `set_timesteps`.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ):
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        self.betas = make_betas(
            beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas, rescale_betas_zero_snr
        )
        self.alphas = 1 - self.betas
        self.alphas_cumprod = alphas_cumprod(self.betas)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def _alpha_bars(self, t: int, prev_t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """abar_t and abar_{t-1}, 0-dim; where there is no previous timestep, the final one."""
        return self.alphas_cumprod[t], self.alphas_cumprod[prev_t] if prev_t >= 0 else self.final_alpha_cumprod

    def _get_variance(self, timestep: int, prev_timestep: int) -> torch.Tensor:
        """sigma_t^2 at eta = 1: (1 - abar_{t-1}) / (1 - abar_t) (1 - abar_t / abar_{t-1}) (DDIM, eq. 16), 0-dim."""
        abar, abar_prev = self._alpha_bars(timestep, prev_timestep)
        return (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from x_t = `sample` (B, C, …) to `previous_timestep`, as a rule the one announced next.

        model_output: (B, C, …). Half precision is computed in float32.
        eta: 0 is deterministic, 1 has the variance of DDPM; the noise is drawn from `generator` or is `variance_noise`.
        use_clipped_model_output: take epsilon anew from the x_0 that was clipped or thresholded.
        Returns prev_sample and pred_original_sample, both (B, C, …) in the dtype of `sample`.
        Raises ValueError as `previous_timestep`, for eta outside 0 … 1, or both sources of noise at once.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must lie in 0 … 1")
        if generator is not None and variance_noise is not None and eta > 0:
            raise ValueError("generator and variance_noise were both given; the noise can come from only one of them")
        t = int(timestep)
        prev_t = self.previous_timestep(t)
        abar, abar_prev = self._alpha_bars(t, prev_t)

        # 1. x_0 and epsilon, by eq. 12
        x_0, epsilon = predict_x0_and_epsilon(self.alphas_cumprod, model_output, sample, t, self.config.prediction_type)
        x_0 = bound_x0(x_0, self.config)
        if use_clipped_model_output:
            _, epsilon = predict_x0_and_epsilon(self.alphas_cumprod, x_0, sample, t, "sample")

        # 2. "predicted x_0" and "direction pointing to x_t", the terms of eq. 12
        sigma = eta * self._get_variance(t, prev_t) ** 0.5
        # Rounding can take this below 0 where abar_t = 0 and eta = 1: the whole variance is then fresh noise.
        direction = (1 - abar_prev - sigma**2).clamp(min=0) ** 0.5
        prev_sample = abar_prev**0.5 * x_0 + direction * epsilon

        # 3. "random noise"
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            prev_sample = prev_sample + sigma * at_least_float32(variance_noise)

        prev_sample, x_0 = prev_sample.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_0
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)

    def inversion_step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        model_input: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """`step` with eta = 0 run upwards, from where it arrives to `timestep` (DDIM, end of section 4.3).

        sample: (B, C, …), x at the timestep announced after `timestep`; for the last one x_0, or x at the final abar.
        model_output: (B, C, …), the network's at `timestep` for `model_input`, which stands in for the x_t sought:
            `sample` by default, or a better estimate. The output for x_t itself makes this the exact inverse of `step`,
            so that repeating a step with its own result as `model_input` removes the error.
        Returns x_t as prev_sample and its x_0 as pred_original_sample, both (B, C, …) in the dtype of `sample`. x_0 is
        neither clipped nor thresholded: where `step` does that, it has no inverse.
        Raises ValueError as `previous_timestep`.
        """
        t = int(timestep)
        abar, abar_prev = self._alpha_bars(t, self.previous_timestep(t))
        model_input = sample if model_input is None else model_input
        x_0, epsilon = predict_x0_and_epsilon(
            self.alphas_cumprod, model_output, model_input, t, self.config.prediction_type
        )
        if abar == 0 and abar_prev < 1:
            # x_t is all noise, of which the network can say nothing new: it is what x_0 leaves of the sample.
            epsilon = (at_least_float32(sample) - abar_prev**0.5 * x_0) / (1 - abar_prev) ** 0.5
        else:
            x_0 = (at_least_float32(sample) - (1 - abar_prev) ** 0.5 * epsilon) / abar_prev**0.5
        x_t = abar**0.5 * x_0 + (1 - abar) ** 0.5 * epsilon

        x_t, x_0 = x_t.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return x_t, x_0
        return DDIMSchedulerOutput(prev_sample=x_t, pred_original_sample=x_0)
