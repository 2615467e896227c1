"""The loop that the two frozen parts of the embedded default share: AdamW, warm-up and cosine, exact resume."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..training.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What both pretraining scripts take."""

    output_dir: str = "runs/emoji64-frozen"
    """Where the finished part goes, and checkpoints in a folder of their own. Both scripts may share it: it is then
    what train_text2img.py takes as `--pretrained_model_name_or_path`."""
    max_train_steps: int
    """Optimizer steps."""
    train_batch_size: int
    """Pictures per step and process."""
    learning_rate: float
    """Peak of AdamW's learning rate, reached after 100 steps, falling to zero as a cosine."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    resume_from_checkpoint: str | None = None
    """A checkpoint's step or path, or "latest"."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass; weights stay in fp32."""
    seed: int = 0
    """Seed of weights, order of the data and augmentation."""


def pretrain(
    config: PretrainConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    loss_at: Callable[[torch.nn.Module, int], torch.Tensor],
    work_dir: Path,
) -> torch.nn.Module:
    """Train `model` for `config.max_train_steps`, going on from a checkpoint where the config says so.

    Args:
        model: on any device, in fp32.
        loss_at: (prepared model, optimizer step) -> scalar loss; all its randomness must follow from the step.
        work_dir: where checkpoints go.

    Returns:
        The trained model, unwrapped, in fp32 and eval mode.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    checkpoint = resolve_checkpoint(work_dir, config.resume_from_checkpoint)
    first_step = load_checkpoint(accelerator, checkpoint) if checkpoint else 0
    started = time.perf_counter()
    steps = range(first_step, config.max_train_steps)
    bar = tqdm(steps, initial=first_step, total=config.max_train_steps, disable=not accelerator.is_main_process)
    for step in bar:
        for group in optimizer.param_groups:  # a function of the step alone: a resume has nothing to restore
            group["lr"] = config.learning_rate * warmup_cosine(step, warmup=100, total=config.max_train_steps)
        with accelerator.autocast():
            loss = loss_at(model, step)
        accelerator.backward(loss)
        _average_gradients(accelerator, model)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % config.checkpointing_steps == 0 or step + 1 == config.max_train_steps:
            save_checkpoint(accelerator, work_dir, step + 1, total_limit=1)
    accelerator.print(f"{len(steps)} steps in {time.perf_counter() - started:.0f} s")
    return accelerator.unwrap_model(model).float().eval()


def _average_gradients(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Between processes: the losses call parts of the model, so that torch's own wrapper does not notice."""
    if accelerator.num_processes > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


def warmup_cosine(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate: linear to 1 over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
