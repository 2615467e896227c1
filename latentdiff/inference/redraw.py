"""`latentdiff redraw`: a picture again, from the recipe that its PNG carries, after looking at what has changed."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from .. import __version__
from ..config.drawing import Redraw
from ..utils.errors import ConfigError
from ..utils.files import folder_sha256, packaged_checkpoint
from ..utils.films import strip
from .drawing import draw_frames, draw_recipes, open_inputs
from .generate import is_there, save
from .loading import DTYPES, HUB_ID, Networks, load_networks
from .recipe import Ingredient, Recipe, file_ingredient, read_recipe

# What a recipe may ask for beyond what its checkpoint is made for, so that a picture does not decide for how long a
# machine works: times as many pixels, and pictures of the checkpoint's size times steps.
MAX_AREA = 16
MAX_WORK = 20_000
_DTYPES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def redraw(command: Redraw) -> None:
    """Draw, save, and say whether it is the same picture."""
    recipe = read_recipe(command.picture)
    command = with_shipped(command, recipe)
    check_given(command, recipe)
    paths = {name: getattr(command, name) for name in ("image", "mask")}  # those that the recipe has, by `check_given`
    inputs = open_inputs(paths, recipe.width, recipe.height)
    checkpoint, hub_id = command.checkpoint, None
    if checkpoint is None:
        checkpoint, hub_id = find_checkpoint(recipe.checkpoint, command), recipe.checkpoint.name
    dtype = _DTYPES[recipe.dtype]
    networks = load_networks(
        checkpoint,
        command.device,
        dtype,
        command.guide_unet,
        command.clip,
        recipe.ema_sigma_rel,
        command.lora,
        hub_id=hub_id,
        single_file_config=command.single_file_config,
    )
    now = as_of_now(recipe, networks, command)
    _tell([*differences(recipe, now), *excess(now, networks)], command)
    _say_device(recipe, now)
    output = command.output or command.picture.with_name(f"{command.picture.stem}-redrawn.png")
    if is_there(output, now, command.overwrite):
        print(f"{output} is there")
        return
    if recipe.kind == "interpolate":
        image = strip(draw_frames(networks, now), now.columns)
    else:  # in a batch of copies, as large as the one in which it was drawn
        [(_, image)] = draw_recipes(networks, [now] * now.batch_size, **inputs, wanted={0})
    save(image, output, now)
    print(comparison(image, command.picture))


def check_given(command: Redraw, recipe: Recipe) -> None:
    """Raise a ConfigError unless everything that the recipe needs is given, and nothing else."""
    if command.output is not None and command.output.suffix.lower() != ".png":
        raise ConfigError(f"--output {command.output}: must end in .png, which carries the recipe")
    for name in ("image", "mask", "guide_unet", "clip", "lora", "single_file_config"):
        flag, wanted, given = f"--{name.replace('_', '-')}", getattr(recipe, name), getattr(command, name)
        if wanted is not None and given is None:
            raise ConfigError(f"{command.picture} was made with {wanted.name!r}: give it with {flag}")
        if wanted is None and given is not None:
            raise ConfigError(f"{flag}: {command.picture} was made without one; leave it out")
    if recipe.dtype not in _DTYPES:
        raise ConfigError(f"{command.picture}: its recipe's dtype is {recipe.dtype!r}; it may be {', '.join(_DTYPES)}")


def with_shipped(command: Redraw, recipe: Recipe) -> Redraw:
    """The command with what the recipe needs and latentdiff ships, by its name, where nothing else is given."""
    found = {}
    for name in ("checkpoint", "clip"):
        wanted = getattr(recipe, name)
        if wanted is not None and getattr(command, name) is None and Path(wanted.name).name == wanted.name:
            beside = Path(packaged_checkpoint()).parent / wanted.name
            found |= {name: str(beside) if name == "checkpoint" else beside} if _is_a_model(beside) else {}
    return replace(command, **found)


def _is_a_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model_index.json", "config.json"))


def find_checkpoint(checkpoint: Ingredient, command: Redraw) -> str:
    """The folder of a recipe's checkpoint of the Hub, where it has been loaded before.

    A picture does not decide what is loaded from the network, nor that it is asked: its owner does, by --checkpoint.

    Raises:
        ConfigError: it is not there, not of the Hub, or not the one that drew the picture.
    """
    picture = command.picture
    if HUB_ID.fullmatch(checkpoint.name):
        index = try_to_load_from_cache(checkpoint.name, "model_index.json")
        if isinstance(index, str):
            folder = Path(index).parent
            if folder_sha256(folder) != checkpoint.sha256 and not command.anyway:
                raise ConfigError(
                    f"{picture}: the {checkpoint.name!r} on this machine is not that of the recipe (SHA-256 differs): "
                    f"--checkpoint {checkpoint.name} loads it anew, --anyway draws with this one"
                )
            return str(folder)
        raise ConfigError(
            f"{picture} was drawn by {checkpoint.name!r} of the Hub, which is not on this machine: "
            f"--checkpoint {checkpoint.name} loads it"
        )
    raise ConfigError(f"{picture} was drawn by {checkpoint.name!r}: say where it lies with --checkpoint")


def as_of_now(recipe: Recipe, networks: Networks, command: Redraw) -> Recipe:
    """The recipe with what is really at hand for it."""
    return replace(
        recipe,
        image=recipe.image and file_ingredient(command.image),
        mask=recipe.mask and file_ingredient(command.mask),
        guide_unet=recipe.guide_unet and networks.guide_unet.ingredient,
        clip=recipe.clip and networks.clip.ingredient,
        lora=networks.lora,
        checkpoint=networks.checkpoint,
        single_file_config=networks.single_file_config,
        device=networks.pipeline.device.type,
        version=__version__,
        batch_size=command.batch_size or recipe.batch_size,
    )


def differences(then: Recipe, now: Recipe) -> Iterator[str]:
    """What is not as it was, in words; the device apart, which is nobody's mistake."""
    for name in ("checkpoint", "single_file_config", "lora", "guide_unet", "clip", "image", "mask"):
        was, is_now = getattr(then, name), getattr(now, name)
        if was is not None and was.sha256 != is_now.sha256:
            what = name.replace("_", " ")
            yield f"the {what} {is_now.name!r} is not the {was.name!r} of the recipe (SHA-256 differs)"
    if then.version != now.version:
        yield f"it was drawn by latentdiff {then.version!r}, and this is {now.version}"


def excess(recipe: Recipe, networks: Networks) -> Iterator[str]:
    """What a recipe asks for far beyond what its checkpoint is made for, in words."""
    height, width = networks.pipeline.picture_size(None, None)
    area = recipe.height * recipe.width / (height * width)
    pictures = recipe.frames or recipe.batch_size
    if area > MAX_AREA or area * pictures * recipe.num_inference_steps > MAX_WORK:
        of = f"{pictures} pictures of " if pictures > 1 else ""
        yield (
            f"it asks for {of}{recipe.width} x {recipe.height} pixels in {recipe.num_inference_steps} steps, far more "
            f"than this checkpoint is made for, which is {width} x {height}"
        )


def _tell(changed: list[str], command: Redraw) -> None:
    if changed and not command.anyway:
        raise ConfigError(f"{command.picture}: {'; '.join(changed)}: --anyway draws it all the same")
    for line in changed:
        print(f"warning: {line}", file=sys.stderr)


def _say_device(then: Recipe, now: Recipe) -> None:
    """Nobody's mistake, so that nothing is refused."""
    if then.device != now.device:
        print(f"drawn on {then.device!r}, and here on {now.device}: shades may differ a little", file=sys.stderr)


def comparison(image: Image.Image, picture: Path) -> str:
    """How the new picture differs from the one in the file."""
    try:
        with Image.open(picture, formats=("PNG",)) as old:
            before = np.asarray(old.convert("RGB")).astype(int)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return f"{picture} cannot be compared: its pixels cannot be read"
    after = np.asarray(image).astype(int)
    if before.shape != after.shape:
        return f"{picture} is of another size"
    apart = abs(before - after)
    if not apart.any():
        return f"the same picture as {picture}, pixel for pixel"
    return f"{(apart > 0).mean():.3%} of the shades differ from {picture}, by {apart.max()} of 255 at most"
