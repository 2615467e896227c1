"""The checks that refuse what makes no sense, each with one line that names the setting."""

import math
import reprlib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..utils.errors import ConfigError
from ..utils.files import is_single_file

Settings = Any  # a `TrainConfig`, which is checked when it is made and therefore imports this

_SHORT = reprlib.Repr()  # a list in YAML may hold another a million times
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100

# Settings of Adam's moments that Adafactor has not.
ADAFACTOR_LACKS = ("adam_beta1", "adam_beta2", "adam_epsilon")


def check(config: Settings) -> None:
    """Everything that can be known to be wrong with a run's settings before anything is loaded.

    Raises:
        ConfigError: the first that makes no sense.
    """
    check_types(config)
    is_text(config, "validation_prompts")
    _check_ranges(config)
    _check_single_file(config)
    _check_data(config)
    _check_schedules(config)
    if config.force_weight_norm and config.lora_rank is not None:
        raise ConfigError("force_weight_norm: has no effect with lora_rank, under which no filter is trained")
    if config.learned_uncertainty:
        _check_uncertainty(config)
    _check_consistency(config)
    if config.task == "inpaint" and _is_set(config, "validation_prompts") and config.validation_prompts:
        raise ConfigError("validation_prompts: have no effect with task inpaint, which paints pictures of the data")
    _check_optimizer(config)
    if config.lora_alpha is not None and config.lora_rank is None:
        raise ConfigError("lora_alpha: has no effect without --lora_rank")
    if config.lora_rank is not None:
        _check_lora(config)
    if config.ema_sigma_rel or config.ema_snapshot_steps is not None:
        _check_power_ema(config)
    if config.overwrite_output_dir and config.resume_from_checkpoint is not None:
        raise ConfigError("overwrite_output_dir: begins anew, and resume_from_checkpoint goes on: give one of them")
    if config.hub_model_id and not config.push_to_hub:
        raise ConfigError("hub_model_id: has no effect without --push_to_hub")


def _is_set(config: Settings, name: str) -> bool:
    """Whether a setting is another than its default."""
    return getattr(config, name) != getattr(type(config), name)


def _check_single_file(config: Settings) -> None:
    source = config.pretrained_model_name_or_path
    check_single_file_config(config, source, config.consistency_teacher, setting="single_file_config")
    for name in ("revision", "variant"):
        if getattr(config, name) is not None and is_single_file(source):
            raise ConfigError(f"{name}: has no effect on the single file {source!r}")


def _check_data(config: Settings) -> None:
    if config.train_data_dir and config.dataset_name:
        raise ConfigError("train_data_dir and dataset_name: give one of them")
    if config.train_data_dir and not Path(config.train_data_dir).is_dir():
        raise ConfigError(f"train_data_dir: {config.train_data_dir!r} is no folder")
    if config.uses_emoji and config.held_out_fraction:
        raise ConfigError("held_out_fraction: is for one's own pictures; the embedded emoji have a fixed split")
    for name in ("aspect_ratio_buckets", "crops_per_picture"):
        if config.uses_emoji and _is_set(config, name):
            raise ConfigError(f"{name}: is for one's own pictures; the embedded emoji are all square")
    if config.shuffle_buffer is not None and config.uses_emoji:
        raise ConfigError("shuffle_buffer: is for one's own pictures; the embedded emoji are in memory")
    if config.crops_per_picture > 1 and not config.center_crop:
        raise ConfigError("crops_per_picture: has no effect on pictures that are stretched (--no-center_crop)")
    if config.cache_text == "always" and not config.cache_latents:
        raise ConfigError("cache_text: 'always' contradicts --no-cache_latents, which keeps nothing on disk")
    if config.cache_text == "always" and config.train_text_encoder:
        raise ConfigError("cache_text: 'always' contradicts --train_text_encoder, under which captions change")


def _check_schedules(config: Settings) -> None:
    """Those of the noise and of the learning rate."""
    if config.beta_schedule == "squaredcos_cap_v2" and (_is_set(config, "beta_start") or _is_set(config, "beta_end")):
        raise ConfigError("beta_start and beta_end: have no effect with beta_schedule squaredcos_cap_v2")
    if config.lr_scheduler == "constant" and _is_set(config, "lr_warmup_steps"):
        raise ConfigError("lr_warmup_steps: has no effect with lr_scheduler constant; take constant_with_warmup")
    if config.lr_scheduler != "inverse_sqrt" and _is_set(config, "lr_decay_start_steps"):
        raise ConfigError(f"lr_decay_start_steps: has no effect with lr_scheduler {config.lr_scheduler}")


def _check_optimizer(config: Settings) -> None:
    if config.optimizer == "adafactor":
        for name in ADAFACTOR_LACKS:
            if _is_set(config, name):
                raise ConfigError(
                    f"{name}: {getattr(config, name)} has no effect with optimizer adafactor; leave it out"
                )
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        raise ConfigError(
            f"learning_rate: {config.learning_rate} is a factor on the rate that optimizer prodigy estimates; give one "
            "near 1, at least 0.1"
        )


def _check_power_ema(config: Settings) -> None:
    if not config.ema_sigma_rel:
        raise ConfigError("ema_snapshot_steps: has no effect without --ema_sigma_rel")
    for sigma_rel in config.ema_sigma_rel:
        if not 0 < sigma_rel <= 0.2886:  # just below 12^-1/2, the plain mean of all weights: a wider one there is not
            raise ConfigError(f"ema_sigma_rel: {sigma_rel} must lie above 0 and at most at 0.2886; 0.05 0.10 is usual")
    if len({f"{sigma_rel:g}" for sigma_rel in config.ema_sigma_rel}) < len(config.ema_sigma_rel):
        raise ConfigError("ema_sigma_rel: names a width twice, to six digits")
    if not config.use_ema:
        raise ConfigError("ema_sigma_rel: has no effect with --no-use_ema")
    if _is_set(config, "ema_decay"):
        raise ConfigError(
            f"ema_decay: {config.ema_decay} has no effect with ema_sigma_rel; leave it at {type(config).ema_decay}"
        )
    if config.lora_rank is not None:
        raise ConfigError("ema_sigma_rel: is for whole networks; the average of adapters (lora_rank) has ema_decay")


def _check_consistency(config: Settings) -> None:
    guidance = config.consistency_guidance
    of_teacher = ("consistency_teacher", "consistency_guide_unet", "consistency_guidance")
    if config.consistency is None:
        for name in ("consistency_steps", *of_teacher):
            if _is_set(config, name):
                raise ConfigError(f"{name}: has no effect without --consistency")
        return
    for name in ("snr_gamma", "learned_uncertainty"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}: weighs the denoising loss, which is not what consistency {config.consistency} has"
            )
    if config.consistency == "training":
        for name in of_teacher:
            if _is_set(config, name):
                raise ConfigError(f"{name}: has no effect with consistency 'training', which has no teacher")
        if config.consistency_steps < 10:
            raise ConfigError(f"consistency_steps: {config.consistency_steps} is below 10, at which it begins")
        return
    if config.unet != "pretrained" and config.consistency_teacher is None:
        raise ConfigError(
            f"consistency: {config.consistency!r} of new weights (unet {config.unet!r}) needs consistency_teacher"
        )
    if config.prediction_type is not None and config.unet == "pretrained" and config.consistency == "distillation":
        raise ConfigError(
            "prediction_type: a student that begins from a pretrained UNet and learns from its own answers keeps that "
            "one's"
        )
    if config.train_text_encoder:
        raise ConfigError(
            f"train_text_encoder: consistency {config.consistency!r} has a teacher that reads as the student does"
        )
    if not 1 <= len(guidance) <= 2 or min(guidance) < 1 or sorted(set(guidance)) != list(guidance):
        raise ConfigError(f"consistency_guidance: {guidance} is neither a value of at least 1 nor two ascending ones")
    if config.lora_rank is not None and len(guidance) == 2:
        raise ConfigError("consistency_guidance: a range is an input of its own, which adapters (lora_rank) cannot add")


def _check_uncertainty(config: Settings) -> None:
    if config.unet == "pretrained":
        raise ConfigError("learned_uncertainty: is for new weights; a pretrained UNet goes on with what it has")
    if config.snr_gamma is not None:
        raise ConfigError(
            f"snr_gamma: {config.snr_gamma} contradicts learned_uncertainty, which weighs noise levels itself; say None"
        )


def _check_lora(config: Settings) -> None:
    if config.unet != "pretrained":
        raise ConfigError(f"lora_rank: adapters stand on a pretrained UNet; unet is {config.unet!r}, not 'pretrained'")
    if config.prediction_type is not None or config.rescale_betas_zero_snr:
        raise ConfigError(
            "lora_rank: only the adapters are saved, so what they are used with keeps its own noise schedule; "
            "leave out prediction_type and rescale_betas_zero_snr"
        )
    if config.train_text_encoder:
        raise ConfigError("lora_rank: adapters are trained on the UNet alone; leave out train_text_encoder")
    if config.lora_alpha is not None and config.lora_alpha <= 0:
        raise ConfigError(f"lora_alpha: {config.lora_alpha} is not above 0")


def check_types(config: Settings) -> None:
    """The command line checks its own values; those of a file or of a program are checked here."""
    for name, kind in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), get_args(kind)
        if any(
            isinstance(one, float) and not math.isfinite(one)
            for one in (value if isinstance(value, tuple) else (value,))
        ):
            raise ConfigError(f"{name}: {value} is not finite")
        if not _is_a(value, kind):
            may_be = ", ".join(map(repr, choices)) if get_origin(kind) is Literal else getattr(kind, "__name__", kind)
            raise ConfigError(f"{name}: {_SHORT.repr(value)} is not what it may be: {may_be}")


def _is_a(value, kind) -> bool:
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        return value in choices
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, choices[0]) for item in value)
    if choices:  # one of several
        return any(_is_a(value, choice) for choice in choices)
    if kind in (int, float):  # a bool is an int to Python, and an int may stand for a float
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check_ranges(config: Settings) -> None:
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                 "validation_steps", "logging_steps", "validation_inference_steps", "crops_per_picture",
                 "lr_decay_start_steps", "consistency_steps"):  # fmt: skip
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: {getattr(config, name)} is below 1")
    for name in ("caption_dropout", "held_out_fraction", "max_rejected_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name}: {getattr(config, name)} is not within 0 and 1")
    for name in ("checkpoints_total_limit", "num_train_epochs", "max_train_samples", "resolution", "lora_rank",
                 "shuffle_buffer", "ema_snapshot_steps"):  # fmt: skip
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"{name}: {getattr(config, name)} is below 1")
    for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name}: {getattr(config, name)} is not above 0")
    for name in ("adam_weight_decay", "lr_warmup_steps", "noise_offset"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name}: {getattr(config, name)} is below 0")
    for name in ("adam_beta1", "adam_beta2", "ema_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name}: {getattr(config, name)} is not in [0, 1)")
    if config.snr_gamma is not None and config.snr_gamma <= 0:
        raise ConfigError(f"snr_gamma: {config.snr_gamma} is not above 0; leave it out for the plain loss")


def check_single_file_config(command: Any, *checkpoints: str | None, setting: str = "--single-file-config") -> None:
    """Raise a ConfigError where a command or a run has this setting, and none of its checkpoints is a single file."""
    given = command.single_file_config is not None
    if given and not any(checkpoint and is_single_file(checkpoint) for checkpoint in checkpoints):
        raise ConfigError(f"{setting}: has no effect without a model in a single file")


def at_least_1(command: Any, *names: str) -> None:
    """Raise a ConfigError that names the flag unless the values are positive."""
    for name in names:
        if getattr(command, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(command, name)}; it must be at least 1")


def is_text(command: Any, *names: str) -> None:
    """Raise a ConfigError that names the setting unless its texts, one or several, can be written in UTF-8: a byte of a
    command line that is none comes as half a character, which no tokenizer takes."""
    for name in names:
        value = getattr(command, name) or ()
        for text in (value,) if isinstance(value, str) else value:
            if not text.isascii() and text.encode("utf-8", "replace").decode() != text:
                raise ConfigError(f"{name}: {text!a} is not text in UTF-8")


def within(command: Any, low: float, high: float, *names: str) -> None:
    """Raise a ConfigError that names the flag unless the values lie between two."""
    for name in names:
        if not low <= getattr(command, name) <= high:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(command, name)}; it must lie in {low:g} … {high:g}"
            )
