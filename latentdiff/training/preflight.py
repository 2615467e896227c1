"""What can be known before a run trains: `latentdiff check`, with the settings that train_text2img.py would get.

Looks at the pictures, at the captions as the tokenizer cuts them, at what the VAE makes of these pictures and whether
it would overflow in fp16, at the room on the disk, and at the time and memory of a few steps. A run itself says the
first of these, which cost nothing, before it trains.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel

from ..config.train import TrainConfig
from ..data.pictures import CaptionedPictures
from ..data.survey import REJECTED, left_out
from ..models.latents import encode_moments, psnr, to_pixels
from ..models.loading import hide_loading_bars
from ..models.parts import FrozenParts, trained_model
from ..objectives.choice import objective_of
from ..objectives.objective import Objective
from ..utils.devices import default_device
from ..utils.system import memory_there, most_memory_used
from .data import Data, load_data
from .ema import snapshot_steps
from .optimizers import make_optimizer, state_bytes
from .setup import load_networks, make_accelerator, make_output_dir, optimizer_steps

CAPTIONS_LOOKED_AT = 20_000
PICTURES_LOOKED_AT = 32
STEPS_TIMED = 3
LARGEST_FP16 = torch.finfo(torch.float16).max
# Whether the processor computes in it; on one that does not, a step in bf16 took 15 times as long as in fp32.
SLOW_ON_CPUS = {
    "bf16": lambda: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    "fp16": lambda: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
POOR_PSNR = 20.0  # dB; the VAEs of Stable Diffusion reach 23 to 25 on COCO, by the card of sd-vae-ft-mse


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A warning does not keep a run from training."""

    text: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{'warning: ' if self.is_warning else ''}{self.text}"


def check(config: TrainConfig, say: Callable[[str], None] = print) -> bool:
    """Look at everything, `say` each finding and the verdict; whether there was no warning.

    Raises:
        ConfigError: the run could not start.
    """
    make_output_dir(config)  # for rejected.jsonl, and to see its disk
    hide_loading_bars()
    accelerator = make_accelerator(replace(config, report_to="none"))
    parts, unet, scheduler = load_networks(config)
    model = trained_model(parts, unet)
    optimizer = make_optimizer(config, model)
    data = load_data(config, accelerator, parts, unet, scheduler)
    parts.to(accelerator.device)
    objective = objective_of(config)
    objective.prepare(accelerator, scheduler, unet, data.hidden_states, optimizer_steps(config, data.batches))
    findings = chain(
        _left_out(config),
        first_look(config, parts, unet, data),
        _vae(parts.vae, data.pictures, accelerator.device),
        _steps(config, accelerator, model, optimizer, objective, data),
    )
    warnings = 0
    for finding in findings:
        say(str(finding))
        warnings += finding.is_warning
    say("ready to train" if not warnings else f"it can train; {warnings} warning{'s' * (warnings > 1)} above")
    return not warnings


def _left_out(config: TrainConfig) -> Iterator[Finding]:
    """A run says this as it looks at the pictures."""
    folder = Path(config.output_dir)
    if not config.uses_emoji and (rejected := left_out(folder)):
        first = f"{_short(rejected[0].file)}: {rejected[0].reason}"
        count = f"{len(rejected):,} files are" if len(rejected) > 1 else "one file is"
        yield Finding(f"left out: {count} not used; the first is {first}; all are in {folder / REJECTED}", True)


def say_first_look(config: TrainConfig, parts: FrozenParts, unet: UNet2DConditionModel, data: Data) -> None:
    """Print what `first_look` finds."""
    for finding in first_look(config, parts, unet, data):
        print(finding)


def first_look(config: TrainConfig, parts: FrozenParts, unet: UNet2DConditionModel, data: Data) -> Iterator[Finding]:
    """Pictures, captions and the disk: what a run says in its first seconds."""
    pictures = data.pictures
    held_out = sum(pictures.held_out)
    yield Finding(f"pictures: {len(pictures.captions) - held_out:,} to train on, {held_out:,} held out")
    if enlarged := getattr(pictures, "enlarged", 0):
        yield Finding(f"pictures: {enlarged:,} are smaller than the resolution and were enlarged", is_warning=True)
    if len(pictures.sizes) > 1:
        counts = zip(pictures.sizes, np.bincount(pictures.size_of, minlength=len(pictures.sizes)), strict=True)
        yield Finding("buckets: " + ", ".join(f"{w}x{h}: {n:,}" for (w, h), n in counts if n))
    yield _captions(parts.tokenizer, pictures)
    if config.cache_latents and data.hidden_states is not None:
        yield _text(data)
    yield _disk(config, trained_model(parts, unet), optimizer_steps(config, data.batches))
    has_instructions = SLOW_ON_CPUS.get(config.mixed_precision, lambda: True)
    if default_device().type == "cpu" and not has_instructions():
        what = f"mixed_precision {config.mixed_precision}: this processor has no instructions for it"
        yield Finding(f"{what}, so a step will take several times as long; say no", is_warning=True)


def _captions(tokenizer, pictures: CaptionedPictures) -> Finding:
    limit = tokenizer.model_max_length
    captions = list(dict.fromkeys(islice(chain.from_iterable(pictures.captions), CAPTIONS_LOOKED_AT)))
    # A token is at least one letter: beyond so many letters the rest is cut whatever it says.
    cut = []
    for start in range(0, len(captions), 1000):  # a thousand at a time: the tokens of all take a hundred megabytes
        some = captions[start : start + 1000]
        tokens = tokenizer([caption[: 50 * limit] for caption in some], verbose=False).input_ids
        cut += [(caption, ids) for caption, ids in zip(some, tokens, strict=True) if len(ids) > limit]
    if not cut:
        return Finding(f"captions: {len(captions):,} different ones, all within the tokenizer's {limit} tokens")
    caption, ids = cut[0]
    lost = tokenizer.decode(ids[limit - 1 : -1])
    return Finding(
        f"captions: {len(cut):,} of {len(captions):,} are cut at the tokenizer's {limit} tokens; "
        f"{_short(caption)!r} loses {_short(lost)!r}",
        is_warning=True,
    )


def _text(data: Data) -> Finding:
    where = "kept on disk" if data.hidden_states.kept else "encoded in each step (--cache_text always keeps them)"
    return Finding(
        f"cache: latents of {_bytes(data.moments.bytes)}; hidden states of {data.hidden_states.different:,} captions, "
        f"{_bytes(data.hidden_states.bytes)}: {where}"
    )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


def _disk(config: TrainConfig, model: torch.nn.Module, total_steps: int) -> Finding:
    """A checkpoint holds the trained weights, their averages, all in fp32, and the optimizer's state. EMA snapshots are
    of the averages alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, averages = 4 * sum(p.numel() for p in trained), len(config.ema_sigma_rel) or int(config.use_ema)
    each = weights * (1 + averages) + state_bytes(config.optimizer, trained)
    # One more than are kept: the new one is whole before an old one goes.
    kept = config.checkpoints_total_limit or max(1, total_steps // config.checkpointing_steps)
    needed, free = each * (kept + 1), shutil.disk_usage(config.output_dir).free
    text = f"checkpoints of {_bytes(each)}, at most {_bytes(needed)} at a time"
    if config.ema_sigma_rel:
        every = config.ema_snapshot_steps or snapshot_steps(total_steps)
        snapshots = -(-total_steps // every) * len(config.ema_sigma_rel) * weights
        needed, text = needed + snapshots, f"{text}; EMA snapshots of {_bytes(snapshots)} in all"
    return Finding(f"disk: {text}; {_bytes(free)} free in {config.output_dir}", is_warning=needed > free)


@torch.no_grad()
def _vae(vae: AutoencoderKL, pictures: CaptionedPictures, device: torch.device) -> Iterator[Finding]:
    """Reconstruction of some of the pictures, spread evenly over the data, and the largest activation on the way."""
    count = len(pictures.captions)
    rows = list(range(0, count, -(-count // PICTURES_LOOKED_AT)))
    largest = _LargestActivation(vae)
    ratios = {}
    for row in rows:
        pixels = to_pixels([pictures.image(row)]).to(device)
        mean, _ = encode_moments(vae, pixels)
        ratios[row] = float(psnr(vae.decode(mean.to(vae.dtype)).sample, pixels))
    largest.remove()
    worst = min(ratios, key=ratios.get)
    mean = sum(ratios.values()) / len(ratios)
    name = pictures.name(worst)
    yield Finding(
        f"VAE: {mean:.1f} dB PSNR on {len(rows)} of these pictures, worst {ratios[worst]:.1f} on {name}",
        is_warning=mean < POOR_PSNR,
    )
    overflows = not largest.value < LARGEST_FP16
    yield Finding(
        f"VAE: its largest activation is {largest.value:,.0f}, "
        + (f"beyond fp16's {LARGEST_FP16:,.0f}: keep it in fp32 or bf16" if overflows else "within fp16"),
        is_warning=overflows,
    )


class _LargestActivation:
    """The largest absolute value that any layer of a network puts out."""

    def __init__(self, network: torch.nn.Module):
        self.value = 0.0
        leaves = [module for module in network.modules() if not list(module.children())]
        self._hooks = [module.register_forward_hook(self._look) for module in leaves]

    def _look(self, module, inputs, output) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            # As a maximum that lets NaN through
            self.value = float(torch.maximum(output.abs().max(), output.new_tensor(self.value)))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _steps(
    config: TrainConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    data: Data,
) -> Iterator[Finding]:
    """A few real optimizer steps, whose result is thrown away."""
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    seconds = []
    for step in range(STEPS_TIMED + 1):
        started = time.perf_counter()
        for micro_step in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                loss = objective(model, data.batches.at(step, micro_step), step).mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        if not torch.isfinite(loss):
            yield Finding(f"step {step + 1}: the loss is {loss.item()}", is_warning=True)
        seconds.append(time.perf_counter() - started)
    each = sorted(seconds[1:])[STEPS_TIMED // 2]  # the first one warms up
    total = optimizer_steps(config, data.batches)
    yield Finding(
        f"time: {each:.3g} s per step, {data.batches.global_batch / each:.3g} pictures a second; "
        f"{total:,} steps take about {_duration(each * total)} without validation"
    )
    yield _memory(accelerator.device)


def _memory(device: torch.device) -> Finding:
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):  # that of cpu and mps is the machine's
        used, there = module.max_memory_allocated(device), module.get_device_properties(device).total_memory
    else:
        used, there = most_memory_used(), memory_there()
    return Finding(
        f"memory: a step needs {_bytes(used)} of {_bytes(there)} on {device.type}; the averaged weights and validation "
        "come on top",
        is_warning=used > 0.9 * there,
    )


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
