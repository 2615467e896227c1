"""Load the networks of a Stable-Diffusion-shaped folder, Hub id or single file."""

import os
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines import stable_diffusion
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from ..diffusion.clip_guidance import ClipGuidance
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..utils.files import check_shipped, is_single_file
from ..utils.weight_files import only_variant
from .parts import FrozenParts, freeze
from .single_file import load_single_file
from .unet import UNET_CLASSES, UNet
from .whole import check_files, load_network, load_tokenizer, loading, settle_tokenizer

_PRETRAINED = "pretrained_model_name_or_path"
# What a pipeline here is made of, and what it may have beside that.
_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
_OTHERS = ("safety_checker", "feature_extractor", "image_encoder")
_INDEX = "model_index.json"


def load_frozen(
    path: str, revision: str | None = None, variant: str | None = None, single_file_config: str | None = None
) -> FrozenParts:
    """VAE, text encoder and tokenizer of a Stable-Diffusion-shaped model, in fp32, eval mode, no gradients.

    Args:
        path: a folder, a Hub id, or a single file.
        single_file_config: of such a file, the `config` of `load_single_file`.

    Raises:
        ConfigError: it is another kind of pipeline, or one of them is not there, not whole or cannot be read.
    """
    check_shipped(path, f"{_PRETRAINED}: ")
    if is_single_file(path):
        parts = _of_single_file(path, single_file_config, "vae", "text_encoder", "tokenizer")
        with loading(_cannot("single_file_config", "tokenizer", path)):
            settle_tokenizer(parts["tokenizer"], parts["text_encoder"])
        return FrozenParts(freeze(parts["vae"]), freeze(parts["text_encoder"]), parts["tokenizer"])
    check_pipeline(path, f"{_PRETRAINED}: {path!r}", revision)
    vae, text_encoder = (
        freeze(_load(kind, path, part, revision, variant).float())
        for part, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel))
    )
    with loading(_cannot(_PRETRAINED, "tokenizer", path)):
        tokenizer = load_tokenizer(CLIPTokenizer, path, "tokenizer", revision=revision)
        settle_tokenizer(tokenizer, text_encoder)
    return FrozenParts(vae, text_encoder, tokenizer)


def load_vae(path: str) -> AutoencoderKL:
    """The VAE of a Stable-Diffusion-shaped folder or Hub id, in fp32, whose decoder is to go on training.

    Raises:
        ConfigError: it is not there, not whole or cannot be read.
    """
    return _load(AutoencoderKL, path, "vae", setting="decoder_of").float()


def load_unet(
    path: str,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    setting: str = _PRETRAINED,
) -> UNet:
    """The UNet of a Stable-Diffusion-shaped model, in fp32, to go on training; arguments as `load_frozen`.

    Args:
        setting: what named it, for the error.

    Raises:
        ConfigError: it is of another kind of pipeline, or not there, not whole or cannot be read.
    """
    if is_single_file(path):
        return _of_single_file(path, single_file_config, "unet")["unet"]
    check_pipeline(path, f"{setting}: {path!r}", revision)
    with loading(_cannot(setting, "unet", path)):
        kind = unet_class(path, subfolder="unet", revision=revision)
    return _load(kind, path, "unet", revision, variant, setting).float()


def load_guide_unet(folder: str | Path, setting: str, **options: Any) -> UNet:
    """A UNet from its folder or that of a pipeline that has one.

    Args:
        setting: what named it, for the error.
        options: as `from_pretrained` takes them, such as `dtype`.

    Raises:
        ConfigError: there is none, or it is not whole.
    """
    folder = Path(folder)
    if (folder / "unet" / "config.json").is_file():
        folder = folder / "unet"
    with loading(f"{setting} {folder}: no UNet can be loaded from it"):
        if not folder.is_dir():  # else diffusers would look for it on the Hub
            raise ValueError("no such folder")
        return load_network(unet_class(folder), folder, variant=only_variant(folder), **options)


def load_clip_guidance(folder: Path, scale: float) -> ClipGuidance:
    """The CLIP in a folder, with its tokenizer and its preprocessor's settings. To be called within `loading`.

    Raises:
        Exception: of any kind, where a part is not there, not whole or cannot be read.
    """
    model, tokenizer = (
        load_network(CLIPModel, folder, variant=only_variant(folder)),
        load_tokenizer(CLIPTokenizer, folder),
    )
    settle_tokenizer(tokenizer, model.text_model)
    return ClipGuidance.from_pretrained(folder, scale=scale, model=model, tokenizer=tokenizer)


def unet_class(path: str | os.PathLike, **options: Any) -> type[UNet]:
    """Which kind of UNet a folder or Hub id holds; diffusers' own where its config.json does not say. To be called
    within `loading`.

    Args:
        options: as `from_pretrained` takes them, such as `subfolder`.

    Raises:
        ValueError: of another kind than is taken here.
        Exception: of any kind, from a damaged file.
    """
    check_files(Path(path, options.get("subfolder", "")))
    config = UNet2DConditionModel.load_config(str(path), **options)
    name = config.get("_class_name", UNet2DConditionModel.__name__)
    if not isinstance(name, str) or name not in UNET_CLASSES:
        raise ValueError(f"its config.json is of {name!r}; it may be of {' or '.join(UNET_CLASSES)}")
    return UNET_CLASSES[name]


def load_parts(folder: Path, what: str, dtype: torch.dtype) -> dict[str, Any]:
    """The parts of a saved pipeline, each of them whole, by their names in its index, as `from_pretrained` takes them;
    those that no class of diffusers or transformers is known for are left to it.

    Args:
        what: the pipeline, for the error.

    Raises:
        ConfigError: it is another kind of pipeline, or a part is not there, not whole or cannot be read.
    """
    parts: dict[str, Any] = {}
    for name, kind in check_pipeline(folder, what).items():
        with loading(f"{what}: its {name} cannot be loaded"):
            if not (folder / name).is_dir():
                raise ValueError("no such folder")
            check_files(folder / name)
            kind = unet_class(folder / name) if name == "unet" else kind
            if kind is None:
                continue
            if issubclass(kind, torch.nn.Module):
                parts[name] = load_network(kind, folder, name, dtype=dtype, variant=only_variant(folder / name))
            elif name == "tokenizer":
                parts[name] = load_tokenizer(kind, folder, name)
            else:
                parts[name] = kind.from_pretrained(str(folder), subfolder=name)
    return parts


def check_pipeline(source: str | Path, what: str, revision: str | None = None) -> dict[str, type | None]:
    """The classes of a pipeline's parts by its index, model_index.json: None of one that is not known. Empty where
    there is no index: then the folders of the parts are all there is to go by.

    Args:
        what: the pipeline, for the error.

    Raises:
        ConfigError: it is no pipeline of Stable Diffusion's parts, or its index cannot be read.
    """
    is_local = Path(source).is_dir()
    with loading(f"{what}: its {_INDEX} cannot be read"):
        if is_local:
            check_files(Path(source))
        try:
            index = DiffusionPipeline.load_config(str(source), revision=revision)
        except OSError:
            if is_local and (Path(source) / _INDEX).exists():
                raise
            return {}  # the Hub says why when its parts are asked for
        return _classes(index)


def _classes(index: dict[str, Any]) -> dict[str, type | None]:
    parts = {name: value for name, value in index.items() if isinstance(value, list) and any(value)}
    others = [f"has a {name}" for name in parts if name not in (*_PARTS, *_OTHERS)]
    others += [f"has no {name}" for name in _PARTS if name not in parts]
    if not others and (kind := parts["unet"][-1]) not in UNET_CLASSES:
        others = [f"has a {kind} for its unet"]
    if others:
        raise ValueError(
            f"it is a {index.get('_class_name')} and {others[0]}; what is taken has Stable Diffusion's parts and no "
            f"other ones, such as StableDiffusionPipeline: {', '.join(_PARTS)}"
        )
    homes = {"diffusers": diffusers, "transformers": transformers, "stable_diffusion": stable_diffusion}
    return {name: getattr(homes.get(value[0]), str(value[-1]), None) for name, value in parts.items()}


def _load(
    kind: type,
    path: str,
    part: str,
    revision: str | None = None,
    variant: str | None = None,
    setting: str = _PRETRAINED,
) -> Any:
    with loading(_cannot(setting, part, path)):
        return load_network(kind, path, part, revision=revision, variant=variant or only_variant(Path(path, part)))


def _cannot(setting: str, part: str, path: str) -> str:
    return f"{setting}: no {part} could be loaded from {path!r}"


def _of_single_file(path: str, config: str | None, *parts: str) -> dict:
    return load_single_file(path, config, parts, setting="single_file_config")


def hide_loading_bars() -> None:
    """Switch off the libraries' bars for loading and saving weights, which take no time here and hide our own lines."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def load_schedule(
    source: str, revision: str | None = None, single_file_config: str | None = None, setting: str = _PRETRAINED
) -> DDPMScheduler:
    """The noise schedule of a Stable-Diffusion-shaped model; arguments as `load_frozen`.

    Args:
        setting: what named it, for the error.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if is_single_file(source):
        return DDPMScheduler.from_config(_of_single_file(source, single_file_config, "scheduler")["scheduler"].config)
    with loading(_cannot(setting, "scheduler", source)):
        check_files(Path(source, "scheduler"))
        return DDPMScheduler.from_pretrained(source, subfolder="scheduler", revision=revision)
