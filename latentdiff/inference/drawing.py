"""Pictures from their recipes: a picture depends on nothing that its recipe does not name."""

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from ..config.sampling import Sampling
from ..pipelines.img2img import LatentDiffImg2ImgPipeline
from ..pipelines.inpaint import LatentDiffInpaintPipeline
from ..pipelines.interpolate import LatentDiffInterpolatePipeline
from ..pipelines.invert import LatentDiffInversionPipeline
from ..public import LatentDiffPipeline
from ..utils.errors import ConfigError, is_out_of_memory
from ..utils.images import crop_box, open_upright, resized
from .loading import SCHEDULERS, Networks, make_scheduler
from .recipe import Recipe

PIPELINES = {
    "text2img": LatentDiffPipeline,
    "img2img": LatentDiffImg2ImgPipeline,
    "inpaint": LatentDiffInpaintPipeline,
    "invert": LatentDiffInversionPipeline,
    "interpolate": LatentDiffInterpolatePipeline,
}


def draw_pictures(
    pipeline: Callable[..., Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    wanted: Collection[int] | None = None,
    **options: Any,
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (i, an RGB picture of prompt i), in batches of `batch_size` as each is drawn.

    Picture i has a generator of its own, seeded with seeds[i], on the CPU: it is the same everywhere.

    Args:
        pipeline: called as any of diffusers' own that take a prompt.
        wanted: the pictures to yield, by number; by default all. A batch is drawn whole or not at all, so that what
            some of its pictures look like does not depend on which are wanted.
        options: for every call of the pipeline.
    """
    wanted = range(len(prompts)) if wanted is None else wanted
    with tqdm(total=len(wanted), desc="drawing", unit="picture", disable=not wanted) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = range(start, min(start + batch_size, len(prompts)))
            mine = [i for i in batch if i in wanted]
            if not mine:
                continue
            generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in batch]
            images = pipeline([prompts[i] for i in batch], generator=generators, output_type="pil", **options).images
            for i in mine:
                yield i, images[i - start].convert("RGB")
            progress.update(len(mine))


def draw_recipes(
    networks: Networks,
    recipes: Sequence[Recipe],
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    wanted: Collection[int] | None = None,
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (i, picture of recipe i) as `draw_pictures`.

    Args:
        recipes: which differ in prompt and seed alone.
        image, mask: those that the recipes name, of their size.

    Raises:
        ConfigError: something in a recipe that these networks cannot do.
    """
    recipe = recipes[0]
    pipeline, options = pipeline_of(networks, recipe), call_options(networks, recipe, image, mask)
    if recipe.kind == "invert":
        pipeline = _without_chance(pipeline)
    prompts, seeds = [each.prompt for each in recipes], [each.seed for each in recipes]
    with _mistakes_in(recipe, networks):
        yield from draw_pictures(pipeline, prompts, seeds, recipe.batch_size, wanted, **options)


def draw_frames(networks: Networks, recipe: Recipe) -> list[Image.Image]:
    """The frames of an interpolation.

    Raises:
        ConfigError: something in the recipe that these networks cannot do.
    """
    with _mistakes_in(recipe, networks):
        return pipeline_of(networks, recipe)(
            prompts=[recipe.prompt, *recipe.prompts],
            seeds=[recipe.seed, *recipe.seeds],
            **call_options(networks, recipe),
        ).images


@contextlib.contextmanager
def _mistakes_in(recipe: Recipe, networks: Networks) -> Iterator[None]:
    """What a pipeline refuses, and a full memory, as a ConfigError."""
    try:
        yield
    except ValueError as error:  # by which pipelines refuse what cannot work
        raise ConfigError(" ".join(str(error).split())) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{networks.pipeline.device} has too little memory for {recipe.batch_size} pictures of "
            f"{recipe.width}x{recipe.height} at a time: give a smaller --batch-size, --height or --width"
        ) from None


def _without_chance(pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline that draws no noise, called like those that do."""
    return lambda prompts, generator, **options: pipeline(prompts, **options)


def pipeline_of(networks: Networks, recipe: Recipe) -> DiffusionPipeline:
    """The pipeline for a kind of recipe, on the loaded components and with the recipe's scheduler."""
    pipeline = PIPELINES[recipe.kind].from_pipe(networks.pipeline)
    pipeline.scheduler = make_scheduler(networks, recipe)
    if recipe.eta and "eta" not in inspect.signature(pipeline.scheduler.step).parameters:
        raise ConfigError(f"--eta is {recipe.eta:g}; {recipe.scheduler} has none: leave it out, or take ddim")
    pipeline.set_progress_bar_config(disable=None, desc="steps", leave=False)  # on a terminal alone
    return pipeline


def call_options(
    networks: Networks, recipe: Recipe, image: Image.Image | None = None, mask: Image.Image | None = None
) -> dict[str, Any]:
    """What the pipeline of a recipe's kind is called with, but for prompts and noise.

    Args:
        image, mask: those that the recipe names, of its size.
    """
    interval = recipe.guidance_interval
    if interval is not None and interval[1] is None:
        interval = (interval[0], math.inf)
    if recipe.clip is not None:
        networks.clip.model.scale = recipe.clip_guidance
    every = {
        "negative_prompt": recipe.negative_prompt or None,
        "num_inference_steps": recipe.num_inference_steps,
        "guidance_scale": recipe.guidance_scale,
        "guidance_rescale": recipe.guidance_rescale,
        "guidance_interval": interval,
        "prompt_weights": recipe.prompt_weights,
        "long_prompts": recipe.long_prompts,
        "guide_unet": None if recipe.guide_unet is None else networks.guide_unet.model,
        "clip_guidance": None if recipe.clip is None else networks.clip.model,
    }
    size = {"height": recipe.height, "width": recipe.width}
    edited = {"image": image, "strength": recipe.strength}
    painted = {"mask_image": mask, "mask_blur": recipe.mask_blur, "keep_unmasked": recipe.keep_unmasked}
    film = {"num_frames": recipe.frames, "loop": recipe.loop, "batch_size": recipe.batch_size}
    eta = {"eta": recipe.eta}
    of_kind = {
        "text2img": size | eta,
        "img2img": edited | eta,
        "inpaint": edited | painted | size | eta,
        "invert": edited | {"source_prompt": recipe.source_prompt},
        "interpolate": film | size | eta,
    }
    return every | of_kind[recipe.kind]


def recipe_of(networks: Networks, sampling: Sampling, **values: Any) -> Recipe:
    """What is drawn with options of sampling; what they leave open is filled in as suits the model.

    Args:
        values: what of a recipe is no option of sampling, and those that this kind of picture has of its own.
    """
    scheduler = SCHEDULERS[sampling.scheduler] if sampling.scheduler else type(networks.own_scheduler)
    steps, guidance_scale = networks.pipeline.usual_drawing(
        sampling.num_inference_steps, sampling.guidance_scale, scheduler
    )
    interval = sampling.guidance_interval
    options = {field.name: getattr(sampling, field.name) for field in fields(Sampling)} | {
        "num_inference_steps": steps,
        "guidance_scale": float(guidance_scale),
        "scheduler": scheduler.__name__,
        "guidance_interval": interval and (interval[0], interval[1] if interval[1] < math.inf else None),
        "guide_unet": networks.guide_unet and networks.guide_unet.ingredient,
        "clip": networks.clip and networks.clip.ingredient,
        "version": __version__,
    }
    return Recipe(**(options | networks.in_recipes() | values))


def open_inputs(paths: dict[str, Path | None], width: int, height: int) -> dict[str, Image.Image]:
    """A picture to edit, and perhaps its mask, by name, upright and in RGB: their middles, at the size that is drawn.

    Raises:
        ConfigError: one is not there, no picture that can be read, or the mask is of another shape than the picture.
    """
    images = {name: _opened(path, f"--{name}") for name, path in paths.items() if path is not None}
    if "mask" in images:
        (w, h), (mask_w, mask_h) = images["image"].size, images["mask"].size
        if abs(w * mask_h - mask_w * h) > max(w * mask_h, mask_w * h) / 100:
            raise ConfigError(
                f"--mask {paths['mask']} is {mask_w}x{mask_h}, of another shape than the picture, which is {w}x{h}"
            )
    return {name: _middle(image, width, height) for name, image in images.items()}


def _opened(path: Path, flag: str) -> Image.Image:
    try:
        return open_upright(path)
    except FileNotFoundError:
        raise ConfigError(f"{flag} {path}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ConfigError(f"{flag} {path} cannot be read as a picture: {type(error).__name__}") from None


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    return resized(image, (width, height), crop_box(image.size, (width, height)))
