"""What the loop of train_text2img.py minimises: the denoising loss, or that of a consistency model, with a teacher or
without one (see `consistency`)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from .batches import Batch
from .config import ConfigError, TrainConfig
from .consistency import (
    Network,
    consistency_function,
    discretization_steps,
    guided_ddim_step,
    neighbours,
    pseudo_huber,
)
from .models import UNet, freeze, load_unet
from .pipelines.guided_sampling import guidance_embedding
from .scheduling_consistency import ConsistencyScheduler
from .scheduling_ddpm import DDPMScheduler
from .training import load_schedule, training_loss, use_fast_attention
from .training_data import Data

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
    if config.consistency == "distillation":
        teacher = load_teacher(config, scheduler, unet)
        teacher.unet.to(accelerator.device)
        empty_caption = data.hidden_states([0], [-1]).to(accelerator.device)
        guidance_width = getattr(unet.config, "time_cond_proj_dim", None)
        return Distillation(scheduler, teacher, empty_caption, accelerator, guidance_width)
    if config.consistency == "training":
        return ConsistencyTraining(scheduler, config.consistency_steps, total_steps)
    return lambda model, batch, step: training_loss(model, scheduler, batch, config)


@dataclass(frozen=True)
class Teacher:
    """A frozen UNet and what it puts out."""

    unet: UNet
    prediction_type: str


def load_teacher(config: TrainConfig, scheduler: ConsistencyScheduler, student: UNet) -> Teacher:
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
    for name in ("in_channels", "cross_attention_dim"):
        if unet.config[name] != student.config[name]:
            raise ConfigError(
                f"consistency_teacher: its {name} is {unet.config[name]}, and the student's {student.config[name]}"
            )
    if getattr(unet.config, "time_cond_proj_dim", None) is not None:
        raise ConfigError(f"consistency_teacher: {source!r} takes its guidance as an input: it is a student itself")
    use_fast_attention(unet)
    return Teacher(unet, theirs.config.prediction_type)


class Distillation:
    """The student's answer at x_t against its own at x_s, where the teacher's guided DDIM step leads from x_t.

    The second answer is the student's as it is, not that of averaged weights, which trains better (arXiv 2310.14189,
    section 3.2) and needs no further network.

    Args:
        scheduler: with the steps that the noise levels are divided into.
        teacher: on the device.
        empty_caption: (1, L, D), what its guidance leads away from.
        guidance_width: of the student's input for the guidance weight, where it has one.
    """

    def __init__(
        self,
        scheduler: ConsistencyScheduler,
        teacher: Teacher,
        empty_caption: torch.Tensor,
        accelerator: Accelerator,
        guidance_width: int | None,
    ):
        self._scheduler, self._teacher, self._empty_caption = scheduler, teacher, empty_caption
        self._guidance_width = guidance_width
        self._autocast = accelerator.autocast
        self._skip = len(scheduler) // scheduler.config.original_inference_steps

    def __call__(self, model: torch.nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """The loss of each sample (B,)."""
        x_t, timesteps, earlier = noised(self._scheduler, batch, self._skip)
        with torch.no_grad(), self._autocast():
            x_s = guided_ddim_step(
                told(self._teacher.unet, batch, batch.encoder_hidden_states),
                told(self._teacher.unet, batch, self._empty_caption.expand(len(x_t), -1, -1)),
                batch.guidance_scales,
                self._scheduler.alphas_cumprod,
                self._teacher.prediction_type,
                x_t,
                timesteps,
                earlier,
            )
        return consistency_loss(model, self._scheduler, batch, (x_t, timesteps), (x_s, earlier), self._guidance_width)


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
