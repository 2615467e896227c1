"""Drawn pictures against real ones, through a network's eyes: distances, and what the same measures say of real ones.

Every one of them depends on how many pictures there are (the Fréchet distance most: it falls as they become more), so
each stands beside its floor: as many real pictures as were drawn, against other real ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..data import emoji
from ..utils import randomness
from ..utils.errors import ConfigError
from .distances import frechet_distance, frechet_distance_error, kernel_distance, precision_recall
from .features import FeatureNetwork, extract_features, picture_key, sha256_of
from .retrieval import Galleries, Recalls, galleries_of, recalls_of

FEWEST = 4  # pictures that all measures are defined of


@dataclass(frozen=True, kw_only=True)
class PictureMeasures:
    """How some pictures lie to the reference, and how many of each that was found with."""

    count: int
    reference_count: int
    frechet_distance: float
    frechet_distance_error: float
    """Standard errors are of which pictures were drawn."""
    kernel_distance: float
    kernel_distance_error: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Reference:
    """The real pictures that others are held against, as a network sees them."""

    name: str
    """To quote: what they are."""
    sha256: str
    """Of their pixels, or of what these follow from."""
    features: torch.Tensor
    """(M, D)."""


@dataclass(frozen=True, kw_only=True)
class EmojiMeasures:
    """What pictures of the embedded emoji's captions are worth."""

    drawn: PictureMeasures
    floor: PictureMeasures
    retrieval: Recalls


def measure(features: torch.Tensor, reference: torch.Tensor) -> PictureMeasures:
    """All measures of features (N, D) against the reference's (M, D).

    Raises:
        ConfigError: fewer than `FEWEST` of one of them.
    """
    if min(len(features), len(reference)) < FEWEST:
        raise ConfigError(
            f"{len(features)} pictures against {len(reference)} cannot be measured: there must be {FEWEST} of each"
        )
    kernel, shares = kernel_distance(features, reference), precision_recall(reference, features)
    return PictureMeasures(
        count=len(features),
        reference_count=len(reference),
        frechet_distance=frechet_distance(features, reference),
        frechet_distance_error=frechet_distance_error(features, reference),
        kernel_distance=kernel.value,
        kernel_distance_error=kernel.standard_error,
        precision=shares.precision,
        recall=shares.recall,
    )


def measure_floor(reference: torch.Tensor, count: int) -> PictureMeasures:
    """The measures of `count` of the reference's own pictures (M, D) against the others; of half of them at the most.

    Which these are is drawn, always in the same way, so that more of them are only added.
    """
    order = torch.randperm(len(reference), generator=randomness.generator(0, "floor"))
    count = min(count, len(reference) // 2)
    return measure(reference[order[:count]], reference[order[count:]])


def emoji_reference(
    network: FeatureNetwork, pictures: emoji.EmojiSet | None = None, folder: Path | None = None
) -> tuple[Reference, Galleries]:
    """The default set's real pictures on white, held-out emoji among them: as one set, and for prompt retrieval.

    Args:
        folder: where their features are kept, see `extract_features`.
    """
    pictures = pictures or emoji.load()
    images = [pictures.composite(i) for i in pictures.indices(held_out=None)]
    features, keys = extract_features(network, images, folder), map(picture_key, images)
    name = f"emoji64, {' and '.join(emoji.STYLES)} on white, {len(images)} pictures"
    return Reference(name, sha256_of(keys), features), galleries_of(features, pictures)


def measure_emoji(
    images: Sequence[Image.Image],
    asked: Sequence[tuple[emoji.Concept, str]],
    network: FeatureNetwork,
    reference: Reference,
    galleries: Galleries,
) -> EmojiMeasures:
    """Everything at once, for scripts that have drawn pictures.

    Args:
        images: RGB pictures of one size, such as those of `retrieval.draw`.
        asked: for each the emoji and the style that its caption named, such as the first of
            `retrieval.training_queries`.
        reference, galleries: of `emoji_reference` and the same network; one serves many calls.
    """
    features = extract_features(network, images)
    return EmojiMeasures(
        drawn=measure(features, reference.features),
        floor=measure_floor(reference.features, len(features)),
        retrieval=recalls_of(features, asked, galleries),
    )
