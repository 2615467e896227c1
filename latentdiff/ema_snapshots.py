"""Snapshots of power-function averages while a run trains, from which any other width is made afterwards."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.configuration_utils import ConfigMixin
from safetensors import SafetensorError

from .config import RunStopped, TrainConfig
from .ema import EMA, PowerEMAs
from .models import networks_of
from .posthoc_ema import SNAPSHOTS, save_snapshot
from .sharding import whole_network

PER_RUN = 20  # where the settings do not say how many


class EMASnapshots:
    """Writes every tracked width of every trained network into `ema_snapshots/` of the run's folder.

    Snapshots later than the step that a run goes on from, which are of an earlier or a killed run, are removed at its
    start: they would be taken for its own. Without power-function averages nothing is done.

    They are in fp32: widths far from those kept are sums with large coefficients of both signs. With fp16 the rounding
    alone is 2e-4 of the weights at sigma_rel 0.08, where 20 snapshots are exact to 1e-5, and 5e-3 at 0.01
    (`benchmarks/posthoc_ema.py`).

    Args:
        ema: what is tracked.
        first_step: what the run goes on from.
        total_steps: after the last of which a snapshot is written in any case.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        ema: EMA | PowerEMAs | None,
        first_step: int,
        total_steps: int,
    ):
        self._accelerator, self._total_steps = accelerator, total_steps
        self._folder = Path(config.output_dir) / SNAPSHOTS
        self._widths = ema.widths if isinstance(ema, PowerEMAs) else []
        self._every = config.ema_snapshot_steps or snapshot_steps(total_steps)
        if accelerator.is_main_process:
            _remove_later(self._folder, first_step)
            if self._widths:
                self._folder.mkdir(exist_ok=True)

    def due(self, done: int) -> bool:
        """Whether they are to be written after optimizer step number `done`."""
        return bool(self._widths) and (done % self._every == 0 or done == self._total_steps)

    def write(self, model: torch.nn.Module, done: int) -> None:
        """Write them after optimizer step number `done`. All processes call it, before the checkpoint of that step: a
        run that goes on from there has them.

        Raises:
            RunStopped: they cannot be written.
        """
        for ema in self._widths:
            with ema.swapped_into(model):
                for name, network in networks_of(model).items():
                    whole = whole_network(network)  # from all processes
                    if self._accelerator.is_main_process:
                        self._save(name, done, ema.sigma_rel, whole)

    def _save(self, name: str, step: int, sigma_rel: float, network: torch.nn.Module) -> None:
        # diffusers' networks and transformers' configurations say what they are.
        said = json.loads((network if isinstance(network, ConfigMixin) else network.config).to_json_string())
        config = {key: value for key, value in said.items() if key != "_name_or_path"}  # of this machine
        try:
            save_snapshot(self._folder, name, step, sigma_rel, network.state_dict(), config)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise RunStopped(f"a snapshot in {self._folder} could not be written ({reason})") from error


def snapshot_steps(total_steps: int) -> int:
    """How often snapshots are written where the settings do not say."""
    return -(-total_steps // PER_RUN)


def _remove_later(folder: Path, step: int) -> None:
    for path in folder.glob("*.safetensors"):
        number = path.stem.rpartition("-")[2]
        if path.name.startswith(".tmp-") or (number.isdigit() and int(number) > step):
            path.unlink()
