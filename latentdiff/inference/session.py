"""What the page does, without the page: drawing one picture after another, showing them while they grow, stopping.

A drawing is a generator: it yields a `Preview` every few steps and ends with a `Drawing`, or with a `Stopped`.
"""

import contextlib
import logging
import math
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config.sampling import SCHEDULERS, Sampling
from ..diffusion.latent_scale import unscale_latents
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..utils.images import FORMATS, crop_box, resized, upright_rgb
from .drawing import call_options, pipeline_of, recipe_of
from .loading import Networks
from .recipe import Recipe, file_ingredient

MAX_PIXELS = 16_000_000  # of a picture to start from; 48 MB once it is unpacked
MAX_PROMPT = 2000  # characters
MAX_SEED = 2**32 - 2  # the noise of the next one is used, too
MAX_STEPS = 1000
MAX_GUIDANCE = 30
MAX_FRAMES = 60
COLUMNS = 8  # frames in the strip of a film
PREVIEWS = 10  # about as many in one drawing


@dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """What every drawing takes; of the options of sampling the page shows some.

    Raises:
        ValueError: one of them is out of its range; the message names it.
    """

    prompt: str
    seed: int | None = None
    """None is any; the recipe says which it was."""
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    scheduler: str = "ddim"
    """One of `SCHEDULERS`."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say in a few words what to draw")
        for name in ("prompt", "negative_prompt"):
            if len(getattr(self, name)) > MAX_PROMPT:
                raise ValueError(f"{name} has {len(getattr(self, name))} characters; it may have {MAX_PROMPT}")
        if self.seed is not None:
            check_range("seed", self.seed, 0, MAX_SEED)
        check_range("steps", self.num_inference_steps, 1, MAX_STEPS)
        check_range("guidance scale", self.guidance_scale, 0, MAX_GUIDANCE)
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler is {self.scheduler!r}; it must be one of {', '.join(SCHEDULERS)}")

    def with_seed(self) -> "Settings":
        """The same, with any seed where none is given."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(MAX_SEED + 1))


@dataclass(frozen=True)
class Usual:
    """With what a checkpoint draws well."""

    scheduler: str
    """One of `SCHEDULERS`."""
    steps: int
    guidance_scale: float
    draws_in_few_steps: bool


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise a ValueError that names it unless `value` is a number from `low` to `high`."""
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie in {low} … {high}")


@dataclass(frozen=True)
class Preview:
    """What the network takes the picture to become, after some of the steps."""

    step: int
    steps: int
    image: Image.Image


@dataclass(frozen=True)
class Drawing:
    """A finished drawing; of an interpolation all its frames."""

    images: list[Image.Image]
    recipe: Recipe
    notes: tuple[str, ...] = ()
    """What the pipeline warned of, such as a prompt that was cut."""


@dataclass(frozen=True)
class Stopped:
    """A drawing that was stopped after this many of its steps."""

    step: int
    steps: int


Progress = Iterator[Preview | Drawing | Stopped]


class Studio:
    """Pipelines on one set of weights, and one thread that draws with them: who comes second waits.

    Args:
        networks: what draws.
        inpainting: what inpaints, where its UNet was trained for that; by default `networks`, which blends.
    """

    def __init__(self, networks: Networks, inpainting: Networks | None = None):
        self.networks, self.inpainting = networks, inpainting or networks
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drawing")
        self._closed = threading.Event()

    def usual_settings(self) -> Usual:
        """What to begin with: a consistency model draws in 4 steps, others with DDIM in 50."""
        pipeline = self.networks.pipeline
        if not isinstance(pipeline.scheduler, ConsistencyScheduler):
            return Usual("ddim", Settings.num_inference_steps, Settings.guidance_scale, False)
        steps, guidance_scale = pipeline.usual_drawing()
        return Usual("lcm", steps, min(guidance_scale, Settings.guidance_scale), True)

    def text_to_image(self, settings: Settings, stop: threading.Event, previews: bool = True) -> Progress:
        """A picture of the prompt. Like every drawing it ends after the step in which `stop` is set.

        Args:
            previews: of a few steps they take a third of the time.
        """
        return self._draw(self.networks, stop, make_recipe(self.networks, settings, kind="text2img"), previews)

    def image_to_image(self, settings: Settings, stop: threading.Event, image: Path, strength: float) -> Progress:
        """The picture in a file, noised and drawn again; strength in (0, 1] says how much of it is given up.

        Raises:
            ValueError: it is too large, or no picture; the strength is out of its range.
        """
        check_range("strength", strength, 0.01, 1)
        picture = fitted(image, self.networks)
        values = {"kind": "img2img", "image": file_ingredient(image), "strength": float(strength)}
        return self._draw(self.networks, stop, make_recipe(self.networks, settings, **values), image=picture)

    def inpaint(self, settings: Settings, stop: threading.Event, image: Path, mask: Path, strength: float) -> Progress:
        """The picture in a file, drawn anew where the one in another file, of its size, is white.

        Raises:
            ValueError: as for `image_to_image`; the mask is black all over.
        """
        check_range("strength", strength, 0.01, 1)
        picture, painted = fitted(image, self.inpainting), fitted(mask, self.inpainting)
        if painted.getbbox() is None:
            raise ValueError("nothing is painted: brush over the part that is to be drawn anew")
        values = {"kind": "inpaint", "strength": float(strength), "keep_unmasked": True}
        values |= {"image": file_ingredient(image), "mask": file_ingredient(mask), "mask_blur": max(picture.size) // 32}
        recipe = make_recipe(self.inpainting, settings, **values)
        return self._draw(self.inpainting, stop, recipe, image=picture, mask=painted)

    def interpolate(
        self,
        settings: Settings,
        stop: threading.Event,
        second_prompt: str,
        frames: int,
        new_noise: bool = False,
        loop: bool = False,
    ) -> Progress:
        """The frames of a film from the prompt to another one.

        Args:
            frames: in all.
            new_noise: the second picture starts from the noise of the seed after the first one's, not from the same.
            loop: the film goes back to the first prompt, too.

        Raises:
            ValueError: the second prompt or the number of frames is out of its range.
        """
        replace(settings, prompt=second_prompt)  # checked as the first one was
        check_range("frames", frames, 3, MAX_FRAMES)
        settings = settings.with_seed()
        values = {"kind": "interpolate", "prompts": (second_prompt,), "seeds": (settings.seed + int(new_noise),)}
        values |= {"frames": frames, "loop": bool(loop), "columns": min(frames, COLUMNS), "batch_size": 4}
        return self._draw(self.networks, stop, make_recipe(self.networks, settings, **values))

    def close(self) -> None:
        """Stop what is being drawn, and draw nothing more."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _draw(
        self,
        networks: Networks,
        stop: threading.Event,
        recipe: Recipe,
        previews: bool = True,
        **inputs: Image.Image,
    ) -> Progress:
        """Draw on the other thread, and pass on what it shows; it stops if nobody is looking any more."""
        left = threading.Event()

        def should_stop() -> bool:
            return any(event.is_set() for event in (stop, left, self._closed))

        shown = queue.SimpleQueue()
        show = shown.put if previews else None
        drawing = self._thread.submit(draw, networks, recipe, inputs, should_stop, show)
        drawing.add_done_callback(lambda _: shown.put(None))
        try:
            yield from iter(shown.get, None)
            yield drawing.result()
        finally:
            left.set()


def picture_size(networks: Networks) -> tuple[int, int]:
    """Width and height of what is drawn, in pixels: what the UNet was trained at."""
    height, width = networks.pipeline.picture_size(None, None)
    return width, height


def fitted(path: Path, networks: Networks) -> Image.Image:
    """The middle of the picture in a file, at the size that is drawn."""
    image, size = open_picture(path), picture_size(networks)
    return resized(image, size, crop_box(image.size, size))


def make_recipe(networks: Networks, settings: Settings, **of_kind) -> Recipe:
    settings, (width, height) = settings.with_seed(), picture_size(networks)
    given = {"prompt": settings.prompt, "seed": settings.seed, "width": width, "height": height}
    return recipe_of(networks, settings, **(given | of_kind))


def draw(
    networks: Networks,
    recipe: Recipe,
    inputs: dict[str, Image.Image],
    should_stop: Callable[[], bool],
    show: Callable[[Preview], None] | None,
) -> Drawing | Stopped:
    """Follow a recipe, with the pictures it names in `inputs`, by the names that it has for them.

    Args:
        show: is given the previews; None where there are to be none.
    """
    if should_stop():
        return Stopped(0, recipe.num_inference_steps)
    pipeline = pipeline_of(networks, recipe)
    pipeline.set_progress_bar_config(disable=True)
    watch = _Watch(pipeline, math.ceil((recipe.frames or 1) / recipe.batch_size), show, should_stop)
    with warnings_of_pipelines() as notes:
        images = pipeline(
            **call_options(networks, recipe, **inputs),
            **words_and_noise(recipe),
            callback_on_step_end=watch.after_step,
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
        ).images
    return watch.stopped or Drawing(images, recipe, tuple(notes))


def words_and_noise(recipe: Recipe) -> dict[str, Any]:
    """The rest of what a pipeline is called with."""
    if recipe.kind == "interpolate":
        return {"prompts": [recipe.prompt, *recipe.prompts], "seeds": [recipe.seed, *recipe.seeds]}
    return {"prompt": recipe.prompt, "seeds": [recipe.seed]}


class _Watch:
    """Looks over a pipeline's shoulder: previews of what it draws, and the end when somebody asks for it."""

    def __init__(
        self, pipeline: Any, batches: int, show: Callable[[Preview], None] | None, should_stop: Callable[[], bool]
    ):
        self.pipeline, self.batches, self.show, self.should_stop = pipeline, batches, show, should_stop
        self.done = 0
        self.stopped: Stopped | None = None

    def after_step(self, pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`."""
        self.done += 1
        steps = pipeline.num_timesteps * self.batches
        if self.done == steps:
            return {}
        if self.should_stop():
            pipeline._interrupt = True
            self.stopped = Stopped(self.done, steps)
        elif self.show is not None and self.done % max(1, steps // PREVIEWS) == 0:
            self.show(Preview(self.done, steps, self._decoded(tensors["pred_original_sample"][:1])))
        return {}

    def _decoded(self, latents: torch.Tensor) -> Image.Image:
        vae = self.pipeline.vae
        pixels = vae.decode(unscale_latents(latents.to(vae.dtype), vae.config), return_dict=False)[0]
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")[0]


@contextlib.contextmanager
def warnings_of_pipelines() -> Iterator[list[str]]:
    """A list that fills with what our pipelines log as a warning inside the block."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())
    logger = logging.getLogger("latentdiff")
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


def open_picture(path: str | Path) -> Image.Image:
    """An uploaded picture, upright and in RGB.

    Raises:
        ValueError: it is too large, or not a picture.
    """
    most = f"it may have {MAX_PIXELS / 1e6:.0f} million in all"
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"the picture has {width} x {height} pixels; {most}")
            return upright_rgb(image)
    except Image.DecompressionBombError:
        raise ValueError(f"the picture has too many pixels; {most}") from None
    except (OSError, SyntaxError):
        raise ValueError("this file is not a picture that can be read; give a PNG, JPEG or WebP") from None
