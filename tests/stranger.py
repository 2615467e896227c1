"""Someone with diffusers but without latentdiff, in a process of their own, and the picture that they draw."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

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

_CODE = """
import sys

class NoLatentdiff:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latentdiff":
            raise ImportError("latentdiff is not installed here")

sys.meta_path.insert(0, NoLatentdiff())
source, pipeline, picture, then, tests = sys.argv[1:]
sys.path.append(tests)

import torch
from diffusers import DiffusionPipeline
from stranger import CALLS

class_name, arguments = CALLS[pipeline]

def load(source):
    custom = source if pipeline == "pipeline" else pipeline
    pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline=custom, trust_remote_code=True)
    assert type(pipe).__name__ == class_name, type(pipe)
    assert type(pipe.scheduler).__module__.startswith("diffusers_modules"), type(pipe.scheduler)
    return pipe

pipe = load(source)
if then == "save again":  # what a stranger saves is as good as what they got
    pipe.save_pretrained("again")
    pipe = load("again")
if pipeline not in ("interpolate", "invert"):  # which take seeds of their own, or none
    arguments["generator"] = torch.Generator().manual_seed(0)
torch.save(pipe("a cat", num_inference_steps=4, output_type="pt", **arguments).images, picture)
assert not any(name.split(".")[0] == "latentdiff" for name in sys.modules)
"""


def stranger_draws(source: str, then: str = "", pipeline: str = "pipeline") -> torch.Tensor:
    """The picture (1, 3, H, W) of seed 0 in 4 steps, from a folder or a repository, without latentdiff."""
    with tempfile.TemporaryDirectory() as elsewhere:
        picture = Path(elsewhere, "picture.pt")
        environment = {**os.environ, "HF_HOME": elsewhere}
        done = subprocess.run(
            [sys.executable, "-c", _CODE, source, pipeline, str(picture), then, str(Path(__file__).parent)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(picture, weights_only=True)
