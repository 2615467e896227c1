"""Whose an output folder is: of one run, whose name its checkpoints carry, and of one process at a time.

`latest` is the latest of the run that the folder is of. A new run in the folder of another one has to be asked for, and
takes nothing away before it has a checkpoint of its own.
"""

import json
import os
import secrets
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..config.train import TrainConfig
from ..diffusion.posthoc_ema import SNAPSHOTS
from ..utils.errors import ConfigError, first_line
from ..utils.files import read_json, remove_asides, write_whole
from ..utils.weight_files import remove_half_saved
from .checkpoint import (
    list_checkpoints,
    remove_checkpoint,
    remove_what_is_aside,
    resolve_checkpoint,
    saved_extra,
)

LOCK, RUN = ".lock", "run.json"
_EARLIER_LOG = "log-earlier.jsonl"
# What says that a folder is a run's; a start that was refused leaves none of it.
_LEFT_BY_A_RUN = ("log.jsonl", "model_index.json", "pytorch_lora_weights.safetensors")


class RunFolder:
    """The output folder, held by this process for the block; the system lets go of it however the process ends.

    Raises:
        ConfigError: another process holds it; it holds another run, and neither is that one gone on with nor may it be
            overwritten; there is no such checkpoint; or it cannot be written.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self._config, self._accelerator, self._folder = config, accelerator, Path(config.output_dir)
        self._lock = FileLock(self._folder / LOCK, timeout=0)
        self._others: dict[Path, int] = {}  # what other runs have left, and when it was written
        self.run = ""
        """The name of this run."""
        self.checkpoint: Path | None = None
        """What it goes on from."""

    def __enter__(self) -> "RunFolder":
        if self._accelerator.is_main_process:
            self._hold()
        try:
            resume_from, owner = self._config.resume_from_checkpoint, self._said("run")
            if resume_from is None:
                self._check_free()
            else:
                self.checkpoint = resolve_checkpoint(self._folder, resume_from, owner)
            self.run = self._name_of_run(owner)
            self._accelerator.wait_for_everyone()  # all have looked before one writes
            if self._accelerator.is_main_process:
                self._others = {path: path.stat().st_mtime_ns for path in self._of_others()}
                self._write(self._folder / RUN, json.dumps({"run": self.run, "process": os.getpid()}) + "\n")
                if self.checkpoint:
                    tqdm.write(f"going on from {self.checkpoint}")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error) -> None:
        self._lock.release()

    def settled(self) -> None:
        """This run has a checkpoint, or is finished: what another one left, and it has not replaced, is removed."""
        for path, written in self._others.items():
            if path.exists() and path.stat().st_mtime_ns == written:
                remove_checkpoint(path) if path.is_dir() else path.unlink()
        self._others = {}

    def save_settings(self) -> None:
        """Write the run's whole configuration, once it is known to make sense."""
        if self._accelerator.is_main_process:
            self._write(self._folder / "train_config.yaml", self._config.to_yaml())

    def _hold(self) -> None:
        try:
            self._lock.acquire()
            remove_asides(self._folder)
            remove_half_saved(self._folder)
            remove_what_is_aside(self._folder)
        except Timeout:
            raise ConfigError(
                f"output_dir: another run is writing to {self._config.output_dir!r} (process {self._said('process')})"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from None

    def _check_free(self) -> None:
        marks = [name for name in _LEFT_BY_A_RUN if (self._folder / name).exists()]
        if not self._config.overwrite_output_dir and (marks or list_checkpoints(self._folder)):
            raise ConfigError(
                f"output_dir: {self._config.output_dir!r} holds another run: --resume_from_checkpoint latest goes on "
                "with it, --overwrite_output_dir begins anew, another --output_dir keeps both"
            )

    def _name_of_run(self, owner: str | None) -> str:
        """That of the checkpoint; of one of a version before 0.2, which had none, that of the folder."""
        before = (saved_extra(self.checkpoint).get("run") or owner) if self.checkpoint else None
        return before or secrets.token_hex(8)

    def _of_others(self) -> list[Path]:
        """Checkpoints of runs that this one does not go on from; where it begins anew, all that they left."""
        checkpoints = list_checkpoints(self._folder)
        if self.checkpoint is None:
            kept = [self._folder / _EARLIER_LOG] if self._set_log_aside() else []
            pictures, snapshots = (self._folder / name for name in ("validation", SNAPSHOTS))
            return [*checkpoints, *pictures.glob("step-*.png"), *snapshots.glob("*.safetensors"), *kept]
        return [path for path in checkpoints if saved_extra(path).get("run") not in (None, self.run)]

    def _set_log_aside(self) -> bool:
        """A run that begins anew begins a log, too; the one that is there is not lost until there is a checkpoint."""
        log = self._folder / "log.jsonl"
        if log.exists():
            os.replace(log, self._folder / _EARLIER_LOG)
        return (self._folder / _EARLIER_LOG).exists()

    def _said(self, name: str):
        try:
            return read_json(self._folder / RUN).get(name)
        except (OSError, ValueError, AttributeError):
            return None

    def _write(self, path: Path, text: str) -> None:
        try:
            write_whole(path, text.encode())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"output_dir: {self._config.output_dir!r} cannot be written ({first_line(error)})")
