"""SIGTERM and SIGINT end a run after the step it is in, with a checkpoint; a second one ends it at once."""

import os
import signal
import time
from types import FrameType
from typing import NoReturn

from accelerate import Accelerator
from tqdm.auto import tqdm

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
                os.kill(os.getpid(), number)
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
