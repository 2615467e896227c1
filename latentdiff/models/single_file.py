"""Read a Stable Diffusion 1.x or 2.x model from one file in the original layout, as others publish theirs."""

from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from ..utils.errors import ConfigError, first_line
from .original_layout import CLIP, OPEN_CLIP, UNET, VAE

# It announces the download of what is not to be had, and then says so in a page.
logging.get_logger("diffusers.loaders.single_file").setLevel(logging.ERROR)

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
# What a file is that holds keys of such a beginning.
_OTHERS = {
    "lora_": "LoRA weights, which --lora takes beside a whole model",
    "unet.": "LoRA weights, which --lora takes beside a whole model",
    "conditioner.": "a Stable Diffusion XL model",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 model",
    "model.diffusion_model.double_blocks.": "a Flux model",
    "control_model.": "a ControlNet",
}
_WHOLE = {"UNet": (UNET + "input_blocks.",), "VAE": (VAE,), "text encoder": (CLIP, OPEN_CLIP)}


def load_single_file(
    path: str | Path,
    config: str | None = None,
    parts: tuple[str, ...] = PARTS,
    dtype: torch.dtype = torch.float32,
    setting: str = "--single-file-config",
) -> dict[str, Any]:
    """Parts of a model, as diffusers' single-file loader makes them, networks in eval mode.

    Args:
        config: a pipeline's folder or Hub id, whose configurations and tokenizer are taken: a file has none. By
            default those, on the Hub, of the Stable Diffusion that the file's weights look like.
        parts: names of them, of `PARTS`.
        dtype: of the networks.
        setting: what gives `config`, for the error.

    Raises:
        ConfigError: the file is absent, damaged or of another kind, or does not fit the configurations, or these are
            not to be had.
    """
    changes = _check_whole(path)
    if config is not None and Path(config).exists() and not (Path(config) / "model_index.json").is_file():
        raise ConfigError(f"{setting}: {config} holds no model_index.json: give the folder of a whole saved pipeline")
    pipeline = _read(path, config, parts, setting)
    loaded = {name: getattr(pipeline, name) for name in parts}
    for name, part in loaded.items():
        if isinstance(part, torch.nn.Module):
            lacking = [weight for weight, tensor in part.state_dict().items() if tensor.is_meta]
            if lacking:
                raise ConfigError(f"{path}: lacks {len(lacking)} weights of its {name}, such as {lacking[0]}")
            loaded[name] = torch.nn.Module.to(part, dtype).eval()  # diffusers' own `to` warns, of no weight
    if "scheduler" in loaded:
        loaded["scheduler"] = _as_declared(loaded["scheduler"], changes)
    return loaded


def _read(path: str | Path, config: str | None, parts: tuple[str, ...], setting: str) -> StableDiffusionPipeline:
    """By diffusers, whose errors become one line."""
    of = config or "the Stable Diffusion that it looks like"
    # What is given as None is not loaded.
    absent = {name: None for name in (*PARTS, "safety_checker", "feature_extractor") if name not in parts}
    try:
        return StableDiffusionPipeline.from_single_file(
            str(path), config=config, requires_safety_checker=False, **absent
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"{path}: the configurations and the tokenizer of {of} are not to be had from the Hub "
            f"({first_line(error)}): give the folder of a model of its kind with {setting}"
        ) from None
    except NotImplementedError:  # a weight that is nowhere has no place to go to
        raise ConfigError(f"{path}: lacks weights that the configurations of {of} ask for ({setting})") from None
    except Exception as error:  # diffusers looks at nothing before it takes it for what it expects
        what = first_line(error).split(". ")[0][:300]
        raise ConfigError(f"{path}: does not fit the configurations of {of} ({setting}): {what}") from None


def _check_whole(path: str | Path) -> dict[str, Any]:
    """What a file says of its noise schedule, as changes of a scheduler's configuration.

    Raises:
        ConfigError: it is not there, no safetensors file, or not of a whole Stable Diffusion 1.x or 2.x.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: no .safetensors file; others may run code when they are read, and are refused")
    try:
        with safe_open(path, "pt") as file:
            names, says = set(file.keys()), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: no safetensors file that can be read: {first_line(error)}") from None
    for beginning, kind in _OTHERS.items():
        if any(name.startswith(beginning) for name in names):
            raise ConfigError(f"{path}: holds {kind}; it must be a whole Stable Diffusion 1.x or 2.x model")
    for part, beginnings in _WHOLE.items():
        if not any(name.startswith(beginnings) for name in names):
            raise ConfigError(
                f"{path}: holds no {part} by Stable Diffusion's original names; it must be a whole model, 1.x or 2.x"
            )
    return _declared(path, names, says)


def _declared(path: Path, names: set[str], says: dict[str, str]) -> dict[str, Any]:
    """By the marks that ComfyUI reads, the header of Stability AI's ModelSpec, and the YAML beside that A1111 reads."""
    changes = {}
    predicts = "v" if "v_pred" in names else says.get("modelspec.prediction_type")
    try:
        beside = yaml.safe_load(path.with_suffix(".yaml").read_text(encoding="utf-8"))
        predicts = beside["model"]["params"].get("parameterization", predicts)
    except (OSError, ValueError, yaml.YAMLError, LookupError, AttributeError, TypeError):
        pass  # there is none, or one of something else
    if predicts in ("v", "eps", "epsilon"):
        changes["prediction_type"] = "v_prediction" if predicts == "v" else "epsilon"
    if "ztsnr" in names:
        changes["rescale_betas_zero_snr"] = True
    return changes


def _as_declared(scheduler, changes: dict[str, Any]):
    """The scheduler with what a file says of itself; DDIM in place of one that knows nothing of it."""
    changes = {name: value for name, value in changes.items() if scheduler.config.get(name) != value}
    if "rescale_betas_zero_snr" in changes:  # then the last timestep has to be drawn from: section 3.3 of 2305.08891
        changes["timestep_spacing"] = "trailing"
    kind = type(scheduler) if changes.keys() <= scheduler._get_init_keys(type(scheduler)) else DDIMScheduler
    return kind.from_config(scheduler.config, **changes) if changes else scheduler
