"""Low-rank adapters on the UNet's attention (LoRA, Hu et al. 2021, arXiv 2106.09685), through peft, in the file that
diffusers' `pipe.load_lora_weights(folder)` takes: rank and alpha travel in its metadata."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft

from ..utils.errors import ConfigError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of every attention, as in diffusers' example
_ADAPTER = "default"


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float, seed: int) -> None:
    """Freeze the UNet and give it adapters, W + alpha / rank * B A, of which B starts at zero and A from `seed`.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("lora_rank: needs the package peft: pip install 'latentdiff[lora]'") from None
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws from the global generator
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(TARGETS))
        )


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Whether `add_lora` was called on it."""
    return _ADAPTER in getattr(unet, "peft_config", {})


def save_lora(unet: UNet2DConditionModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `pytorch_lora_weights.safetensors` into `folder`."""
    from peft import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=_ADAPTER))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers={name: tensor.to(dtype) for name, tensor in layers.items()},
        unet_lora_adapter_metadata=unet.peft_config[_ADAPTER].to_dict(),
    )


def load_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Read back what `save_lora` wrote, into a UNet with adapters of the same shape.

    Raises:
        RuntimeError: they are of another shape.
    """
    from peft import set_peft_model_state_dict

    layers, _ = StableDiffusionPipeline.lora_state_dict(folder)
    layers = convert_unet_state_dict_to_peft({name.removeprefix("unet."): t for name, t in layers.items()})
    result = set_peft_model_state_dict(unet, layers, adapter_name=_ADAPTER)
    if result.unexpected_keys:
        raise RuntimeError(f"{folder} has {result.unexpected_keys[0]}, which this UNet has not")
