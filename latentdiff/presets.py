"""Settings of a training run by name, and from a YAML file."""

from contextlib import suppress
from pathlib import Path
from typing import get_args, get_type_hints

import yaml

from .config import ADAFACTOR_LACKS, ConfigError, TrainConfig

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
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config: {path!r} cannot be read ({str(error).splitlines()[0]})") from None
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
