"""What ends a run early.

SIGTERM and SIGINT end it after the step it is in, with a checkpoint; a second one ends it at once. A run whose numbers
are no longer finite stops, says at which step and on which pictures, and overwrites nothing.
"""

import signal
import time
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..data.batches import Batches
from ..utils.errors import RunStopped

# Processes must stop after the same step, so they ask each other; not at every step, since asking takes time.
STEPS_BETWEEN_QUESTIONS = 10
# Ctrl-C reaches a process from the terminal and once more from its launcher: what comes so soon is the same wish.
SECONDS_OF_ONE_WISH = 0.5


class StopSignals:
    """In its block the two signals are noted instead of ending the process.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._received: int | None = None
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            if time.monotonic() - self._first > SECONDS_OF_ONE_WISH:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._received, self._first = number, time.monotonic()
        if self._accelerator.is_main_process:
            name = signal.Signals(number).name
            tqdm.write(f"{name}: stopping after this step, with a checkpoint; once more to leave at once")

    def requested(self, step: int) -> bool:
        """Whether the run is to end after optimizer step number `step`; the same on all processes."""
        if self._accelerator.num_processes == 1:
            return self._received is not None
        if step % STEPS_BETWEEN_QUESTIONS:
            return False
        if self._received is not None:
            self._accelerator.set_trigger()
        return self._accelerator.check_trigger()

    def leave(self, step: int) -> NoReturn:
        """Say where the run stands and end the process with 128 and the signal's number, as shells have it."""
        self._accelerator.end_training()
        if self._accelerator.is_main_process:
            tqdm.write(f"stopped after step {step}; --resume_from_checkpoint latest goes on from there")
        raise SystemExit(128 + (self._received or signal.SIGTERM))


MOST_SKIPPED_IN_A_ROW = 100


class DivergenceWatch:
    """Looks at every optimizer step's gradient without making the device wait.

    A NaN or an infinity in the loss or anywhere in the network reaches the gradient's norm, on every process. Under
    fp16 such a step is one that the gradient scaler skips: it is counted, and only an unbroken row of
    `MOST_SKIPPED_IN_A_ROW` of them is taken for divergence. Otherwise the weights are spoilt from that step on.

    Args:
        accelerator: says whether steps were skipped.
        batches: name the pictures of a step.
        skipped_steps: how many a checkpoint that the run goes on from had counted.

    Attributes:
        grad_norm: the last step's.
        skipped_steps: how many were skipped under fp16.
    """

    def __init__(self, accelerator: Accelerator, batches: Batches, skipped_steps: int = 0):
        self._accelerator, self._batches = accelerator, batches
        self._first_bad = torch.tensor(-1, device=accelerator.device)
        self._skipped_in_a_row = 0
        self.grad_norm: torch.Tensor | None = None
        self.skipped_steps = skipped_steps

    def add(self, step: int, grad_norm: torch.Tensor) -> None:
        """Take in the norm of the gradient of optimizer step number `step`, counted from 1.

        Raises:
            RunStopped: under fp16, after too many skipped steps.
        """
        self.grad_norm = grad_norm
        if self._accelerator.scaler is None:
            bad = ~torch.isfinite(grad_norm) & (self._first_bad < 0)
            self._first_bad = torch.where(bad, step, self._first_bad)
            if self._first_bad.device.type == "cpu":  # looking costs nothing
                self.check()
            return
        skipped = self._accelerator.optimizer_step_was_skipped
        self.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise RunStopped(self._message(step, f"{MOST_SKIPPED_IN_A_ROW} steps in a row overflowed in fp16"))

    @property
    def measures(self) -> dict[str, float | torch.Tensor]:
        """For the log."""
        skipped = {} if self._accelerator.scaler is None else {"skipped_steps": self.skipped_steps}
        return {"grad_norm": self.grad_norm, **skipped}

    def check(self) -> None:
        """Wait for the device and look. To be called before anything is saved or shown.

        Raises:
            RunStopped: a step since the start of the run had a gradient that was not finite.
        """
        if (step := int(self._first_bad)) >= 0:
            raise RunStopped(self._message(step, "the gradient is not finite"))

    def _message(self, step: int, what: str) -> str:
        names = list(dict.fromkeys(self._batches.name(row) for row in self._batches.rows_at(step - 1)))
        return (
            f"step {step}: {what}. Nothing was saved after it: --resume_from_checkpoint latest goes on from before, "
            f"with a lower --learning_rate or in another --mixed_precision. Its pictures: {', '.join(names)}"
        )
