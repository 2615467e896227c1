"""`latentdiff reconstruct-ema`: an average of any length after a run, as a network that diffusers loads; and
`latentdiff sweep-ema`: what averages of different lengths are worth, each made from the run's snapshots."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from safetensors.torch import save
from tqdm.auto import tqdm

from .. import __version__
from ..config.commands import ReconstructEma, SweepEma
from ..config.presets import read_config
from ..config.train import TrainConfig
from ..data import emoji
from ..diffusion.posthoc_ema import Reconstruction, reconstructions, snapshots_folder
from ..inference.loading import HUB_ID, load_pipeline
from ..models.parts import FrozenParts, trained_model
from ..public import LatentDiffPipeline
from ..training.data import load_data
from ..training.held_out import HeldOutErrors, HeldOutLoss
from ..utils.errors import ConfigError
from ..utils.files import cache_folder, folder_sha256, read_json, write_whole
from ..utils.weight_files import remove_replaced, write_earlier_names
from . import features
from .held_out_curve import training_schedule
from .measures import emoji_reference, measure_emoji
from .retrieval import DrawSettings, draw, plain_caption, take, training_queries

SWEEP = "ema_sweep"  # the files' name


@dataclass(frozen=True, kw_only=True)
class WidthResult:
    """What the average of one width is worth."""

    sigma_rel: float
    tracked: bool
    """Whether the run kept this width itself."""
    profile_error: float
    """What its reconstruction misses of its profile, see `posthoc_ema.profile_error`."""
    held_out_loss: float | None
    """As a run logs it; None where nothing was held out."""
    behind_best: float | None
    """Its distance to the lowest loss of the sweep."""
    behind_best_error: float | None
    """The standard error of that over pictures and timesteps. Both answered the same questions, so it is far smaller
    than the loss's own."""
    pictures: dict | None
    """Of drawn emoji, where that was asked for: the fields of `picture_measures.EmojiMeasures`."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The quality over widths, and what has to be quoted with it."""

    conditions: dict
    widths: list[WidthResult]


def sweep_ema(command: SweepEma) -> None:
    """Measure each width, print a table, and write `ema_sweep.json`, `.md` and `.png`.

    Pictures that were measured before under the same conditions are not drawn again.
    """
    averages = {
        width: reconstructions_of(command.checkpoint, width, command.step)["unet"]
        for width in sorted(command.sigma_rel)
    }
    pipeline, local = load_pipeline(command.checkpoint, command.device), Path(command.checkpoint).is_dir()
    loss, model = held_out_loss(command.checkpoint, pipeline)
    if not loss.pictures and not command.count:
        raise ConfigError(f"{command.checkpoint}: its run held no pictures out; give --count to measure drawn ones")
    drawing = _DrawnPictures(command, pipeline) if command.count else None
    conditions = {
        "checkpoint": Path(command.checkpoint).resolve().name if local else command.checkpoint,
        "sha256": folder_sha256(pipeline.name_or_path),
        "step": averages[max(averages)].step,
        "snapshots": len(averages[max(averages)].snapshots),
        "held_out_pictures": loss.pictures,
        "drawn": drawing and drawing.conditions,
        "latentdiff": __version__,
    }
    folder = command.output_dir or (Path(command.checkpoint) if local else Path())
    pictures = _measured_before(folder / f"{SWEEP}.json", conditions)
    losses = {}
    for done, width in enumerate(tqdm(averages, desc="widths", unit="width"), start=1):
        pipeline.load_ema(width, command.step, source=command.checkpoint)
        if loss.pictures:
            errors = loss.errors(model, training_schedule(pipeline.scheduler))
            losses[width] = HeldOutErrors.joined(errors.values()).loss.double()
        pictures[width] = pictures.get(width) or (drawing and drawing.measure())
        widths = _results(list(averages.values())[:done], losses, pictures)
        write_sweep(Sweep(conditions=conditions, widths=widths), folder)
    print(table(widths))


def held_out_loss(checkpoint: str, pipeline: LatentDiffPipeline) -> tuple[HeldOutLoss, torch.nn.Module]:
    """The loss on what the run in this folder held out, elsewhere on the held-out emoji, and what it is measured of.

    Raises:
        ConfigError: the run's pictures are not where they were.
    """
    settings = Path(checkpoint) / "train_config.yaml"
    config = TrainConfig(**read_config(str(settings))) if settings.is_file() else TrainConfig()
    # Of all pictures the held-out ones alone are encoded, when they are asked for.
    config = replace(config, cache_latents=False, cache_text="auto", output_dir=str(checkpoint))
    networks = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    parts = FrozenParts(*networks, text_encoder_is_trained=config.train_text_encoder)
    accelerator = Accelerator(cpu=pipeline.device.type == "cpu")
    data = load_data(config, accelerator, parts, pipeline.unet, training_schedule(pipeline.scheduler))
    return data.held_out_loss, trained_model(parts, pipeline.unet)


class _DrawnPictures:
    """The same captions drawn from the same noise at each call, and measured against the embedded emoji.

    Raises:
        ConfigError: a count that these do not have, or a network that is not to be had.
    """

    def __init__(self, command: SweepEma, pipeline: LatentDiffPipeline):
        self._pipeline, emoji_set = pipeline, emoji.load()
        self._settings = DrawSettings.of(command, pipeline)
        self._asked = take(training_queries(emoji_set), command.count, "training captions that name a style")
        self._network = features.load(command.network, pipeline.device)
        self._reference, self._galleries = emoji_reference(self._network, emoji_set, cache_folder())

    @property
    def conditions(self) -> dict:
        """What has to be quoted with the measures."""
        return {
            "count": len(self._asked),
            "sampler": type(self._pipeline.scheduler).__name__,
            **asdict(self._settings),
            "network": self._network.name,
            "network_sha256": self._network.sha256,
            "reference": self._reference.name,
            "reference_sha256": self._reference.sha256,
        }

    def measure(self) -> dict:
        """The fields of `EmojiMeasures` under the pipeline's present weights."""
        images = draw(self._pipeline, [plain_caption(*row) for row in self._asked], self._settings)
        return asdict(measure_emoji(images, self._asked, self._network, self._reference, self._galleries))


def _measured_before(path: Path, conditions: dict) -> dict[float, dict | None]:
    """The pictures' measures of an earlier sweep, by width, if it was under the same conditions."""
    try:
        earlier = read_json(path)
        same = earlier["conditions"] == conditions
        return {row["sigma_rel"]: row["pictures"] for row in earlier["widths"]} if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _results(
    averages: Sequence[Reconstruction], losses: Mapping[float, torch.Tensor], pictures: Mapping[float, dict | None]
) -> list[WidthResult]:
    best = min(losses.values(), key=torch.mean, default=None)
    results = []
    for average in averages:
        loss, width = losses.get(average.sigma_rel), average.sigma_rel
        behind = None if loss is None else loss - best
        results.append(
            WidthResult(
                sigma_rel=width,
                tracked=width in {snapshot.sigma_rel for snapshot in average.snapshots},
                profile_error=average.profile_error,
                held_out_loss=None if loss is None else loss.mean().item(),
                behind_best=None if loss is None else behind.mean().item(),
                behind_best_error=None if loss is None else (behind.std() / len(behind) ** 0.5).item(),
                pictures=pictures[width],
            )
        )
    return results


def write_sweep(sweep: Sweep, folder: Path) -> None:
    """Put `ema_sweep.json`, `ema_sweep.md` and `ema_sweep.png` into a folder.

    Raises:
        ConfigError: they cannot be written.
    """
    try:
        write_whole(folder / f"{SWEEP}.json", (json.dumps(asdict(sweep), indent=2) + "\n").encode())
        write_whole(folder / f"{SWEEP}.md", (table(sweep.widths) + "\n").encode())
        plot(sweep.widths, folder / f"{SWEEP}.png")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror or error})") from None


def table(widths: Sequence[WidthResult]) -> str:
    """A Markdown table; the widths that the run itself kept are in bold."""
    drawn = ("FD", "KID x 1000", "R@1", "R@10") if widths[0].pictures else ()
    heads = ("sigma_rel", "held-out loss", "above the best", *drawn, "profile missed")
    lines = ["| " + " | ".join(heads) + " |", "|" + " ---: |" * len(heads)]
    for row in widths:
        cells = [f"**{row.sigma_rel:g}**" if row.tracked else f"{row.sigma_rel:g}"]
        if row.held_out_loss is None:
            cells += ["", ""]
        else:
            cells += [f"{row.held_out_loss:.5f}", f"{row.behind_best:.5f} ± {row.behind_best_error:.5f}"]
        if row.pictures:
            measures, found = row.pictures["drawn"], row.pictures["retrieval"]["drawn"]
            fd, kd = "frechet_distance", "kernel_distance"
            cells.append(f"{measures[fd]:.4g} ± {measures[fd + '_error']:.2g}")
            cells.append(f"{1e3 * measures[kd]:.4g} ± {1e3 * measures[kd + '_error']:.2g}")
            cells += [f"{found['at_1']:.3f}", f"{found['at_10']:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{row.profile_error:.2%}"]) + " |")
    return "\n".join(lines)


def plot(widths: Sequence[WidthResult], path: Path) -> None:
    """The measures over widths as a PNG; full marks are widths that the run itself kept."""
    curves = {}
    if widths[0].held_out_loss is not None:
        curves["held-out loss"] = [(row.held_out_loss, row.behind_best_error) for row in widths]
    if widths[0].pictures:
        drawn = [row.pictures["drawn"] for row in widths]
        curves["FD"] = [(one["frechet_distance"], one["frechet_distance_error"]) for one in drawn]
        curves["KID"] = [(one["kernel_distance"], one["kernel_distance_error"]) for one in drawn]
        curves["R@1"] = [(row.pictures["retrieval"]["drawn"]["at_1"], 0.0) for row in widths]
    figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
    for axes, (label, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        places = [row.sigma_rel for row in widths]
        values, errors = zip(*points, strict=True)
        axes.errorbar(places, values, errors, marker="o", markerfacecolor="white", capsize=2, color="C0")
        kept = [(row.sigma_rel, value) for row, value in zip(widths, values, strict=True) if row.tracked]
        axes.plot(*zip(*kept, strict=True) if kept else ((), ()), "o", color="C0")
        axes.set(xlabel="relative width of the average (sigma_rel)", ylabel=label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def reconstruct_ema(command: ReconstructEma) -> None:
    """Write the average as diffusers' folders, and say how near it is to one that would have been kept."""
    averages = reconstructions_of(command.run, command.sigma_rel, command.step)
    width = f"{command.sigma_rel:.3f}"
    width = width if float(width) == command.sigma_rel else f"{command.sigma_rel:g}"
    name = f"unet-ema-{width}" + ("" if command.step is None else f"-step-{command.step}")
    output = command.output or (Path(command.run) if Path(command.run).is_dir() else Path()) / name
    for network, average in averages.items():
        folder = output if len(averages) == 1 else output / network
        write_network(average, folder)
        widths = dict.fromkeys(f"{snapshot.sigma_rel:g}" for snapshot in average.snapshots)
        print(
            f"{folder}: {network} at step {average.step}, sigma_rel {average.sigma_rel:g}, of {len(average.snapshots)} "
            f"snapshots of {' and '.join(widths)}; {average.profile_error:.2%} of its profile is missed"
        )


def write_network(average: Reconstruction, folder: Path) -> None:
    """A folder that diffusers' (or transformers') `from_pretrained` loads, with the average in fp32.

    Raises:
        ConfigError: it cannot be written.
        ValueError: the snapshots do not belong together.
    """
    config = average.snapshots[-1].config
    weights = "diffusion_pytorch_model.safetensors" if "_diffusers_version" in config else "model.safetensors"
    try:
        write_whole(folder / weights, save(average.tensors(), metadata={"format": "pt"}))
        write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        write_earlier_names(folder)
        remove_replaced(folder, {weights})
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror or error})") from None


def reconstructions_of(run: str, sigma_rel: float, step: int | None) -> dict[str, Reconstruction]:
    """For each network that a run trained, by its name, its average of one width; see `posthoc_ema.reconstructions`.

    Args:
        run: a folder, or a model on the Hub.

    Raises:
        ConfigError: such an average is not to be had.
    """
    if not Path(run).is_dir() and not HUB_ID.fullmatch(run):
        raise ConfigError(f"{run}: no such folder (nor is it the name of a model on the Hub, owner/name)")
    try:
        return reconstructions(snapshots_folder(run), sigma_rel, step)
    except ValueError as error:
        raise ConfigError(str(error)) from None
