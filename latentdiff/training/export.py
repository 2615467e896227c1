"""What a finished run leaves: a Stable Diffusion folder or LoRA weights, with a model card, on the Hub if wanted."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

from ..config.train import TrainConfig
from ..diffusion.posthoc_ema import SNAPSHOTS
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..diffusion.scheduling_ddim import DDIMScheduler
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..distributed.fsdp import whole_network
from ..models.lora import has_lora, save_lora
from ..models.parts import FrozenParts, UNetWithTextEncoder, networks_of
from ..public import LatentDiffPipeline
from ..utils.hub import push_folder
from .card import repo_name, write_card
from .ema import EMA, PowerEMAs
from .objectives import objective_of


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
    scheduler: DDPMScheduler | ConsistencyScheduler,
    model: UNet2DConditionModel | UNetWithTextEncoder,
    ema: EMA | PowerEMAs | None,
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
            if objective_of(
                config
            ).draws_in_few_steps:  # whose steps the model that the adapters are for knows nothing of
                as_pipeline(parts, unet, scheduler).scheduler.save_pretrained(config.output_dir)
        else:
            for module in (parts.vae, parts.text_encoder, unet):
                module.to("cpu")
                module.half() if half else module.float()
            as_pipeline(parts, unet, scheduler).save_pretrained(config.output_dir)
            settle_configurations(Path(config.output_dir))
        write_card(config)
        tqdm.write(f"saved in {config.output_dir}")
        if config.push_to_hub:
            url = push_folder(
                config.output_dir, repo_name(config), private=config.hub_private, ignore_patterns=NOT_PUSHED
            )
            tqdm.write(f"pushed to {url}")
    accelerator.end_training()


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
