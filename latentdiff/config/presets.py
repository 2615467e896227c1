"""A run's settings from the command line, over those of a preset or of a YAML file."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import get_args, get_type_hints

import yaml

from ..utils.errors import ConfigError, first_line
from ..utils.flags import parse_flags, user_errors
from ..utils.text import NotText, decoded
from .checks import ADAFACTOR_LACKS
from .train import TrainConfig


def run_training(main: Callable[[TrainConfig], None], argv: list[str] | None = None) -> None:
    """Parse a TrainConfig, over `--preset NAME` or `--config FILE` where one is given, and call `main(config)`."""
    with user_errors():
        main(parse_train_config(argv))


def parse_train_config(argv: list[str] | None = None, prog: str | None = None) -> TrainConfig:
    """Flags over a config file over a preset over the defaults.

    Raises:
        ConfigError: an unknown preset, an unreadable file, or settings that make no sense together.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="emoji64")
    first.add_argument("--config")
    first.add_argument("--optimizer")  # decides which of a preset's settings hold
    chosen, rest = first.parse_known_args(argv)
    given = read_config(chosen.config) if chosen.config else {}
    if chosen.optimizer is not None:
        given["optimizer"] = chosen.optimizer
    values = preset(chosen.preset, given.get("optimizer", TrainConfig.optimizer)) | given
    return parse_flags(
        TrainConfig,
        rest,
        default=TrainConfig(**values),
        prog=prog,
        description=f"{TrainConfig.__doc__}\n\n--preset NAME and --config FILE set what the flags then change.",
    )


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
        values = yaml.safe_load(decoded(Path(path).read_bytes()))
    except (OSError, NotText, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config: {path!r} cannot be read ({first_line(error)})") from None
    if not values:
        raise ConfigError(f"config: {path!r} is empty: it would say nothing of the run that it is to start")
    known = get_type_hints(TrainConfig)
    if not isinstance(values, dict) or (unknown := [name for name in values if name not in known]):
        what = f"has no setting named {unknown[0]!r}" if isinstance(values, dict) else "is no list of settings"
        raise ConfigError(f"config: {path!r} {what}")
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
