"""EMA whose length is chosen after training: Karras et al. 2023, arXiv 2312.02696, section 3 and appendix C.

A run keeps power-function averages of its weights of one or two widths, and writes snapshots of them now and then. An
average of any other width, at any step, is a linear combination of these snapshots: the one whose profile, the weight
that it gives to each moment of training, is nearest to the profile of the average that was not kept.

    profile   p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)  on 0 <= tau <= t, else 0                   (equation 7)

A width is given as sigma_rel, the profile's standard deviation as a share of t: 0.05 is short, 0.1 is twice as long.
All here is computed in float64; steps are optimizer steps, counted from 1.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

LARGEST_SIGMA_REL = 12**-0.5  # of gamma = 0, the plain mean over all of training

# ---- the mathematics -------------------------------------------------------------------------------------------------


def sigma_rel_of(gamma: float) -> float:
    """The relative width of the profile with exponent `gamma` >= 0."""
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


def gamma_of(sigma_rel: float) -> float:
    """The exponent >= 0 of the profile of a relative width: a root of the cubic that `sigma_rel_of` gives.

    Raises:
        ValueError: no exponent has that width.
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise ValueError(f"sigma_rel: {sigma_rel} must lie above 0 and at most at {LARGEST_SIGMA_REL:.4f}")
    inverse = float(sigma_rel) ** -2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(float(roots[np.isreal(roots)].real.max()), 0.0)


def decay_at(step: int, gamma: float) -> float:
    """What step number `step` leaves of the average before it (equation 8).

    Then step i has the weight (i^(gamma+1) - (i-1)^(gamma+1)) / step^(gamma+1): the profile's own share of the time
    between i - 1 and i. The first step leaves nothing of the initial weights.
    """
    return (1 - 1 / step) ** (gamma + 1)


def inner_products(
    steps_a: np.ndarray | float, gammas_a: np.ndarray | float, steps_b: np.ndarray | float, gammas_b: np.ndarray | float
) -> np.ndarray:
    """The integral of the product of two profiles, elementwise over arrays that broadcast (appendix C)."""
    last = np.maximum(steps_a, steps_b)
    gammas_last = np.where(np.less_equal(steps_a, steps_b), gammas_b, gammas_a)
    scale = (np.add(gammas_a, 1) * np.add(gammas_b, 1)) / (np.add(gammas_a, gammas_b) + 1)
    return scale * (np.minimum(steps_a, steps_b) / last) ** gammas_last / last


def coefficients(steps: np.ndarray, gammas: np.ndarray, step: float, gamma: float) -> np.ndarray:
    """Those (N,) of the snapshots whose combination has the profile nearest to (step, gamma); their sum is 1.

    Least squares by the normal equations, of profiles scaled to norm 1, which keeps them well conditioned.

    Args:
        steps, gammas: (N,), of the snapshots.
    """
    norms = inner_products(steps, gammas, steps, gammas) ** 0.5
    gram = inner_products(steps[:, None], gammas[:, None], steps, gammas) / norms / norms[:, None]
    wanted = inner_products(steps, gammas, step, gamma) / norms
    found = np.linalg.lstsq(gram, wanted)[0] / norms
    return found / found.sum()


def profile_error(steps: np.ndarray, gammas: np.ndarray, weights: np.ndarray, step: float, gamma: float) -> float:
    """How far the combined profile is from (step, gamma): the norm of the difference over that of the wanted one.

    It says in advance how well snapshots reach a width: their spacing has to be narrow beside sigma_rel * step.
    """
    gram = inner_products(steps[:, None], gammas[:, None], steps, gammas)
    norm = inner_products(step, gamma, step, gamma)
    squared = norm - 2 * weights @ inner_products(steps, gammas, step, gamma) + weights @ gram @ weights
    return float((max(squared, 0.0) / norm) ** 0.5)


# ---- snapshots -------------------------------------------------------------------------------------------------------

SNAPSHOTS = "ema_snapshots"  # the folder's name in that of a run
SNAPSHOT_METADATA = "ema_snapshot"  # what stands in a file beside the weights, under this name
NETWORKS = ("unet", "text_encoder")  # whose averages are kept; the name becomes that of a folder


@dataclass(frozen=True, order=True)
class Snapshot:
    """A power-function average as it was after an optimizer step: a safetensors file in fp32."""

    network: str
    """What it is an average of, by the name of diffusers' folders: "unet", perhaps "text_encoder"."""
    step: int
    sigma_rel: float
    path: Path

    @property
    def config(self) -> dict:
        """What stands in the network's config.json."""
        return _said_by(self.path)["config"]


def snapshot_path(folder: str | os.PathLike, network: str, step: int, sigma_rel: float) -> Path:
    """Where in the folder of snapshots one is kept."""
    return Path(folder, f"{network}-sigma_rel-{sigma_rel:g}-step-{step:07d}.safetensors")


def list_snapshots(folder: str | os.PathLike, network: str | None = None) -> list[Snapshot]:
    """Those in a folder of snapshots, by network and step; of one network, or of all.

    Raises:
        ValueError: there are none, or a file is damaged or none of these.
    """
    found = sorted(_read(path) for path in Path(folder).glob("*.safetensors") if not path.name.startswith("."))
    found = [snapshot for snapshot in found if network in (None, snapshot.network)]
    if not found:
        what = "EMA snapshots" if network is None else f"EMA snapshots of the {network}"
        raise ValueError(f"{folder} holds no {what}: a run with --ema_sigma_rel writes them")
    return found


def _read(path: Path) -> Snapshot:
    said = _said_by(path)
    network, step, sigma_rel = (said.get(name) for name in ("network", "step", "sigma_rel"))
    if network not in NETWORKS or type(step) is not int or type(sigma_rel) not in (int, float):
        raise ValueError(f"{path} is no EMA snapshot: what it says of itself is not what a run writes")
    return Snapshot(network, step, sigma_rel, path)


def _said_by(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})[SNAPSHOT_METADATA])
            if not isinstance(said.get("config"), dict):
                raise KeyError("config")
            return said
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no EMA snapshot, or a damaged one ({type(error).__name__})") from None


def snapshots_folder(source: str | os.PathLike, **hub) -> Path:
    """Where the EMA snapshots of a folder or of a model on the Hub are, which may be none; the latter's are fetched.

    Args:
        hub: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.
    """
    if not os.path.isdir(source):
        source = snapshot_download(str(source), allow_patterns=f"{SNAPSHOTS}/*", **hub)
    return Path(source, SNAPSHOTS)


def copy_snapshots(source: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Put the EMA snapshots of a folder or of a model on the Hub into another folder.

    Raises:
        ValueError: there are none.
    """
    found = list_snapshots(snapshots_folder(source))
    target = Path(folder, SNAPSHOTS)
    target.mkdir(parents=True, exist_ok=True)
    for path in (snapshot.path for snapshot in found):
        if path.resolve().parent != target.resolve():
            shutil.copyfile(path, target / path.name)


# ---- reconstruction --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconstruction:
    """An average that was not kept, as a combination of snapshots of one network."""

    snapshots: tuple[Snapshot, ...]
    coefficients: np.ndarray
    """(N,) float64; their sum is 1."""
    step: int
    sigma_rel: float
    profile_error: float
    """See the function of that name; 0 is exact."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The average by the network's names, in fp32, summed in float64. One tensor at a time is read of all files, so
        memory holds one model and one tensor.

        Raises:
            ValueError: the snapshots are not all of the same network, or one is damaged.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(snapshot.path, "pt")) for snapshot in self.snapshots]
            self._check_same(files)
            return {name: self._sum([file.get_tensor(name) for file in files]) for name in files[0].keys()}  # noqa: SIM118

    def _sum(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(values[0], dtype=torch.float64)
        for coefficient, value in zip(self.coefficients, values, strict=True):
            total.add_(value.double(), alpha=float(coefficient))
        return total.float()

    def _check_same(self, files: Sequence) -> None:
        shapes = [{name: file.get_slice(name).get_shape() for name in file.keys()} for file in files]  # noqa: SIM118
        for snapshot, others in zip(self.snapshots, shapes, strict=True):
            if others != shapes[0]:
                raise ValueError(f"{snapshot.path} is of another network than {self.snapshots[0].path.name}")


def plan(snapshots: Sequence[Snapshot], sigma_rel: float, step: int | None = None) -> Reconstruction:
    """The reconstruction of a width from snapshots of one network, of which nothing is read yet.

    Args:
        sigma_rel: above 0 and at most at LARGEST_SIGMA_REL.
        step: at which the average would have been kept; by default that of the last snapshot.

    Raises:
        ValueError: no width, a step before the first snapshot or after the last one, or no snapshots.
    """
    if not snapshots:
        raise ValueError("there are no EMA snapshots to reconstruct from")
    gamma = gamma_of(sigma_rel)
    steps = np.array([snapshot.step for snapshot in snapshots], dtype=np.float64)
    gammas = np.array([gamma_of(snapshot.sigma_rel) for snapshot in snapshots])
    first, last = int(steps.min()), int(steps.max())
    step = last if step is None else step
    if not first <= step <= last:
        raise ValueError(f"step: {step} must lie in {first} … {last}, between the first EMA snapshot and the last")
    found = coefficients(steps, gammas, step, gamma)
    error = profile_error(steps, gammas, found, step, gamma)
    return Reconstruction(tuple(snapshots), found, step, sigma_rel, error)


def reconstructions(folder: str | os.PathLike, sigma_rel: float, step: int | None = None) -> dict[str, Reconstruction]:
    """For each network that a run has kept averages of, by its name, the reconstruction of one width.

    Args:
        folder: of the snapshots.

    Raises:
        ValueError: as `list_snapshots` and `plan`.
    """
    everything = list_snapshots(folder)
    networks = dict.fromkeys(snapshot.network for snapshot in everything)
    return {name: plan([s for s in everything if s.network == name], sigma_rel, step) for name in networks}
