"""What a finished run leaves: a Stable Diffusion folder or LoRA weights, with a model card, on the Hub if wanted."""

import json
import tempfile
from pathlib import Path
from urllib.parse import unquote

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from tqdm.auto import tqdm

from ..config.train import TrainConfig
from ..diffusion.posthoc_ema import SNAPSHOTS
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..diffusion.scheduling_ddim import DDIMScheduler
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..distributed.fsdp import whole_network
from ..models.lora import has_lora, save_lora
from ..models.parts import FrozenParts, UNetWithTextEncoder, networks_of
from ..objectives.choice import objective_of
from ..pipelines.portable_saving import code_files
from ..public import LatentDiffPipeline
from ..utils.errors import RunStopped, is_out_of_room, reason
from ..utils.files import move_into_place, read_json
from ..utils.hub import push_folder
from ..utils.weight_files import SAVING, remove_pipeline, remove_variants
from .card import repo_name, write_card
from .checkpoint import list_checkpoints
from .ema import EMA, PowerEMAs


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


# Of a pipeline's part, and of a folder beside the parts.
_OF_A_PART = {".json", ".txt", ".safetensors", ".bin", ".model", ".jinja", ".py"}
_BESIDE = ("README.md", "LICENSE*", "model_index.json", "config.json", "scheduler_config.json", "*.safetensors")
_RESULTS = ("evaluation.json", "evaluation.md", "ema_sweep.json", "ema_sweep.md", "ema_sweep.png")
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}


def pushed_files(folder: Path, ema_snapshots: bool = False) -> list[str]:
    """What of a saved folder belongs to the model, as paths in it: its parts, code, card and the pictures on it.

    Whatever else lies there stays at home: checkpoints, caches, logs, lists of pictures, settings, others' files.
    """
    index = folder / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    found = [path for pattern in (*_BESIDE, *_RESULTS, *code_files()) for path in folder.glob(pattern)]
    for part in folder.iterdir():
        if isinstance(parts.get(part.name), list) and part.is_dir():
            found += [path for path in part.iterdir() if path.suffix in _OF_A_PART]
    if ema_snapshots:
        found += (folder / SNAPSHOTS).glob("*.safetensors")
    card = folder / "README.md"
    said = unquote(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else ""
    pictures = [path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.suffix.lower() in _PICTURES]
    found += [path for path in pictures if path.relative_to(folder).as_posix() in said]
    names = {path.relative_to(folder).as_posix() for path in found if path.is_file()}
    return sorted(name for name in names if not any(one.startswith(".") for one in Path(name).parts))


def finish(
    config: TrainConfig,
    accelerator: Accelerator,
    parts: FrozenParts,
    scheduler: DDPMScheduler | ConsistencyScheduler,
    model: UNet2DConditionModel | UNetWithTextEncoder,
    ema: EMA | PowerEMAs | None,
) -> None:
    """Save the finished model with its model card in the output folder, and push it where that is wanted.

    Raises:
        RunStopped: it cannot be written; an earlier one in the folder and the checkpoints are left as they are.
    """
    accelerator.wait_for_everyone()
    if ema is not None:
        ema.copy_to(model)
    unet = whole_network(networks_of(model)["unet"])  # from all processes
    folder = Path(config.output_dir)
    if accelerator.is_main_process:
        try:
            _save(config, parts, unet, scheduler)
            write_card(config)
        except Exception as error:
            if not (isinstance(error, OSError) or is_out_of_room(error)):
                raise
            left = list_checkpoints(folder)
            how = f"--resume_from_checkpoint latest goes on from {left[-1].name}" if left else "there is no checkpoint"
            raise RunStopped(f"the finished model could not be saved in {folder} ({reason(error)}); {how}") from error
        tqdm.write(f"saved in {config.output_dir}")
        if config.push_to_hub:
            url = push_folder(folder, repo_name(config), private=config.hub_private, files=pushed_files(folder))
            tqdm.write(f"pushed to {url}")
    accelerator.end_training()


def _save(
    config: TrainConfig, parts: FrozenParts, unet: UNet2DConditionModel, scheduler: DDPMScheduler | ConsistencyScheduler
) -> None:
    """The finished model into the output folder, whole or not at all."""
    folder, half = Path(config.output_dir), config.save_dtype == "fp16"
    if has_lora(unet):
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=folder) as aside:
            save_lora(unet, Path(aside), torch.float16 if half else torch.float32)
            move_into_place(Path(aside, LORA_WEIGHT_NAME_SAFE), folder / LORA_WEIGHT_NAME_SAFE)
        if objective_of(config).draws_in_few_steps:  # whose steps the adapters' model knows nothing of
            as_pipeline(parts, unet, scheduler).scheduler.save_pretrained(folder)
        sources = (config.pretrained_model_name_or_path, config.consistency_teacher)
        if not any(source and Path(source).resolve() == folder.resolve() for source in sources):
            remove_pipeline(folder)  # of another run: it would be loaded, and pushed, with the adapters
        return
    for module in (parts.vae, parts.text_encoder, unet):
        module.to("cpu")
        module.half() if half else module.float()
    as_pipeline(parts, unet, scheduler).save_pretrained(folder)
    settle_configurations(folder)
    remove_what_another_run_left(folder)


def remove_what_another_run_left(folder: Path) -> None:
    """A whole model is neither loaded nor pushed with the adapters, or in another variant, of the one it replaces."""
    for name in (LORA_WEIGHT_NAME_SAFE, SCHEDULER_CONFIG_NAME):
        (folder / name).unlink(missing_ok=True)
    for part in ("vae", "text_encoder", "unet"):
        remove_variants(folder / part)


def settle_configurations(folder: Path) -> None:
    """The text encoder loads in fp32 whatever precision it is saved in, as diffusers loads the UNet and transformers
    does not; and no part names the path it was loaded from, which is nobody else's.
    """
    for path in (folder / part / "config.json" for part in ("vae", "text_encoder", "unet")):
        settings = read_json(path)
        settings.pop("_name_or_path", None)
        if path.parent.name == "text_encoder":
            settings["dtype"] = "float32"
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
