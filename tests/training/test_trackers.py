"""What a tracker is told: settings, curves and pictures; and that none of them is left out without a word."""

import json
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image

from latentdiff.config.train import TrainConfig
from latentdiff.training.log import RunLog
from latentdiff.training.setup import make_accelerator
from latentdiff.training.trackers import log_picture, log_values, plain_settings
from latentdiff.utils.errors import ConfigError


def settings(tmp_path, name: str) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path), report_to=name, ema_sigma_rel=(0.05, 0.1))


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard", "all"])
def test_a_tracker_that_is_not_installed_is_an_error(name, tmp_path, monkeypatch):
    """accelerate leaves it out, and hours later there are no curves."""
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=r"report_to: .*is(?: not)? installed"):
        make_accelerator(settings(tmp_path, name))


def test_a_tracker_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    """Such as one that is not logged in: each has its own kind of error."""

    class NotLoggedIn(Exception):
        """As wandb's UsageError: none of Python's kinds."""

    def refuse(self):
        raise NotLoggedIn("api_key not configured")

    monkeypatch.setattr(accelerate.tracking.TensorBoardTracker, "start", refuse)
    with pytest.raises(ConfigError, match="report_to: tensorboard does not start: api_key not configured"):
        make_accelerator(settings(tmp_path, "tensorboard"))


def test_tensorboard_gets_settings_curves_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = make_accelerator(settings(tmp_path, "tensorboard"))
    log_values(accelerator, {"loss": 0.5}, 3)
    picture = Image.fromarray(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3))
    log_picture(accelerator, picture, tmp_path / "unused.png", 4)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "logs" / "latentdiff"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    (shown,) = events.Images("validation")
    assert (shown.step, shown.width, shown.height) == (4, 16, 12)
    (said,) = (tmp_path / "logs").rglob("hparams.yml")
    assert "ema_sigma_rel: 0.05 | 0.1" in said.read_text() and "learning_rate: " in said.read_text()


def test_settings_are_values_that_every_tracker_takes(tmp_path):
    """TensorBoard and MLflow end a run on None and on tuples."""
    plain = plain_settings(settings(tmp_path, "wandb"))
    assert {type(value) for value in plain.values()} <= {bool, int, float, str}
    assert plain["validation_prompts"].startswith("a cat | ") and "max_train_samples" not in plain


class Recorded(GeneralTracker):
    """Keeps what it is called with."""

    requires_logging_directory = False

    def __init__(self, name: str):
        self.name = name
        super().__init__()
        self.calls: list[tuple] = []
        self.writer = SimpleNamespace(log_image=lambda *args, **options: self.calls.append(("writer", args, options)))
        self.live = SimpleNamespace(log_image=lambda *args, **options: self.calls.append(("live", args, options)))

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values: dict) -> None:
        """Nothing to do with the settings here."""

    def log(self, values: dict, step: int | None = None, **options) -> None:
        self.calls.append(("log", values, step))

    def log_images(self, values: dict, step: int | None = None, **options) -> None:
        self.calls.append(("log_images", values["validation"], step))

    def log_artifact(self, *args) -> None:
        self.calls.append(("log_artifact", *args))


PICTURE, PATH = Image.new("RGB", (4, 4)), Path("step-7.png")


@pytest.mark.parametrize(
    "name, call",
    [
        ("wandb", ("log_images", [PICTURE], 7)),
        ("swanlab", ("log_images", [PICTURE], 7)),
        ("aim", ("log_images", PICTURE, 7)),
        ("clearml", ("log_images", PICTURE, 7)),
        ("mlflow", ("log_artifact", "step-7.png", "validation")),
        ("comet_ml", ("writer", ("step-7.png",), {"name": "validation", "step": 7})),
    ],
)
def test_pictures_come_as_each_tracker_takes_them(name, call):
    """accelerate passes them on as they are; a list where one picture is meant fails in the tracker's own package."""
    tracker = Recorded(name)
    log_picture(SimpleNamespace(trackers=[tracker]), PICTURE, PATH, 7)
    assert tracker.calls == [call]


def test_a_tracker_that_fails_later_ends_nothing(tmp_path, caplog):
    """A server that is away for a minute would end a run of days."""
    tracker = Recorded("mlflow")
    tracker.log = lambda *args, **options: 1 / 0
    tracker.log_artifact = lambda *args: 1 / 0
    accelerator = SimpleNamespace(trackers=[tracker], is_main_process=True)
    log = RunLog(TrainConfig(output_dir=str(tmp_path)), accelerator, first_step=0)
    log(5, {"loss": 0.25})
    log_picture(accelerator, PICTURE, PATH, 5)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 5, "loss": 0.25}
    assert caplog.text.count("mlflow does not take what was measured: division by zero") == 2
