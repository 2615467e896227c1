"""Pictures with captions, decoded, checked and brought to one size; every bad file is named and none ends the run.

A data set here is three things: rows, each with captions; `image(row)`, an RGB picture of the final size; and how often
a row stands in an epoch. The embedded emoji and pictures of one's own look the same from here on.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps

from . import emoji
from .config import ConfigError, TrainConfig
from .random_streams import fraction
from .sources import FORMATS, Row, open_source

logger = logging.getLogger(__name__)


class CaptionedPictures(Protocol):
    """What the cache and the training loop need of a data set."""

    captions: Sequence[Sequence[str]]
    """For each row the captions of which one is drawn each time."""
    repeats: Sequence[int]
    """How often each row stands in an epoch."""
    held_out: Sequence[bool]
    """Rows that are never trained on."""

    def image(self, row: int) -> Image.Image:
        """The row's picture, RGB, of the final size."""

    def name(self, row: int) -> str:
        """What to call the row's picture in a message."""


# -------------------------------------------------------------------------------------------------- emoji


class EmojiPictures:
    """emoji64 as captioned pictures: each of the default set on white and on the twelve colours.

    White counts as many times as six colours together, since a prompt that names no background means white. Held-out
    emoji are held out on white; held-out pairs of emoji and colour are not in the set at all.

    Args:
        max_train_samples: keep only the first so many trained pictures of emoji (on all their backgrounds).
        captions_on_white, captions_on_colour: how many of the ways to say a picture are kept.
    """

    def __init__(self, max_train_samples: int | None = None, captions_on_white: int = 8, captions_on_colour: int = 2):
        self._set = emoji.load()
        self._rows: list[tuple[int, str]] = []
        self.captions, self.repeats, self.held_out = [], [], []
        for index in self._set.indices()[:max_train_samples]:
            concept, style = self._set.rows[index]
            for colour in emoji.BACKGROUNDS:
                if not concept.pair_held_out(colour):
                    on_white = colour == "white"
                    count = captions_on_white if on_white else captions_on_colour
                    said = emoji.training_captions(concept, style, colour, count)
                    self._add(index, colour, said, repeats=6 if on_white else 1)
        for index in self._set.indices(held_out=True):
            self._add(index, "white", emoji.captions(*self._set.rows[index])[1:2], repeats=1, held_out=True)

    def _add(self, index: int, colour: str, captions: list[str], repeats: int, held_out: bool = False) -> None:
        self._rows.append((index, colour))
        self.captions.append(captions)
        self.repeats.append(repeats)
        self.held_out.append(held_out)

    def image(self, row: int) -> Image.Image:
        """64x64 RGB."""
        return self._set.composite(*self._rows[row])

    def name(self, row: int) -> str:
        """Emoji, style and background."""
        index, colour = self._rows[row]
        concept, style = self._set.rows[index]
        return f"{concept.names[0]} ({style}, {colour})"


# -------------------------------------------------------------------------------------- pictures of one's own


@dataclass(frozen=True)
class Rejected:
    """A picture that cannot be used, and why."""

    file: str
    reason: str


class OwnPictures:
    """A folder of captioned pictures, or a data set that `datasets` reads.

    Args:
        config: names the data, its columns and the transform.
        resolution: side of the pictures in pixels.

    Raises:
        ConfigError: the data or a column is not there, or more than `max_rejected_fraction` of the pictures cannot be
            used; they are listed in `rejected.jsonl` in the output folder either way.

    Attributes:
        enlarged: how many are smaller than the resolution.
    """

    def __init__(self, config: TrainConfig, resolution: int):
        self._config, self._resolution = config, resolution
        self._source = open_source(config)
        self._rows, self._names, self.captions, self.held_out, self.enlarged = [], [], [], [], 0
        rejected = []
        count = min(len(self._source), config.max_train_samples or len(self._source))
        for number in range(count):
            row = self._source.row(number)
            if problem := self._problem(number, row):
                rejected.append(Rejected(row.name, problem))
                continue
            self._rows.append(number)
            self._names.append(row.name)
            self.captions.append(row.captions)
            self.held_out.append(fraction("held out", row.name) < config.held_out_fraction)
        self.repeats = [1] * len(self._rows)
        _report(rejected, count, config)
        if all(self.held_out):
            raise ConfigError(
                f"no picture is left to train on: {count} read, {len(rejected)} rejected, the rest held out"
            )

    def image(self, row: int) -> Image.Image:
        """(resolution, resolution) RGB."""
        return fit(self._decode(self._rows[row]), self._resolution, self._config.center_crop)

    def name(self, row: int) -> str:
        """The file in the folder, or the row's number in a data set without files."""
        return self._names[row]

    def _decode(self, number: int) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(self._source.open(number), formats=FORMATS) as image:
                return upright_rgb(image)

    def _problem(self, number: int, row: Row) -> str | None:
        if row.problem:
            return row.problem
        if not row.captions:
            return "its caption is missing"
        try:
            self.enlarged += min(self._decode(number).size) < self._resolution
        except Exception as error:  # Pillow raises many kinds for a broken file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return f"it cannot be read as a picture ({reason})"
        return None


def _report(rejected: list[Rejected], count: int, config: TrainConfig) -> None:
    path = Path(config.output_dir) / "rejected.jsonl"
    if not rejected:
        path.unlink(missing_ok=True)  # an earlier run's
        return
    lines = "".join(json.dumps(vars(r), ensure_ascii=False) + "\n" for r in rejected)
    path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # a file's name need not be text
    first = f"{rejected[0].file}: {rejected[0].reason}"
    if len(rejected) > config.max_rejected_fraction * count:
        raise ConfigError(
            f"{len(rejected)} of {count} pictures cannot be used, more than max_rejected_fraction = "
            f"{config.max_rejected_fraction}; the first is {first}; all are in {path}"
        )
    logger.warning("%d of %d pictures are left out; the first is %s; all are in %s", len(rejected), count, first, path)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB: the first frame, turned as its EXIF says, what is transparent on white.

    Raises:
        ValueError: its shades are floating-point numbers, of which none is known to be white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its shades are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        image.info.pop("transparency", None)  # a shade of 16 bits, which Pillow cannot apply
        image = image.point(lambda value: value / 256).convert("L")
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, resolution: int, center_crop: bool = True) -> Image.Image:
    """A square of `resolution` pixels: the middle, after resizing the shorter side, or the whole picture stretched."""
    size = (resolution, resolution)
    if center_crop:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)
