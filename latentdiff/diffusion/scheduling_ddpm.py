"""Ancestral sampling: denoising diffusion probabilistic models (Ho et al. 2020, arXiv 2006.11239).

Constructor, config and `step` have the names of diffusers' DDPMScheduler, so that either library loads the other's
scheduler_config.json. The previous timestep is looked up in the timesteps that `set_timesteps` announced.
"""

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
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
    link_timesteps,
    make_betas,
    predict_x0_and_epsilon,
)


class DDPMScheduler(AnnouncedTimesteps, SchedulerMixin, ConfigMixin):
    """x_{t-1} ~ N(mu(x_t, x_0), sigma_t^2) with the x_0 that the network predicts (DDPM, eq. 6 and 7).

    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see `make_betas`.
    variance_type: sigma_t^2. "fixed_small", "fixed_small_log" and any unknown value: beta-tilde_t, the variance of the
        posterior; "fixed_large", "fixed_large_log": beta_t; "learned": the second half of the network's channels;
        "learned_range": those channels, from -1 to 1, interpolate between the logarithms of beta-tilde_t and beta_t
        (arXiv 2102.09672, eq. 15).
    clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: see `bound_x0`.
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
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        self.betas = make_betas(
            beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas, rescale_betas_zero_snr
        )
        self.alphas = 1 - self.betas
        self.alphas_cumprod = alphas_cumprod(self.betas)
        self.init_noise_sigma = 1.0
        self.variance_type = variance_type
        # Until set_timesteps is called, sampling walks the training grid.
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps).flip(0)
        self._previous = link_timesteps(range(num_train_timesteps - 1, -1, -1))

    def _alpha_bars(self, t: int, prev_t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """abar_t and abar_{t-1}, 0-dim; abar of x_0 itself is 1."""
        one = self.alphas_cumprod.new_ones(())
        return self.alphas_cumprod[t], self.alphas_cumprod[prev_t] if prev_t >= 0 else one

    def _get_variance(
        self,
        t: torch.Tensor | int,
        predicted_variance: torch.Tensor | None = None,
        variance_type: str | None = None,
    ) -> torch.Tensor:
        """sigma_t^2 of a step from `t`: 0-dim, or (B, C, …) as `predicted_variance` where it is learned.

        beta-tilde_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t (DDPM, eq. 7). Always the variance, never its root or log.
        """
        t = int(t)
        abar, abar_prev = self._alpha_bars(t, self.previous_timestep(t))
        beta = 1 - abar / abar_prev
        # The floor keeps the logarithm finite where a step arrives at x_0 and the posterior is a point.
        beta_tilde = ((1 - abar_prev) / (1 - abar) * beta).clamp(min=1e-20)
        variance_type = variance_type or self.variance_type
        if variance_type == "learned":
            return predicted_variance
        if variance_type == "learned_range":
            share = (predicted_variance + 1) / 2
            return torch.exp(share * beta.log() + (1 - share) * beta_tilde.log())
        return beta if variance_type in ("fixed_large", "fixed_large_log") else beta_tilde

    def _split_learned(
        self, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(prediction, predicted variance), each shaped like `sample`; None for a variance that is not learned."""
        if self.variance_type not in ("learned", "learned_range"):
            return model_output, None
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"variance_type is {self.variance_type!r}, so model_output must have {2 * sample.shape[1]} channels, "
                f"twice those of sample; it has shape {tuple(model_output.shape)}"
            )
        prediction, variance = model_output.chunk(2, dim=1)
        return prediction, at_least_float32(variance)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step from x_t = `sample` (B, C, …) to `previous_timestep`, as a rule the one announced next.

        model_output: (B, C, …), or (B, 2C, …) with a learned variance. Half precision is computed in float32.
        Returns prev_sample and pred_original_sample, both (B, C, …) in the dtype of `sample`.
        Raises ValueError as `previous_timestep`.
        """
        t = int(timestep)
        prev_t = self.previous_timestep(t)
        model_output, predicted_variance = self._split_learned(model_output, sample)
        abar, abar_prev = self._alpha_bars(t, prev_t)
        alpha = abar / abar_prev  # of the whole stride from t to prev_t

        # 1. x_0, by eq. 15
        x_0, _ = predict_x0_and_epsilon(self.alphas_cumprod, model_output, sample, t, self.config.prediction_type)
        x_0 = bound_x0(x_0, self.config)

        # 2. the posterior's mean, by eq. 7
        x_0_weight = abar_prev**0.5 * (1 - alpha) / (1 - abar)
        sample_weight = alpha**0.5 * (1 - abar_prev) / (1 - abar)
        prev_sample = x_0_weight * x_0 + sample_weight * at_least_float32(sample)

        # 3. noise. As in diffusers it is drawn at every t > 0, so that generators stay in step; but a step that arrives
        # at x_0 has none left to add, whatever the variance type.
        if t > 0:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
            if prev_t >= 0:
                prev_sample = prev_sample + self._get_variance(t, predicted_variance) ** 0.5 * at_least_float32(noise)

        prev_sample, x_0 = prev_sample.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)
