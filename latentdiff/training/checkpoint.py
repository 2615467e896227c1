"""Checkpoints that appear whole or not at all, and the choice of the one to go on from.

accelerate saves what it prepared; the UNet, a text encoder that is trained with it, and their averages are written as
diffusers writes them. The step says the
rest: every draw, the order of the data and the learning rate follow from it.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ..distributed.fsdp import load_whole, whole_network
from ..models.loading import unet_class
from ..models.lora import has_lora, load_lora, save_lora
from ..models.parts import networks_of
from ..models.whole import load_network, loading
from ..utils.errors import ConfigError, RunStopped, first_line, is_out_of_room
from ..utils.files import file_sha256, move_into_place, read_json
from ..utils.system import sync
from ..utils.weight_files import write_earlier_names
from .ema import EMA, PowerEMAs

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)$")
_ASIDE = ".tmp-"  # before a name: what is being written or removed, and what a killed run left of that
_DONE = "state.json"  # written last: its presence says that the checkpoint was whole; it holds the files' SHA-256


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints in `output_dir`, the earliest first; half-written ones do not count."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.match(path.name)]
    return sorted((path for path in found if (path / _DONE).exists()), key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(_NAME.match(Path(checkpoint).name)[1])


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    total_limit: int | None = None,
    extra: dict | None = None,
) -> Path:
    """Write `checkpoint-{step}` aside and rename it when whole, then remove the oldest beyond `total_limit`.

    All processes call it. The new one is whole before an old one is removed. Checkpoints of later steps are what an
    earlier run left, which this one does not go on from: they are the first to be removed.

    Args:
        extra: plain values to keep beside it, which `saved_extra` gives back.

    Raises:
        RunStopped: it cannot be written; the earlier ones are left as they are.
    """
    final, aside = output_dir / f"checkpoint-{step}", output_dir / f"{_ASIDE}checkpoint-{step}"
    try:
        if accelerator.is_main_process:
            remove_what_is_aside(output_dir)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _seal(aside, {"step": step, "extra": extra or {}})
            remove_checkpoint(final)
            move_into_place(aside, final)
            if total_limit:
                by_age = sorted(list_checkpoints(output_dir), key=lambda path: (step_of(path) <= step, step_of(path)))
                for old in by_age[:-total_limit]:
                    remove_checkpoint(old)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_room(error):
            raise  # not torch's way to say that it could not write
        shutil.rmtree(aside, ignore_errors=True)
        left = list_checkpoints(output_dir)
        raise RunStopped(
            f"{final} could not be written ({first_line(error)}); "
            + (f"the last one is {left[-1].name}" if left else "there is no earlier one")
        ) from error
    accelerator.wait_for_everyone()
    return final


def _seal(folder: Path, state: dict) -> None:
    """Force the folder's files onto the disk, then write what says that they are whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    state["sha256"] = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    (folder / _DONE).write_text(json.dumps(state), encoding="utf-8")


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove one so that a kill in between leaves nothing that looks like a checkpoint."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f"{_ASIDE}old-{checkpoint.name}")
        os.replace(checkpoint, aside)
        shutil.rmtree(aside)


def remove_what_is_aside(output_dir: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for left in output_dir.glob(f"{_ASIDE}*checkpoint-*"):
        shutil.rmtree(left, ignore_errors=True)


def save_weights_as_diffusers_does(
    accelerator: Accelerator, model: torch.nn.Module, ema: EMA | PowerEMAs | None
) -> None:
    """From now on a checkpoint holds `unet/` and `unet_ema/`, and both are read back from there: whole UNets, or LoRA
    weights where the UNet has adapters. So it is with `text_encoder/` where that is trained, too, and with averages of
    more widths, such as `unet_ema_0.1/`.

    Args:
        model: as prepared, without what accelerate wraps around it.
    """
    networks, averages = networks_of(model), {} if ema is None else ema.averages

    def save(models: list, weights: list, folder: str) -> None:
        _save_weights(accelerator, networks, Path(folder))
        for suffix, average in averages.items():
            with average.swapped_into(model):
                _save_weights(accelerator, networks, Path(folder), suffix)
        weights.clear()  # else accelerate writes them a second time

    def load(models: list, folder: str) -> None:
        if "text_encoder" not in networks and (Path(folder) / "text_encoder").is_dir():
            raise ConfigError(f"resume_from_checkpoint: {folder} goes on with --train_text_encoder alone")
        for suffix, average in averages.items():
            _load_weights(networks, Path(folder), suffix)
            average.copy_from(model)
        _load_weights(networks, Path(folder))
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _save_weights(
    accelerator: Accelerator, networks: dict[str, torch.nn.Module], checkpoint: Path, suffix: str = ""
) -> None:
    for name, network in networks.items():
        whole = whole_network(network)  # from all processes
        if not accelerator.is_main_process:
            continue
        if has_lora(whole):
            save_lora(whole, checkpoint / f"{name}{suffix}")
        else:
            whole.save_pretrained(checkpoint / f"{name}{suffix}")
            write_earlier_names(checkpoint / f"{name}{suffix}")


def _load_weights(networks: dict[str, torch.nn.Module], checkpoint: Path, suffix: str = "") -> None:
    for name, network in networks.items():
        folder = checkpoint / f"{name}{suffix}"
        if not folder.is_dir():
            setting = "use_ema" if suffix else f"train_{name}"
            raise ConfigError(f"resume_from_checkpoint: {folder} is missing; was the run made without {setting}?")
        what = "UNet" if name == "unet" else "text encoder"
        with loading(f"resume_from_checkpoint: {folder} holds another {what} than this run trains, or a damaged one"):
            if has_lora(network):
                load_lora(network, folder)
            else:  # a sharded network is of a class of its own
                kind = unet_class(folder) if name == "unet" else type(network)
                load_whole(network, load_network(kind, folder).state_dict())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or is not what was written. None where all is well."""
    try:
        digests = dict(read_json(checkpoint / _DONE).get("sha256", {}))
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{_DONE} cannot be read"
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != digest:
            return f"{name} is damaged"
    return None


def resolve_checkpoint(output_dir: str | Path, resume_from: str | None, run: str | None = None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir: the run's folder.
        resume_from: None, "latest" (the newest that is not damaged; None is returned where there is none: a run starts
            afresh), a step's number, the name of a checkpoint in `output_dir`, or a path.
        run: whose latest is meant, where several have left theirs; those without a name are anybody's.

    Raises:
        ConfigError: it names a checkpoint that is not there, not whole or damaged, or all of them are damaged.
    """
    whole = list_checkpoints(output_dir)
    if resume_from is None:
        return None
    if resume_from == "latest":
        own = [path for path in whole if run is None or saved_extra(path).get("run") in (None, run)]
        return _newest_undamaged(own) if own else None
    name = f"checkpoint-{resume_from}" if resume_from.isdigit() else resume_from
    for path in (Path(output_dir) / name, Path(name)):
        if _NAME.match(path.name) and (path / _DONE).exists():
            if problem := damage(path):
                raise ConfigError(f"resume_from_checkpoint: {path}: {problem}")
            return path
    there = ", ".join(path.name for path in whole) or "none"
    raise ConfigError(
        f"resume_from_checkpoint: {resume_from!r} is no whole checkpoint; whole ones in {output_dir}: {there}"
    )


def _newest_undamaged(whole: list[Path]) -> Path:
    for path in reversed(whole):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is passed over: %s", path, problem)
    raise ConfigError(f"resume_from_checkpoint: every checkpoint is damaged; the first is {path}: {problem}")


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """Load everything into what `accelerator` prepared and registered; returns the optimizer step to go on from."""
    with loading(f"resume_from_checkpoint: {checkpoint} cannot be loaded"):
        accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # its micro-batch counter: every optimizer step starts a new count, whatever it was saved with
    return step_of(checkpoint)


def saved_extra(checkpoint: Path) -> dict:
    """The plain values that `save_checkpoint` was given; none where they cannot be read (see `damage`)."""
    try:
        return dict(read_json(checkpoint / _DONE).get("extra", {}))
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
