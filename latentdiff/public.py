"""The classes that drawing needs, loaded together when `latentdiff` is first asked for one of its own."""

# Together: diffusers finds a scheduler class by its module's name in sys.modules when it loads a pipeline.
from .mp_unet import MPUNet2DConditionModel
from .pipelines.portable_saving import OWN_UNETS
from .pipelines.text2img import LatentDiffPipeline
from .scheduling_consistency import ConsistencyScheduler
from .scheduling_ddim import DDIMScheduler
from .scheduling_ddpm import DDPMScheduler

__all__ = [
    "ConsistencyScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "LatentDiffPipeline",
    "MPUNet2DConditionModel",
]

OWN_UNETS[MPUNet2DConditionModel.__name__] = MPUNet2DConditionModel
