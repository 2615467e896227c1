"""Someone with diffusers but without latentdiff, in a process of their own, and the picture that they draw."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_CODE = """
import sys

class NoLatentdiff:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latentdiff":
            raise ImportError("latentdiff is not installed here")

sys.meta_path.insert(0, NoLatentdiff())
source, picture, then = sys.argv[1:]

import torch
from diffusers import DiffusionPipeline

def load(source):
    pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline=source, trust_remote_code=True)
    assert type(pipe).__name__ == "LatentDiffPipeline", type(pipe)
    assert type(pipe.scheduler).__module__.startswith("diffusers_modules"), type(pipe.scheduler)
    return pipe

pipe = load(source)
if then == "save again":  # what a stranger saves is as good as what they got
    pipe.save_pretrained("again")
    pipe = load("again")
images = pipe("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, picture)
assert not any(name.split(".")[0] == "latentdiff" for name in sys.modules)
"""


def stranger_draws(source: str, then: str = "") -> torch.Tensor:
    """The picture (1, 3, H, W) of seed 0 in 4 steps, from a folder or a repository, without latentdiff."""
    with tempfile.TemporaryDirectory() as elsewhere:
        picture = Path(elsewhere, "picture.pt")
        environment = {**os.environ, "HF_HOME": elsewhere}
        done = subprocess.run(
            [sys.executable, "-c", _CODE, source, str(picture), then],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(picture, weights_only=True)
