"""`latentdiff export`: a saved model as a single file in Stable Diffusion's original layout, for other programs."""

import os
import sys
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from ..config.commands import Export
from ..models.original_layout import (
    check_layout,
    original_config,
    original_weights,
    unusual_sizes,
    version_of,
)
from ..public import LatentDiffPipeline
from ..utils.errors import ConfigError, first_line
from ..utils.files import is_single_file, write_whole
from .loading import DTYPES, load_pipeline

_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}
# Some tokens of CLIP's own tokenizer, which no single file has and every program brings along.
_OF_CLIP = {"a</w>": 320, "photo</w>": 1125, "of</w>": 539, "cat</w>": 2368, "<|startoftext|>": 49406}


def export(command: Export) -> None:
    """Load, write, and say where, and what of it not every program can read."""
    if is_single_file(command.checkpoint):
        raise ConfigError(f"{command.checkpoint}: is a single file already; give the folder of a saved pipeline")
    pipeline = load_pipeline(command.checkpoint, "cpu")
    networks = pipeline.unet, pipeline.vae, pipeline.text_encoder
    schedule = pipeline.scheduler.config
    try:
        check_layout(*networks, schedule)
    except ConfigError as error:
        raise ConfigError(f"{command.checkpoint}: {error}") from None
    predicts_v = _predicts_v(pipeline)
    settings = command.output.with_suffix(".yaml")
    if settings.exists() and not (predicts_v and command.overwrite):
        what = "--overwrite replaces it" if predicts_v else f"A1111 would read {command.output.name} by it; move it"
        raise ConfigError(f"{settings} is there: {what}")
    for part, network in zip(("unet", "vae", "text_encoder"), networks, strict=True):
        dtype = DTYPES[command.dtype] if command.dtype else _stored_dtype(Path(pipeline.name_or_path) / part)
        _cast(network, dtype, part)
    weights = {name: tensor.contiguous() for name, tensor in original_weights(*networks).items()}
    if predicts_v:  # marks for ComfyUI and those that have its way
        weights["v_pred"] = torch.empty(0)
        if schedule.get("rescale_betas_zero_snr"):
            weights["ztsnr"] = torch.empty(0)
    try:
        # Under a name of this kind, too, it gets the mode that the umask says.
        aside = command.output.with_name(f".{os.getpid()}.{command.output.name}")
        write_whole(command.output, lambda path: save_file(weights, path, _metadata(command, pipeline)), aside)
        print(command.output)
        if predicts_v:
            write_whole(settings, yaml.safe_dump(original_config(*networks, schedule), sort_keys=False).encode())
            print(settings)
    except (OSError, RuntimeError) as error:  # safetensors has errors of its own for a full disk
        raise ConfigError(f"{command.output} cannot be written: {first_line(error)}") from None
    for line in _cautions(pipeline):
        print(f"warning: {line}", file=sys.stderr)


def _predicts_v(pipeline: LatentDiffPipeline) -> bool:
    return pipeline.scheduler.config.get("prediction_type") == "v_prediction"


def _stored_dtype(folder: Path) -> torch.dtype:
    """In which a part's weights are stored, by the first of them."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in list(weights.keys()):
                return _STORED.get(weights.get_slice(name).get_dtype(), torch.float32)
    return torch.float32


def _cast(network: torch.nn.Module, dtype: torch.dtype, part: str) -> None:
    """In place.

    Raises:
        ConfigError: a weight is larger than the precision's largest number.
    """
    largest = torch.finfo(dtype).max
    for name, weight in network.state_dict().items():
        if weight.is_floating_point() and weight.numel() and weight.abs().max() > largest:
            raise ConfigError(f"--dtype: {part} {name} has a weight beyond {largest:g}; choose bf16 or fp32")
    torch.nn.Module.to(network, dtype)


def _metadata(command: Export, pipeline: LatentDiffPipeline) -> dict[str, str]:
    """The file's header, by Stability AI's ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec)."""
    height, width = pipeline.picture_size(None, None)
    predicts_v = _predicts_v(pipeline)
    kinds = {1: "stable-diffusion-v1", 2: "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"}
    inpaints = "" if pipeline.unet.config.in_channels == 4 else "/inpainting"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": kinds[version_of(pipeline.unet)] + inpaints,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": command.output.stem,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
    }


def _cautions(pipeline: LatentDiffPipeline) -> list[str]:
    """What of a written file not every program reads as it is meant."""
    found = []
    unusual = unusual_sizes(pipeline.unet, pipeline.vae, pipeline.text_encoder)
    if unusual:
        found.append(f"of another size than Stable Diffusion's, which some programs take alone: {', '.join(unusual)}")
    if not _OF_CLIP.items() <= pipeline.tokenizer.get_vocab().items():
        found.append("its tokenizer is another than CLIP's, which programs bring along: they would read other words")
    if _predicts_v(pipeline) and version_of(pipeline.unet) == 1:
        found.append(
            "it predicts v: tell ComfyUI by the node ModelSamplingDiscrete, stable-diffusion.cpp by --prediction v, "
            "sd-scripts by --v_parameterization"
        )
    return found
