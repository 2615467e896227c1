"""Inpainting with a trained checkpoint against blending: `python benchmarks/inpainting.py`.

Blending takes a text-to-image model and puts the known latents, at the step's noise level, back after every step
(`StableDiffusionInpaintPipeline` with a UNet of four channels): what is painted never sees the rest at more than one
noise level. The trained UNet sees mask and masked picture beside the noisy latents. Both get the same emoji on colours
that neither has seen them on, the same masks, captions, seeds, steps and guidance; the VAE alone, which both paint
through, is the floor.

What is to be painted over holds a part of another picture, as it does whoever edits one. The trained UNet sees grey
there. Blending does not stay clear of it: a latent is 4 pixels wide, sees beyond them, and is known where its upper
left pixel is. Were the original left there, blending would be given pixels of the very answer: "blending, answer left
in" shows how much that is worth.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from PIL import Image

from latentdiff.data import emoji
from latentdiff.data.masks import random_masks
from latentdiff.models.latents import (
    decode_latents,
    encode_moments,
    masked_pixels,
    sample_latents,
    to_images,
    to_pixels,
)
from latentdiff.utils import randomness
from latentdiff.utils.grid import labelled_grid

BATCH = 20
SHOWN = 10  # pictures in the grid
RIM = 3  # pixels on each side of the mask's edge


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    inpainting: str = "checkpoints/emoji64-inpaint"
    """The trained checkpoint."""
    text_to_image: str = "checkpoints/emoji64"
    """What blends."""
    count: int = 100
    """Pictures."""
    num_inference_steps: int = 25
    """DDIM steps."""
    guidance_scale: float = 4.0
    """Guidance."""
    output: str = "benchmarks/results/inpainting"
    """Where the numbers (.json) and the pictures (.png) go, as the beginning of a path."""


@dataclass(frozen=True)
class Case:
    """One picture, what it is called, and where it is open."""

    caption: str
    pixels: torch.Tensor  # (3, H, W)
    mask: torch.Tensor  # (1, H, W)


def main(settings: Settings) -> None:
    cases = make_cases(settings.count)
    originals = torch.stack([case.pixels for case in cases])
    masks = torch.stack([case.mask for case in cases])
    edited = torch.where(masks.bool(), originals.roll(1, dims=0), originals)
    drawn = {
        "blending": paint(settings.text_to_image, cases, edited, settings),
        "trained": paint(settings.inpainting, cases, edited, settings),
        "blending, answer left in": paint(settings.text_to_image, cases, originals, settings),
        "VAE alone": reconstruct(settings.text_to_image, cases),
    }
    measured = {way: measures(cases, pixels) for way, pixels in drawn.items()}
    means = {way: {name: float(np.mean(values)) for name, values in found.items()} for way, found in measured.items()}
    less = {name: np.subtract(values, measured["trained"][name]) for name, values in measured["blending"].items()}
    result = {
        "count": settings.count,
        "sampler": "DDIMScheduler",
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        **means,
        "blending less trained": {name: float(values.mean()) for name, values in less.items()},
        "its standard error": {name: float(values.std(ddof=1) / len(values) ** 0.5) for name, values in less.items()},
    }
    rows = {name: found for name, found in result.items() if isinstance(found, dict)}
    print(f"{'':24}" + "".join(f"{name:>12}" for name in less))
    for name, found in rows.items():
        print(f"{name:24}" + "".join(f"{value:12.4f}" for value in found.values()))
    Path(f"{settings.output}.json").write_text(json.dumps(result, indent=2) + "\n")
    show(cases[:SHOWN], drawn).save(f"{settings.output}.png")


def make_cases(count: int) -> list[Case]:
    """Emoji on colours that are held out for them, in an order that depends on their names alone, with fixed masks."""
    everything = emoji.load()
    pairs = [
        (*everything.rows[index], colour, index)
        for index in everything.indices()
        for colour in emoji.COLOURS
        if everything.rows[index][0].pair_held_out(colour)
    ]
    pairs.sort(key=lambda pair: randomness.fraction("inpainting", pair[0].names[0], pair[1], pair[2]))
    cases = []
    for number, (concept, style, colour, index) in enumerate(pairs[:count]):
        generator = randomness.generator(0, "inpainting", number)
        (mask,) = random_masks([generator], (emoji.RESOLUTION,) * 2, whole_picture=0)
        (pixels,) = to_pixels([everything.composite(index, colour)])
        cases.append(Case(emoji.captions(concept, style, colour)[1], pixels, mask))
    return cases


def paint(model: str, cases: list[Case], given: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Into `given` (B, 3, H, W), each case from noise of its own -> the same in [-1, 1], as it is drawn, nothing
    pasted."""
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    painted = []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        painted += pipeline(
            [case.caption for case in batch],
            image=given[start : start + BATCH],
            mask_image=torch.stack([case.mask for case in batch]),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
            output_type="pt",
        ).images
    return torch.stack(painted).float() * 2 - 1


def reconstruct(model: str, cases: list[Case]) -> torch.Tensor:
    """The originals through the VAE and back."""
    vae = StableDiffusionInpaintPipeline.from_pretrained(model).vae
    mean, std = encode_moments(vae, torch.stack([case.pixels for case in cases]))
    return decode_latents(vae, sample_latents(vae.config, mean, std, torch.zeros_like(mean))).clamp(-1, 1)


def measures(cases: list[Case], drawn: torch.Tensor) -> dict[str, list[float]]:
    """Of each picture, in units of the full range of a colour:

    - inside: root of the mean squared error over what the mask leaves open;
    - inner rim: the same over those of these pixels that lie within RIM of the edge;
    - rim: the same within RIM pixels on both sides of it, with the known side as it is drawn, too;
    - seam: with the known pixels put back, the mean step from a pixel to its neighbour across the edge, less the
      original's own step there.
    """
    found = {"inside": [], "inner rim": [], "rim": [], "seam": []}
    for case, pixels in zip(cases, drawn, strict=True):
        open_, near = case.mask.bool(), rim(case.mask)
        error = ((pixels - case.pixels) / 2).square().mean(0, keepdim=True)
        for name, where in (("inside", open_), ("inner rim", open_ & near), ("rim", near)):
            found[name].append(error[where].mean().sqrt().item())
        pasted = torch.where(open_, pixels, case.pixels)
        found["seam"].append(step_across(pasted, case.mask) - step_across(case.pixels, case.mask))
    return found


def rim(mask: torch.Tensor) -> torch.Tensor:
    """(1, H, W): the pixels that have both open and known ones within RIM."""
    window = 2 * RIM + 1
    near_open = torch.nn.functional.max_pool2d(mask, window, stride=1, padding=RIM)
    near_known = torch.nn.functional.max_pool2d(1 - mask, window, stride=1, padding=RIM)
    return (near_open * near_known).bool()


def step_across(pixels: torch.Tensor, mask: torch.Tensor) -> float:
    """The mean absolute difference of neighbours of which one is open and the other known."""
    steps = []
    for axis in (1, 2):
        across = mask.diff(dim=axis)[0] != 0
        steps.append((pixels.diff(dim=axis) / 2).abs().mean(0)[across])
    return torch.cat(steps).mean().item()


def show(cases: list[Case], drawn: dict[str, torch.Tensor]) -> Image.Image:
    """Side by side: what is known, both ways as they are drawn, and the original."""
    images, labels = [], []
    for i, case in enumerate(cases):
        columns = [masked_pixels(case.pixels, case.mask), drawn["blending"][i], drawn["trained"][i], case.pixels]
        images += to_images(torch.stack(columns))
        labels += [case.caption, "blending", "trained", "as it was"]
    return labelled_grid(images, labels, columns=8)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
