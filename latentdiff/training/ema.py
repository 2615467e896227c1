"""Averages of weights while they are trained, counted in optimizer steps; and snapshots of power-function averages,
from which one of any other width is made afterwards."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.configuration_utils import ConfigMixin
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..config.train import TrainConfig
from ..diffusion.posthoc_ema import SNAPSHOT_METADATA, SNAPSHOTS, decay_at, gamma_of, snapshot_path
from ..distributed.fsdp import own_part, whole_network
from ..models.parts import networks_of
from ..utils.errors import ConfigError, RunStopped, first_line
from ..utils.files import move_into_place


class EMA:
    """A running average, in float32, of those of a module's parameters that are trained.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that early averages are not held back by the
    initial weights. Of a sharded module each process averages what it holds.

    Args:
        module: whose parameters that require gradients are averaged; the average starts from them.
        decay: in [0, 1).
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        self.decay = decay
        self.parameters = [p.detach().float().clone() for p in _trained(module)]

    @property
    def averages(self) -> dict[str, "EMA"]:
        """What a checkpoint has to hold, by what stands behind a network's name in it."""
        return {"_ema": self}

    def decay_at(self, step: int) -> float:
        """What optimizer step number `step` leaves of the average before it, in [0, 1)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 1."""
        current = [p.detach().float() for p in _trained(module)]
        torch._foreach_lerp_(self.parameters, current, 1 - self.decay_at(step))

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Write the average into the module's parameters, in their dtype."""
        torch._foreach_copy_(_trained(module), self.parameters)

    @torch.no_grad()
    def copy_from(self, module: torch.nn.Module) -> None:
        """Take the module's parameters as the average, e.g. after loading one from disk."""
        torch._foreach_copy_(self.parameters, _trained(module))

    @contextmanager
    def swapped_into(self, module: torch.nn.Module) -> Iterator[None]:
        """In the block the module computes with the average; afterwards, also on errors, it has its own weights."""
        kept = [p.detach().clone() for p in _trained(module)]
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(_trained(module), kept)


class PowerEMA(EMA):
    """A power-function average (arXiv 2312.02696, equation 8), whose length grows with the run.

    It holds nothing of the initial weights. What a step adds becomes small beside what float32 holds: measured on
    weights that wander, it is 2e-6 off the same average in float64 after 1e5 steps, and 4e-4 after 1e6.

    Args:
        sigma_rel: its relative width, see `posthoc_ema`.

    Raises:
        ValueError: there is no such width.
    """

    def __init__(self, module: torch.nn.Module, sigma_rel: float):
        super().__init__(module, decay=0.0)
        self.sigma_rel, self._gamma = sigma_rel, gamma_of(sigma_rel)

    def decay_at(self, step: int) -> float:
        return decay_at(step, self._gamma)


class PowerEMAs:
    """Power-function averages of one or more widths. What draws, and the finished model, has the first.

    Args:
        widths: their sigma_rel.
    """

    def __init__(self, module: torch.nn.Module, widths: Sequence[float]):
        self.widths = [PowerEMA(module, sigma_rel) for sigma_rel in widths]

    @property
    def averages(self) -> dict[str, EMA]:
        """As of `EMA`: the first is where the only one would be, the others have their width in the name."""
        return {f"_ema_{ema.sigma_rel:g}" if number else "_ema": ema for number, ema in enumerate(self.widths)}

    def update(self, module: torch.nn.Module, step: int) -> None:
        """As of `EMA`."""
        for ema in self.widths:
            ema.update(module, step)

    def copy_to(self, module: torch.nn.Module) -> None:
        """As of `EMA`."""
        self.widths[0].copy_to(module)

    def swapped_into(self, module: torch.nn.Module) -> AbstractContextManager[None]:
        """As of `EMA`."""
        return self.widths[0].swapped_into(module)


def make_ema(config: TrainConfig, module: torch.nn.Module) -> EMA | PowerEMAs | None:
    """The averages that the settings ask for; None where they ask for none."""
    if not config.use_ema:
        return None
    return PowerEMAs(module, config.ema_sigma_rel) if config.ema_sigma_rel else EMA(module, config.ema_decay)


def check_same_ema(config: TrainConfig, carried: dict) -> None:
    """Whether a checkpoint holds the averages that the settings ask for, by the values kept beside it.

    Raises:
        ConfigError: it holds those of other widths.
    """
    earlier = tuple(carried.get("ema_sigma_rel", ()))
    if carried and earlier != config.ema_sigma_rel:
        raise ConfigError(
            f"ema_sigma_rel: {_said(config.ema_sigma_rel)} cannot go on from a checkpoint with {_said(earlier)}; take "
            "the same, in the same order"
        )


def _said(widths: Sequence[float]) -> str:
    return " ".join(f"{width:g}" for width in widths) or "none"


def _trained(module: torch.nn.Module) -> list[torch.Tensor]:
    return [own_part(p) for p in module.parameters() if p.requires_grad]


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
            if first_step:  # those of another run stay until this one has a checkpoint
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
            raise RunStopped(f"a snapshot in {self._folder} could not be written ({first_line(error)})") from error


def save_snapshot(
    folder: Path,
    network: str,
    step: int,
    sigma_rel: float,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping,
) -> Path:
    """Write one aside, force it onto the disk and rename it, so that it is there whole or not at all.

    Args:
        tensors: the network's state dict, with the average in it.
        config: what stands in the network's config.json.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    final = snapshot_path(folder, network, step, sigma_rel)
    aside = final.with_name(f".tmp-{final.name}")
    said = {"network": network, "step": step, "sigma_rel": sigma_rel, "config": dict(config)}
    # In one entry, since safetensors writes several in any order.
    metadata = {SNAPSHOT_METADATA: json.dumps(said)}
    save_file({name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}, aside, metadata)
    move_into_place(aside, final)
    return final


def snapshot_steps(total_steps: int) -> int:
    """How often snapshots are written where the settings do not say."""
    return -(-total_steps // PER_RUN)


def _remove_later(folder: Path, step: int) -> None:
    for path in folder.glob("*.safetensors"):
        number = path.stem.rpartition("-")[2]
        if path.name.startswith(".tmp-") or (number.isdigit() and int(number) > step):
            path.unlink()
