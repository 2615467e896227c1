"""The optimizers that a run may take, each from the library that holds it; and forced weight normalisation, under which
they turn filters and do not lengthen them (Karras et al. 2023, arXiv 2312.02696, section 2.3)."""

import math
from math import prod

import torch
from torch import nn

from ..config.train import TrainConfig
from ..distributed.fsdp import own_part
from ..models.mp_layers import MPConv2d, MPLinear, filter_norms
from ..models.mp_unet import MPUNet2DConditionModel
from ..utils.errors import ConfigError


def make_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the model's parameters that are trained.

    Raises:
        ConfigError: its package is not installed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    shared = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    adam = shared | {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    try:
        match config.optimizer:
            case "adamw":  # all parameters are updated in one fused kernel
                return torch.optim.AdamW(parameters, **adam, fused=True)
            case "adamw_8bit":
                # torchao's keeps its moments in tensors of a class of its own and its learning rate in one that may not
                # be replaced; this one's are plain uint8, on the CPU too.
                import bitsandbytes

                return bitsandbytes.optim.AdamW8bit(parameters, **adam)
            case "adafactor":
                # With these two off, `learning_rate` is what it is to AdamW, and the schedule decides its course. To
                # torch's Adafactor it is a share of each weight's own size.
                from transformers.optimization import Adafactor

                return Adafactor(parameters, **shared, scale_parameter=False, relative_step=False)
            case "prodigy":
                # As its authors advise for diffusion; the first of the two keeps warm-up out of the estimated rate.
                from prodigyopt import Prodigy

                return Prodigy(parameters, **adam, safeguard_warmup=True, use_bias_correction=True)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"optimizer: {config.optimizer!r} needs the package {error.name}: pip install {error.name}"
        ) from None


def check_same_optimizer(config: TrainConfig, carried: dict) -> None:
    """Whether the settings name the optimizer whose state a checkpoint holds, by the values kept beside it.

    Raises:
        ConfigError: another one.
    """
    earlier = carried.get("optimizer", config.optimizer)
    if earlier != config.optimizer:
        raise ConfigError(
            f"optimizer: {config.optimizer!r} cannot go on from a checkpoint of {earlier!r}; take the same one, or "
            "start a new run from the finished model"
        )


def state_bytes(optimizer: str, parameters: list[torch.Tensor]) -> int:
    """How much an optimizer keeps of such parameters, by its name in the settings: what a checkpoint holds of it."""

    def of(shape: torch.Size) -> float:
        count = prod(shape)
        if optimizer == "prodigy":  # two moments, a running sum of gradients and the initial weights
            return 16 * count
        if optimizer == "adafactor" and len(shape) > 1:  # sums over rows and over columns
            return 4 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])
        if optimizer == "adafactor":
            return 4 * count
        if optimizer == "adamw_8bit" and count >= 4096:  # a scale to each 256 numbers, and two tables of 256
            return 2 * (count + 4 * -(-count // 256) + 4 * 256)
        return 8 * count

    return sum(of(p.shape) for p in parameters)


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
