"""Pictures with captions as the cache and the training loop see them: the embedded emoji, or pictures of one's own.

A data set here is rows, each with captions; how often a row stands in an epoch; `image(row)`, an RGB picture of the
final size; and a digest that says what that picture follows from.
"""

import hashlib
import inspect
import io
import json
import math
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ..config.train import TrainConfig
from ..utils.errors import RunStopped
from ..utils.images import crop_box, open_decoded, resized
from ..utils.randomness import fraction
from ..utils.system import read_at
from . import emoji, recolour
from .folder import Folder
from .sources import Source, Table
from .survey import PICTURES
from .tars import Tars, tar_files


class CaptionedPictures(Protocol):
    """What the cache and the training loop need of a data set."""

    captions: Sequence[Sequence[str]]
    """For each row the captions of which one is drawn each time."""
    caption_counts: np.ndarray
    """How many those are."""
    repeats: np.ndarray
    """How often each row stands in an epoch."""
    held_out: np.ndarray
    """Rows that are never trained on."""
    sizes: Sequence[tuple[int, int]]
    """Widths and heights that the pictures come in; those of one batch are of one size."""
    size_of: np.ndarray
    """For each row which of the sizes it has."""
    crops: int
    """How many crops there are of each picture."""

    def image(self, row: int, crop: int = 0) -> Image.Image:
        """The row's picture, RGB, of its size. Any thread may ask."""

    def digests(self) -> Iterator[bytes]:
        """What each picture follows from, row by row and in a row crop by crop."""

    def name(self, row: int) -> str:
        """What to call the row's picture in a message."""


# -------------------------------------------------------------------------------------------------- emoji


class EmojiPictures:
    """emoji64 as captioned pictures: each of the default set on white and on the twelve colours, and itself in those.

    About half of an epoch is plain emoji on white, since a prompt that names no colour means that; a fifth is emoji in
    other colours than their own. Held-out emoji are held out on white; held-out pairs of an emoji and the colour of its
    background, or of an emoji and its own colour, are not in the set at all.

    Args:
        max_train_samples: keep only the first so many trained pictures of emoji (in all colours).
        captions_on_white, captions_on_colour, captions_in_colour: how many of the ways to say a picture are kept, for
            emoji on white, on coloured backgrounds, and in other colours.
    """

    def __init__(
        self,
        max_train_samples: int | None = None,
        captions_on_white: int = 8,
        captions_on_colour: int = 2,
        captions_in_colour: int = 4,
    ):
        self._set = emoji.load()
        self._rows: list[tuple[int, str, str | None]] = []
        self.captions: list[list[str]] = []
        self.sizes, self.crops = [(emoji.RESOLUTION, emoji.RESOLUTION)], 1
        for index in self._set.indices()[:max_train_samples]:
            concept, style = self._set.rows[index]
            for row in (*self._on_backgrounds(index), *self._in_other_colours(index)):
                on_ground = captions_on_white if row[1] == "white" else captions_on_colour
                count = captions_in_colour if row[2] else on_ground
                self._rows.append(row)
                self.captions.append(emoji.training_captions(concept, style, row[1], count, row[2]))
        trained = len(self._rows)
        for index in self._set.indices(held_out=True):
            self._rows.append((index, "white", None))
            self.captions.append(emoji.captions(*self._set.rows[index])[1:2])
        self.caption_counts = np.array([len(said) for said in self.captions])
        self.held_out = np.arange(len(self._rows)) >= trained
        plain = np.array([row[1:] == ("white", None) for row in self._rows])
        self.repeats = np.where(plain & ~self.held_out, 18, 1)
        self.size_of = np.zeros(len(self._rows), np.int8)

    def _on_backgrounds(self, index: int) -> Iterator[tuple[int, str, None]]:
        concept, _ = self._set.rows[index]
        return ((index, ground, None) for ground in emoji.BACKGROUNDS if not concept.pair_held_out(ground))

    def _in_other_colours(self, index: int) -> Iterator[tuple[int, str, str]]:
        """On white, and one in three on a coloured background, too."""
        concept, style = self._set.rows[index]
        if not self._set.can_be_recoloured(index):
            return
        for colour in emoji.COLOURS:
            if not concept.thing_held_out(colour):
                yield index, "white", colour
                grounds = [c for c in emoji.COLOURS if c != colour and not concept.pair_held_out(c)]
                place = int(fraction("ground", concept.key, style, colour) * 3 * len(grounds))
                yield from ((index, ground, colour) for ground in grounds[place : place + 1])

    def image(self, row: int, crop: int = 0) -> Image.Image:
        """64x64 RGB."""
        return self._set.composite(*self._rows[row])

    def digests(self) -> Iterator[bytes]:
        """SHA-256 of the pixels; of an emoji in another colour, of those that it is made from and how."""
        made_by = inspect.getsource(recolour).encode()  # to make them takes a second for a thousand
        for row, (index, ground, colour) in enumerate(self._rows):
            if colour is None:
                yield hashlib.sha256(self.image(row).tobytes()).digest()
            else:
                source = self._set.pictures[index].tobytes() + f"{ground} {colour} {emoji.BACKGROUNDS}".encode()
                yield hashlib.sha256(source + made_by).digest()

    def name(self, row: int) -> str:
        """Emoji, style and background."""
        index, ground, colour = self._rows[row]
        concept, style = self._set.rows[index]
        thing = concept.names[0] if colour is None else f"{colour} {concept.names[0]}"
        return f"{thing} ({style}, {ground})"


# -------------------------------------------------------------------------------------- pictures of one's own

_LINES_READ = 64  # of the list of pictures at a time, since the place of every line would take memory


def open_source(config: TrainConfig) -> Source:
    """What `train_data_dir` or `dataset_name` names: a folder of pictures, of WebDataset tars, or a table.

    Raises:
        ConfigError: it is not there or cannot be read.
    """
    folder = Path(config.train_data_dir or config.dataset_name)
    if folder.is_dir():
        if Folder.is_one(folder):
            return Folder(folder, config.caption_column)
        if tars := tar_files(folder):
            return Tars(tars, config.caption_column)
    return Table(config)


class OwnPictures:
    """The pictures that `survey` listed, cropped and resized. The list stays on disk: memory hardly grows with it.

    Args:
        config: names the output folder with the list, and says how pictures are cropped.
        open_source: what reads the pictures' files; not called before one is asked for, since tables take memory.
        sizes: widths and heights to bring the pictures to; each takes the one nearest to its own shape.

    Attributes:
        enlarged: how many are smaller than their size.
    """

    def __init__(self, config: TrainConfig, open_source: Callable[[], Source], sizes: Sequence[tuple[int, int]]):
        self._source = cache(open_source)
        self._stretch, self.crops = not config.center_crop, config.crops_per_picture
        self._list = open(Path(config.output_dir) / PICTURES, "rb")  # noqa: SIM115 - kept open
        self.sizes, self.enlarged = list(sizes), 0
        shapes = np.log([width / height for width, height in sizes])
        starts, counts, held_out, size_of = array("q"), array("I"), array("b"), array("b")
        for row, (start, line) in enumerate(self._lines()):
            (width, height) = line["size"]
            nearest = int(np.abs(shapes - math.log(width / height)).argmin())
            self.enlarged += width < sizes[nearest][0] or height < sizes[nearest][1]
            if row % _LINES_READ == 0:
                starts.append(start)
            counts.append(len(line["captions"]))
            held_out.append(line["held_out"])
            size_of.append(nearest)
        self._starts = [*starts, os.fstat(self._list.fileno()).st_size]
        self.caption_counts, self.size_of = _compact(counts), _compact(size_of)
        self.held_out, self.repeats = _compact(held_out, bool), np.broadcast_to(np.int8(1), len(counts))
        self.captions = _Captions(self)

    def image(self, row: int, crop: int = 0) -> Image.Image:
        """RGB, of the row's size.

        Raises:
            RunStopped: its file is not what it was when the run started.
        """
        line = self.line(row)
        try:
            file = self._source().open(line["place"])
            content = file.read_bytes() if isinstance(file, Path) else file.read()
        except (OSError, ValueError) as error:
            raise RunStopped(f"{line['name']} can no longer be read ({error})") from error
        if hashlib.sha256(content).hexdigest() != line["sha256"]:
            raise RunStopped(f"{line['name']} has changed since the run started; start it again")
        size = self.sizes[self.size_of[row]]
        image = open_decoded(io.BytesIO(content)).image  # what it complains of was said when it was looked at
        return resized(image, size, self._box(line, size, crop))

    def digests(self) -> Iterator[bytes]:
        """SHA-256 of the file's, the size and the part of the picture that is taken, and whether to sRGB."""
        for row, (_, line) in enumerate(self._lines()):
            size = self.sizes[self.size_of[row]]
            # The same bytes without the conversion are another picture: entries of version 0.1.0 are of that one.
            colours = " in sRGB" if line.get("converted") else ""
            for crop in range(self.crops):
                box = ",".join(f"{edge:.3f}" for edge in self._box(line, size, crop))
                yield hashlib.sha256(f"{line['sha256']} {box} to {size} lanczos{colours}".encode()).digest()

    def name(self, row: int) -> str:
        """The file in the folder, or the row's number in a data set without files."""
        return self.line(row)["name"]

    def line(self, row: int) -> dict:
        """The row as the list has it."""
        block, place = divmod(row, _LINES_READ)
        start, end = self._starts[block : block + 2]
        return json.loads(read_at(self._list, start, end - start).split(b"\n")[place])

    def _lines(self) -> Iterator[tuple[int, dict]]:
        """All lines with where they start."""
        with mmap.mmap(self._list.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            start = 0
            for line in iter(lines.readline, b""):
                yield start, json.loads(line)
                start += len(line)

    def _box(self, line: dict, size: tuple[int, int], crop: int) -> tuple[float, float, float, float]:
        if self._stretch:
            return (0, 0, *line["size"])
        if self.crops == 1:
            return crop_box(line["size"], size)
        return crop_box(line["size"], size, tuple(fraction("crop", line["sha256"], str(crop), axis) for axis in "xy"))


def _compact(values: Sequence[int], dtype=None) -> np.ndarray:
    """As an array of the smallest integers that hold them; of one number where all are the same.

    Of a million rows each byte is a megabyte in every process.
    """
    column = np.array(values, dtype or np.min_scalar_type(max(values)))
    return np.broadcast_to(column[0], len(column)) if (column == column[0]).all() else column


class _Captions(Sequence):
    """For each row its captions, read when they are asked for."""

    def __init__(self, pictures: OwnPictures):
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures.caption_counts)

    def __getitem__(self, row: int) -> list[str]:
        return self._pictures.line(row)["captions"]

    def __iter__(self) -> Iterator[list[str]]:
        return (line["captions"] for _, line in self._pictures._lines())
