"""A run's settings from the command line, over those of a preset or of a YAML file."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

import tyro
import yaml

from ..utils.errors import ConfigError, first_line
from ..utils.files import check_shipped, read_at_most
from ..utils.flags import parse_flags, user_errors
from ..utils.suggestions import perhaps
from ..utils.text import decoded
from .checks import ADAFACTOR_LACKS
from .train import (
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimisationSettings,
    ResultSettings,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class PresetSettings:
    """A preset or a file of settings, which the flags below change."""

    preset: str = "emoji64"
    """Settings for a purpose: emoji64, demo, finetune or distill."""
    config: str | None = None
    """A YAML file of settings, over those of the preset, such as the train_config.yaml of a run."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """The command line of a run, in groups; its flags are the names of the settings."""

    preset: PresetSettings
    model: ModelSettings
    data: DataSettings
    objective: ObjectiveSettings
    optimisation: OptimisationSettings
    result: ResultSettings


FLAT = (tyro.conf.OmitArgPrefixes,)

MOST_SETTINGS = 2**20  # bytes of a file of them


def run_training(main: Callable[[TrainConfig], None], argv: list[str] | None = None) -> None:
    """Parse a TrainConfig, over `--preset NAME` or `--config FILE` where one is given, and call `main(config)`."""
    with user_errors():
        main(parse_train_config(argv))


def parse_train_config(
    argv: list[str] | None = None, prog: str | None = None, description: str | None = None
) -> TrainConfig:
    """Flags over a config file over a preset over the defaults.

    Raises:
        ConfigError: an unknown preset, an unreadable file, or settings that make no sense together.
    """
    start = _first_look(argv)
    given = read_config(start.config) if start.config else {}
    if start.optimizer is not None:
        given["optimizer"] = start.optimizer
    values = preset(start.preset, given.get("optimizer", TrainConfig.optimizer)) | given
    flags = parse_flags(
        TrainFlags,
        argv,
        default=_grouped(start, values),
        prog=prog,
        description=description or TrainConfig.__doc__,
        config=FLAT,
        use_underscores=True,
    )
    groups = [getattr(flags, group.name) for group in fields(flags) if group.name != "preset"]
    config = TrainConfig(**{one.name: getattr(group, one.name) for group in groups for one in fields(group)})
    check_shipped(config.pretrained_model_name_or_path, "pretrained_model_name_or_path: ")
    return config


@dataclass(frozen=True, kw_only=True)
class _First(PresetSettings):
    optimizer: str | None = None
    """It decides which of a preset's settings hold."""


def _first_look(argv: list[str] | None) -> _First:
    """What has to be known before the other flags have defaults."""
    try:
        return tyro.cli(_First, args=argv, return_unknown_args=True, console_outputs=False, add_help=False)[0]
    except SystemExit:  # one of them lacks its value, which is said when all flags are parsed
        return _First()


def _grouped(start: _First, values: dict) -> TrainFlags:
    kinds = {name: kind for name, kind in get_type_hints(TrainFlags).items() if name != "preset"}
    groups = {
        name: kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values})
        for name, kind in kinds.items()
    }
    return TrainFlags(preset=PresetSettings(preset=start.preset, config=start.config), **groups)


# What differs from the defaults.
PRESETS: dict[str, dict] = {
    "emoji64": {"learning_rate": 8e-4, "snr_gamma": 0.02, "adam_epsilon": 1e-10},
    "demo": {
        "unet": "tiny", "max_train_samples": 20, "max_train_steps": 500, "lr_warmup_steps": 50,
        "checkpointing_steps": 500, "validation_steps": 250, "output_dir": "demo-output/run", "report_to": "none",
        "ema_decay": 0.99, "learning_rate": 1e-3, "snr_gamma": 0.02, "adam_epsilon": 1e-10,
    },
    "finetune": {
        "unet": "pretrained", "learning_rate": 1e-5, "train_batch_size": 4,
        "max_train_steps": 1000, "adam_weight_decay": 0.01, "adam_beta2": 0.999, "output_dir": "runs/finetune",
        "validation_prompts": (),
    },
    "distill": {
        "unet": "pretrained", "consistency": "distillation", "caption_dropout": 0.0, "learning_rate": 1e-5,
        "max_train_steps": 2000, "adam_beta2": 0.999, "output_dir": "runs/distilled", "ema_decay": 0.995,
        "validation_prompts": (), "validation_inference_steps": 4,
    },
}  # fmt: skip


def preset(name: str, optimizer: str = TrainConfig.optimizer) -> dict:
    """The settings of a preset, less those that the optimizer has not, and with the learning rate that Prodigy wants.

    Raises:
        ConfigError: unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: {name!r} is unknown; it may be {', '.join(map(repr, PRESETS))}")
    lacks = ADAFACTOR_LACKS if optimizer == "adafactor" else ()
    rate = {"learning_rate": 1.0} if optimizer == "prodigy" else {}
    return {setting: value for setting, value in PRESETS[name].items() if setting not in lacks} | rate


def read_config(path: str) -> dict:
    """The settings in a YAML file that `TrainConfig.save` or a person wrote.

    Raises:
        ConfigError: the file is missing or holds a setting that does not exist.
    """
    try:
        values = yaml.safe_load(decoded(read_at_most(path, MOST_SETTINGS)))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config: {path!r} cannot be read ({first_line(error)})") from None
    if not values:
        raise ConfigError(f"config: {path!r} is empty: it would say nothing of the run that it is to start")
    known = get_type_hints(TrainConfig)
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path!r} is no list of settings")
    if unknown := [name for name in values if name not in known]:
        raise ConfigError(f"config: {path!r} has no setting named {unknown[0]!r}{perhaps(str(unknown[0]), known)}")
    return {name: _from_yaml(value, known[name]) for name, value in values.items()}


def _from_yaml(value, kind):
    """What YAML reads otherwise than a person means it: a list, `no` (False to YAML), `1e-4` (a string to YAML)."""
    if isinstance(value, list):
        return tuple(value)
    if value is False and "no" in get_args(kind):
        return "no"
    if isinstance(value, str) and float in (kind, *get_args(kind)):
        with suppress(ValueError):
            return float(value)
    return value
