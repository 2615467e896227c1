"""Memory and time of a training step against resolution and batch, latentdiff's beside diffusers' way:

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --resolutions 512 --batch-sizes 1 4 --mixed-precision fp16   # on a GPU

Each row and way is a process of its own, which trains emoji64's UNet on pictures of noise: the peak is that of its
steps after the first, on a CPU of the whole process (its resident memory), on a GPU of what torch allocated. Ours has
its latents and captions cached, and the frozen networks off the device, where the device is not the CPU itself.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from accelerate import Accelerator
from sampling_speed import wait
from training_step import Steps, draw_noise

from latentdiff.config.train import TrainConfig
from latentdiff.training.data import load_data
from latentdiff.training.setup import load_networks, make_output_dir
from latentdiff.utils.flags import run_cli


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    resolutions: tuple[int, ...] = (64, 128, 256)
    """Of the pictures, in pixels."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Pictures a step; above the first resolution the first of them alone."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the UNet's arithmetic."""
    steps: int = 3
    """Steps that are measured, after one that warms up."""
    way: Literal["latentdiff", "diffusers"] | None = None
    """Measure this one alone, in this process, at the first resolution and batch, on the pictures in `folder`."""
    folder: Path | None = None
    """Captioned pictures; by default made."""


def main(settings: Settings) -> None:
    if settings.way is not None:
        print(json.dumps(measure(settings)))
        return
    print(
        "| pixels | pictures a step | latentdiff, GB | diffusers, GB | ratio | latentdiff, s | diffusers, s | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for resolution in settings.resolutions:
        for batch in settings.batch_sizes if resolution == settings.resolutions[0] else settings.batch_sizes[:1]:
            with tempfile.TemporaryDirectory() as folder:
                draw_noise(Path(folder), resolution, count=2 * batch)
                found = [in_a_process(settings, way, resolution, batch, folder) for way in ("latentdiff", "diffusers")]
            memory, seconds = zip(*found, strict=True)
            cells = [f"{each / 1e9:.2f}" for each in memory] + [f"{memory[0] / memory[1]:.2f}"]
            cells += [f"{each:.2f}" for each in seconds] + [f"{seconds[0] / seconds[1]:.2f}"]
            print(f"| {resolution} | {batch} | {' | '.join(cells)} |", flush=True)


def in_a_process(settings: Settings, way: str, resolution: int, batch: int, folder: str) -> tuple[float, float]:
    """Peak bytes, and seconds of a step."""
    child = [sys.executable, __file__, "--way", way, "--folder", folder, "--resolutions", str(resolution)]
    child += ["--batch-sizes", str(batch), "--steps", str(settings.steps)]
    child += ["--mixed-precision", settings.mixed_precision]
    return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def measure(settings: Settings) -> tuple[float, float]:
    """What `in_a_process` asks for."""
    resolution, batch = settings.resolutions[0], settings.batch_sizes[0]
    config = TrainConfig(
        train_data_dir=str(settings.folder),
        cache_dir=str(settings.folder / "cache"),
        output_dir=str(settings.folder / "run"),
        resolution=resolution,
        held_out_fraction=0.0,
        train_batch_size=batch,
        mixed_precision=settings.mixed_precision,
        cache_latents=settings.way == "latentdiff",
    )
    make_output_dir(config)  # which is told what the pictures are
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    parts, unet, scheduler = load_networks(config)
    unet = accelerator.prepare(unet)
    data = load_data(config, accelerator, parts, unet, scheduler)
    step = Steps(accelerator, unet, scheduler, parts, data.pictures, config)
    take = (lambda i: step.ours(data.batches, i)) if settings.way == "latentdiff" else step.diffusers
    take(0)
    reset_peak(accelerator.device)
    seconds = []
    for i in range(1, settings.steps + 1):
        started = time.perf_counter()
        take(i)
        wait(accelerator.device)
        seconds.append(time.perf_counter() - started)
    return peak(accelerator.device), median(seconds)


def reset_peak(device: torch.device) -> None:
    """Forget what setting up took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """Bytes, the most since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run_cli(main, Settings)
