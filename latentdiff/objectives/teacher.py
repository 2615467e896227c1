"""The teacher that a consistency model is distilled from: a frozen UNet under guidance."""

from dataclasses import dataclass

import torch

from ..config.train import TrainConfig
from ..data.batches import Batch
from ..diffusion.consistency import Network, guided
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..models.loading import load_guide_unet, load_schedule, load_unet
from ..models.parts import freeze
from ..models.unet import UNet, use_fast_attention
from ..utils.errors import ConfigError
from .prediction import network_for


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
        if self.guide_unet is not None:
            worse = network_for(self.guide_unet, batch)
        else:
            worse = network_for(self.unet, batch, text=self.empty_caption.expand(len(batch.latents), -1, -1))
        return guided(network_for(self.unet, batch), worse, batch.guidance_scales)


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
    source, revision, variant, setting = config.consistency_teacher, None, None, "consistency_teacher"
    if source is None:
        source, revision, variant = config.pretrained_model_name_or_path, config.revision, config.variant
        setting = "pretrained_model_name_or_path"
    unet = freeze(load_unet(source, revision, variant, config.single_file_config, setting))
    theirs = load_schedule(source, revision, config.single_file_config, setting)
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
