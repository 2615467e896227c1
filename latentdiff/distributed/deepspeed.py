"""DeepSpeed's ZeRO, as accelerate's configuration asks for with `use_deepspeed` and a `zero_stage`: every process holds
all weights, of the optimizer's moments a part (stage 1) and of the gradient one (2). It clips and steps in `backward`.

Weights and their average are as in a run that shares nothing. What is written to disk is whole, in the files of such a
run, so either goes on from the other's checkpoints.
"""

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    compare_versions,
    is_deepspeed_available,
    parse_flag_from_env,
)

from ..config.train import TrainConfig
from ..utils.errors import ConfigError

_AUTOCAST = "torch_autocast"  # DeepSpeed's name


def zero_plugin(config: TrainConfig) -> DeepSpeedPlugin | None:
    """What the launcher's configuration says about DeepSpeed; None where it does not ask for it.

    Raises:
        ConfigError: it asks for what would not be trained or saved right, or the package is missing.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    refuse_what_is_not_shared_out(config, "DeepSpeed")
    if config.mixed_precision == "fp16":
        raise ConfigError("mixed_precision: 'fp16' goes with FSDP2 or DDP; DeepSpeed goes with 'no' and 'bf16'")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise ConfigError("accelerate's deepspeed_config_file: is not read; leave it out and set zero_stage to 1 or 2")
    if not _has_deepspeed():
        raise ConfigError("accelerate's use_deepspeed: needs DeepSpeed, 0.19 or newer: pip install -U deepspeed")
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage not in (1, 2):
        instead = "FSDP with fsdp_version: 2" if plugin.zero_stage else "DDP"
        raise ConfigError(
            f"accelerate's zero_stage: {plugin.zero_stage} is not supported; set it to 1 or 2, or use {instead}"
        )
    if {plugin.offload_optimizer_device, plugin.offload_param_device} != {"none"}:
        raise ConfigError("accelerate's offload_optimizer_device and offload_param_device: are not supported; say none")
    steps = "gradient_accumulation_steps"
    _settle(plugin, steps, config.gradient_accumulation_steps, setting=steps, unsaid=("auto", 1))
    _settle(plugin, "gradient_clipping", config.max_grad_norm, setting="max_grad_norm", unsaid=("auto",))
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.train_batch_size
    if config.mixed_precision == "bf16":
        # As in other runs, torch casts in the forward. Under DeepSpeed's own bf16 weights and their average would be of
        # 16 bits. That no modules are named keeps gradients in fp32 on their way between processes.
        cast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        plugin.deepspeed_config |= {"bf16": {"enabled": False}, _AUTOCAST: cast}
    # DeepSpeed 0.19 calls it by the name it had before torch 2.13, which says so at every step.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    return plugin


def refuse_what_is_not_shared_out(config: TrainConfig, way: str) -> None:
    """Raise ConfigError for what neither DeepSpeed nor FSDP2 would train or save right here; `way` is which of them."""
    if config.lora_rank is not None:
        raise ConfigError(
            f"lora_rank: what is trained is small and is not shared out; launch it with DDP, without {way}"
        )
    if config.train_text_encoder:
        raise ConfigError(f"train_text_encoder: is not shared out; launch it with DDP, without {way}")
    if config.optimizer != "adamw":
        raise ConfigError(f"optimizer: {config.optimizer!r} is not shared out; {way} goes with 'adamw'")


def _has_deepspeed() -> bool:
    """Versions much older than the one this was written for would not know all that they are told, and ignore it."""
    return is_deepspeed_available() and compare_versions("deepspeed", ">=", "0.19")


def _settle(plugin: DeepSpeedPlugin, name: str, value: float, *, setting: str, unsaid: tuple) -> None:
    """A setting's value takes the place of the launcher's, which may be the same or what it is without being set."""
    if (theirs := getattr(plugin, name)) not in (value, *unsaid):
        raise ConfigError(f"accelerate's {name}: {theirs} contradicts --{setting} {value}; leave it out")
    plugin.deepspeed_config[name] = value


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains, on processes that know of each other."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.backend is not None


def autocast_of(accelerator: Accelerator) -> torch.autocast:
    """What DeepSpeed's own forward computes under, for the others."""
    casts = _AUTOCAST in accelerator.deepspeed_plugin.deepspeed_config
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=casts)


def whole_state(optimizer: AcceleratedOptimizer, keep: bool) -> dict:
    """The state dict of an optimizer that holds all of every parameter, on the CPU. All processes call it.

    Args:
        keep: whether this process wants it; without, tensors are missing.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    (parameters,), adamw = optimizer.optimizer.bit16_groups, optimizer.optimizer.optimizer
    state = adamw.state_dict()
    (entries,), (group,) = state["state"].values(), state["param_groups"]
    moments = {}
    for number, parameter in enumerate(parameters):
        moments[number] = {}
        for name, value in entries.items():
            whole = safe_get_full_optimizer_state(parameter, name) if value.dim() else value  # the step is a scalar
            if keep:
                moments[number][name] = whole.to("cpu", copy=True)
    return {"state": moments, "param_groups": [group | {"params": list(moments)}]}


def load_whole_state(optimizer: AcceleratedOptimizer, state: dict) -> None:
    """Take this process's part of a whole optimizer's state dict, and of the module's weights as they now are.

    Args:
        state: of which only that part is read.
    """
    zero = optimizer.optimizer
    # All parameters lie in a row, of which each process has a part -> (N,), wherever that cuts them.
    (parameters,), (part,) = zero.bit16_groups, zero.single_partition_of_fp32_groups
    entries = {name: torch.zeros_like(part) if value.dim() else value for name, value in state["state"][0].items()}
    for number, parameter in enumerate(parameters):
        if (fragment := parameter._hp_mapping) is None:  # all of it is in other parts
            continue
        there, here = fragment.lp_fragment_address, fragment.hp_fragment_address
        for name, value in state["state"][number].items():
            if value.dim():
                taken = value.flatten().narrow(0, there.start, there.numel)
                entries[name].narrow(0, here.start, here.numel).copy_(taken)
    (group,) = state["param_groups"]
    zero.optimizer.load_state_dict({"state": {0: entries}, "param_groups": [group | {"params": [0]}]})
    zero.refresh_fp32_params()  # it steps with a copy of its part of the weights
