"""`latentdiff generate` and `latentdiff edit`: pictures of a list of prompts, each written as soon as it is drawn; and
`latentdiff interpolate`: a film from prompt to prompt, with a strip of its frames that carries the recipe."""

import io
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from ..config.drawing import Drawing, Edit, Generate, Interpolate, PictureList
from ..config.sampling import SCHEDULERS
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..utils.errors import ConfigError
from ..utils.files import read_at_most, write_whole
from ..utils.films import check_animation, save_animation, strip
from ..utils.grid import labelled_grid
from ..utils.text import decoded, lines
from .drawing import draw_frames, draw_recipes, open_inputs, recipe_of
from .loading import Networks, load_networks
from .recipe import MAX_SIDE, Ingredient, Recipe, RecipeError, file_ingredient, read_recipe, save_png

PICTURES_FOLDER = "pictures"
MAX_PROMPTS_FILE = 16 * 2**20  # bytes
COLUMNS = 4
SOFTWARE = 0x0131  # EXIF's name of the program that made a picture


def generate(command: Generate) -> None:
    """Draw, save and say where."""
    work = _start(command)
    networks = load(command)
    width, height = picture_size(command, networks)
    _draw(command, networks, work, picture_recipe(command, networks, kind="text2img", width=width, height=height))


def edit(command: Edit) -> None:
    """Draw out of a picture, save and say where."""
    work = _start(command)
    if command.source_prompt is not None:
        work = [(prompt, 0) for prompt, _ in work]  # nothing is drawn by lot
    values: dict[str, Any] = {"kind": "img2img", "strength": 0.8, "image": _ingredient(command.image, "--image")}
    if command.mask is not None:
        values |= {"kind": "inpaint", "strength": 1.0, "mask": _ingredient(command.mask, "--mask")}
        values |= {"mask_blur": command.mask_blur, "keep_unmasked": command.keep_unmasked}
    if command.source_prompt is not None:
        values |= {"kind": "invert", "source_prompt": command.source_prompt, "scheduler": SCHEDULERS["ddim"].class_name}
    if command.strength is not None:
        values["strength"] = command.strength
    networks = load(command)
    if command.source_prompt is not None and isinstance(networks.own_scheduler, ConsistencyScheduler):
        raise ConfigError(
            "--source-prompt: this checkpoint draws in few steps, which cannot be run backwards; give --image alone"
        )
    width, height = picture_size(command, networks)
    paths = {"image": command.image, "mask": command.mask}
    inputs = open_inputs(paths, width, height)
    recipe = picture_recipe(command, networks, width=width, height=height, **values)
    _draw(command, networks, work, recipe, **inputs)


def _ingredient(path: Path, flag: str) -> Ingredient:
    try:
        if path.exists() and not path.is_file():  # at a pipe it would wait
            raise ConfigError(f"{flag} {path} cannot be read: it is no file")
        return file_ingredient(path)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}") from None


def _start(command: PictureList) -> list[tuple[str, int]]:
    """(prompt, seed) of each picture; what can be found wrong before anything is loaded is found here."""
    if command.grid is not None and command.grid.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"{command.grid} cannot be written: its suffix names no picture format")
    if command.grid is not None and command.grid.exists() and not (command.overwrite or _is_ours(command.grid)):
        raise ConfigError(f"{command.grid} is there, and no grid of latentdiff's: --overwrite replaces it")
    prompts = [*command.prompts, *(_read_prompts(command.prompts_file) if command.prompts_file else ())]
    if command.seeds:
        return [(prompt, seed) for prompt in prompts for seed in command.seeds]
    return [(prompt, command.seed + i) for i, prompt in enumerate(prompts)]


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        text = decoded(read_at_most(path, MAX_PROMPTS_FILE))
    except ValueError as error:
        raise ConfigError(f"--prompts-file {path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"--prompts-file {path} cannot be read: {error.strerror}") from None
    prompts = [line.strip() for line in lines(text) if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts-file {path} holds no prompt: write one on each line")
    return prompts


def load(command: Drawing) -> Networks:
    return load_networks(
        command.checkpoint,
        command.device,
        command.dtype,
        command.guide_unet,
        command.clip,
        command.ema_sigma_rel,
        command.lora,
        single_file_config=command.single_file_config,
    )


def picture_size(command: PictureList | Interpolate, networks: Networks) -> tuple[int, int]:
    """Width and height in pixels: as asked for, else what the UNet was trained at."""
    height, width = networks.pipeline.picture_size(command.height, command.width)
    for flag, side in (("--height", height), ("--width", width)):
        factor = networks.pipeline.vae_scale_factor
        if side % factor or side > MAX_SIDE:
            raise ConfigError(f"{flag} is {side}; it must be a multiple of {factor}, at most {MAX_SIDE}")
    return width, height


def picture_recipe(command: Drawing, networks: Networks, **values: Any) -> Recipe:
    """What all pictures of a command share, with the first one's seed and no prompt.

    Raises:
        ConfigError: a negative prompt that nothing is led away from.
    """
    given = {"prompt": "", "seed": command.seed, "clip_guidance": command.clip_guidance}
    recipe = recipe_of(networks, command, **(given | values))
    if command.negative_prompt and recipe.guidance_scale <= 1:
        raise ConfigError(f"--negative-prompt: has no effect at guidance scale {recipe.guidance_scale:g}")
    if command.negative_prompt and networks.pipeline.takes_guidance_as_input:
        raise ConfigError("--negative-prompt: has no effect on this checkpoint, whose guidance is inside its UNet")
    return recipe


def _draw(
    command: PictureList, networks: Networks, work: Sequence[tuple[str, int]], shared: Recipe, **inputs: Image.Image
) -> None:
    """Draw what is not there yet; files and the grid in the order of the work."""
    # Of long prompts each has as many pieces as the longest of its batch: there they would depend on one another.
    size = 1 if command.long_prompts else command.batch_size
    recipes = [
        replace(shared, prompt=prompt, seed=seed, batch_size=min(size, len(work) - i // size * size))
        for i, (prompt, seed) in enumerate(work)
    ]
    paths = _paths(command, work)
    there = {i for i, path in enumerate(paths) if is_there(path, recipes[i], command.overwrite)}
    for i in sorted(there):
        print(f"{paths[i]} is there")
    pictures = {}
    for i, image in draw_recipes(networks, recipes, **inputs, wanted=set(range(len(work))) - there):
        if paths:
            save(image, paths[i], recipes[i])
        if command.grid is not None:
            pictures[i] = image
    if command.grid is not None:
        images = [pictures[i] if i in pictures else Image.open(paths[i]) for i in range(len(work))]
        labels = [f"{prompt} ({seed})" if command.seeds else prompt for prompt, seed in work]
        _save_grid(labelled_grid(images, labels, command.columns or len(command.seeds) or COLUMNS), command.grid)


def _paths(command: PictureList, work: Sequence[tuple[str, int]]) -> list[Path]:
    """A file for each picture; none where only a grid is asked for."""
    if command.output_dir is None and command.grid is not None:
        return []
    folder = command.output_dir or Path(PICTURES_FOLDER)
    ends = [f"-{seed}" if command.seeds else "" for _, seed in work]
    return [folder / f"{i:03d}-{file_name(work[i][0])}{ends[i]}.png" for i in range(len(work))]


def file_name(prompt: str) -> str:
    """A prompt as part of a file's name: "A cat, twemoji style" -> "a-cat-twemoji-style", cut at 60 letters and at 180
    bytes. Letters that the system's names cannot have are left out."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60]
    encoding = sys.getfilesystemencoding()
    return words.encode(encoding, "ignore")[:180].decode(encoding, "ignore")


def is_there(path: Path, recipe: Recipe, overwrite: bool) -> bool:
    """Whether a file holds the picture of a recipe already.

    Raises:
        ConfigError: it holds something else, which would be lost.
    """
    if not path.exists():
        return False
    try:
        other = replace(read_recipe(path), batch_size=recipe.batch_size)
    except RecipeError:
        other = None
    if other == recipe or overwrite:
        return other == recipe
    what = "something else" if other is None else _difference(other, recipe)
    raise ConfigError(f"{path} is there and holds {what}: --overwrite replaces it, --output-dir draws elsewhere")


def _difference(there: Recipe, wanted: Recipe) -> str:
    name = next(name for name in vars(wanted) if getattr(there, name) != getattr(wanted, name))
    return f"a picture of another {name.replace('_', ' ')}"


def save(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Write a picture with its recipe, and say where.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        save_png(image, path, recipe)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
    tqdm.write(str(path))


def _save_grid(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[SOFTWARE] = f"latentdiff {__version__}"
    stream = io.BytesIO()
    try:
        image.save(stream, format=Image.registered_extensions()[path.suffix.lower()], exif=exif)
        write_whole(path, stream.getvalue())
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None
    print(path)


def _is_ours(path: Path) -> bool:
    """Whether a picture was written by `_save_grid`."""
    try:
        with Image.open(path) as image:
            return str(image.getexif().get(SOFTWARE, "")).startswith("latentdiff ")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def interpolate(command: Interpolate) -> None:
    """Draw, save and say where."""
    check_animation(command.output, command.fps)
    networks = load(command)
    stations = max(len(command.prompts), len(command.seeds))
    prompts, seeds = command.prompts, command.seeds or (command.seed,)
    prompts, seeds = (each * (stations if len(each) == 1 else 1) for each in (prompts, seeds))
    width, height = picture_size(command, networks)
    recipe = picture_recipe(
        command,
        networks,
        kind="interpolate",
        prompt=prompts[0],
        prompts=prompts[1:],
        seed=seeds[0],
        seeds=seeds[1:],
        frames=command.num_frames,
        loop=command.loop,
        columns=command.columns,
        width=width,
        height=height,
        batch_size=command.batch_size,
    )
    row = command.output.with_suffix(".png")
    if is_there(row, recipe, command.overwrite) and command.output.exists():
        print(f"{command.output} is there")
        return
    if command.output.exists() and not row.exists() and not command.overwrite:
        raise ConfigError(f"{command.output} is there, and no film of latentdiff's: --overwrite replaces it")
    frames = draw_frames(networks, recipe)
    try:
        print(save_animation(frames, command.output, command.fps))
    except OSError as error:
        raise ConfigError(f"{command.output} cannot be written: {error}") from None
    save(strip(frames, command.columns), row, recipe)
