"""The classes that `latentdiff` offers, loaded together when one of them is first asked for."""

# Together: diffusers finds a scheduler class by its module's name in sys.modules when it loads a pipeline.
from .mp_unet import MPUNet2DConditionModel
from .pipelines.img2img import LatentDiffImg2ImgPipeline
from .pipelines.inpaint import LatentDiffInpaintPipeline
from .pipelines.interpolate import LatentDiffInterpolatePipeline
from .pipelines.invert import LatentDiffInversionPipeline
from .pipelines.portable_saving import OWN_UNETS
from .pipelines.text2img import LatentDiffPipeline
from .scheduling_consistency import ConsistencyScheduler
from .scheduling_ddim import DDIMScheduler
from .scheduling_ddpm import DDPMScheduler

__all__ = [
    "ConsistencyScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "LatentDiffImg2ImgPipeline",
    "LatentDiffInpaintPipeline",
    "LatentDiffInterpolatePipeline",
    "LatentDiffInversionPipeline",
    "LatentDiffPipeline",
    "MPUNet2DConditionModel",
]

OWN_UNETS[MPUNet2DConditionModel.__name__] = MPUNet2DConditionModel
