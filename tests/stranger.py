"""Someone with diffusers but without latentdiff, in a process of their own, and the picture that they draw."""

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from forked import Forked, hf_home

PICTURE = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
MASK = torch.zeros(1, 1, 16, 16).index_fill(3, torch.arange(8), 1.0)  # the left half
# By the name of its file, a pipeline's class and what it is called with besides the prompt.
CALLS = {
    "pipeline": ("LatentDiffPipeline", {}),
    "img2img": ("LatentDiffImg2ImgPipeline", {"image": PICTURE}),
    "inpaint": ("LatentDiffInpaintPipeline", {"image": PICTURE, "mask_image": MASK}),
    "interpolate": ("LatentDiffInterpolatePipeline", {"seeds": [0, 1], "num_frames": 3}),
    "invert": ("LatentDiffInversionPipeline", {"image": PICTURE, "source_prompt": "a dog"}),
}


class _NoLatentdiff:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latentdiff":
            raise ImportError("latentdiff is not installed here")


def _load(source: str, pipeline: str):
    from diffusers import DiffusionPipeline

    custom = source if pipeline == "pipeline" else pipeline
    pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline=custom, trust_remote_code=True)
    assert type(pipe).__name__ == CALLS[pipeline][0], type(pipe)
    assert type(pipe.scheduler).__module__.startswith("diffusers_modules"), type(pipe.scheduler)
    return pipe


def _draw(source: str, pipeline: str, picture: str, then: str) -> None:
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (here, here.parent)]
    sys.meta_path.insert(0, _NoLatentdiff())
    pipe = _load(source, pipeline)
    if then == "save again":  # what a stranger saves is as good as what they got
        pipe.save_pretrained("again")
        pipe = _load("again", pipeline)
    arguments = dict(CALLS[pipeline][1])
    if pipeline not in ("interpolate", "invert"):  # which take seeds of their own, or none
        arguments["generator"] = torch.Generator().manual_seed(0)
    torch.save(pipe("a cat", num_inference_steps=4, output_type="pt", **arguments).images, picture)
    assert not any(name.split(".")[0] == "latentdiff" for name in sys.modules)


def stranger_draws(source: str, then: str = "", pipeline: str = "pipeline") -> torch.Tensor:
    """The picture (1, 3, H, W) of seed 0 in 4 steps, from a folder or a repository, without latentdiff."""
    for kept in hf_home().iterdir():  # nobody has fetched anything for them before
        shutil.rmtree(kept)
    with tempfile.TemporaryDirectory() as elsewhere:
        picture = Path(elsewhere, "picture.pt")
        process = Forked(_draw, source, pipeline, str(picture), then, cwd=elsewhere)
        (said,) = process.communicate()
        assert process.returncode == 0, said[-3000:]
        return torch.load(picture, weights_only=True)
