"""What a run tells the tracker of `report_to`: settings, curves and pictures, through accelerate's own calls.

A tracker that cannot start is a ConfigError; one that fails later, as a server may, ends nothing: `log.jsonl` and the
folder `validation` have it all.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..config.train import TrainConfig
from ..utils.errors import ConfigError, first_line

logger = logging.getLogger(__name__)
PROJECT = "latentdiff"


def start_tracker(config: TrainConfig, accelerator: Accelerator) -> None:
    """Start what `report_to` names and tell it the settings.

    Raises:
        ConfigError: it is not installed, or does not start.
    """
    name = config.report_to
    if name == "none":
        return
    if not accelerator.log_with:  # accelerate leaves out without a word what is not there
        what = "no tracker is installed" if name == "all" else f"{name} is not installed: pip install {name}"
        raise ConfigError(f"report_to: {what} (or --report_to none)")
    try:
        accelerator.init_trackers(PROJECT, config=plain_settings(config))
    except Exception as error:  # each tracker has its own kinds
        raise ConfigError(f"report_to: {name} does not start: {first_line(error)}") from None


def plain_settings(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Every setting as a value that any tracker takes; those that are not set are left out."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    return {n: v if isinstance(v, (bool, int, float, str)) else " | ".join(map(str, v)) for n, v in settings.items()}


def log_values(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """A point of every curve."""
    for tracker in accelerator.trackers:
        _tell(tracker, tracker.log, values, step=step)


def log_picture(accelerator: Accelerator, picture: Image.Image, path: Path, step: int) -> None:
    """A picture beside the curves, called "validation".

    Args:
        picture: RGB.
        path: where it is saved, for trackers that take files.
    """
    for tracker in accelerator.trackers:
        _tell(tracker, _PICTURES.get(tracker.name, _as_list), tracker, picture, path, step)


def _tell(tracker: GeneralTracker, call: Callable, *args: Any, **options: Any) -> None:
    try:
        call(*args, **options)
    except Exception as error:
        logger.warning("%s does not take what was measured: %s", tracker.name, first_line(error))


# ---- what each tracker's `log_images` takes; for those that have none, what they have instead


def _as_list(tracker: GeneralTracker, picture: Image.Image, path: Path, step: int) -> None:
    tracker.log_images({"validation": [picture]}, step)


def _as_one(tracker: GeneralTracker, picture: Image.Image, path: Path, step: int) -> None:
    tracker.log_images({"validation": picture}, step)


def _as_array(tracker: GeneralTracker, picture: Image.Image, path: Path, step: int) -> None:
    tracker.log_images({"validation": np.asarray(picture)[None]}, step, dataformats="NHWC")


def _to_mlflow(tracker: GeneralTracker, picture: Image.Image, path: Path, step: int) -> None:
    tracker.log_artifact(str(path), "validation")


def _to_comet(tracker: GeneralTracker, picture: Image.Image, path: Path, step: int) -> None:
    tracker.writer.log_image(str(path), name="validation", step=step)


def _to_dvclive(tracker: GeneralTracker, picture: Image.Image, path: Path, step: int) -> None:
    tracker.live.log_image("validation.png", np.asarray(picture))


def _to_trackio(tracker: GeneralTracker, picture: Image.Image, path: Path, step: int) -> None:
    import trackio

    tracker.log({"validation": trackio.Image(path)}, step=step)


_PICTURES = {
    "aim": _as_one,
    "clearml": _as_one,
    "comet_ml": _to_comet,
    "dvclive": _to_dvclive,
    "mlflow": _to_mlflow,
    "tensorboard": _as_array,
    "trackio": _to_trackio,
}
