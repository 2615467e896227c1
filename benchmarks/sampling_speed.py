"""Seconds per picture, side by side in one run:

    python benchmarks/sampling_speed.py                              # the shipped checkpoint's shapes
    python benchmarks/sampling_speed.py --shapes sd15 --only-overhead     # on a CPU, where 50 steps take half an hour
    python benchmarks/sampling_speed.py --shapes sd15 --dtype fp16 --num-inference-steps 25   # on a GPU

Three ways with the same weights, steps and guidance take turns, so that what else the machine does hits all alike: the
bare calls of UNet and VAE decoder that a picture needs, which are the limit; diffusers' StableDiffusionPipeline; and
LatentDiffPipeline. Ratios are of neighbouring turns: their median, with the lowest and the highest. What a pipeline
adds to its networks is measured alone, too, with a UNet and a decoder that answer zeros at once, and compared with what
the networks themselves take, a single call of each times the number of steps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff import DDIMScheduler, LatentDiffPipeline
from latentdiff.inference.loading import DTYPES
from latentdiff.utils.files import packaged_checkpoint, write_whole
from latentdiff.utils.flags import run_cli

PROMPT = "a red apple on a white background"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    shapes: Literal["emoji64", "sd15"] = "emoji64"
    """The shipped checkpoint, or Stable Diffusion 1.5's networks at 512x512 with random weights."""
    num_inference_steps: int = 50
    """DDIM steps."""
    guidance_scale: float = 4.0
    """With an unconditional pass in each step; 1 is without."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Pictures at a time."""
    turns: int = 7
    """Of each way, after one that warms up."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the networks."""
    only_overhead: bool = False
    """Leave out whole drawings: a pipeline's cost beside its networks, for one picture."""
    channels_last: bool = False
    """Memory layout of UNet and VAE, of all three ways."""
    output: Path | None = None
    """Markdown file for the table."""


def main(settings: Settings) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = make_pipeline(settings.shapes).to(device, DTYPES[settings.dtype])
    if settings.channels_last:
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
    parts = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
    peer = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    for pipe in (pipeline, peer):
        pipe.set_progress_bar_config(disable=True)
    lines = [
        f"{settings.shapes}, {settings.dtype} on {device}, DDIM {settings.num_inference_steps} steps, guidance "
        f"{settings.guidance_scale:g}, {settings.turns} turns",
        "",
        "| pictures at a time | LatentDiffPipeline, s a picture | / bare UNet and VAE | / StableDiffusionPipeline |",
        "| --- | --- | --- | --- |",
    ]
    for batch_size in () if settings.only_overhead else settings.batch_sizes:
        found = measure(settings, pipeline, peer, batch_size)
        ours = found["ours"]
        cells = [spread(ours, found[name], digits=3) for name in ("bare", "peer")]
        lines.append(f"| {batch_size} | {median(ours) / batch_size:.3f} | {' | '.join(cells)} |")
        print("\n".join(lines) if len(lines) == 5 else lines[-1], flush=True)
    networks = network_seconds(settings, pipeline)
    lines += ["", f"One picture: UNet and decoder take {networks:.2f} s. Beside them"]
    for pipe in (pipeline, peer):
        seconds = overhead(settings, pipe)
        lines[-1] += f" {type(pipe).__name__} takes {1000 * seconds:.0f} ms ({seconds / networks:.2%}),"
    lines[-1] = lines[-1].removesuffix(",") + "."
    print(lines[-1])
    if settings.output is not None:
        write_whole(settings.output, ("\n".join(lines) + "\n").encode())


def spread(found: list[float], base: list[float], digits: int = 2) -> str:
    """Ratios of neighbouring turns: their median, the lowest and the highest."""
    ratios = [a / b for a, b in zip(found, base, strict=True)]
    return f"{median(ratios):.{digits}f} ({min(ratios):.{digits}f} … {max(ratios):.{digits}f})"


def make_pipeline(shapes: str) -> LatentDiffPipeline:
    """The networks, in fp32."""
    shipped = LatentDiffPipeline.from_pretrained(packaged_checkpoint())
    if shapes == "emoji64":
        return shipped
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
        scaling_factor=0.18215,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the rest are its defaults
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return LatentDiffPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=shipped.tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**schedule, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    )


def measure(
    settings: Settings, pipeline: LatentDiffPipeline, peer: StableDiffusionPipeline, batch_size: int
) -> dict[str, list[float]]:
    """Way -> the seconds of each turn."""

    ways = {
        "bare": lambda: bare(settings, pipeline, batch_size),
        "peer": lambda: call(settings, peer, batch_size),
        "ours": lambda: call(settings, pipeline, batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(settings.turns + 1):
        for name, way in ways.items():
            wait(pipeline.device)
            started = time.perf_counter()
            way()
            wait(pipeline.device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def call(settings: Settings, pipe: Callable, batch_size: int) -> None:
    """One drawing."""
    steps, guidance_scale = settings.num_inference_steps, settings.guidance_scale
    generator = torch.Generator().manual_seed(0)
    pipe([PROMPT] * batch_size, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator)


def overhead(settings: Settings, pipe: LatentDiffPipeline | StableDiffusionPipeline) -> float:
    """Seconds of processor time of a call for one picture whose networks take none, the least of all turns."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    picture = torch.zeros(1, 3, side, side, device=pipe.device, dtype=pipe.vae.dtype)
    found = []
    with (
        patch.object(pipe.unet, "forward", lambda sample, *args, **kwargs: (torch.zeros_like(sample),)),
        patch.object(pipe.vae, "decode", lambda *args, **kwargs: (picture,)),
    ):
        for _ in range(settings.turns):
            started = time.process_time()
            call(settings, pipe, batch_size=1)
            wait(pipe.device)
            found.append(time.process_time() - started)
    return min(found)


def network_seconds(settings: Settings, pipeline: LatentDiffPipeline) -> float:
    """Seconds that UNet and decoder take for one picture, from the quickest call of each."""
    one = replace(settings, num_inference_steps=1)
    found = []
    for steps in (one, replace(one, num_inference_steps=0)):
        seconds = []
        for _ in range(3):
            wait(pipeline.device)
            started = time.perf_counter()
            bare(steps, pipeline, batch_size=1)
            wait(pipeline.device)
            seconds.append(time.perf_counter() - started)
        found.append(min(seconds))
    with_step, decoder = found
    return decoder + settings.num_inference_steps * (with_step - decoder)


@torch.no_grad()
def bare(settings: Settings, pipeline: LatentDiffPipeline, batch_size: int) -> None:
    """The UNet's calls and the decoder's, on tensors that are there."""
    unet, kind = pipeline.unet, {"device": pipeline.device, "dtype": pipeline.unet.dtype}
    passes = batch_size * (2 if settings.guidance_scale > 1 else 1)
    latents = torch.randn(passes, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size, **kind)
    hidden = torch.randn(passes, pipeline.tokenizer.model_max_length, unet.config.cross_attention_dim, **kind)
    timestep = torch.tensor(500, device=pipeline.device)
    for _ in range(settings.num_inference_steps):
        unet(latents, timestep, hidden, return_dict=False)
    pipeline.vae.decode(latents[:batch_size], return_dict=False)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_cli(main, Settings)
