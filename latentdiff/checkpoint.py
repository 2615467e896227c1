"""Checkpoints that appear whole or not at all, and the choice of the one to go on from.

accelerate saves what it prepared; the UNet and its average are written as diffusers writes a UNet. The step says the
rest: every draw, the order of the data and the learning rate follow from it.
"""

import json
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from .config import ConfigError
from .ema import EMA

_NAME = re.compile(r"checkpoint-(\d+)$")
_DONE = "state.json"  # written last: its presence says that the checkpoint is whole


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints in `output_dir`, the earliest first; half-written ones do not count."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.match(path.name)]
    return sorted((path for path in found if (path / _DONE).exists()), key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(_NAME.match(Path(checkpoint).name)[1])


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int | None = None) -> Path:
    """Write `checkpoint-{step}` aside and rename it when whole, then remove the oldest beyond `total_limit`.

    All processes call it. The new one is whole before an old one is removed. Checkpoints of later steps are what an
    earlier run left, which this one does not go on from: they are the first to be removed.
    """
    final, aside = output_dir / f"checkpoint-{step}", output_dir / f".tmp-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / _DONE).write_text(json.dumps({"step": step}))
        _sync_files(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        if total_limit:
            by_age = sorted(list_checkpoints(output_dir), key=lambda path: (step_of(path) <= step, step_of(path)))
            for old in by_age[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def save_weights_as_diffusers_does(accelerator: Accelerator, unet: UNet2DConditionModel, ema: EMA | None) -> None:
    """From now on a checkpoint holds `unet/` and `unet_ema/`, and both are read back from there.

    Args:
        unet: not yet prepared; its preparation keeps the module.
    """

    def save(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            unet.save_pretrained(Path(folder) / "unet")
            if ema is not None:
                with ema.swapped_into(unet):
                    unet.save_pretrained(Path(folder) / "unet_ema")
        weights.clear()  # else accelerate writes them a second time

    def load(models: list, folder: str) -> None:
        if ema is not None:
            _load_weights(unet, Path(folder) / "unet_ema")
            ema.copy_from(unet)
        _load_weights(unet, Path(folder) / "unet")
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _load_weights(unet: UNet2DConditionModel, folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"resume_from_checkpoint: {folder} is missing; was the run made without use_ema?")
    try:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder).state_dict())
    except RuntimeError:  # names and shapes of hundreds of tensors
        raise ConfigError(f"resume_from_checkpoint: {folder} holds another UNet than this run trains") from None


def _sync_files(folder: Path) -> None:
    """Force every file of the folder onto the disk, so that the rename cannot come before the contents."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def resolve_checkpoint(output_dir: str | Path, resume_from: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir: the run's folder.
        resume_from: None, "latest" (None is returned where there is none: a run starts afresh), a step's number, the
            name of a checkpoint in `output_dir`, or a path.

    Raises:
        ConfigError: it names a checkpoint that is not there or not whole.
    """
    whole = list_checkpoints(output_dir)
    if resume_from is None or (resume_from == "latest" and not whole):
        return None
    if resume_from == "latest":
        return whole[-1]
    name = f"checkpoint-{resume_from}" if resume_from.isdigit() else resume_from
    for path in (Path(output_dir) / name, Path(name)):
        if _NAME.match(path.name) and (path / _DONE).exists():
            return path
    there = ", ".join(path.name for path in whole) or "none"
    raise ConfigError(
        f"resume_from_checkpoint: {resume_from!r} is no whole checkpoint; whole ones in {output_dir}: {there}"
    )


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """Load everything into what `accelerator` prepared and registered; returns the optimizer step to go on from."""
    accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # its micro-batch counter: every optimizer step starts a new count, whatever it was saved with
    return step_of(checkpoint)
