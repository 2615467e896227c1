"""What pictures are drawn with: a saved pipeline and what guides it, found, loaded, and named for their recipes."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.schedulers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import is_peft_available
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from ..config import sampling
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..diffusion.scheduling_ddim import DDIMScheduler
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.loading import hide_loading_bars, load_clip_guidance, load_guide_unet, load_parts
from ..models.single_file import load_single_file
from ..models.trial import try_parts
from ..models.whole import check_files, loading, settle_tokenizer
from ..pipelines.portable_saving import adopt_scheduler
from ..public import LatentDiffPipeline
from ..utils.devices import device_named
from ..utils.errors import ConfigError, first_line
from ..utils.files import check_shipped, is_single_file
from .recipe import Ingredient, Recipe, folder_ingredient

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
# How the first of a LoRA layer's two matrices is called: by peft, by diffusers once, by sd-scripts.
_LORA_LAYER = ("lora_A.weight", ".down.weight", "lora_down.weight")
# diffusers says in a page what `_load_lora` says in a line.
diffusers.utils.logging.get_logger("diffusers.loaders.peft").setLevel(diffusers.utils.logging.CRITICAL)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_OURS = {kind.__name__: kind for kind in (DDIMScheduler, DDPMScheduler, ConsistencyScheduler)}
SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    name: _OURS.get(names.class_name) or getattr(diffusers, names.class_name)
    for name, names in sampling.SCHEDULERS.items()
}


@dataclass(frozen=True)
class Network:
    """Something loaded, and what a recipe calls it."""

    model: Any
    ingredient: Ingredient


@dataclass(frozen=True)
class Networks:
    """What pictures are drawn with."""

    pipeline: LatentDiffPipeline
    checkpoint: Ingredient
    own_scheduler: SchedulerMixin
    """The checkpoint's, from which the others take their settings."""
    guide_unet: Network | None = None
    clip: Network | None = None
    """A `ClipGuidance`."""
    ema_sigma_rel: float | None = None
    """Which average of the weights was taken in place of the one that was saved."""
    lora: Ingredient | None = None
    """The LoRA weights that the pipeline has."""
    single_file_config: Ingredient | None = None
    """Whose configurations and tokenizer a checkpoint in a single file was read with, where that was chosen."""

    def in_recipes(self) -> dict[str, Any]:
        """What a recipe says of the checkpoint and of where and how it is run."""
        return {
            "checkpoint": self.checkpoint,
            "single_file_config": self.single_file_config,
            "ema_sigma_rel": self.ema_sigma_rel,
            "lora": self.lora,
            "dtype": str(self.pipeline.dtype).removeprefix("torch."),
            "device": self.pipeline.device.type,
        }


def load_networks(
    checkpoint: str,
    device: str | None = None,
    dtype: str = "fp32",
    guide_unet: Path | None = None,
    clip: Path | None = None,
    ema_sigma_rel: float | None = None,
    lora: Path | None = None,
    hub_id: str | None = None,
    single_file_config: str | None = None,
) -> Networks:
    """A checkpoint and what guides it, on their device.

    Args:
        checkpoint: a folder, a Hub id, or a single file.
        dtype: one of `DTYPES`, of the pipeline and the guiding UNet.
        guide_unet: the folder of a UNet, or of a pipeline that has one.
        clip: the folder of a CLIP with its tokenizer and its preprocessor's config.
        ema_sigma_rel: as `load_pipeline`.
        lora: the folder or file of LoRA weights for the checkpoint's networks; with a scheduler's configuration in the
            folder, they are a consistency model's.
        hub_id: what recipes call the checkpoint, where it is the folder of one that was loaded from the Hub before.
        single_file_config: as `load_pipeline`.

    Raises:
        ConfigError: one of them is not there or cannot be loaded.
    """
    pipeline = load_pipeline(checkpoint, device, dtype, ema_sigma_rel, single_file_config)
    lora_ingredient = None if lora is None else _load_lora(lora, pipeline)
    hub_id = hub_id or (None if Path(checkpoint).exists() else checkpoint)
    return Networks(
        pipeline=pipeline,
        checkpoint=folder_ingredient(pipeline.name_or_path, hub_id),  # the very files that were loaded
        own_scheduler=pipeline.scheduler,
        guide_unet=None if guide_unet is None else _load_guide_unet(guide_unet, pipeline),
        clip=None if clip is None else load_clip(clip, pipeline),
        ema_sigma_rel=ema_sigma_rel,
        lora=lora_ingredient,
        single_file_config=_configuration(single_file_config) if is_single_file(checkpoint) else None,
    )


def load_pipeline(
    checkpoint: str,
    device: str | None,
    dtype: str = "fp32",
    ema_sigma_rel: float | None = None,
    single_file_config: str | None = None,
) -> LatentDiffPipeline:
    """A `LatentDiffPipeline` on its device, without progress bars of its own.

    Args:
        checkpoint: a folder, a Hub id, or a single file.
        ema_sigma_rel: the width of the average of the weights to take from the snapshots that its training kept; by
            default the weights are those that were saved.
        single_file_config: of a single file, the `config` of `load_single_file`.

    Raises:
        ConfigError: nothing that can be loaded is there.
    """
    check_shipped(checkpoint)
    hide_loading_bars()
    place = device_named(device)
    if is_single_file(checkpoint):
        if ema_sigma_rel is not None:
            raise ConfigError(f"--ema-sigma-rel: {checkpoint} is a single file, which has no snapshots of a training")
        pipeline = LatentDiffPipeline(**load_single_file(checkpoint, single_file_config, dtype=DTYPES[dtype]))
        pipeline.register_to_config(_name_or_path=checkpoint)
    else:
        pipeline = _load_folder(checkpoint, dtype, ema_sigma_rel)
    pipeline.set_progress_bar_config(disable=True)
    with loading(f"{checkpoint}: its tokenizer cannot be used"):
        settle_tokenizer(pipeline.tokenizer, pipeline.text_encoder)
    try_parts(
        checkpoint,
        lambda: pipeline.encode_prompt("a", pipeline.device, 1, do_classifier_free_guidance=False)[0],
        pipeline.to(place).vae,
        pipeline.unet,
    )
    return pipeline


def _configuration(source: str | None) -> Ingredient | None:
    """A folder or Hub id by its configurations and vocabularies, which have been read by now."""
    if source is None or Path(source).is_dir():
        return source and folder_ingredient(source, weights=False)
    return folder_ingredient(Path(try_to_load_from_cache(source, "model_index.json")).parent, source, weights=False)


def _load_folder(checkpoint: str, dtype: str, ema_sigma_rel: float | None) -> LatentDiffPipeline:
    """Of a folder or from the Hub."""
    folder = Path(checkpoint)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ConfigError(f"{checkpoint} holds no model_index.json: give the folder of a whole saved pipeline")
    if not folder.exists() and not HUB_ID.fullmatch(checkpoint):
        raise ConfigError(f"{checkpoint}: no such folder (nor is it the name of a model on the Hub, owner/name)")
    try:
        files = folder if folder.exists() else LatentDiffPipeline.download(checkpoint)
        parts = load_parts(Path(files), checkpoint, DTYPES[dtype])
        with loading(f"{checkpoint}: its scheduler cannot be used"):
            parts["scheduler"] = adopt_scheduler(parts["scheduler"])
        with loading(f"{checkpoint}: it cannot be loaded"):
            pipeline = LatentDiffPipeline.from_pretrained(files, dtype=DTYPES[dtype], **parts)
        if ema_sigma_rel is not None:
            pipeline.load_ema(ema_sigma_rel, source=checkpoint)  # on the Hub a loaded model comes without its snapshots
    except (OSError, ValueError) as error:
        where = "cannot be loaded" if folder.exists() else "neither a folder here nor a model to be had from the Hub"
        raise ConfigError(f"{checkpoint}: {where}: {first_line(error)}") from None
    return pipeline


def _load_guide_unet(folder: Path, pipeline: LatentDiffPipeline) -> Network:
    unet = load_guide_unet(folder, "--guide-unet", dtype=pipeline.dtype)
    return Network(unet.to(pipeline.device).eval(), folder_ingredient(folder))


def _load_lora(path: Path, pipeline: LatentDiffPipeline) -> Ingredient:
    """Give the pipeline LoRA weights, diffusers' or sd-scripts', and the scheduler that they were distilled for, if
    they were; say how many of their layers it has."""
    file = _lora_file(path)
    if file.name == LORA_WEIGHT_NAME_SAFE:  # as a run leaves it, perhaps with a scheduler beside it
        path = file.parent
    if not is_peft_available():
        raise ConfigError("--lora: needs the package peft: pip install 'latentdiff[lora]'")
    with loading(f"--lora {path}: does not fit this checkpoint"):
        check_files(file.parent)
        with safe_open(file, "pt") as weights:
            layers = [name for name in list(weights.keys()) if name.endswith(_LORA_LAYER)]
        try:
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
        except ValueError as error:
            if "not found in the base model" in str(error):  # peft names all of them
                raise ConfigError(
                    f"--lora {path}: its layers are those of another model than this checkpoint"
                ) from None
            raise
    _say_fit(path, len(layers), pipeline)
    with loading(f"--lora {path}: its {SCHEDULER_CONFIG_NAME} cannot be used"):
        if path.is_dir() and (path / SCHEDULER_CONFIG_NAME).is_file():
            pipeline.scheduler = ConsistencyScheduler.from_pretrained(path)
    return folder_ingredient(path)


def _lora_file(path: Path) -> Path:
    """The file of LoRA weights: what was given, or the one in that folder.

    Raises:
        ConfigError: there is none, there are several, or it is a pickle.
    """
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if path / LORA_WEIGHT_NAME_SAFE in found:
            return path / LORA_WEIGHT_NAME_SAFE
        if len(found) > 1:
            raise ConfigError(f"--lora {path}: holds {len(found)} .safetensors files: give one, such as {found[0]}")
        if not found:
            raise ConfigError(f"--lora {path}: holds no {LORA_WEIGHT_NAME_SAFE}, nor another .safetensors file")
        return found[0]
    if not path.is_file():
        raise ConfigError(f"--lora {path}: no such file or folder")
    if path.suffix != ".safetensors":
        raise ConfigError(f"--lora {path}: such a file may run code when it is read; give a .safetensors file")
    return path


def _say_fit(path: Path, count: int, pipeline: LatentDiffPipeline) -> None:
    """diffusers leaves out what does not fit: adapters of another model would be drawn with as if they were not there.

    Args:
        count: layers that the file has.

    Raises:
        ConfigError: none fits.
    """
    networks = (pipeline.unet, pipeline.text_encoder)
    fitting = sum(bool(getattr(module, "lora_A", None)) for network in networks for module in network.modules())
    if not fitting:
        raise ConfigError(f"--lora {path}: none of its {count} layers is one of this checkpoint's")
    is_less = " (warning: the others are left out)" if fitting < count else ""
    print(f"{path.name}: {fitting} of {count} LoRA layers fit this checkpoint{is_less}", file=sys.stderr)


def load_clip(folder: Path, pipeline: LatentDiffPipeline, flag: str = "--clip", scale: float = 0.0) -> Network:
    """A CLIP with its tokenizer as a `ClipGuidance`, on the pipeline's device.

    Raises:
        ConfigError: there is none in the folder; it is named by the flag that gave it.
    """
    if not folder.is_dir():  # else transformers would look for it on the Hub
        raise ConfigError(f"{flag} {folder}: no such folder")
    with loading(f"{flag} {folder}: no CLIP can be loaded from it"):
        clip = load_clip_guidance(folder, scale)
    return Network(clip.to(pipeline.device), folder_ingredient(folder))


def scheduler_class(networks: Networks, name: str) -> type[SchedulerMixin]:
    """The class that a recipe names: one that the command line offers, or the checkpoint's own.

    Raises:
        ConfigError: neither.
    """
    own = type(networks.own_scheduler)
    known = {kind.__name__: kind for kind in (own, *SCHEDULERS.values())}
    if name not in known:
        raise ConfigError(f"scheduler {name!r} is not known here; it may be {', '.join(known)}")
    return known[name]


def make_scheduler(networks: Networks, recipe: Recipe) -> SchedulerMixin:
    """The recipe's scheduler, with the checkpoint's settings but for those that the recipe changes.

    Raises:
        ConfigError: an unknown class, or one that has no use for what the recipe sets.
    """
    kind = scheduler_class(networks, recipe.scheduler)
    changes: dict[str, Any] = {}
    if recipe.timestep_spacing is not None:
        changes["timestep_spacing"] = recipe.timestep_spacing
    if recipe.karras_sigmas:
        changes["use_karras_sigmas"] = True
    known = kind._get_init_keys(kind)
    if kind is ConsistencyScheduler:  # whose timesteps are those that the model was distilled at
        known = known - {"timestep_spacing"}
    for name in changes.keys() - known:
        raise ConfigError(f"{kind.__name__} has no {name}: leave it out, or take another --scheduler")
    settings = {name: value for name, value in networks.own_scheduler.config.items() if name in known}
    return kind.from_config(settings, **changes)
