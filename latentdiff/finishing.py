"""What a finished run leaves: a Stable Diffusion folder or LoRA weights, with a model card, on the Hub if wanted."""

import json
import os
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

from . import emoji
from .config import TrainConfig, packaged_checkpoint
from .ema import EMA, PowerEMAs
from .hub import model_card, push_folder
from .lora import has_lora, save_lora
from .models import FrozenParts, UNetWithTextEncoder, networks_of
from .posthoc_ema import SNAPSHOTS
from .presets import PRESETS
from .public import LatentDiffPipeline
from .scheduling_consistency import ConsistencyScheduler
from .scheduling_ddim import DDIMScheduler
from .scheduling_ddpm import DDPMScheduler
from .sharding import whole_network


def as_pipeline(
    parts: FrozenParts, unet: UNet2DConditionModel, scheduler: DDPMScheduler | ConsistencyScheduler
) -> LatentDiffPipeline:
    """The networks as a pipeline that draws on the training schedule: a consistency model as such, else with DDIM."""
    # What the last call cut and padded to would be saved as the tokenizer's own; each call sets it anew.
    parts.tokenizer.backend_tokenizer.no_truncation()
    parts.tokenizer.backend_tokenizer.no_padding()
    # Stable Diffusion's pipeline rewrites a configuration without these two, and would then draw otherwise than ours.
    settings = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    kind = ConsistencyScheduler if isinstance(scheduler, ConsistencyScheduler) else DDIMScheduler
    return LatentDiffPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=kind.from_config(scheduler.config, **settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# What a run leaves in its folder beside the model, and what names files of the machine it ran on.
NOT_PUSHED = (
    "checkpoint-*/*",
    ".tmp-*",
    "logs/*",
    "*pictures.jsonl*",
    "rejected.jsonl",
    "train_config.yaml",
    f"{SNAPSHOTS}/*",
    "*-ema-*/*",  # of `latentdiff reconstruct-ema`
)


def finish(
    config: TrainConfig,
    accelerator: Accelerator,
    parts: FrozenParts,
    model: UNet2DConditionModel | UNetWithTextEncoder,
    ema: EMA | PowerEMAs | None,
    scheduler: DDPMScheduler | ConsistencyScheduler,
) -> None:
    """Save the finished model with its model card in the output folder, and push it where that is wanted."""
    accelerator.wait_for_everyone()
    if ema is not None:
        ema.copy_to(model)
    unet = whole_network(networks_of(model)["unet"])  # from all processes
    if accelerator.is_main_process:
        half = config.save_dtype == "fp16"
        if has_lora(unet):
            save_lora(unet, Path(config.output_dir), torch.float16 if half else torch.float32)
            if config.consistency is not None:  # whose steps the model that the adapters are for knows nothing of
                as_pipeline(parts, unet, scheduler).scheduler.save_pretrained(config.output_dir)
        else:
            for module in (parts.vae, parts.text_encoder, unet):
                module.to("cpu")
                module.half() if half else module.float()
            as_pipeline(parts, unet, scheduler).save_pretrained(config.output_dir)
            settle_configurations(Path(config.output_dir))
        _write_card(config)
        tqdm.write(f"saved in {config.output_dir}")
        if config.push_to_hub:
            url = push_folder(
                config.output_dir, repo_name(config), private=config.hub_private, ignore_patterns=NOT_PUSHED
            )
            tqdm.write(f"pushed to {url}")
    accelerator.end_training()


def repo_name(config: TrainConfig) -> str:
    """Where the model is pushed to."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def settle_configurations(folder: Path) -> None:
    """The text encoder loads in fp32 whatever precision it is saved in, as diffusers loads the UNet and transformers
    does not; and no part names the path it was loaded from, which is nobody else's.
    """
    for path in (folder / part / "config.json" for part in ("vae", "text_encoder", "unet")):
        settings = json.loads(path.read_text())
        settings.pop("_name_or_path", None)
        if path.parent.name == "text_encoder":
            settings["dtype"] = "float32"
        path.write_text(json.dumps(settings, indent=2) + "\n")


# Where files lay on the machine of the run says nothing to others.
_OF_THE_MACHINE = {"output_dir", "cache_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id"}


def training_command(settings: dict) -> str:
    """A run as a command line: every setting that differs from the preset's, of paths their last part at most.

    Args:
        settings: all of a `TrainConfig`, by name.
    """
    preset = "finetune" if settings["unet"] == "pretrained" else "emoji64"
    if settings.get("consistency") in ("distillation", "trajectories"):
        preset = "distill"
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
            words += [f"--{name}", *(Path(v).name if os.path.isabs(str(v)) else str(v) for v in values)]
    return shlex.join(["accelerate", "launch", "train_text2img.py", *words])


def drawn_with(config: TrainConfig) -> dict[str, Any]:
    """Steps and guidance of a run's pictures: where a teacher's guidance is for good inside the UNet, none more."""
    is_inside = config.has_teacher and len(config.consistency_guidance) == 1
    guidance = 1.0 if is_inside else config.validation_guidance_scale
    return {"num_inference_steps": config.validation_inference_steps, "guidance_scale": guidance}


def sampler_of(config: TrainConfig, num_inference_steps: int, guidance_scale: float) -> str:
    """In words, for a card."""
    sampler = "DDIM" if config.consistency is None else "Multistep consistency sampling"
    is_inside = config.has_teacher and guidance_scale == 1.0
    guidance = "guidance inside it" if is_inside else f"guidance {guidance_scale:g}"
    return f"{sampler}, {num_inference_steps} steps, {guidance}."


def _write_card(config: TrainConfig) -> None:
    folder = Path(config.output_dir)
    pictures = sorted((folder / "validation").glob("step-*.png"))
    own = config.train_data_dir or config.dataset_name
    from_pretrained = config.unet == "pretrained"
    source = config.pretrained_model_name_or_path
    is_hub_id = not Path(source).exists()
    inpaints = config.task == "inpaint"
    kind = "inpainting model: it paints what a mask leaves open, after words" if inpaints else "text-to-image model"
    if config.consistency is not None:
        kind += " that draws in one to eight steps (a latent consistency model)"
    what_is_drawn = "masked, drawn, and as it was" if inpaints else "; ".join(config.validation_prompts)
    model_card(
        repo_name(config),
        license="other" if own or from_pretrained else "cc-by-sa-4.0",
        repo_id=config.hub_model_id,
        description=f"A latent diffusion {kind}. Trained with latentdiff."
        if config.lora_rank is None
        else f"LoRA weights of rank {config.lora_rank} for {source}, trained with latentdiff.",
        lora_of=source if config.lora_rank else None,
        inpaints=inpaints,
        samples={str(pictures[-1].relative_to(folder)): what_is_drawn} if pictures else None,
        prompt=next(iter(config.validation_prompts), "a cat"),
        training_command=training_command(asdict(config)),
        sampler=sampler_of(config, **drawn_with(config)),
        data={Path(own).name: "see the source of the data"} if own else emoji.CREDITS,
        base_model=source if from_pretrained and is_hub_id else None,
        call=None if config.consistency is None else drawn_with(config),
        draws_in_few_steps=config.consistency is not None,
        datasets=[config.dataset_name] if config.dataset_name and not Path(config.dataset_name).exists() else (),
    ).save(folder / "README.md")
