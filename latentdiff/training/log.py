"""What a run says of itself: lines of a log, a tracker's curves, a progress bar."""

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..config.train import TrainConfig
from .trackers import log_values


class RunLog:
    """What was measured at which optimizer step: a line of JSON each in `log.jsonl`, and the tracker's curves.

    A run that goes on from an earlier step first removes the lines after it, so that no step stands there twice.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, first_step: int):
        self._accelerator, self._path = accelerator, Path(config.output_dir) / "log.jsonl"
        if accelerator.is_main_process:
            earlier = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() and first_step else []
            self._path.write_bytes(b"".join(line for line in earlier if 0 <= _step_of(line) <= first_step))

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Add `values` after optimizer step number `step`."""
        log_values(self._accelerator, values, step)
        if self._accelerator.is_main_process:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def _step_of(line: bytes) -> float:
    """The step that a line of the log is of; below 0 for one that is none, as a killed run's last one may be."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else -1
    except (ValueError, TypeError, LookupError, RecursionError):
        return -1
    return step if isinstance(step, int) else -1


class Progress:
    """The progress bar with loss, pictures per second and time left; to be used in a with statement."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        log: RunLog,
        first_step: int,
        total_steps: int,
        pending: list[float],
    ):
        self._accelerator, self._log, self._every = accelerator, log, config.logging_steps
        self._global_batch = config.samples_per_step * accelerator.num_processes
        self._earlier = pending  # what a checkpoint between two lines of the log kept
        self._losses: list[torch.Tensor] = []
        self._since, self._last_step = time.perf_counter(), first_step
        self._bar = tqdm(
            initial=first_step,
            total=total_steps,
            desc="training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )

    def add(self, loss: torch.Tensor) -> None:
        """Take in a micro-batch's loss without waiting for the device."""
        self._losses.append(loss.detach())

    @property
    def pending(self) -> list[float]:
        """Losses since the last line of the log, means over the processes, for a checkpoint to keep."""
        if not self._losses:
            return self._earlier
        return self._earlier + self._accelerator.reduce(torch.stack(self._losses), "mean").tolist()

    def step(self, done: int, **values: float | torch.Tensor) -> None:
        """After optimizer step number `done`; every `logging_steps` the mean loss since the last time is shown, and
        logged beside `values`."""
        self._bar.update()
        if done % self._every and done != self._bar.total:
            return
        loss = float(torch.tensor(self.pending).mean())
        rate = (done - self._last_step) * self._global_batch / (time.perf_counter() - self._since)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} pictures/s")
        self._log(done, {"loss": loss, **{k: float(v) for k, v in values.items()}, "pictures_per_second": rate})
        self._earlier, self._losses = [], []
        self._last_step, self._since = done, time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()  # ends its line, so that a message does not stand behind it
