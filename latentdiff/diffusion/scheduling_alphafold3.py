"""AlphaFold3's sampler (Abramson et al. 2024, Nature 630, supplement, algorithm 18), on any network of this project.

It is the stochastic sampler of EDM (Karras et al. 2022, arXiv 2206.00364, algorithm 2) with Euler steps that are too
long on purpose. In units of the data's standard deviation, with s_0 > … > s_N = 0 and s_hat = (1 + gamma) s_{i-1},

    x_hat = x + 1.003 sqrt(s_hat^2 - s_{i-1}^2) noise,
    x     = x_hat + 1.5 (s_i - s_hat) (x_hat - D(x_hat; s_hat)) / s_hat

where gamma = 0.8 as long as s_i > 1/16, and 0 after that. The noise that goes before a step is drawn at the end of the
step before it, so that `step` leads from one call of the network to the next, as of every scheduler. What AlphaFold3
does beside it, to centre and to turn the structure at each step, is not the sampler's but the data's: see the pipeline.

The sample is x, as in diffusers' Euler schedulers, not x_t = x / sqrt(1 + s^2), which `scale_model_input` makes of it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .noise_schedule import (
    PREDICTION_TYPES,
    add_noise,
    alphas_cumprod,
    at_least_float32,
    check_choice,
    make_betas,
)


@dataclass
class AlphaFold3SchedulerOutput(BaseOutput):
    """The sample for the next call of the network, and what the network says of x_0; both (B, …)."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class AlphaFold3Scheduler(SchedulerMixin, ConfigMixin):
    """The noise levels are s_i = (sigma_max^(1/rho) + i/N (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, the last one 0.

    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the noise that the network was trained on,
        see `make_betas`; a noise level between two timesteps' is told to it as a timestep between them, one beyond the
        last as the last.
    prediction_type: what the network predicts, "epsilon", "sample" or "v_prediction".
    sigma_max, sigma_min, rho: in units of the data's standard deviation.
    gamma_0, gamma_min: how much noise is added before a step, and down to which level that it leads to.
    noise_scale, step_scale: of that noise, and of the step.

    Attributes: sigmas: float32 (N + 1,), s_0 … s_N; timesteps: float32 (N,).
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
        prediction_type: str = "epsilon",
        sigma_max: float = 160.0,
        sigma_min: float = 4e-4,
        rho: float = 7.0,
        gamma_0: float = 0.8,
        gamma_min: float = 1 / 16,
        noise_scale: float = 1.003,
        step_scale: float = 1.5,
    ):
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; they must be positive and ascend")
        self.betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas)
        self.alphas_cumprod = alphas_cumprod(self.betas)
        self.set_timesteps(50)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the noise levels of so many steps.

        Raises:
            ValueError: less than one.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
        config, place = self.config, torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64)
        high, low = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
        self.sigmas = ((high + place * (low - high)) ** config.rho).float()
        self.sigmas[-1] = 0
        gamma = torch.where(self.sigmas[1:] > config.gamma_min, config.gamma_0, 0.0)
        self._noised = self.sigmas[:-1] * (1 + gamma)  # s_hat
        self._added = config.noise_scale * (self._noised.square() - self.sigmas[:-1].square()).sqrt()
        self.timesteps = self._timesteps_of(self._noised).to(device)
        self.num_inference_steps, self._step_index = num_inference_steps, 0

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first sample: s_0, and what is added before the first step."""
        return float((self.sigmas[0].square() + self._added[0].square()).sqrt())

    def _timesteps_of(self, sigmas: torch.Tensor) -> torch.Tensor:
        levels = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().log().double().numpy()
        return torch.from_numpy(np.interp(sigmas.log().double().numpy(), levels, np.arange(len(levels)))).float()

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """x_t = x / sqrt(1 + s_hat^2), which the network was trained on."""
        sigma = self._noised[self._index()].item()
        return sample / (1 + sigma**2) ** 0.5

    def _index(self) -> int:
        """The step that comes next. Timesteps cannot tell it, since those of the strongest noise are all the last."""
        if self._step_index >= len(self._noised):
            raise ValueError(f"all {len(self._noised)} steps were done: call set_timesteps before another sample")
        return self._step_index

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> AlphaFold3SchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """From x_hat = `sample` (B, …) to that of the next step; the steps are taken in their order.

        model_output: (B, …), the network's for `scale_model_input(sample)`. Half precision is computed in float32.
        generator: of the noise that goes before the next step.
        Raises ValueError where all steps were taken.
        """
        index = self._index()
        sigma, then = self._noised[index].item(), self.sigmas[index + 1].item()
        x, output = at_least_float32(sample), at_least_float32(model_output)
        if self.config.prediction_type == "sample":
            x_0 = output
        elif self.config.prediction_type == "epsilon":
            x_0 = x - sigma * output
        else:
            x_0 = x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * output
        x = x + self.config.step_scale * (then - sigma) * (x - x_0) / sigma
        if index + 1 < len(self._noised) and (added := self._added[index + 1].item()):
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=model_output.dtype)
            x = x + added * at_least_float32(noise)
        self._step_index += 1
        x, x_0 = x.to(sample.dtype), x_0.to(sample.dtype)
        return AlphaFold3SchedulerOutput(prev_sample=x, pred_original_sample=x_0) if return_dict else (x, x_0)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t of the training; see `noise_schedule.add_noise`."""
        return add_noise(self.alphas_cumprod, original_samples, noise, timesteps)
