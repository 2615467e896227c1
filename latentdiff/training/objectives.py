"""What the loop of train_text2img.py minimises: the denoising loss, or that of a consistency model, with a teacher or
without one (see `consistency`)."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator

from ..config.train import TrainConfig
from ..data.batches import Batch
from ..diffusion.consistency import (
    Network,
    consistency_function,
    ddim_step,
    ddim_trajectory,
    discretization_steps,
    guided,
    neighbours,
    pseudo_huber,
)
from ..diffusion.losses import denoising_loss, min_snr_weight, training_target
from ..diffusion.noise_schedule import predict_x0_and_epsilon, signal_and_noise_levels
from ..diffusion.scheduling_consistency import ConsistencyScheduler, solver_timesteps
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.loading import load_guide_unet, load_schedule, load_unet
from ..models.parts import freeze
from ..models.unet import UNet, use_fast_attention
from ..pipelines.guided_sampling import guidance_embedding
from ..utils.errors import ConfigError
from .data import Data


def training_loss(model: torch.nn.Module, scheduler, batch: Batch, config: TrainConfig) -> torch.Tensor:
    """The weighted loss of each sample of a batch in what the UNet predicts -> (B,).

    Where the UNet learns its uncertainty u of each noise level, loss / exp(u) + u (arXiv 2312.02696, eq. 21): at its
    least u is the logarithm of the loss there, so that all levels count the same.

    Args:
        model: the UNet, or one with a text encoder in front of it, for batches without hidden states.
    """
    noisy_latents = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    seen = noisy_latents if batch.conditions is None else torch.cat([noisy_latents, batch.conditions], dim=1)
    text = batch.captions if batch.encoder_hidden_states is None else batch.encoder_hidden_states
    output = model(seen, batch.timesteps, text)
    kind, abar = scheduler.config.prediction_type, scheduler.alphas_cumprod
    losses = denoising_loss(output.sample, training_target(kind, batch.latents, batch.noise, abar, batch.timesteps))
    if (u := getattr(output, "log_variance", None)) is not None:
        losses = losses / u.exp() + u
    if config.snr_gamma is not None:
        losses = losses * min_snr_weight(abar, batch.timesteps, config.snr_gamma, kind)
    return losses


FEWEST_STEPS = 10  # of training without a teacher, at its beginning (arXiv 2310.14189, section 3.4)

# (model, batch, optimizer step) -> the loss of each sample (B,)
Objective = Callable[[torch.nn.Module, Batch, int], torch.Tensor]


def make_objective(
    config: TrainConfig,
    accelerator: Accelerator,
    scheduler: DDPMScheduler | ConsistencyScheduler,
    unet: UNet,
    data: Data,
    total_steps: int,
) -> Objective:
    """What the settings ask for.

    Raises:
        ConfigError: the teacher cannot be loaded.
    """
    if config.has_teacher:
        kind = Distillation if config.consistency == "distillation" else TrajectoryDistillation
        teacher = load_teacher(config, scheduler, unet, data.hidden_states([0], [-1]), accelerator.device)
        guidance_width = getattr(unet.config, "time_cond_proj_dim", None)
        return kind(scheduler, teacher, accelerator, guidance_width)
    if config.consistency == "training":
        return ConsistencyTraining(scheduler, config.consistency_steps, total_steps)
    return lambda model, batch, step: training_loss(model, scheduler, batch, config)


@dataclass(frozen=True)
class Teacher:
    """A frozen UNet under guidance, on the device."""

    unet: UNet
    prediction_type: str
    guide_unet: UNet | None
    """What its guidance leads away from, given the captions;"""
    empty_caption: torch.Tensor
    """or, where there is none, the UNet itself given this (1, L, D)."""

    def of(self, batch: Batch) -> Network:
        """Its guided answer for the captions of a batch."""
        with_captions = told(self.unet, batch, batch.encoder_hidden_states)
        if self.guide_unet is not None:
            worse = told(self.guide_unet, batch, batch.encoder_hidden_states)
        else:
            worse = told(self.unet, batch, self.empty_caption.expand(len(batch.latents), -1, -1))
        return guided(with_captions, worse, batch.guidance_scales)


def load_teacher(
    config: TrainConfig,
    scheduler: ConsistencyScheduler,
    student: UNet,
    empty_caption: torch.Tensor,
    device: torch.device | str = "cpu",
) -> Teacher:
    """The teacher that the settings name, in fp32.

    Raises:
        ConfigError: it cannot be loaded, is of another noise schedule than the student, or takes other inputs.
    """
    source, revision, variant = config.consistency_teacher, None, None
    if source is None:
        source, revision, variant = config.pretrained_model_name_or_path, config.revision, config.variant
    unet, theirs = freeze(load_unet(source, revision, variant)), load_schedule(source, revision)
    if not torch.equal(theirs.alphas_cumprod, scheduler.alphas_cumprod):
        raise ConfigError(f"consistency_teacher: {source!r} has another noise schedule than the student")
    _check_inputs("consistency_teacher", unet, student)
    guide_unet = None
    if config.consistency_guide_unet is not None:
        guide_unet = freeze(load_guide_unet(config.consistency_guide_unet, "consistency_guide_unet:"))
        _check_inputs("consistency_guide_unet", guide_unet, student)
    for network in filter(None, (unet, guide_unet)):
        use_fast_attention(network.to(device))
    return Teacher(unet, theirs.config.prediction_type, guide_unet, empty_caption.to(device))


def _check_inputs(setting: str, unet: UNet, student: UNet) -> None:
    for name in ("in_channels", "cross_attention_dim"):
        if unet.config[name] != student.config[name]:
            raise ConfigError(f"{setting}: its {name} is {unet.config[name]}, and the student's {student.config[name]}")
    if getattr(unet.config, "time_cond_proj_dim", None) is not None:
        raise ConfigError(f"{setting}: it takes its guidance as an input: it is a student itself")


class FromTeacher:
    """What both ways to learn from a teacher hold.

    Args:
        scheduler: with the steps that the noise levels are divided into.
        guidance_width: of the student's input for the guidance weight, where it has one.
    """

    def __init__(
        self, scheduler: ConsistencyScheduler, teacher: Teacher, accelerator: Accelerator, guidance_width: int | None
    ):
        self._scheduler, self._teacher, self._guidance_width = scheduler, teacher, guidance_width
        self._autocast = accelerator.autocast
        self._steps = scheduler.config.original_inference_steps


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
        text = repeated.captions if batch.encoder_hidden_states is None else repeated.encoder_hidden_states
        output = told(model, repeated, text, self._guidance_width)(x_t, timesteps)
        x_0, _ = predict_x0_and_epsilon(abar, output, x_t, timesteps, self._scheduler.config.prediction_type)
        _, sigma = signal_and_noise_levels(abar, timesteps, x_t)
        error = (x_0.unflatten(0, points.shape[:2]) - end) / sigma.unflatten(0, points.shape[:2])
        return error.square().mean(dim=(0, 2, 3, 4))


class ConsistencyTraining:
    """The answer at x_t against that at x_s, both of the same picture and noise: no teacher says where x_t leads, but
    on the average over pictures the two agree (arXiv 2303.01469, theorem 2).

    Args:
        most_steps: into how many the noise levels are divided in the end.
    """

    def __init__(self, scheduler: ConsistencyScheduler, most_steps: int, total_steps: int):
        self._scheduler, self._most_steps, self._total_steps = scheduler, most_steps, total_steps

    def __call__(self, model: torch.nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """The loss of each sample (B,)."""
        steps = discretization_steps(step, self._total_steps, FEWEST_STEPS, self._most_steps)
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
        guidance_width: see `told`.
    """
    text = batch.captions if batch.encoder_hidden_states is None else batch.encoder_hidden_states
    student, kind = told(model, batch, text, guidance_width), scheduler.config.prediction_type
    with torch.no_grad():
        target = consistency_function(student, scheduler.alphas_cumprod, kind, *neighbour)
    return pseudo_huber(consistency_function(student, scheduler.alphas_cumprod, kind, *at), target)


def told(
    model: torch.nn.Module, batch: Batch, text: torch.Tensor | list[str], guidance_width: int | None = None
) -> Network:
    """A network with all that it is told beside x_t and the timesteps.

    Args:
        guidance_width: of its embedding of the teacher's guidance weight, where it takes one.
    """
    guidance = {}
    if guidance_width is not None:
        guidance["timestep_cond"] = guidance_embedding(batch.guidance_scales - 1, guidance_width)

    def network(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen = x_t if batch.conditions is None else torch.cat([x_t, batch.conditions], dim=1)
        return model(seen, timesteps, text, **guidance).sample

    return network
