"""FSDP2: every process holds a part of each weight, gradient, average and optimizer moment, as accelerate's
configuration asks for with `fsdp_version: 2`. What is written to disk is whole, in the files of a run that shards
nothing, so either goes on from the other's checkpoints.

What a sharded module does to its weights (a forward or a `full_tensor()`) all processes must do together.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    disable_fsdp_ram_efficient_loading,
    parse_flag_from_env,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config.train import TrainConfig
from ..utils.errors import ConfigError
from .deepspeed import autocast_of, is_zero, load_whole_state, refuse_what_is_not_shared_out, whole_state

_OPTIMIZER, _SCALER = "optimizer.bin", "scaler.pt"  # accelerate's names


def sharding_plugin(config: TrainConfig) -> FullyShardedDataParallelPlugin | None:
    """What the launcher's configuration says about FSDP; None where it does not ask for it.

    Raises:
        ConfigError: it asks for what would not be trained or saved right.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(f"accelerate's fsdp_version: {version} is not supported; set it to 2")
    plugin = FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("accelerate's fsdp_offload_params: true is not supported; leave it out")
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:  # it picks lists of blocks, which have no forward
        raise ConfigError("accelerate's fsdp_auto_wrap_policy: SIZE_BASED_WRAP fails; choose TRANSFORMER_BASED_WRAP")
    if plugin.activation_checkpointing and plugin.auto_wrap_policy is None:
        raise ConfigError(
            "accelerate's fsdp_activation_checkpointing: needs fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"
        )
    refuse_what_is_not_shared_out(config, "FSDP")
    # Under it transformers 5.10 gives all processes but the first zeros; nothing would send them the text encoder.
    disable_fsdp_ram_efficient_loading()
    return plugin


class ShardingAccelerator(Accelerator):
    """accelerate's, except that FSDP2 and DeepSpeed clip, save and load as other runs do: by whole numbers and whole
    tensors.

    accelerate itself would write the sharded weights beside those of the registered hooks, and the optimizer's state
    in files that only FSDP or DeepSpeed reads, the latter's by unpickling.
    """

    def clip_grad_norm_(self, parameters, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        norm = _whole(super().clip_grad_norm_(parameters, max_norm, norm_type))
        return torch.as_tensor(norm, device=self.device)  # DeepSpeed has clipped before, and gives a number

    def autocast(self, autocast_handler=None) -> AbstractContextManager:
        return autocast_of(self) if is_zero(self) else super().autocast(autocast_handler)

    def save_state(self, output_dir: str) -> None:
        """All processes call it; the main one writes."""
        if not (self.is_fsdp2 or is_zero(self)):
            super().save_state(output_dir)
            return
        folder, (optimizer,) = Path(output_dir), self._optimizers
        if self.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        for hook in self._save_model_state_pre_hook.values():
            hook([], [], output_dir)
        if is_zero(self):
            state = whole_state(optimizer, keep=self.is_main_process)
        else:
            state = optimizer.state_dict()
            state["state"] = {
                number: {name: self._gathered(value) for name, value in entries.items()}
                for number, entries in state["state"].items()
            }
        if self.is_main_process:
            torch.save(state, folder / _OPTIMIZER)
            if self.scaler is not None:
                torch.save(self.scaler.state_dict(), folder / _SCALER)

    def load_state(self, input_dir: str) -> None:
        """All processes call it and read the same files."""
        if not (self.is_fsdp2 or is_zero(self)):
            super().load_state(input_dir)
            return
        folder, (optimizer,) = Path(input_dir), self._optimizers
        for hook in self._load_model_state_pre_hook.values():
            hook([], input_dir)
        state = torch.load(folder / _OPTIMIZER, map_location="cpu", mmap=True, weights_only=True)
        if is_zero(self):
            load_whole_state(optimizer, state)
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {name: _part_like(parameters[number], value) for name, value in entries.items()}
            for number, entries in state["state"].items()
        }
        optimizer.load_state_dict(state | {"state": moments})
        if self.scaler is not None:
            self.scaler.load_state_dict(torch.load(folder / _SCALER, weights_only=True))

    def _gathered(self, value):
        whole = _whole(value)  # from all processes, of which one keeps it
        return (whole.cpu() if isinstance(whole, torch.Tensor) else whole) if self.is_main_process else None


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether FSDP2 has prepared it."""
    return isinstance(module, FSDPModule)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_network(network: torch.nn.Module) -> torch.nn.Module:
    """`network` itself, or where it is a sharded UNet a plain one on the CPU with all of its weights.

    All processes call it. On all but the main one what it returns for a sharded UNet has no weights (a `meta` device).
    """
    if not is_sharded(network):
        return network
    with torch.device("meta"):
        plain = _kind_of(network).from_config(network.config)
    weights = {}
    for name, tensor in network.state_dict().items():
        tensor = _whole(tensor)
        if torch.distributed.get_rank() == 0:
            weights[name] = tensor.cpu()
    if weights:
        plain.load_state_dict(weights, assign=True)
    return plain


def _kind_of(network: torch.nn.Module) -> type:
    """The class of a network, which FSDP2 has given one of its own."""
    return next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))


def load_whole(unet: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """`unet.load_state_dict(weights)`, of which a sharded one takes its parts. All processes call it.

    Raises:
        RuntimeError: names or shapes are others.
    """
    there = unet.state_dict()
    unet.load_state_dict({name: _part_like(there.get(name), value) for name, value in weights.items()})


@contextmanager
def parts_put_back(unet: torch.nn.Module) -> Iterator[None]:
    """After the block no process keeps whole weights that forwards in it gathered.

    FSDP2 keeps those of the outermost module for a backward to come. Without one the next forward would compute with
    them, whatever has been written into the parts.
    """
    try:
        yield
    finally:
        for module in unet.modules():
            if is_sharded(module):
                module.reshard()


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part_like(reference, value):
    """`value`, as a DTensor where it stands for all of one."""
    if not isinstance(reference, DTensor) or not isinstance(value, torch.Tensor) or value.shape != reference.shape:
        return value
    return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
