"""latentdiff: captioned pictures in, a published text-to-image model out, on Hugging Face diffusers."""

import importlib

__version__ = "0.1.0"
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


def __getattr__(name: str) -> type:
    """All classes at the first use of any: what they need takes seconds to load, which `latentdiff --help` has not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module(".public", __name__)
    globals().update({each: getattr(public, each) for each in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
