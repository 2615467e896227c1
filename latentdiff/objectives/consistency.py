"""The losses of a consistency model, with a teacher or without one (see `diffusion.consistency`)."""

from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator

from ..data.batches import Batch
from ..data.latent_cache import HiddenStates
from ..diffusion.consistency import (
    consistency_function,
    ddim_step,
    ddim_trajectory,
    discretization_steps,
    neighbours,
    pseudo_huber,
)
from ..diffusion.noise_schedule import predict_x0_and_epsilon, signal_and_noise_levels
from ..diffusion.scheduling_consistency import ConsistencyScheduler, solver_timesteps
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.unet import UNet, add_guidance_input
from .objective import Objective
from .prediction import network_for, predict
from .teacher import load_teacher


class Consistency(Objective):
    """What all three ways to a consistency model share."""

    draws_in_few_steps = True
    denoises = False
    name = "consistency loss"
    sampler = "Multistep consistency sampling"

    def scheduler(self, schedule: DDPMScheduler) -> ConsistencyScheduler:
        """With the steps that the noise levels are divided into."""
        steps = self.config.consistency_steps
        return ConsistencyScheduler.from_config(schedule.config, original_inference_steps=steps)


class FromTeacher(Consistency):
    """What both ways to learn from a teacher share."""

    preset = "distill"

    @property
    def takes_guidance(self) -> bool:
        """Unless one weight of the teacher's is inside for good."""
        return len(self.config.consistency_guidance) > 1

    def add_inputs(self, unet: UNet) -> None:
        """That of the guidance weight, where it is to be one."""
        if self.takes_guidance:
            add_guidance_input(unet)

    @property
    def guidance_range(self) -> tuple[float, float]:
        """The teacher's."""
        return min(self.config.consistency_guidance), max(self.config.consistency_guidance)

    def prepare(
        self,
        accelerator: Accelerator,
        scheduler: ConsistencyScheduler,
        unet: UNet,
        hidden_states: HiddenStates,
        total_steps: int,
    ) -> None:
        """Load the teacher."""
        teacher = load_teacher(self.config, scheduler, unet, hidden_states([0], [-1]), accelerator.device)
        self._scheduler, self._teacher, self._autocast = scheduler, teacher, accelerator.autocast
        self._guidance_width = getattr(unet.config, "time_cond_proj_dim", None)
        self._steps = scheduler.config.original_inference_steps

    def drawing(self) -> dict[str, Any]:
        """Without guidance, where the teacher's is inside."""
        return super().drawing() | ({} if self.takes_guidance else {"guidance_scale": 1.0})

    def guidance_in_words(self, guidance_scale: float) -> str:
        """A part of `sampler_in_words`."""
        return "guidance inside it" if guidance_scale == 1 else super().guidance_in_words(guidance_scale)


class Distillation(FromTeacher):
    """The student's answer at x_t against its own at x_s, where the teacher's guided DDIM step leads from x_t.

    The second answer is the student's as it is, not that of averaged weights, which trains better (arXiv 2310.14189,
    section 3.2) and needs no further network.
    """

    def __call__(self, model: torch.nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """The loss of each sample (B,)."""
        x_t, timesteps, earlier = noised(self._scheduler, batch, len(self._scheduler) // self._steps)
        flow = self._scheduler.alphas_cumprod, self._teacher.prediction_type
        with torch.no_grad(), self._autocast():
            x_s = ddim_step(self._teacher.of(batch), *flow, x_t, timesteps, earlier)
        return consistency_loss(model, self._scheduler, batch, (x_t, timesteps), (x_s, earlier), self._guidance_width)


class TrajectoryDistillation(FromTeacher):
    """The student's answers at all points of the teacher's trajectories, from the batch's noise on, against their ends.

    No answer has to wait until those below it are learned, as in `Distillation`, and every step of the teacher gives a
    sample (Luhman & Luhman 2021, arXiv 2101.02388, take the first point alone). The loss is the squared error of v
    (arXiv 2202.00512, section 4), whatever the student puts out: that of x_0 over 1 - abar. In epsilon the strongest
    noise, which every picture is drawn from, would hardly count.
    """

    def __call__(self, model: torch.nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """The mean loss over each sample's trajectory (B,)."""
        abar, grid = self._scheduler.alphas_cumprod, solver_timesteps(len(self._scheduler), self._steps)
        with torch.no_grad(), self._autocast():
            points, end = ddim_trajectory(
                self._teacher.of(batch), abar, self._teacher.prediction_type, batch.noise, grid
            )
        x_t, repeated = points.flatten(0, 1), repeat(batch, len(grid))
        timesteps = torch.tensor(grid, device=end.device).repeat_interleave(len(end))
        output = predict(model, repeated, x_t, timesteps, guidance_width=self._guidance_width).sample
        x_0, _ = predict_x0_and_epsilon(abar, output, x_t, timesteps, self._scheduler.config.prediction_type)
        _, sigma = signal_and_noise_levels(abar, timesteps, x_t)
        error = (x_0.unflatten(0, points.shape[:2]) - end) / sigma.unflatten(0, points.shape[:2])
        return error.square().mean(dim=(0, *range(2, error.ndim)))


class ConsistencyTraining(Consistency):
    """The answer at x_t against that at x_s, both of the same picture and noise: no teacher says where x_t leads, but
    on the average over pictures the two agree (arXiv 2303.01469, theorem 2)."""

    fewest_steps = 10  # into which the noise levels are divided at the beginning (arXiv 2310.14189, section 3.4)

    def prepare(
        self,
        accelerator: Accelerator,
        scheduler: ConsistencyScheduler,
        unet: UNet,
        hidden_states: HiddenStates | None,
        total_steps: int,
    ) -> None:
        """Nothing is loaded."""
        self._scheduler, self._total_steps = scheduler, total_steps

    def __call__(self, model: torch.nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """The loss of each sample (B,)."""
        steps = discretization_steps(step, self._total_steps, self.fewest_steps, self.config.consistency_steps)
        x_t, timesteps, earlier = noised(self._scheduler, batch, len(self._scheduler) // steps)
        x_s = self._scheduler.add_noise(batch.latents, batch.noise, earlier)
        return consistency_loss(model, self._scheduler, batch, (x_t, timesteps), (x_s, earlier))


def repeat(batch: Batch, times: int) -> Batch:
    """The whole batch so many times over."""
    return Batch(
        *(
            value if value is None else value * times if isinstance(value, list) else torch.cat([value] * times)
            for value in (getattr(batch, field.name) for field in fields(batch))
        )
    )


def noised(scheduler: ConsistencyScheduler, batch: Batch, skip: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t (B, C, h, w), its timesteps (B,) and those of the neighbours before."""
    timesteps, earlier = neighbours(batch.timesteps, skip)
    return scheduler.add_noise(batch.latents, batch.noise, timesteps), timesteps, earlier


def consistency_loss(
    model: torch.nn.Module,
    scheduler: ConsistencyScheduler,
    batch: Batch,
    at: tuple[torch.Tensor, torch.Tensor],
    neighbour: tuple[torch.Tensor, torch.Tensor],
    guidance_width: int | None = None,
) -> torch.Tensor:
    """d(f(x_t, t), f(x_s, s)) of each sample (B,); the second has no gradient.

    Args:
        at, neighbour: x (B, C, h, w) and its timesteps (B,).
        guidance_width: as `predict` takes it.
    """
    student, kind = network_for(model, batch, guidance_width=guidance_width), scheduler.config.prediction_type
    with torch.no_grad():
        target = consistency_function(student, scheduler.alphas_cumprod, kind, *neighbour)
    return pseudo_huber(consistency_function(student, scheduler.alphas_cumprod, kind, *at), target)
