"""Every comparison of speed, one after the other, in one report: `make bench`, or

    python benchmarks/everything.py
    python benchmarks/everything.py --parts training starting

Each part is a script of this folder, whose own docstring says what it measures; here it gets settings that suit the
machine. With nothing else running, all of it takes about an hour on two CPU cores.
"""

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from latentdiff.utils.files import write_whole
from latentdiff.utils.flags import run_cli

FOLDER = Path(__file__).resolve().parent
FEW_STEPS = ["sampling_steps.py", "--count", "100", "--seeds", "0", "--output", "runs/bench-steps"]
DISTILLED = ["--checkpoint", "checkpoints/emoji64-lcm", "--rows", "lcm-1", "lcm-2", "lcm-4"]

# What is run on a CPU and on a GPU, where that is not the same.
ON_CPU = {
    "training": [["training_step.py"]],
    "memory": [["training_memory.py"]],
    "sampling": [["sampling_speed.py"], ["sampling_speed.py", "--shapes", "sd15", "--only-overhead"]],
    "few_steps": [[*FEW_STEPS, "--rows", "ddim-50", "dpm++-20"], [*FEW_STEPS, *DISTILLED]],
    "starting": [["starting.py"]],
    "runtimes": [["runtimes.py"]],
}
BF16 = ["--mixed-precision", "bf16"]
SD15 = ["--shapes", "sd15"]
ON_GPU = ON_CPU | {
    "training": [
        ["training_step.py", *BF16, "--dynamo-backend", "inductor"],
        ["training_step.py", *SD15, *BF16, "--train-batch-size", "8", "--dynamo-backend", "inductor"],
    ],
    "memory": [["training_memory.py", *BF16, "--resolutions", "64", "256", "512"]],
    "sampling": [["sampling_speed.py"], ["sampling_speed.py", *SD15, "--dtype", "fp16", "--num-inference-steps", "25"]],
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run."""

    parts: tuple[Literal["training", "memory", "sampling", "few_steps", "starting", "runtimes"], ...] = tuple(ON_CPU)
    """Which parts."""
    output: Path = Path("runs/benchmarks.md")
    """The report."""


def main(settings: Settings) -> None:
    commands = ON_GPU if torch.cuda.is_available() else ON_CPU
    report = [f"# Measured on {machine()}", ""]
    for part in settings.parts:
        for words in commands[part]:
            started = time.perf_counter()
            report += [f"## python benchmarks/{' '.join(words)}", "", run(words)]
            report += [f"\n{time.perf_counter() - started:.0f} s.\n"]
            settings.output.parent.mkdir(parents=True, exist_ok=True)
            write_whole(settings.output, ("\n".join(report) + "\n").encode())
    print(f"in {settings.output}")


def run(words: list[str]) -> str:
    """What a script prints, which is shown as it comes. Its errors and bars go to the terminal."""
    print(f"\npython benchmarks/{' '.join(words)}", flush=True)
    child = subprocess.Popen([sys.executable, FOLDER / words[0], *words[1:]], stdout=subprocess.PIPE, text=True)
    lines = []
    for line in child.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if child.wait():
        sys.exit(f"{words[0]} failed")
    return "".join(lines).rstrip()


def machine() -> str:
    """What the numbers belong to."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = (names or [platform.processor() or platform.machine()])[0]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}), {torch.get_num_threads()} of {os.cpu_count()} cores, {versions}"


if __name__ == "__main__":
    run_cli(main, Settings)
