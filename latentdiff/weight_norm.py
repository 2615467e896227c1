"""Forced weight normalisation: the optimizer turns filters and does not lengthen them (Karras et al. 2023, arXiv
2312.02696, section 2.3)."""

import torch
from torch import nn

from .config import TrainConfig
from .mp_unet import MPConv2d, MPLinear, MPUNet2DConditionModel


def forces_weight_norm(config: TrainConfig, unet: nn.Module) -> bool:
    """Whether a run keeps its filters' lengths: as it is told to, and always in a magnitude-preserving UNet."""
    return config.force_weight_norm or isinstance(unet, MPUNet2DConditionModel)


class ForcedWeightNorm:
    """Brings every trained filter back to its length after a step of the optimizer.

    A filter is what gives one output of a convolution or linear layer. In a magnitude-preserving UNet its length is the
    root of the number of its weights. In others it is what it was when the run began, which a resumed run finds again,
    since it is made before a checkpoint is loaded; their last convolution is left free, since its length is the scale
    of what the network puts out.

    Args:
        module: with the weights that the run begins from.
    """

    def __init__(self, module: nn.Module):
        self._weights, self._lengths = [], []
        for name, layer in module.named_modules():
            of_layer = isinstance(layer, nn.Linear | nn.Conv2d) and name.split(".")[-1] != "conv_out"
            if not (of_layer or isinstance(layer, MPLinear | MPConv2d)) or not layer.weight.requires_grad:
                continue
            self._weights.append(layer.weight)
            preserved = isinstance(layer, MPLinear | MPConv2d)
            self._lengths.append(layer.weight[0].numel() ** 0.5 if preserved else _length(layer.weight))

    @torch.no_grad()
    def restore(self) -> None:
        """After a step of the optimizer."""
        for weight, length in zip(self._weights, self._lengths, strict=True):
            weight.mul_(length / _length(weight).clamp(min=1e-12))


def _length(weight: torch.Tensor) -> torch.Tensor:
    """Of each filter, shaped to multiply the weight."""
    return torch.linalg.vector_norm(weight.detach(), dim=tuple(range(1, weight.ndim)), keepdim=True)
