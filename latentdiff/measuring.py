"""`latentdiff retrieval`, `latentdiff backgrounds` and `latentdiff check`: numbers, printed and written."""

from pathlib import Path

from . import backgrounds as composition
from . import feature_networks, preflight
from . import retrieval as prompts
from .cli import Check
from .cli_measuring import Backgrounds, Retrieval
from .config import ConfigError
from .loading import load_pipeline


def retrieval(command: Retrieval) -> None:
    """Measure, print and, where asked, write JSON."""
    pipeline = load_pipeline(command.checkpoint, command.device)
    settings = prompts.DrawSettings.of(command, pipeline)
    network = feature_networks.load(device=pipeline.device)
    _report(prompts.retrieval(pipeline, count=command.count, settings=settings, network=network), command.output)


def backgrounds(command: Backgrounds) -> None:
    """Measure, print and, where asked, write JSON."""
    pipeline = load_pipeline(command.checkpoint, command.device)
    settings = prompts.DrawSettings.of(command, pipeline)
    network = feature_networks.load(device=pipeline.device)
    _report(composition.backgrounds(pipeline, count=command.count, settings=settings, network=network), command.output)


def check(command: Check) -> None:
    """Say what stands against a run with these settings."""
    preflight.check(command.config)


def _report(result: prompts.Measurement, output: Path | None) -> None:
    print(result)
    if output is not None:
        try:
            result.save_json(output)
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error}") from None
