"""From nothing to the first picture, side by side in one run:

    python benchmarks/starting.py
    python benchmarks/starting.py --checkpoint checkpoints/emoji64-lcm --num-inference-steps 2

Each turn starts a fresh process for latentdiff and one for diffusers, which import their pipeline, load the checkpoint
and draw. Ratios are of neighbouring processes: their median, with the lowest and the highest.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from statistics import median

from sampling_speed import spread

from latentdiff.utils.flags import run_cli

PIPELINES = {
    "latentdiff": "from latentdiff import LatentDiffPipeline as Pipeline",
    "diffusers": "from diffusers import StableDiffusionPipeline as Pipeline",
}
STAGES = ("import", "load", "first picture", "second picture")
CHILD = """
import json, sys, time
times = [time.perf_counter()]
done = lambda: times.append(time.perf_counter())
{line}
done()
import torch
pipe = Pipeline.from_pretrained(sys.argv[1]).to("cuda" if torch.cuda.is_available() else "cpu")
pipe.set_progress_bar_config(disable=True)
done()
for _ in range(2):
    pipe("a cat", num_inference_steps=int(sys.argv[2]), guidance_scale=float(sys.argv[3]))
    done()
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    checkpoint: str = "checkpoints/emoji64"
    """Folder of a saved pipeline."""
    num_inference_steps: int = 20
    """Of each picture."""
    guidance_scale: float = 4.0
    """Of each picture."""
    turns: int = 7
    """Pairs of processes, after one that warms up the disk's cache."""


def main(settings: Settings) -> None:
    seconds: dict[str, list[list[float]]] = {name: [] for name in PIPELINES}
    for turn in range(settings.turns + 1):
        # In turn first and second, so that a machine that grows slower, or faster, favours neither.
        for name in list(PIPELINES)[:: 1 if turn % 2 else -1]:
            found = start(settings, name)
            if turn:
                seconds[name].append(found)
    print(f"{settings.checkpoint}, {settings.num_inference_steps} steps, {settings.turns} turns\n")
    print("| s | latentdiff | diffusers | latentdiff / diffusers |")
    print("| --- | --- | --- | --- |")
    ours, theirs = ([*zip(*seconds[name], strict=True)] for name in PIPELINES)
    rows = [*zip(STAGES, ours, theirs, strict=True), ("all to the first picture", _sums(ours), _sums(theirs))]
    for stage, a, b in rows:
        print(f"| {stage} | {median(a):.2f} | {median(b):.2f} | {spread(a, b, digits=3)} |")


def start(settings: Settings, name: str) -> list[float]:
    """Seconds of each stage in a process of its own."""
    how = [settings.checkpoint, str(settings.num_inference_steps), str(settings.guidance_scale)]
    child = [sys.executable, "-c", CHILD.format(line=PIPELINES[name]), *how]
    return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def _sums(stages: list[tuple[float, ...]]) -> list[float]:
    """Of each process, without the second picture."""
    return [sum(turn) for turn in zip(*stages[:-1], strict=True)]


if __name__ == "__main__":
    run_cli(main, Settings)
