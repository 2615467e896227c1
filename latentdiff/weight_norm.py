"""Forced weight normalisation: the optimizer turns filters and does not lengthen them (Karras et al. 2023, arXiv
2312.02696, section 2.3)."""

import math

import torch
from torch import nn

from .config import ConfigError, TrainConfig
from .mp_layers import MPConv2d, MPLinear, filter_norms
from .mp_unet import MPUNet2DConditionModel
from .sharding import own_part


def make_weight_norm(config: TrainConfig, unet: nn.Module, *, is_zero: bool = False) -> "ForcedWeightNorm | None":
    """What keeps the filters' lengths, where the settings ask for it, and always for a magnitude-preserving UNet.

    Args:
        is_zero: DeepSpeed takes the steps.

    Raises:
        ConfigError: it is to step on weights of its own, in which a filter lies in two processes.
    """
    if not (config.force_weight_norm or isinstance(unet, MPUNet2DConditionModel)) or config.lora_rank is not None:
        return None
    if is_zero:
        raise ConfigError("force_weight_norm: goes with DDP and FSDP2, as the mp UNets do; launch without DeepSpeed")
    return ForcedWeightNorm(unet)


class ForcedWeightNorm:
    """Brings every trained filter back to its length after a step of the optimizer.

    A filter is what gives one output of a convolution or linear layer. In a magnitude-preserving UNet its length is the
    root of the number of its weights. In others it is what it was when the run began, which a resumed run finds again,
    since it is made before a checkpoint is loaded; their last convolution is left free, since its length is the scale
    of what the network puts out.

    A sharded module's parts hold whole filters: each process brings back its own.

    Args:
        unet: with the weights that the run begins from.
    """

    def __init__(self, unet: nn.Module):
        self._weights, self._lengths = [], []
        for name, layer in unet.named_modules():
            preserves = isinstance(layer, MPLinear | MPConv2d)
            plain = type(layer) in (nn.Linear, nn.Conv2d) and name.split(".")[-1] != "conv_out"
            if not (preserves or plain) or not layer.weight.requires_grad:
                continue
            self._weights.append(layer.weight)
            length = filter_norms(own_part(layer.weight.detach()))
            self._lengths.append(
                torch.full_like(length, math.prod(layer.weight.shape[1:]) ** 0.5) if preserves else length
            )
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """After a step of the optimizer."""
        weights = [own_part(weight) for weight in self._weights]
        norms = [filter_norms(weight).clamp_(min=1e-12) for weight in weights]
        torch._foreach_mul_(weights, torch._foreach_div(self._lengths, norms))
