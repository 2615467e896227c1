"""latentdiff: captioned pictures in, a published text-to-image model out, on Hugging Face diffusers."""

import importlib
from pathlib import Path

__version__ = "0.1.0"

# An installed package has its pipelines within; in a checkout they lie beside it, installed or not.
if not (Path(__path__[0]) / "pipelines").is_dir():
    __path__.append(str(Path(__path__[0]).parent))

# The module of each. Those of "public" are loaded together; who only draws does without the rest.
_MODULES = {
    "ConsistencyScheduler": "public",
    "DDIMScheduler": "public",
    "DDPMScheduler": "public",
    "LatentDiffImg2ImgPipeline": "pipelines.img2img",
    "LatentDiffInpaintPipeline": "pipelines.inpaint",
    "LatentDiffInterpolatePipeline": "pipelines.interpolate",
    "LatentDiffInversionPipeline": "pipelines.invert",
    "LatentDiffPipeline": "public",
    "MPUNet2DConditionModel": "public",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> type:
    """A class when it is first used: what it needs takes seconds to load, which `latentdiff --help` has not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".public", __name__)
    globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
