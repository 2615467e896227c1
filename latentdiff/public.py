"""The classes that drawing needs, loaded together when `latentdiff` is first asked for one of its own."""

import sys

# Together: diffusers finds a scheduler class by its module's name in sys.modules when it loads a pipeline.
from .diffusion.scheduling_consistency import ConsistencyScheduler
from .diffusion.scheduling_ddim import DDIMScheduler
from .diffusion.scheduling_ddpm import DDPMScheduler
from .models.mp_unet import MPUNet2DConditionModel
from .pipelines.portable_saving import OWN_UNETS
from .pipelines.text2img import LatentDiffPipeline

__all__ = [
    "ConsistencyScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "LatentDiffPipeline",
    "MPUNet2DConditionModel",
]

OWN_UNETS[MPUNet2DConditionModel.__name__] = MPUNet2DConditionModel

# Where these lay before version 0.2: the index of a folder that diffusers itself saved names a class's module.
_MOVED = {
    "diffusion": ("clip_guidance", "guidance", "noise_schedule", "posthoc_ema")
    + ("scheduling_consistency", "scheduling_ddim", "scheduling_ddpm"),
    "models": ("mp_layers", "mp_unet"),
}
for _room, _names in _MOVED.items():
    for _name in _names:
        sys.modules[f"{__package__}.{_name}"] = sys.modules[f"{__package__}.{_room}.{_name}"]
