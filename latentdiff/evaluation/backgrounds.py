"""Composition: does the model put an emoji on a background that training never put it on?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..config.commands import Backgrounds
from ..data import emoji
from . import features
from .features import FeatureNetwork, extract_features
from .retrieval import (
    DrawSettings,
    Measurement,
    Recall,
    build_galleries,
    draw,
    in_fixed_order,
    measured,
    plain_caption,
    report,
    take,
)

FRAME = 2  # pixels of border at 64x64, in proportion at other sizes
# RGB distance under which a pixel counts as background: below half the distance of any two named colours (87).
BACKGROUND_TOLERANCE = 40.0


@dataclass(frozen=True, kw_only=True)
class BackgroundsResult(Measurement):
    """Composition: emoji on backgrounds that training never put them on, beside some that it did."""

    colour_held_out: float
    """Share of held-out pairs whose border has the colour asked for."""
    colour_seen: float
    held_out: Recall
    """Retrieval of the held-out pairs, background masked to white."""
    seen: Recall
    """The same emoji and styles on backgrounds that training may use."""
    real: Recall
    """The real pictures of the held-out pairs through the same mask: what masking alone costs."""

    def __str__(self) -> str:
        rows = [
            f"held out  colour {self.colour_held_out:.3f}  {self.held_out}",
            f"seen      colour {self.colour_seen:.3f}  {self.seen}",
            f"real      {'':12}  {self.real}",
        ]
        return "\n".join([*rows, self._conditions()])


@dataclass(frozen=True)
class Pair:
    """An (emoji, style, background) to draw."""

    concept: emoji.Concept
    style: str
    colour: str
    index: int = field(compare=False)
    """Row of the emoji set that holds the picture."""

    @property
    def name(self) -> str:
        """What the fixed order is made from."""
        return f"{self.concept.key}|{self.style}|{self.colour}"


def composition_pairs(pictures: emoji.EmojiSet) -> list[tuple[Pair, Pair]]:
    """Every pair kept from training, in a fixed order, each beside a trained pair of the same emoji and style."""
    both = []
    for index in pictures.indices():
        concept, style = pictures.rows[index]
        pairs = [Pair(concept, style, colour, index) for colour in emoji.COLOURS]
        free = [pair for pair in pairs if not concept.pair_held_out(pair.colour)]
        kept = [pair for pair in pairs if concept.pair_held_out(pair.colour)]
        # Another free colour for each one held out; an emoji with more held-out colours than free ones is cut short.
        both += zip(kept, in_fixed_order(free, key=lambda pair: pair.name), strict=False)
    return in_fixed_order(both, key=lambda held_out_and_seen: held_out_and_seen[0].name)


def backgrounds(command: Backgrounds) -> None:
    """Measure, print and, where asked, write JSON."""
    report(measure_backgrounds, command)


def measure_backgrounds(
    pipeline: Callable[..., Any],
    *,
    count: int = 240,
    settings: DrawSettings | None = None,
    network: FeatureNetwork | None = None,
    pictures: emoji.EmojiSet | None = None,
) -> BackgroundsResult:
    """Composition: "a cat, twemoji style, on a blue background" where training never put that emoji on that colour.

    `count` held-out pairs and as many seen ones, of the same emoji and styles and from the same noise, are drawn. Each
    gives the name of its border's colour, and is looked up, its background masked to white, among the real pictures.
    The arguments and errors are those of `measure_retrieval`.
    """
    settings, network, pictures = (
        settings or DrawSettings(),
        network or features.load(),
        pictures or emoji.load(),
    )
    both = take(composition_pairs(pictures), count, "held-out pairs of emoji, style and background")
    held_out, seen = map(list, zip(*both, strict=True))
    held_out_images, seen_images = (
        draw(pipeline, [plain_caption(p.concept, p.style, p.colour) for p in pairs], settings)
        for pairs in (held_out, seen)
    )
    galleries = build_galleries(network, pictures)

    def masked_recall(images: list[Image.Image]) -> Recall:
        features = extract_features(network, [mask_background(image) for image in images])
        return galleries.recall(features, [(pair.concept, pair.style) for pair in held_out])

    return BackgroundsResult(
        count=count,
        colour_held_out=_colour_share(held_out_images, held_out),
        colour_seen=_colour_share(seen_images, seen),
        held_out=masked_recall(held_out_images),
        seen=masked_recall(seen_images),
        real=masked_recall([pictures.composite(pair.index, pair.colour) for pair in held_out]),
        **measured(pipeline, network, galleries, settings),
    )


def _colour_share(images: Sequence[Image.Image], asked: Sequence[Pair]) -> float:
    right = [nearest_colour(border_colour(image)) == pair.colour for image, pair in zip(images, asked, strict=True)]
    return sum(right) / len(right)


# -------------------------------------------------------------------------------------------------- backgrounds


def border_colour(image: Image.Image) -> np.ndarray:
    """The median RGB (3,) float64 of the frame, 2 pixels wide at 64x64."""
    pixels = np.asarray(image.convert("RGB"))
    width = max(1, round(FRAME * min(image.size) / emoji.RESOLUTION))
    inside = np.zeros(pixels.shape[:2], dtype=bool)
    inside[width:-width, width:-width] = True
    return np.median(pixels[~inside], axis=0)


def nearest_colour(rgb: np.ndarray) -> str:
    """The name in `emoji.BACKGROUNDS`, white among them, that is nearest in RGB."""
    return min(emoji.BACKGROUNDS, key=lambda name: float(np.linalg.norm(rgb - np.array(emoji.BACKGROUNDS[name]))))


def mask_background(image: Image.Image) -> Image.Image:
    """The picture with its background white: pixels of about the border's colour that connect to the border."""
    pixels = np.array(image.convert("RGB"))
    near = np.linalg.norm(pixels - border_colour(image), axis=2) <= BACKGROUND_TOLERANCE
    # One more pixel of background all around joins all parts of the border, so that one fill reaches them.
    # The copy can be written to; on an array's own memory Pillow's fill does nothing and says nothing.
    flood = Image.fromarray(np.pad(near, 1, constant_values=True).astype(np.uint8)).copy()
    ImageDraw.floodfill(flood, (0, 0), 2)
    pixels[np.asarray(flood)[1:-1, 1:-1] == 2] = 255
    return Image.fromarray(pixels)
