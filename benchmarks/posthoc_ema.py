"""Averages that were kept during a run against the same made afterwards: `python benchmarks/posthoc_ema.py RUN`.

RUN is the folder of a real run that tracked a third width beside the usual two, with many snapshots:

    accelerate launch train_text2img.py --unet tiny --ema_sigma_rel 0.05 0.10 0.08 --ema_snapshot_steps 25 \
        --max_train_steps 1000 --output_dir RUN

From 5, 10, 20 and 40 of the snapshots of the first two widths, evenly spread, the third is made and compared to what
was kept. A second table says what snapshots in half precision would do, to widths that are far from those kept as well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from safetensors.torch import load_file

from latentdiff.diffusion.posthoc_ema import (
    SNAPSHOTS,
    Reconstruction,
    Snapshot,
    coefficients,
    gamma_of,
    list_snapshots,
    plan,
    snapshot_path,
)
from latentdiff.utils.errors import ConfigError

COUNTS = (5, 10, 20, 40)
HALVED_WIDTHS = (0.01, 0.02, 0.03, 0.08, 0.15, 0.25)
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compared."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    output: str = "benchmarks/results/posthoc_ema"
    """Where the numbers (.json) and the plot (.png) go, as the beginning of a path."""


def main(settings: Settings) -> None:
    folder = settings.run / SNAPSHOTS
    snapshots = list_snapshots(folder, "unet")
    tracked = dict.fromkeys(snapshot.sigma_rel for snapshot in snapshots)  # by file name: in no order of importance
    kept_widths = (0.05, 0.1)
    wanted = [sigma_rel for sigma_rel in tracked if sigma_rel not in kept_widths]
    if not wanted or not set(kept_widths) <= tracked.keys():
        raise ConfigError(f"{folder} holds the widths {list(tracked)}; it must hold 0.05, 0.1 and one more")
    basis = [snapshot for snapshot in snapshots if snapshot.sigma_rel in kept_widths]
    last = max(snapshot.step for snapshot in basis)
    rows = []
    for sigma_rel in wanted:
        kept = load_file(snapshot_path(folder, "unet", last, sigma_rel))
        for count in COUNTS:
            average = plan(spread(basis, count), sigma_rel)
            row = {"sigma_rel": sigma_rel, "snapshots": count, "profile_error": average.profile_error}
            rows.append(row | {"difference": difference(average.tensors(), kept)})
            print(row | {"difference": rows[-1]["difference"]})
    others = {s: difference(load_file(snapshot_path(folder, "unet", last, s)), kept) for s in kept_widths}
    print(f"the kept widths themselves differ from {sigma_rel:g} by {others}")
    halves = [half_precision(plan(spread(basis, 20), sigma_rel)) for sigma_rel in HALVED_WIDTHS]
    for row in halves:
        print(row)
    numbers = {"steps": last, "reconstructed": rows, "kept_widths_differ": others, "half_precision": halves}
    Path(f"{settings.output}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    plot(basis, rows, others, Path(f"{settings.output}.png"))


def spread(basis: Sequence[Snapshot], count: int) -> list[Snapshot]:
    """Snapshots at `count` of their steps, evenly spread, the last one among them."""
    steps = sorted({snapshot.step for snapshot in basis})
    if len(steps) % count:
        raise ConfigError(f"there are snapshots of {len(steps)} steps; it must be a multiple of {count}")
    each = len(steps) // count
    return [snapshot for snapshot in basis if snapshot.step in steps[each - 1 :: each]]


def difference(a: Weights, b: Weights) -> float:
    """The norm of a - b over all weights, relative to that of b."""
    off = sum((a[name].double() - b[name].double()).square().sum().item() for name in b)
    return (off / sum(tensor.double().square().sum().item() for tensor in b.values())) ** 0.5


def half_precision(average: Reconstruction) -> dict[str, float]:
    """How far the average would be off that is made of the same snapshots in fp16, and its largest coefficients."""
    total: dict[str, torch.Tensor] = {}
    for coefficient, snapshot in zip(average.coefficients, average.snapshots, strict=True):
        for name, tensor in load_file(snapshot.path).items():
            total[name] = total.get(name, 0) + float(coefficient) * tensor.half().double()
    return {
        "sigma_rel": average.sigma_rel,
        "profile_error": average.profile_error,
        "largest_coefficient": float(np.abs(average.coefficients).max()),
        "norm_of_coefficients": float(np.linalg.norm(average.coefficients)),
        "difference_by_fp16": difference(total, average.tensors()),
    }


def plot(basis: Sequence[Snapshot], rows: Sequence[dict], others: Mapping[float, float], path: Path) -> None:
    """The wanted profile beside those that were made, and the differences of the weights over the snapshots."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    profiles, differences = figure.subplots(1, 2)
    sigma_rel, last = rows[0]["sigma_rel"], max(snapshot.step for snapshot in basis)
    tau = np.linspace(0, 1, 2001)
    for count in (5, 20):
        some = spread(basis, count)
        steps = np.array([snapshot.step / last for snapshot in some])
        gammas = np.array([gamma_of(snapshot.sigma_rel) for snapshot in some])
        found = coefficients(steps, gammas, 1.0, gamma_of(sigma_rel))
        each = np.where(tau[:, None] <= steps, (gammas + 1) * tau[:, None] ** gammas / steps ** (gammas + 1), 0)
        profiles.plot(tau, each @ found, label=f"of {count} snapshots")
    gamma = gamma_of(sigma_rel)
    profiles.plot(tau, (gamma + 1) * tau**gamma, "k:", label=f"sigma_rel {sigma_rel:g}")
    profiles.set(xlabel="share of the run", ylabel="weight in the average", xlim=(0.4, 1))
    for width in dict.fromkeys(row["sigma_rel"] for row in rows):
        mine = [row for row in rows if row["sigma_rel"] == width]
        counts = [row["snapshots"] for row in mine]
        differences.plot(counts, [row["difference"] for row in mine], "o-", label=f"weights, sigma_rel {width:g}")
        differences.plot(counts, [row["profile_error"] for row in mine], ".--", label=f"profile, sigma_rel {width:g}")
    for width, value in others.items():
        differences.axhline(value, color="grey", linewidth=0.8)
        differences.text(COUNTS[0], value, f"sigma_rel {width:g} instead", fontsize="x-small", va="bottom")
    differences.set(
        xlabel="snapshots of each of two widths", ylabel="relative difference", xscale="log", yscale="log",
        xticks=COUNTS, xticklabels=COUNTS,
    )  # fmt: skip
    differences.minorticks_off()
    for axes in (profiles, differences):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
