"""What each choice is worth on emoji64: the same small run again and again, one thing changed each time.

    python benchmarks/ablation.py train    # every variant from every seed; stop it at any time, start it again
    python benchmarks/ablation.py measure  # what is trained and not measured yet
    python benchmarks/ablation.py report   # benchmarks/results/ablation.json, the table and the plot of docs/edm2.md

All see the same pictures in the same order, under the same noise and captions, in as many steps, and draw from the same
noise with the same sampler. `--only` picks variants, so that several processes can share the work.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from latentdiff import LatentDiffPipeline
from latentdiff.data import emoji
from latentdiff.data.pictures import EmojiPictures
from latentdiff.evaluation import features
from latentdiff.evaluation.held_out_curve import held_out_curve
from latentdiff.evaluation.measures import emoji_reference, measure_emoji
from latentdiff.evaluation.retrieval import DrawSettings, draw, plain_caption, training_queries
from latentdiff.utils.files import cache_folder, write_whole

ROOT = Path(__file__).resolve().parent.parent
# What every run shares: the preset of the shipped checkpoint, on the small UNet and for 40,000 pictures.
SHARED = {
    "unet": "tiny", "max_train_steps": 1250, "learning_rate": 1e-3, "lr_warmup_steps": 100,
    "mixed_precision": "bf16", "checkpointing_steps": 250, "checkpoints_total_limit": 10, "validation_steps": 250,
    "report_to": "none",
}  # fmt: skip
# Gradients of a magnitude-preserving UNet are smaller by the root of a filter's size; Adam's epsilon has to be, too.
MP = {"learning_rate": 1e-2, "lr_scheduler": "inverse_sqrt", "lr_decay_start_steps": 400, "adam_epsilon": 1e-15}
VARIANTS: dict[str, dict] = {
    "base": {},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "v": {"prediction_type": "v_prediction"},
    "snr-5": {"snr_gamma": 5.0},
    "plain-loss": {"snr_gamma": None},
    "weight-norm": {"force_weight_norm": True},
    "mp": {"unet": "mp-tiny", **MP},
    "mp-mini": {"unet": "mp-mini", **MP},
    "mp-uncertainty": {"unet": "mp-tiny", **MP, "learned_uncertainty": True, "snr_gamma": None},
}
COUNT = 60  # pictures drawn of each run
STEPS, GUIDANCE_SCALE = 20, 4.0
# Log-SNRs that the noise schedules of all variants reach, so that their errors are means over the same levels.
COMMON_LOG_SNRS = (-5.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which part of the work is done."""

    stage: tyro.conf.Positional[Literal["train", "measure", "report"]]
    """Train, measure what is trained, or write the table and the plot."""
    only: tuple[str, ...] = tuple(VARIANTS)
    """The variants."""
    seeds: tuple[int, ...] = (0, 1)
    """Of each variant."""
    runs: Path = Path("runs/ablation")
    """Where the runs and their measures are kept."""
    output: str = "benchmarks/results/ablation"
    """Where the report goes: this with .json, .md and .png."""

    def folders(self) -> dict[tuple[str, int], Path]:
        """Each run's."""
        return {(name, seed): self.runs / f"{name}-seed{seed}" for seed in self.seeds for name in self.only}


# ------------------------------------------------------------------------------------------------------- train


def train(settings: Settings) -> None:
    """Every run that is not finished, from its last checkpoint."""
    for (variant, seed), folder in settings.folders().items():
        if not (folder / "model_index.json").exists():
            flags = SHARED | VARIANTS[variant] | {"seed": seed, "output_dir": folder.resolve()}
            words = [word for name, value in flags.items() for word in _words(name, value)]
            command = [sys.executable, "train_text2img.py", *words, "--validation_prompts"]
            command += ["--resume_from_checkpoint", "latest"]
            subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def _words(name: str, value: object) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


# ----------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured of one run."""

    variant: str
    seed: int
    parameters: int
    flops: int
    """Of a forward pass of one picture."""
    pictures_per_second: float
    """In training, the median of the log."""
    held_out_epsilon: float
    """Mean squared error of the noise, over evenly spread log-SNRs that all variants reach."""
    curve: dict[str, float]
    """That error by log-SNR, the middle of the bin."""
    frechet_distance: float
    kernel_distance: float
    recall_at_1: float
    recall_at_10: float
    precision: float
    recall: float


MEASURES = {
    "held_out_epsilon": "held-out error",
    "frechet_distance": "FD",
    "kernel_distance": "KID",
    "recall_at_1": "R@1",
    "recall_at_10": "R@10",
}


def measure(settings: Settings) -> None:
    """Every run that is finished and has no measures yet."""
    network = features.load()
    pictures, held_out = emoji.load(), EmojiPictures()
    reference, galleries = emoji_reference(network, pictures, cache_folder())
    asked = training_queries(pictures)[:COUNT]
    how = DrawSettings(num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE, seed=0, batch_size=30)
    for (variant, seed), folder in settings.folders().items():
        if (folder / "measures.json").exists() or not (folder / "model_index.json").exists():
            continue
        pipeline = LatentDiffPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        curve = held_out_curve(pipeline, held_out)
        points = {(point.low + point.high) / 2: point.epsilon for point in curve.over_log_snr}
        images = draw(pipeline, [plain_caption(*query) for query in asked], how)
        found = measure_emoji(images, asked, network, reference, galleries)
        low, high = COMMON_LOG_SNRS
        row = Row(
            variant=variant,
            seed=seed,
            parameters=sum(p.numel() for p in pipeline.unet.parameters()),
            flops=flops_of(pipeline),
            pictures_per_second=training_speed(folder),
            held_out_epsilon=statistics.mean(error for at, error in points.items() if low < at < high),
            curve={f"{at:g}": error for at, error in points.items()},
            frechet_distance=found.drawn.frechet_distance,
            kernel_distance=found.drawn.kernel_distance,
            recall_at_1=found.retrieval.drawn.at_1,
            recall_at_10=found.retrieval.drawn.at_10,
            precision=found.drawn.precision,
            recall=found.drawn.recall,
        )
        write_whole(folder / "measures.json", json.dumps(asdict(row), indent=2).encode())
        print(row)


def flops_of(pipeline: LatentDiffPipeline) -> int:
    """Of the UNet's forward pass of one picture."""
    unet = pipeline.unet
    latents = torch.zeros(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    tokens = torch.zeros(1, pipeline.tokenizer.model_max_length, unet.config.cross_attention_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(latents, torch.tensor([1]), tokens)
    return counter.get_total_flops()


def training_speed(folder: Path) -> float:
    """Pictures per second, the median of a run's log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return statistics.median(line["pictures_per_second"] for line in lines if "pictures_per_second" in line)


# ------------------------------------------------------------------------------------------------------ report


def report(settings: Settings) -> None:
    """The rows that there are as JSON, as a table of means and spreads over the seeds, and as a plot."""
    found = [folder / "measures.json" for folder in settings.folders().values()]
    rows = [Row(**json.loads(path.read_text())) for path in found if path.exists()]
    variants = {row.variant: [other for other in rows if other.variant == row.variant] for row in rows}
    Path(f"{settings.output}.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    table = "\n".join(_table(variants)) + "\n"
    Path(f"{settings.output}.md").write_text(table)
    print(table)
    _plot(variants, Path(f"{settings.output}.png"))


def _table(variants: dict[str, list[Row]]) -> list[str]:
    head = ["variant", "seeds", "parameters", "MFLOP", *MEASURES.values()]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, rows in variants.items():
        cells = [name, str(len(rows)), f"{rows[0].parameters / 1e6:.2f} M", f"{rows[0].flops / 1e6:.0f}"]
        cells += [_with_spread([getattr(row, measure) for row in rows]) for measure in MEASURES]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _with_spread(values: list[float]) -> str:
    """The mean and, from two seeds on, the standard deviation between them."""
    mean = statistics.mean(values)
    digits = max(1, 2 - math.floor(math.log10(abs(mean)))) if mean else 3
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _plot(variants: dict[str, list[Row]], path: Path) -> None:
    """By how much each variant's held-out error lies above the base's at each noise level, and the KIDs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    means = {name: _mean_curve(rows) for name, rows in variants.items()}
    for name, curve in means.items():
        shared = [at for at in curve if at in means["base"]]
        curves.plot(shared, [curve[at] / means["base"][at] for at in shared], marker=".", label=name)
    curves.set(xlabel="log-SNR (much noise … little noise)", ylabel="held-out error / that of base")
    curves.grid(alpha=0.3)
    curves.legend(fontsize="small")
    kids = {name: [row.kernel_distance for row in rows] for name, rows in variants.items()}
    spreads = [statistics.stdev(values) if len(values) > 1 else 0 for values in kids.values()]
    bars.barh(list(kids), [statistics.mean(values) for values in kids.values()], xerr=spreads, color="tab:blue")
    bars.set(xlabel=f"KID, {COUNT} pictures, DDIM {STEPS} steps, guidance {GUIDANCE_SCALE:g}")
    bars.invert_yaxis()
    figure.savefig(path, dpi=100)


def _mean_curve(rows: list[Row]) -> dict[float, float]:
    return {float(at): statistics.mean(row.curve[at] for row in rows) for at in rows[0].curve}


def main(settings: Settings) -> None:
    {"train": train, "measure": measure, "report": report}[settings.stage](settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
