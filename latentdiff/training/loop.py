"""The loop of a training run, the same for every kind of data, network and objective.

A run is made of what `Run` names. The loop adds what holds for all: optimizer, averages, resumable checkpoints, the
log, and the ends that a run may have. Its one clock counts optimizer steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ..config.train import TrainConfig
from ..data.batches import Batches
from ..distributed.deepspeed import is_zero
from ..models.parts import networks_of
from ..objectives.objective import Objective
from .checkpoint import load_checkpoint, save_checkpoint, save_weights_as_diffusers_does, saved_extra
from .ema import EMA, EMASnapshots, PowerEMAs, make_ema
from .log import Progress, RunLog
from .optimizers import make_optimizer, make_weight_norm
from .push import BackgroundPush
from .run_folder import RunFolder
from .setup import learning_rate_at
from .stopping import DivergenceWatch, StopSignals

Averages = EMA | PowerEMAs | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training run is made of."""

    config: TrainConfig
    accelerator: Accelerator
    folder: RunFolder
    """Where it is kept, and what it goes on from."""
    model: torch.nn.Module
    """What is trained, on the CPU."""
    objective: Objective
    """(model, batch, optimizer step) -> the loss of each sample (B,)."""
    batches: Batches
    total_steps: int
    validation: Callable[[Averages, RunLog], Callable[[torch.nn.Module, int], None]]
    """Makes what measures and draws after an optimizer step."""
    finish: Callable[[torch.nn.Module, Averages], None]
    """Saves the finished model."""
    pushes: BackgroundPush | None = None
    """Sends checkpoints to the Hub, on the main process."""


def train(run: Run) -> None:
    """Train to the end, or to where a signal or numbers that are not finite end it.

    Raises:
        RunStopped: a checkpoint could not be written, or the gradient is not finite.
    """
    config, accelerator = run.config, run.accelerator
    learning_rate = learning_rate_at(config, run.total_steps)
    optimizer = make_optimizer(config, run.model)
    model, optimizer = accelerator.prepare(run.model, optimizer)
    bare = accelerator.unwrap_model(model)
    weight_norm = make_weight_norm(config, networks_of(bare)["unet"], is_zero=is_zero(accelerator))
    ema = make_ema(config, bare)
    save_weights_as_diffusers_does(accelerator, bare, ema)
    first_step, carried = 0, {}
    if checkpoint := run.folder.checkpoint:
        first_step, carried = load_checkpoint(accelerator, checkpoint), saved_extra(checkpoint)
    snapshots = EMASnapshots(config, accelerator, ema, first_step, run.total_steps)
    log = RunLog(config, accelerator, first_step)
    validation = run.validation(ema, log)
    progress = Progress(config, accelerator, log, first_step, run.total_steps, carried.get("losses", []))
    watch = DivergenceWatch(accelerator, run.batches, carried.get("skipped_steps", 0))

    if first_step == 0:
        validation(bare, 0)
    model.train()
    with progress, StopSignals(accelerator) as stop:
        for step in range(first_step, run.total_steps):
            grad_norm = take_step(run, model, optimizer, learning_rate(step), step, progress)
            if weight_norm is not None:
                weight_norm.restore()
            done = step + 1  # optimizer steps: the one clock that users see
            watch.add(done, grad_norm)
            if ema is not None:
                ema.update(bare, done)
            stops = stop.requested(done) and done < run.total_steps
            saves = done % config.checkpointing_steps == 0 or stops
            validates = done % config.validation_steps == 0 or done == run.total_steps
            if saves or validates or snapshots.due(done) or done % config.logging_steps == 0:
                watch.check()
            progress.step(done, learning_rate=learning_rate(step), **watch.measures)
            if validates:
                validation(bare, done)
            if snapshots.due(done):
                snapshots.write(bare, done)
            if saves:  # after validation and snapshots: a run killed between the two would go on without them
                extra = {"losses": progress.pending, "skipped_steps": watch.skipped_steps}
                extra |= {"optimizer": config.optimizer, "ema_sigma_rel": config.ema_sigma_rel, "run": run.folder.run}
                output_dir = Path(config.output_dir)
                saved = save_checkpoint(accelerator, output_dir, done, config.checkpoints_total_limit, extra)
                run.folder.settled()
                if run.pushes and done < run.total_steps:
                    run.pushes.start(saved, done)
            if stops:
                stop.leave(done)
    if run.pushes:
        run.pushes.wait()
    run.finish(bare, ema)
    run.folder.settled()


def take_step(
    run: Run,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    step: int,
    progress: Progress,
) -> torch.Tensor:
    """One optimizer step over all of its micro-batches; the norm that its gradient had before it was clipped."""
    accelerator = run.accelerator
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    for micro_step in range(run.config.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            loss = run.objective(model, run.batches.at(step, micro_step), step).mean()
            accelerator.backward(loss)
            progress.add(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), run.config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return grad_norm
