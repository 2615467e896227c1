"""`latentdiff interpolate`: a film from prompt to prompt, and a strip of its frames that carries the recipe."""

from .animation import check_animation, save_animation, strip
from .cli import Interpolate
from .config import ConfigError
from .drawing import draw_frames
from .picture_lists import is_there, load, picture_recipe, picture_size, save


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
