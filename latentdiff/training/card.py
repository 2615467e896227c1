"""What a run's model card says."""

import os
import shlex
from dataclasses import asdict, fields
from pathlib import Path

from ..config.presets import PRESETS
from ..config.train import TrainConfig
from ..data import emoji
from ..objectives.choice import OBJECTIVES, objective_of
from ..objectives.tasks import task_of
from ..utils.files import packaged_checkpoint
from ..utils.model_card import model_card

# Where files lay on the machine of the run says nothing to others.
_OF_THE_MACHINE = {"output_dir", "cache_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id"}
_OF_THE_MACHINE |= {"overwrite_output_dir"}


def training_command(settings: dict) -> str:
    """A run as a command line: every setting that differs from the preset's, of paths their last part at most.

    Args:
        settings: all of a `TrainConfig`, by name.
    """
    usual = "finetune" if settings["unet"] == "pretrained" else "emoji64"
    preset = OBJECTIVES[settings.get("consistency")].preset or usual
    defaults = {field.name: field.default for field in fields(TrainConfig)} | PRESETS[preset]
    defaults["pretrained_model_name_or_path"] = packaged_checkpoint()
    words = [] if preset == "emoji64" else ["--preset", preset]
    for name, value in settings.items():
        default = defaults[name]
        if name in _OF_THE_MACHINE or value == default or (isinstance(value, list) and tuple(value) == default):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list | tuple) else (value,)
            words += [f"--{name}", *map(public_name, values)]
    return shlex.join(["accelerate", "launch", "train_text2img.py", *words])


def public_name(value: object) -> str:
    """A setting as others may read it: of what is, or looks like, a path of this machine its last part."""
    text = str(value)
    on_disk = "/" in text and os.path.exists(text)
    if on_disk or os.path.isabs(text) or text.startswith((".", "~")):
        return Path(text).expanduser().resolve().name
    return text


def repo_name(config: TrainConfig) -> str:
    """Where the model is pushed to."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def write_card(config: TrainConfig) -> None:
    """The README.md of the finished folder."""
    folder = Path(config.output_dir)
    pictures = sorted((folder / "validation").glob("step-*.png"))
    own = config.train_data_dir or config.dataset_name
    from_pretrained = config.unet == "pretrained"
    is_hub_id = not Path(config.pretrained_model_name_or_path).exists()
    source = public_name(config.pretrained_model_name_or_path)
    task, objective = task_of(config), objective_of(config)
    few_steps = " that draws in one to eight steps (a latent consistency model)" if objective.draws_in_few_steps else ""
    model_card(
        repo_name(config),
        license="other" if own or from_pretrained else "cc-by-sa-4.0",
        repo_id=config.hub_model_id,
        description=f"A latent diffusion {task.kind}{few_steps}. Trained with latentdiff."
        if config.lora_rank is None
        else f"LoRA weights of rank {config.lora_rank} for {source}, trained with latentdiff.",
        lora_of=source if config.lora_rank else None,
        inpaints=task.inpaints,
        samples={str(pictures[-1].relative_to(folder)): task.drawn_in_words} if pictures else None,
        prompt=next(iter(config.validation_prompts), "a cat"),
        training_command=training_command(asdict(config)),
        sampler=objective.sampler_in_words(**objective.drawing()),
        data={public_name(own): "see the source of the data"} if own else emoji.CREDITS,
        base_model=source if from_pretrained and is_hub_id else None,
        call=objective.drawing() if objective.draws_in_few_steps else None,
        draws_in_few_steps=objective.draws_in_few_steps,
        takes_guidance=objective.takes_guidance,
        datasets=[config.dataset_name] if config.dataset_name and not Path(config.dataset_name).exists() else (),
    ).save(folder / "README.md")
