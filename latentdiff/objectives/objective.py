"""What every objective says: its loss, and all that follows from it, scheduler, inputs, pictures, words."""

from typing import Any

import torch
from accelerate import Accelerator

from ..config.train import TrainConfig
from ..data.batches import Batch
from ..data.latent_cache import HiddenStates
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.unet import UNet

Scheduler = DDPMScheduler | ConsistencyScheduler


class Objective:
    """What a run minimises. A new one is a subclass and a line in `choice.OBJECTIVES`.

    It is made of the settings alone and says what follows from them; `prepare` comes before the first loss.
    """

    draws_in_few_steps = False
    """Whether the result is a consistency model, which draws in one to eight steps."""
    denoises = True
    """Whether the denoising loss of held-out pictures says how well it goes."""
    preset: str | None = None
    """The preset that runs of this kind begin from, where it is one of its own."""
    name = "epsilon loss"
    """What a plot of the loss says beside its axis."""
    sampler = "DDIM"
    """What draws a run's pictures, in words."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def scheduler(self, schedule: DDPMScheduler) -> Scheduler:
        """The scheduler of what is trained on a noise schedule."""
        return schedule

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance weight is an input of the UNet."""
        return False

    def add_inputs(self, unet: UNet) -> None:
        """Give the UNet the inputs that it needs for this."""

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """What guidance scales each batch draws from evenly, where it has any."""
        return None

    def prepare(
        self,
        accelerator: Accelerator,
        scheduler: Scheduler,
        unet: UNet,
        hidden_states: HiddenStates | None,
        total_steps: int,
    ) -> None:
        """Load what the loss needs beside the model.

        Args:
            unet: that is trained, before it is wrapped.
            hidden_states: of the captions, where the text encoder is frozen.

        Raises:
            ConfigError: that cannot be loaded.
        """
        self._scheduler = scheduler

    def __call__(self, model: torch.nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """The loss of each sample (B,).

        Args:
            model: as prepared by accelerate.
            step: optimizer steps done before.
        """
        raise NotImplementedError

    # Pictures and words

    def drawing(self) -> dict[str, Any]:
        """Steps and guidance of a run's pictures."""
        return {
            "num_inference_steps": self.config.validation_inference_steps,
            "guidance_scale": self.config.validation_guidance_scale,
        }

    def sampler_in_words(self, num_inference_steps: int, guidance_scale: float) -> str:
        """For a card."""
        return f"{self.sampler}, {num_inference_steps} steps, {self.guidance_in_words(guidance_scale)}."

    def guidance_in_words(self, guidance_scale: float) -> str:
        """A part of `sampler_in_words`."""
        return f"guidance {guidance_scale:g}"
