"""How many steps, and which guidance: quality and time of one checkpoint's pictures under many samplers.

    python benchmarks/sampling_steps.py                         # every row that is not there yet
    python benchmarks/sampling_steps.py --rows ddim-5 ddpm-1000 # some, perhaps while another process makes others
    python benchmarks/sampling_steps.py --rows                  # only the report of what is there

All rows draw the same captions from the same noise. It may be stopped at any time: what has been drawn is kept, and the
same command goes on. Each row ends in a file of its own, and every run in a report of all rows: sampling_steps.json,
.md and .png in the output folder.

A distance depends on how many pictures it is measured of, so that rows of different counts cannot be compared. With
`--slow-count` the rows of 1000 steps draw fewer, and all others are measured with the first so many, too.
"""

import io
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from PIL import Image

from latentdiff.cli import Drawing
from latentdiff.data import emoji
from latentdiff.evaluation import features as feature_networks
from latentdiff.evaluation.features import FeatureNetwork, extract_features
from latentdiff.evaluation.measures import (
    EmojiMeasures,
    PictureMeasures,
    Reference,
    emoji_reference,
    measure,
    measure_floor,
)
from latentdiff.evaluation.retrieval import Galleries, plain_caption, recalls_of, take, training_queries
from latentdiff.inference.drawing import draw_recipes
from latentdiff.inference.generate import file_name, is_there, picture_recipe
from latentdiff.inference.loading import Networks, load_networks
from latentdiff.inference.recipe import Recipe, save_png
from latentdiff.utils.errors import ConfigError
from latentdiff.utils.files import cache_folder, write_whole
from latentdiff.utils.flags import run_cli

NAME = "sampling_steps"
SLOW = 500  # steps from which on a row draws `slow_count` pictures
SEEDS_APART = 100_000  # between the noises of two seeds


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to draw. None: what the settings say for all rows."""

    scheduler: str = "ddim"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    autoguidance: bool = False


STEPS = {
    **{f"ddim-{n}": Row(num_inference_steps=n) for n in (5, 10, 20, 50, 100)},
    "ddpm-1000": Row(scheduler="ddpm", num_inference_steps=1000),
}
GUIDANCE = {
    **{f"guidance-{scale:g}": Row(guidance_scale=scale) for scale in (1.0, 2.0, 4.0, 7.5)},
    "interval-7.5": Row(guidance_scale=7.5, guidance_interval=(0.5, 20.0)),
    "rescale-7.5": Row(guidance_scale=7.5, guidance_rescale=0.7),
    **{f"autoguidance-{scale:g}": Row(guidance_scale=scale, autoguidance=True) for scale in (1.5, 2.0, 3.0)},
}
OTHERS = {
    **{f"ddpm-{n}": Row(scheduler="ddpm", num_inference_steps=n) for n in (20, 50, 100)},
    "dpm++-20": Row(scheduler="dpm++", num_inference_steps=20),
    "unipc-20": Row(scheduler="unipc", num_inference_steps=20),
}
# Of a checkpoint that was distilled to draw in few steps, with the same output folder:
#     python benchmarks/sampling_steps.py --checkpoint runs/emoji64-lcm --rows lcm-1 lcm-2 lcm-4 lcm-8
FEW_STEPS = {f"lcm-{n}": Row(scheduler="lcm", num_inference_steps=n) for n in (1, 2, 4, 8)}
ROWS = STEPS | OTHERS | FEW_STEPS | GUIDANCE


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    checkpoint: str = "checkpoints/emoji64"
    """Folder of a saved pipeline that draws emoji, or a model on the Hub as owner/name."""
    rows: tuple[Literal[tuple(ROWS)], ...] = (*STEPS, *GUIDANCE)
    """Which rows, in this order; the others take part in the report if they are there."""
    count: int = 200
    """Pictures of each row and seed."""
    slow_count: int | None = None
    """Pictures of rows with 1000 steps; by default as many."""
    seeds: tuple[int, ...] = (0, 1)
    """Each row is drawn from each."""
    guidance_scale: float = 4.0
    """Of the rows that compare steps."""
    num_inference_steps: int = 20
    """Of the rows that compare guidance."""
    guide_unet: Path = Path("checkpoints/emoji64-guide")
    """The worse UNet of autoguidance."""
    batch_size: int = 25
    """Pictures drawn at a time."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the networks."""
    device: str | None = None
    """As torch names it; by default cuda where there is one, else cpu."""
    network: str = "efficientnet-lite0"
    """What looks at the pictures, see `latentdiff evaluate`."""
    output: Path = Path("runs/sampling_steps")
    """Folder for the pictures, the rows and the report."""

    def __post_init__(self) -> None:
        if self.slow_count is not None and not 4 <= self.slow_count <= self.count:
            raise ConfigError(f"--slow-count is {self.slow_count}; it must lie in 4 … {self.count} (--count)")
        for name in ("batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not self.seeds or min(self.seeds) < 0:
            raise ConfigError(f"--seeds are {self.seeds}; there must be one at least, and none negative")


@dataclass(frozen=True)
class Judge:
    """What the pictures are held against."""

    network: FeatureNetwork
    reference: Reference
    galleries: Galleries
    asked: Sequence[tuple[emoji.Concept, str]]
    floors: dict[int, PictureMeasures] = field(default_factory=dict)

    def measure(self, features: torch.Tensor) -> EmojiMeasures:
        """Of the first captions' pictures, with what real pictures score."""
        count, reference = len(features), self.reference.features
        if count not in self.floors:
            self.floors[count] = measure_floor(reference, count)
        recalls = recalls_of(features, self.asked[:count], self.galleries)
        return EmojiMeasures(drawn=measure(features, reference), floor=self.floors[count], retrieval=recalls)


def main(settings: Settings) -> None:
    network = feature_networks.load(settings.network, settings.device or "cpu")
    pictures = emoji.load()
    asked = take(training_queries(pictures), settings.count, "training captions that name a style")
    judge = Judge(network, *emoji_reference(network, pictures, cache_folder()), asked)
    if settings.rows:
        networks = load_networks(settings.checkpoint, settings.device, settings.dtype, settings.guide_unet)
        for name in settings.rows:
            for seed in settings.seeds:
                make_row(settings, networks, judge, name, seed)
    report(settings.output)


# ------------------------------------------------------------------------------------------------------- a row


def make_row(settings: Settings, networks: Networks, judge: Judge, name: str, seed: int) -> None:
    """Draw what is not there, measure, and write the row's file; nothing, if it says all that is asked for."""
    row = ROWS[name]
    networks = networks if row.autoguidance else replace(networks, guide_unet=None)
    shared = shared_recipe(settings, networks, row, seed)
    slow_count = settings.slow_count or settings.count
    counts = sorted({slow_count} if shared.num_inference_steps >= SLOW else {slow_count, settings.count})
    path = settings.output / "rows" / f"{name}-seed-{seed}.json"
    drawing = {key: value for key, value in json.loads(shared.to_json()).items() if key not in ("prompt", "batch_size")}
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("drawing") == drawing and {str(count) for count in counts} <= found["measures"].keys():
        return
    print(f"{name}, seed {seed}", flush=True)
    folder = settings.output / "pictures" / name / f"seed-{seed}"
    images, cost = draw(folder, networks, shared, judge.asked[: counts[-1]])
    features = extract_features(judge.network, images, settings.output / "features")
    values = {
        "row": name,
        "seed": seed,
        **cost,
        "batch_size": settings.batch_size,
        "measures": {str(count): asdict(judge.measure(features[:count])) for count in counts},
        "drawing": drawing,
        "network": {"name": judge.network.name, "sha256": judge.network.sha256},
        "reference": {"name": judge.reference.name, "sha256": judge.reference.sha256},
    }
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def shared_recipe(settings: Settings, networks: Networks, row: Row, seed: int) -> Recipe:
    """What all pictures of a row have in common, with the first one's seed."""
    given = {name: value for name, value in vars(row).items() if name != "autoguidance" and value is not None}
    usual = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    if row.scheduler == "lcm" and networks.pipeline.usual_drawing()[1] == 1.0:  # its guidance is inside it
        usual["guidance_scale"] = 1.0
    command = Drawing(
        **{**usual, **given},
        checkpoint=settings.checkpoint,
        seed=seed * SEEDS_APART,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
    )
    height, width = networks.pipeline.picture_size(None, None)
    return picture_recipe(
        command, networks, kind="text2img", height=height, width=width, batch_size=settings.batch_size
    )


def draw(
    folder: Path, networks: Networks, shared: Recipe, asked: Sequence[tuple[emoji.Concept, str]]
) -> tuple[list[Image.Image], dict[str, float]]:
    """The pictures, those drawn that are not there, and what one costs: `seconds`, the median over batches, and
    `passes` through a network, guidance's among them.

    Raises:
        ConfigError: the folder holds pictures that were drawn in another way.
    """
    captions, paths, log = [plain_caption(*query) for query in asked], [], folder / "costs.json"
    costs = json.loads(log.read_text()) if log.exists() else []
    for start in range(0, len(asked), shared.batch_size):
        batch = captions[start : start + shared.batch_size]
        recipes = [
            replace(shared, prompt=caption, seed=shared.seed + start + i, batch_size=len(batch))
            for i, caption in enumerate(batch)
        ]
        files = [folder / f"{start + i:04d}-{file_name(caption)}.png" for i, caption in enumerate(batch)]
        if missing := {i for i, path in enumerate(files) if not is_here(path, recipes[i])}:
            with counted_passes(networks) as passes:
                began = time.perf_counter()
                drawn = list(draw_recipes(networks, recipes, wanted=missing))
                seconds = time.perf_counter() - began
            costs.append({"seconds": seconds / len(batch), "passes": sum(passes) / len(batch)})
            write_whole(log, json.dumps(costs).encode())
            for i, image in drawn:
                save_png(image, files[i], recipes[i])
        paths += files
    medians = {name: statistics.median(cost[name] for cost in costs) for name in ("seconds", "passes")}
    return [open_whole(path) for path in paths], medians


def is_here(path: Path, recipe: Recipe) -> bool:
    """Whether the picture is there.

    Raises:
        ConfigError: the file holds another.
    """
    try:
        return is_there(path, recipe, overwrite=False)
    except ConfigError as error:
        raise ConfigError(f"{str(error).split(': --')[0]}: --output draws elsewhere") from None


@contextmanager
def counted_passes(networks: Networks) -> Iterator[list[int]]:
    """How many pictures each call of a network was given."""
    passes: list[int] = []
    models = [networks.pipeline.unet, *([networks.guide_unet.model] if networks.guide_unet else [])]
    hooks = [model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0]))) for model in models]
    yield passes
    for hook in hooks:
        hook.remove()


def open_whole(path: Path) -> Image.Image:
    """An RGB picture, its file closed."""
    with Image.open(path) as image:
        return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------- the report


def report(output: Path) -> None:
    """The rows that are there, in one file, a table for each count, and a plot of the largest that most rows have."""
    found = [json.loads(path.read_text()) for path in sorted((output / "rows").glob("*.json"))]
    if not found:
        raise ConfigError(f"{output / 'rows'} holds no rows yet: name some with --rows")
    rows = {name: [row for row in found if row["row"] == name] for name in ROWS}
    rows = {name: of_seeds for name, of_seeds in rows.items() if of_seeds}
    counts = sorted({int(count) for row in found for count in row["measures"]}, reverse=True)
    tables = [table(rows, count) for count in counts]
    write_whole(output / f"{NAME}.json", (json.dumps(found, indent=2) + "\n").encode())
    write_whole(output / f"{NAME}.md", "\n\n".join([*tables, conditions(found)]).encode() + b"\n")
    # Of equally many pictures, so that every row can be compared with every other.
    shared = [count for count in counts if len(summaries(rows, count)) == len(rows)]
    plot(rows, (shared or counts)[0], output / f"{NAME}.png")
    print("\n\n".join(tables))
    print(f"in {output}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A row's numbers: means over its seeds."""

    steps: int
    guidance_scale: float
    passes: float
    seconds: float
    distances: list[float]
    """Fréchet distances, one for each seed."""
    distance_error: float
    """Standard error of their mean that comes from which pictures were drawn."""
    kernel_distance: float
    kernel_distance_error: float
    recall_at_1: float
    recall_at_10: float
    floor: dict[str, float]
    """Of distances: as many real pictures against the others."""
    ceiling: dict[str, float]
    """Of retrieval: the real pictures of the other style."""

    @property
    def distance(self) -> float:
        return statistics.mean(self.distances)


def summary(of_seeds: list[dict], count: int) -> Summary | None:
    """None where no seed has so many pictures."""
    mine = [row for row in of_seeds if str(count) in row["measures"]]
    if not mine:
        return None
    drawn = [row["measures"][str(count)]["drawn"] for row in mine]
    recalls = [row["measures"][str(count)]["retrieval"]["drawn"] for row in mine]

    def error(name: str) -> float:
        return sum(each[name] ** 2 for each in drawn) ** 0.5 / len(drawn)

    return Summary(
        steps=mine[0]["drawing"]["num_inference_steps"],
        guidance_scale=mine[0]["drawing"]["guidance_scale"],
        passes=statistics.mean(row["passes"] for row in mine),
        seconds=statistics.mean(row["seconds"] for row in mine),
        distances=[each["frechet_distance"] for each in drawn],
        distance_error=error("frechet_distance_error"),
        kernel_distance=statistics.mean(each["kernel_distance"] for each in drawn),
        kernel_distance_error=error("kernel_distance_error"),
        recall_at_1=statistics.mean(each["at_1"] for each in recalls),
        recall_at_10=statistics.mean(each["at_10"] for each in recalls),
        floor=mine[0]["measures"][str(count)]["floor"],
        ceiling=mine[0]["measures"][str(count)]["retrieval"]["ceiling"],
    )


def summaries(rows: dict[str, list[dict]], count: int) -> dict[str, Summary]:
    """Of the rows that have so many pictures."""
    return {name: found for name, of_seeds in rows.items() if (found := summary(of_seeds, count))}


def table(rows: dict[str, list[dict]], count: int) -> str:
    """In markdown, with what real pictures would score."""
    lines = [
        f"{count} pictures from each seed:",
        "",
        "| row | FD | FD by seed | KID x 1000 | R@1 | R@10 | passes a picture | seconds a picture |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in summaries(rows, count).items():
        cells = [
            name,
            f"{found.distance:.1f} ± {found.distance_error:.1f}",
            ", ".join(f"{distance:.1f}" for distance in found.distances),
            f"{1000 * found.kernel_distance:.2f} ± {1000 * found.kernel_distance_error:.2f}",
            f"{found.recall_at_1:.3f}",
            f"{found.recall_at_10:.3f}",
            f"{found.passes:g}",
            f"{found.seconds:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    floor, ceiling = found.floor, found.ceiling  # they are the same for all rows
    lines.append(
        f"| real pictures | {floor['frechet_distance']:.1f} | | {1000 * floor['kernel_distance']:.2f} "
        f"± {1000 * floor['kernel_distance_error']:.2f} | {ceiling['at_1']:.3f} | {ceiling['at_10']:.3f} | | |"
    )
    return "\n".join(lines)


def conditions(found: list[dict]) -> str:
    """What the rows rest on; where they differ in it, everything that any of them does."""

    def of_all(values: Iterable) -> str:
        return " and ".join(sorted(set(map(str, values))))

    drawing = [row["drawing"] for row in found]
    return (
        f"{of_all(each['checkpoint']['name'] for each in drawing)} in {of_all(each['dtype'] for each in drawing)} on "
        f"{of_all(each['device'] for each in drawing)}, {of_all(row['batch_size'] for row in found)} pictures at a "
        "time; seconds are the median of the batches. "
        f"{of_all(row['network']['name'] for row in found)} looked at them and at "
        f"{of_all(row['reference']['name'] for row in found)}. FD falls with the number of pictures. ± is the standard "
        "error for which pictures were drawn. Real pictures give the floor of FD and KID (so many of them against the "
        "others) and the ceiling of R@1 and R@10 (the same emoji in the other style)."
    )


def plot(rows: dict[str, list[dict]], count: int, path: Path) -> None:
    """Distance and time over steps; distance against retrieval for each kind of guidance."""
    found = summaries(rows, count)
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left = figure.add_subplot(1, 2, 1, xlabel="steps", ylabel=f"FD of {count} pictures", xscale="log")
    time_axis = left.twinx()
    time_axis.set(ylabel="seconds a picture (dotted)", yscale="log")
    for sampler in ("ddim", "ddpm", "dpm++", "unipc", "lcm"):
        line = [each for name, each in found.items() if name.rsplit("-", 1)[0] == sampler]
        if line:
            steps, errors = [each.steps for each in line], [each.distance_error for each in line]
            left.errorbar(steps, [each.distance for each in line], errors, marker="o", capsize=3, label=sampler.upper())
            time_axis.plot(steps, [each.seconds for each in line], ":", marker=".", color=left.lines[-1].get_color())
    steps = sorted({each.steps for name, each in found.items() if name not in GUIDANCE})
    left.set_xticks(steps, [str(count) for count in steps])
    left.xaxis.set_minor_formatter("")
    time_axis.yaxis.set_major_formatter("{x:g}")
    left.legend(loc="upper center")
    right = figure.add_subplot(1, 2, 2, xlabel="FD", ylabel="R@10")
    for name in GUIDANCE:
        if each := found.get(name):
            right.errorbar(each.distance, each.recall_at_10, xerr=each.distance_error, marker="o", capsize=3)
            right.annotate(name, (each.distance, each.recall_at_10), (6, 6), textcoords="offset points")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    write_whole(path, stream.getvalue())


if __name__ == "__main__":
    run_cli(main, Settings)
