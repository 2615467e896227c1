"""Load the networks of a Stable-Diffusion-shaped folder, Hub id or single file."""

import logging
import os
from pathlib import Path
from pickle import UnpicklingError

import diffusers
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..utils.errors import ConfigError, first_line
from ..utils.files import check_shipped, is_single_file
from ..utils.weight_files import only_variant
from .parts import FrozenParts, freeze
from .single_file import load_single_file
from .unet import UNET_CLASSES, UNet

logger = logging.getLogger(__name__)


def load_frozen(
    path: str, revision: str | None = None, variant: str | None = None, single_file_config: str | None = None
) -> FrozenParts:
    """VAE, text encoder and tokenizer of a Stable-Diffusion-shaped model, in fp32, eval mode, no gradients.

    Args:
        path: a folder, a Hub id, or a single file.
        single_file_config: of such a file, the `config` of `load_single_file`.

    Raises:
        ConfigError: one of them is not there or cannot be read.
    """
    check_shipped(path, "pretrained_model_name_or_path: ")
    if is_single_file(path):
        parts = _of_single_file(path, single_file_config, "vae", "text_encoder", "tokenizer")
        return FrozenParts(freeze(parts["vae"]), freeze(parts["text_encoder"]), parts["tokenizer"])
    parts = {}
    for name, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel), ("tokenizer", CLIPTokenizer)):
        options = {"subfolder": name, "revision": revision}
        if kind is not CLIPTokenizer:
            options |= {"variant": variant or only_variant(Path(path, name)), "use_safetensors": True}
        parts[name] = _load(kind, path, options)
    if set(parts["tokenizer"].get_vocab()) <= set(parts["tokenizer"].all_special_tokens):
        # transformers makes an empty one where its files are missing; all captions would be the same to it
        raise ConfigError(f"pretrained_model_name_or_path: no tokenizer could be loaded from {path!r} (it is empty)")
    return FrozenParts(freeze(parts["vae"].float()), freeze(parts["text_encoder"].float()), parts["tokenizer"])


def load_vae(path: str) -> AutoencoderKL:
    """The VAE of a Stable-Diffusion-shaped folder or Hub id, in fp32, whose decoder is to go on training.

    Raises:
        ConfigError: it is not there or cannot be read.
    """
    options = {"subfolder": "vae", "variant": only_variant(Path(path, "vae")), "use_safetensors": True}
    return _load(AutoencoderKL, path, options, setting="decoder_of").float()


def load_unet(
    path: str, revision: str | None = None, variant: str | None = None, single_file_config: str | None = None
) -> UNet:
    """The UNet of a Stable-Diffusion-shaped model, in fp32, to go on training; arguments as `load_frozen`.

    Raises:
        ConfigError: it is not there or cannot be read.
    """
    if is_single_file(path):
        return _of_single_file(path, single_file_config, "unet")["unet"]
    variant = variant or only_variant(Path(path, "unet"))
    options = {"subfolder": "unet", "revision": revision, "variant": variant, "use_safetensors": True}
    return _load(unet_class(path, subfolder="unet", revision=revision), path, options).float()


def load_guide_unet(folder: str | Path, setting: str, **options) -> UNet:
    """A UNet from its folder or that of a pipeline that has one.

    Args:
        setting: what named it, for the error.
        options: as `from_pretrained` takes them, such as `dtype`.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(folder)
    if (folder / "unet" / "config.json").is_file():
        folder = folder / "unet"
    try:
        kind, variant = unet_class(folder), only_variant(folder)
        return kind.from_pretrained(str(folder), use_safetensors=True, variant=variant, **options)
    except (OSError, ValueError) as error:
        what = first_line(error)
        raise ConfigError(f"{setting} {folder}: no UNet can be loaded from it: {what}") from None


def unet_class(path: str | os.PathLike, **options) -> type[UNet]:
    """Which kind of UNet a folder or Hub id holds; diffusers' own where its config.json does not say.

    Args:
        options: as `from_pretrained` takes them, such as `subfolder`.
    """
    try:
        config = UNet2DConditionModel.load_config(str(path), **options)
    except (OSError, ValueError):  # loading it says what is wrong
        return UNet2DConditionModel
    return UNET_CLASSES.get(config.get("_class_name"), UNet2DConditionModel)


def _load(kind, path: str, options: dict, setting: str = "pretrained_model_name_or_path"):
    """From safetensors, or of an old model that has none, from what torch reads without running any code."""
    folder = Path(path) / options["subfolder"]
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        logger.warning("%s holds no safetensors: its pickled weights are read with weights_only=True", folder)
        options = options | {"use_safetensors": False}
    try:
        return kind.from_pretrained(path, **options)  # both libraries say weights_only=True, which nothing overrides
    except UnpicklingError as error:
        raise ConfigError(
            f"{setting}: no {options['subfolder']} could be loaded from {path!r} (its pickle holds more than weights)"
        ) from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        what = first_line(error)[:300]
        raise ConfigError(f"{setting}: no {options['subfolder']} could be loaded from {path!r} ({what})") from error


def _of_single_file(path: str, config: str | None, *parts: str) -> dict:
    return load_single_file(path, config, parts, setting="single_file_config")


def hide_loading_bars() -> None:
    """Switch off the libraries' bars for loading and saving weights, which take no time here and hide our own lines."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load_schedule(source: str, revision: str | None = None, single_file_config: str | None = None) -> DDPMScheduler:
    """The noise schedule of a Stable-Diffusion-shaped model; arguments as `load_frozen`.

    Raises:
        ConfigError: there is none.
    """
    if is_single_file(source):
        return DDPMScheduler.from_config(_of_single_file(source, single_file_config, "scheduler")["scheduler"].config)
    try:
        return DDPMScheduler.from_pretrained(source, subfolder="scheduler", revision=revision)
    except OSError:
        raise ConfigError(f"pretrained_model_name_or_path: no scheduler in {source!r}") from None
