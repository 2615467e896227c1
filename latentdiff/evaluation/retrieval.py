"""Does the model draw what the prompt says? Prompt retrieval among the real pictures of the embedded emoji.

An independent network looks at each drawn picture and searches the real pictures of the caption's style for the
nearest one (cosine of features, mean-centred on the gallery). R@k is the share that finds the caption's own picture
among the first k. The real pictures of the other style give the ceiling, shuffled captions the floor.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..config.commands import Retrieval
from ..config.drawing import Command
from ..data import emoji
from ..inference.drawing import draw_pictures
from ..inference.loading import load_pipeline
from ..utils.errors import ConfigError
from ..utils.files import write_whole
from . import features
from .features import FeatureNetwork, extract_features


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How pictures are drawn; picture i starts from the noise of seed + i, whatever the batch size."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 0
    batch_size: int = 32

    @classmethod
    def of(cls, command: Command, pipeline: Any) -> "DrawSettings":
        """As a command says, and where it says nothing as the pipeline draws well."""
        steps, guidance_scale = pipeline.usual_drawing(command.num_inference_steps, command.guidance_scale)
        return cls(
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=command.seed,
            batch_size=command.batch_size,
        )

    def __post_init__(self):
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class Recall:
    """R@1 and R@10, shares in [0, 1]."""

    at_1: float
    at_10: float

    def __str__(self) -> str:
        return f"R@1 {self.at_1:.3f}  R@10 {self.at_10:.3f}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What has to be quoted with any number: how many pictures, which sampler, which network looked at them."""

    count: int
    gallery_size: int
    """Real pictures in each style's gallery."""
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    network: str

    def save_json(self, path: str | os.PathLike) -> None:
        """Write all numbers as JSON; a file that is there is replaced whole or not at all."""
        write_whole(path, (json.dumps(asdict(self), indent=2) + "\n").encode())

    def _conditions(self) -> str:
        return (
            f"{self.count} pictures, {self.sampler} with {self.num_inference_steps} steps, guidance scale "
            f"{self.guidance_scale:g}, seed {self.seed}; galleries of {self.gallery_size}; {self.network}"
        )


@dataclass(frozen=True, kw_only=True)
class Recalls:
    """Prompt retrieval of drawn pictures between its ceiling and its floor, all on the same captions."""

    drawn: Recall
    ceiling: Recall
    """The real picture of the same emoji in the other style, in the same galleries."""
    floor: Recall
    """The drawn pictures, each taken for that of another caption of its style."""


@dataclass(frozen=True, kw_only=True)
class RetrievalResult(Recalls, Measurement):
    """Prompt retrieval, and how it came about."""

    def __str__(self) -> str:
        rows = [f"{name:<8}{getattr(self, name)}" for name in ("drawn", "ceiling", "floor")]
        return "\n".join([*rows, self._conditions()])


def retrieval(command: Retrieval) -> None:
    """Measure, print and, where asked, write JSON."""
    report(measure_retrieval, command)


def report(measure: Callable[..., Measurement], command: Command) -> None:
    """What a command's checkpoint draws, measured, printed and, where asked, written as JSON.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or the file not written.
    """
    pipeline = load_pipeline(command.checkpoint, command.device, single_file_config=command.single_file_config)
    settings, network = DrawSettings.of(command, pipeline), features.load(device=pipeline.device)
    result = measure(pipeline, count=command.count, settings=settings, network=network)
    print(result)
    if command.output is not None:
        try:
            result.save_json(command.output)
        except OSError as error:
            raise ConfigError(f"{command.output} cannot be written: {error}") from None


# ---------------------------------------------------------------------------------------------------- retrieval


def found_at(queries: torch.Tensor, gallery: torch.Tensor, target_index: torch.Tensor, k: int) -> torch.Tensor:
    """For each query, the chance that its target is among its k nearest in the gallery: (N,) float64 in [0, 1].

    Nearest by the cosine of features centred on the gallery's mean. It is 0 or 1 unless others are exactly as near as
    the target, when it is the chance under a random order of the equals: a model that always draws one thing gains
    nothing. A query with features that are not finite finds nothing.

    Args:
        queries: features (N, D). gallery: features (M, D).
        target_index: (N,) int64, the row of the gallery that each query should find.
        k: from 1 to M.

    Raises:
        ValueError: k out of range, or as many targets as queries are not there.
    """
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k is {k}; the gallery has {len(gallery)} pictures")
    if target_index.shape != queries.shape[:1]:
        raise ValueError(f"{len(queries)} queries need as many targets, not {tuple(target_index.shape)}")
    mean = gallery.double().mean(dim=0)
    unit_queries = F.normalize(queries.double() - mean, dim=1)
    unit_gallery = F.normalize(gallery.double() - mean, dim=1)
    similarity = unit_queries @ unit_gallery.T
    target = similarity.gather(1, target_index[:, None])
    nearer = (similarity > target).sum(dim=1)
    equal = (similarity == target).sum(dim=1).clamp(min=1)
    chance = ((k - nearer) / equal).double().clamp(0, 1)
    return torch.where(target[:, 0].isfinite(), chance, 0.0)


def recall_at(queries: torch.Tensor, gallery: torch.Tensor, target_index: torch.Tensor, k: int) -> float:
    """R@k: the mean of `found_at`, a share in [0, 1]."""
    return found_at(queries, gallery, target_index, k).mean().item()


@dataclass(frozen=True)
class Galleries:
    """Features of the default set's real pictures on white, held-out emoji among them: a gallery for each style."""

    features: dict[str, torch.Tensor]
    """Style -> (M, D)."""
    rows: dict[str, dict[str, int]]
    """Style -> emoji's key -> row in the gallery."""

    def recall(self, queries: torch.Tensor, asked: Sequence[tuple[emoji.Concept, str]]) -> Recall:
        """R@1 and R@10 of features (N, D), each searched in the gallery of the style asked for."""
        found = {1: [], 10: []}
        for style, gallery in self.features.items():
            mine = [i for i, (_, asked_style) in enumerate(asked) if asked_style == style]
            targets = torch.tensor([self.rows[style][asked[i][0].key] for i in mine], dtype=torch.long)
            for k, chances in found.items():
                chances.append(found_at(queries[mine], gallery, targets, min(k, len(gallery))))
        at_1, at_10 = (torch.cat(chances).mean().item() for chances in found.values())
        return Recall(at_1=at_1, at_10=at_10)

    def real(self, asked: Sequence[tuple[emoji.Concept, str]]) -> torch.Tensor:
        """The real pictures' own features (N, D) for (emoji, style) pairs."""
        return torch.stack([self.features[style][self.rows[style][concept.key]] for concept, style in asked])


def build_galleries(network: FeatureNetwork, pictures: emoji.EmojiSet, folder: Path | None = None) -> Galleries:
    """Look at every picture of the default set, both styles; `folder` as in `extract_features`."""
    images = [pictures.composite(i) for i in pictures.indices(held_out=None)]
    return galleries_of(extract_features(network, images, folder), pictures)


def galleries_of(features: torch.Tensor, pictures: emoji.EmojiSet) -> Galleries:
    """The default set's features (M, D), in the order of its indices, by style."""
    indices = pictures.indices(held_out=None)
    by_style, rows = {}, {}
    for style in emoji.STYLES:
        mine = [n for n, i in enumerate(indices) if pictures.rows[i][1] == style]
        by_style[style] = features[mine]
        rows[style] = {pictures.rows[indices[n]][0].key: row for row, n in enumerate(mine)}
    return Galleries(by_style, rows)


# ------------------------------------------------------------------------------------------------------ drawing


def draw(pipeline: Callable[..., Any], prompts: Sequence[str], settings: DrawSettings) -> list[Image.Image]:
    """One RGB picture for each prompt, in batches; picture i has a generator of its own, seeded with seed + i."""
    seeds = range(settings.seed, settings.seed + len(prompts))
    options = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    return [image for _, image in draw_pictures(pipeline, prompts, seeds, settings.batch_size, **options)]


def plain_caption(concept: emoji.Concept, style: str, colour: str = "white") -> str:
    """The plainest training caption that names the style: "a cat, twemoji style, on a blue background"."""
    return emoji.captions(concept, style, colour)[1]


def other_style(style: str) -> str:
    """The style that gives the ceiling: the next of `emoji.STYLES`, in a circle."""
    return emoji.STYLES[(emoji.STYLES.index(style) + 1) % len(emoji.STYLES)]


def in_fixed_order(items: Sequence[Any], key: Callable[[Any], str]) -> list[Any]:
    """A shuffle that depends on the names alone, so that a larger count only adds to a smaller one's pictures."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())


def take(items: Sequence[Any], count: int, what: str) -> list[Any]:
    """The first `count` of `items`.

    Raises:
        ConfigError: there are fewer, or the count is below 4.
    """
    if not 4 <= count <= len(items):  # two of each style are the fewest that can be shuffled
        raise ConfigError(f"count is {count}; it must be from 4 to {len(items)}, the number of {what}")
    return list(items[:count])


def measured(pipeline: Any, network: FeatureNetwork, galleries: Galleries, settings: DrawSettings) -> dict[str, Any]:
    """The fields that say how a result came about, but for `count`."""
    return {
        "gallery_size": len(galleries.features[emoji.STYLES[0]]),
        "sampler": type(pipeline.scheduler).__name__,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "seed": settings.seed,
        "network": network.name,
    }


# ----------------------------------------------------------------------------------------------------- measures


def training_queries(pictures: emoji.EmojiSet) -> list[tuple[emoji.Concept, str]]:
    """Every trained (emoji, style), in a fixed order: each emoji once with styles alternating, then in the others."""
    trained = {pictures.rows[i][0].key: pictures.rows[i][0] for i in pictures.indices()}
    order = in_fixed_order(list(trained.values()), key=lambda concept: concept.key)
    styles = emoji.STYLES
    return [(c, styles[(i + turn) % len(styles)]) for turn in range(len(styles)) for i, c in enumerate(order)]


def measure_retrieval(
    pipeline: Callable[..., Any],
    *,
    count: int = 500,
    settings: DrawSettings | None = None,
    network: FeatureNetwork | None = None,
    pictures: emoji.EmojiSet | None = None,
) -> RetrievalResult:
    """Prompt retrieval on training captions of the embedded default, such as "a cat, twemoji style".

    Args:
        pipeline: called as diffusers' text-to-image pipelines; has a `scheduler`.
        count: captions, half of each style; at least 500 for numbers to quote.
        settings: how pictures are drawn.
        network: what judges them; EfficientNet-Lite0 by default.
        pictures: the real ones; the built default set by default.

    Raises:
        ConfigError: a count that the set does not have, or a missing package.
    """
    settings, network, pictures = (
        settings or DrawSettings(),
        network or features.load(),
        pictures or emoji.load(),
    )
    asked = take(training_queries(pictures), count, "training captions that name a style")
    images = draw(pipeline, [plain_caption(*row) for row in asked], settings)
    galleries = build_galleries(network, pictures)
    recalls = recalls_of(extract_features(network, images), asked, galleries)
    return RetrievalResult(count=count, **vars(recalls), **measured(pipeline, network, galleries, settings))


def recalls_of(drawn: torch.Tensor, asked: Sequence[tuple[emoji.Concept, str]], galleries: Galleries) -> Recalls:
    """Of pictures' features (N, D), drawn for (emoji, style) pairs, of each style two at the least."""
    others = galleries.real([(concept, other_style(style)) for concept, style in asked])
    return Recalls(
        drawn=galleries.recall(drawn, asked),
        ceiling=galleries.recall(others, asked),
        floor=galleries.recall(drawn, _shuffled(asked)),
    )


def _shuffled(asked: Sequence[tuple[emoji.Concept, str]]) -> list[tuple[emoji.Concept, str]]:
    """Each caption replaced by the next one of its own style (their order is random): none keeps its own."""
    following = {}
    for style in emoji.STYLES:
        mine = [i for i, (_, asked_style) in enumerate(asked) if asked_style == style]
        following |= dict(zip(mine, mine[1:] + mine[:1], strict=True))
    return [asked[following[i]] for i in range(len(asked))]
