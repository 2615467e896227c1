"""The command line: `latentdiff generate`, `latentdiff retrieval`, `latentdiff backgrounds`, `latentdiff check`.

Torch and diffusers are imported inside the commands, so that `--help` and a mistyped flag answer without loading them.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from PIL import Image

from .cli_errors import parse_train_config, user_errors
from .config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from .evaluation import DrawSettings, Measurement

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
PICTURES_FOLDER = "pictures"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command takes."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved pipeline, or a model on the Hub as owner/name."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Weight of classifier-free guidance; 1 is none."""
    seed: int = 0
    """Picture i starts from the noise of seed + i."""
    batch_size: int = 32
    """Pictures drawn at a time; it does not change them."""
    device: str | None = None
    """As torch names it; by default cuda where there is one, else cpu."""


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Draw a picture for each prompt."""

    prompts: tuple[str, ...]
    """One or more, each in quotes."""
    output_dir: str | None = None
    """Folder for one PNG per prompt; "pictures" where neither this nor --grid is given."""
    grid: str | None = None
    """File for one picture of all, with their prompts underneath."""
    columns: int = 4
    """Pictures in a row of the grid."""


@dataclass(frozen=True, kw_only=True)
class Retrieval(Command):
    """Measure whether drawn emoji are found again among the real ones: R@1, R@10, their ceiling and floor."""

    count: int = 500
    """Training captions to draw, half of each style."""
    output: str | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class Backgrounds(Command):
    """Measure emoji on background colours they were never trained with: the colour drawn, and retrieval."""

    count: int = 240
    """Held-out pairs of emoji and background to draw, and as many that were trained on."""
    output: str | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Look before training: takes every flag of train_text2img.py (which `latentdiff check --help` lists) and says
    what it finds in pictures, captions, VAE, disk, time and memory."""

    config: tyro.conf.Suppress[TrainConfig | None] = None


def load_pipeline(checkpoint: str, device: str | None) -> Any:
    """A `LatentDiffPipeline` on its device, without progress bars of its own.

    Raises:
        ConfigError: nothing that can be loaded is there.
    """
    folder = Path(checkpoint)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ConfigError(f"{checkpoint} holds no model_index.json: give the folder of a whole saved pipeline")
    if not folder.exists() and not HUB_ID.fullmatch(checkpoint):
        raise ConfigError(f"{checkpoint}: no such folder (nor is it the name of a model on the Hub, owner/name)")

    import torch

    from .models import hide_loading_bars
    from .pipelines.text2img import LatentDiffPipeline

    hide_loading_bars()
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError(f"--device {device}: not a device that torch knows, such as cpu, cuda or cuda:1") from None
    try:
        pipeline = LatentDiffPipeline.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        where = "cannot be loaded" if folder.exists() else "neither a folder here nor a model to be had from the Hub"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{checkpoint}: {where}: {reason[0]}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _settings(command: Command) -> "DrawSettings":
    from .evaluation import DrawSettings

    return DrawSettings(
        num_inference_steps=command.num_inference_steps,
        guidance_scale=command.guidance_scale,
        seed=command.seed,
        batch_size=command.batch_size,
    )


def generate(command: Generate) -> None:
    """Draw, save and say where."""
    if not command.prompts:
        raise ConfigError('--prompts is empty: give one or more, such as --prompts "a cat" "a dog"')
    if command.columns < 1:
        raise ConfigError(f"--columns is {command.columns}; it must be at least 1")
    if command.grid is not None and Path(command.grid).suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"{command.grid} cannot be written: its suffix names no picture format")
    settings, pipeline = _settings(command), load_pipeline(command.checkpoint, command.device)
    from .evaluation import draw
    from .grid import labelled_grid

    images = draw(pipeline, command.prompts, settings)
    if command.output_dir is not None or command.grid is None:
        folder = Path(command.output_dir or PICTURES_FOLDER)
        for i, (prompt, image) in enumerate(zip(command.prompts, images, strict=True)):
            _save(image, folder / f"{i:03d}-{file_name(prompt)}.png")
    if command.grid is not None:
        _save(labelled_grid(images, command.prompts, command.columns), Path(command.grid))


def file_name(prompt: str) -> str:
    """A prompt as part of a file's name: "A cat, twemoji style" -> "a-cat-twemoji-style", cut at 60 letters."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60]


def _save(image: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None
    print(path)


def retrieval(command: Retrieval) -> None:
    """Measure, print and, where asked, write JSON."""
    settings, pipeline = _settings(command), load_pipeline(command.checkpoint, command.device)
    from . import evaluation

    network = evaluation.efficientnet_lite.load(pipeline.device)
    _report(evaluation.retrieval(pipeline, count=command.count, settings=settings, network=network), command.output)


def backgrounds(command: Backgrounds) -> None:
    """Measure, print and, where asked, write JSON."""
    settings, pipeline = _settings(command), load_pipeline(command.checkpoint, command.device)
    from . import evaluation

    network = evaluation.efficientnet_lite.load(pipeline.device)
    _report(evaluation.backgrounds(pipeline, count=command.count, settings=settings, network=network), command.output)


def _report(result: "Measurement", output: str | None) -> None:
    print(result)
    if output is not None:
        try:
            result.save_json(output)
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error}") from None


def check(command: Check) -> None:
    """Say what stands against a run with these settings."""
    from . import preflight

    preflight.check(command.config)


COMMANDS = {Generate: generate, Retrieval: retrieval, Backgrounds: backgrounds, Check: check}


def parse(argv: list[str] | None = None) -> Command | Check:
    """The command that `argv` (by default the process's own) asks for."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["check"]:  # its flags stand over a preset or a file, as in training
        return Check(config=parse_train_config(argv[1:], prog="latentdiff check"))
    description = "Draw with a latent diffusion model, and measure what it draws."
    return tyro.cli(Generate | Retrieval | Backgrounds | Check, args=argv, prog="latentdiff", description=description)


def main(argv: list[str] | None = None) -> None:
    """Run a command; a user's mistake (ConfigError) is one line on stderr and status 2."""
    with user_errors():
        command = parse(argv)
        COMMANDS[type(command)](command)


if __name__ == "__main__":
    main()
