"""ONNX Runtime and OpenVINO beside torch on a CPU, side by side in one run, from a saved folder:

    python benchmarks/runtimes.py --output benchmarks/results/runtimes.json

optimum exports the folder to both; what that needs goes into an environment of its own, which is made under runs/. The
three draw the same noise in turn, in one process there, with as many threads each. Ratios are of neighbouring turns:
their median, with the lowest and the highest.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from sampling_speed import spread

from latentdiff.utils.errors import ConfigError
from latentdiff.utils.files import packaged_checkpoint
from latentdiff.utils.flags import run_cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from environments import NoPackages, make_environment  # noqa: E402

PACKAGES = ("optimum-onnx[onnxruntime]", "optimum-intel[openvino]", "diffusers<0.37")
CHILD = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import diffusers, onnxruntime, openvino, torch, transformers
from optimum.intel import OVStableDiffusionPipeline
from optimum.onnxruntime import ORTStableDiffusionPipeline
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
folder, threads, turns, steps, scale = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
torch.set_num_threads(threads)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
pipelines = {
    "torch": diffusers.StableDiffusionPipeline.from_pretrained(folder),
    "ONNX Runtime": ORTStableDiffusionPipeline.from_pretrained(folder, export=True, session_options=options),
    "OpenVINO": OVStableDiffusionPipeline.from_pretrained(folder, export=True, load_in_8bit=False, ov_config=exact),
}
unet = pipelines["torch"].unet.config
how = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}
how["latents"] = torch.randn(
    (1, unet.in_channels, unet.sample_size, unet.sample_size), generator=torch.Generator().manual_seed(0)
)
seconds, pictures = {name: [] for name in pipelines}, {}
for turn in range(turns + 1):
    # In turn first and last, so that a machine that grows slower, or faster, favours none.
    for name in list(pipelines)[:: 1 if turn % 2 else -1]:
        pipelines[name].set_progress_bar_config(disable=True)
        started = time.perf_counter()
        pictures[name] = pipelines[name]("a cat, twemoji style", **how).images
        seconds[name] += [time.perf_counter() - started] * bool(turn)  # the first one warms up
apart = {name: float(abs(picture - pictures["torch"]).max()) for name, picture in pictures.items()}
modules = (torch, onnxruntime, openvino, transformers, diffusers)
versions = {module.__name__: module.__version__ for module in modules}
print(json.dumps({"versions": versions, "seconds": seconds, "largest_difference": apart}))
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    checkpoint: str = packaged_checkpoint()
    """Folder of a saved text-to-image pipeline."""
    num_inference_steps: int = 20
    """Of each picture."""
    guidance_scale: float = 4.0
    """Of each picture."""
    turns: int = 7
    """Pictures that each draws, after one that warms up."""
    threads: int = torch.get_num_threads()
    """Of each."""
    output: Path | None = None
    """JSON file for the numbers."""


def main(settings: Settings) -> None:
    try:
        python = make_environment(ROOT / "runs" / "environments" / "runtimes", *PACKAGES)
    except NoPackages as error:
        raise ConfigError(f"{', '.join(PACKAGES)} cannot be had here: {error}") from None
    how = (settings.threads, settings.turns, settings.num_inference_steps, settings.guidance_scale)
    command = [python, "-c", CHILD, str(Path(settings.checkpoint).resolve()), *map(str, how)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ""})
    found = json.loads(child.stdout.splitlines()[-1])
    seconds = found["seconds"]
    how = f"{settings.num_inference_steps} steps, {settings.turns} turns, {settings.threads} threads"
    print(f"{settings.checkpoint}, {how}")
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()) + "\n")
    print("| | s a picture | / torch | largest pixel difference |")
    print("| --- | --- | --- | --- |")
    for name, times in seconds.items():
        apart = found["largest_difference"][name]
        print(f"| {name} | {median(times):.2f} | {spread(times, seconds['torch'])} | {apart:.1e} |")
    if settings.output:
        asked = {name: value for name, value in asdict(settings).items() if name != "output"}
        settings.output.write_text(json.dumps(asked | found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main, Settings)
