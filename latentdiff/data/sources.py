"""Where one's own pictures come from, and a table that the `datasets` library reads. Nothing is decoded here.

A source has rows, each with a name, captions and the file behind the picture. What is wrong with a row is kept as its
problem and ends nothing.
"""

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from ..config.train import TrainConfig
from ..utils.errors import ConfigError, first_line


@dataclass(frozen=True)
class Row:
    """One picture with its captions.

    Attributes:
        name: what to call it in a message.
        problem: why it cannot be used, where that is known without opening its file.
        place: where the file is, as plain JSON; what the source's `open` takes.
        stamp: tells without opening it whether the file is the one that was seen before; None where nothing does.
        is_picture: whether a picture is lost with it, where it has a problem.
    """

    name: str
    captions: list[str] = field(default_factory=list)
    problem: str | None = None
    place: object = None
    stamp: str | None = None
    is_picture: bool = True


class Source(Protocol):
    """Rows in an order that depends on the data alone."""

    def rows(self) -> Iterator[Row]:
        """All of them. Raises ConfigError where there are none to be had."""

    def open(self, place: object) -> Path | BinaryIO:
        """The picture's file. Raises ValueError where there is none."""


def stamp_of(path: Path) -> str | None:
    """Path, size and times of a file; None for one so new that it could change again within the clock's grain."""
    seen = path.stat()
    if time.time() - seen.st_ctime < 2:
        return None
    return f"{path.absolute()}|{seen.st_size}|{seen.st_mtime_ns}|{seen.st_ctime_ns}"


def clean(captions: object) -> list[str]:
    """A caption or a list of captions without what is empty or no text."""
    said = captions if isinstance(captions, list) else [captions]
    # JSON can hold halves of characters, which no tokenizer takes.
    whole = (caption.encode("utf-8", "replace").decode() for caption in said if isinstance(caption, str))
    return [caption for caption in whole if caption.strip()]


# -------------------------------------------------------------------------------------------------------- a table


class Table:
    """A data set on the Hub or on disk (parquet, arrow), read through `datasets`, which leaves pictures undecoded.

    Raises:
        ConfigError: it cannot be read, or a column is not there.
    """

    def __init__(self, config: TrainConfig):
        self._image_column, self._caption_column = config.image_column, config.caption_column
        self._folder = Path(config.train_data_dir or config.dataset_name).resolve()
        self._data = _load_dataset(config)
        for name in (config.image_column, config.caption_column):
            if name not in self._data.column_names:
                raise ConfigError(
                    f"no column {name!r} in the data; it has {', '.join(map(repr, self._data.column_names))} "
                    "(image_column and caption_column name them)"
                )

    def rows(self) -> Iterator[Row]:
        """The name is the file, within the folder where there is one, so that it does not change when that moves."""
        pictures = self._data.data.column(self._image_column)
        columns = (
            pc.struct_field(pictures, "path"),
            pc.is_valid(pc.struct_field(pictures, "bytes")),
            self._data.data.column(self._caption_column),
        )
        folders = (self._folder, *_downloads())
        for number, (file, has_bytes, said) in enumerate(zip(*map(_values, columns), strict=True)):
            name, stamp, problem = f"row {number}", f"{self._data._fingerprint}|{number}", None
            if file:
                path = Path(file)
                name = path.relative_to(self._folder).as_posix() if path.is_relative_to(self._folder) else file
                if not has_bytes:
                    inside = any(path.resolve().is_relative_to(folder) for folder in folders)
                    problem = None if inside else "it leads out of the data folder"
                    stamp = stamp_of(path) if inside and path.is_file() else None
            yield Row(name, clean(said), problem, place=number, stamp=stamp)

    def open(self, place: int) -> Path | BinaryIO:
        stored = self._data[place][self._image_column]
        if not stored:
            raise ValueError("there is none")
        return io.BytesIO(stored["bytes"]) if stored.get("bytes") else Path(stored["path"])


def _values(column: pa.ChunkedArray) -> Iterator:
    """A column's values as Python's, a chunk in memory at a time."""
    for chunk in column.chunks:
        yield from chunk.to_pylist()


def _downloads() -> Iterator[Path]:
    """Where `datasets` and the Hub's client put the files of a data set."""
    import datasets
    import huggingface_hub

    for folder in (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE):
        yield Path(folder).resolve()


def _load_dataset(config: TrainConfig):
    """The data with undecoded pictures, so that one broken file does not end the reading of the others."""
    import datasets

    where = config.train_data_dir or config.dataset_name
    try:
        if config.train_data_dir:
            data = datasets.load_dataset(config.train_data_dir, split="train")
        else:
            data = datasets.load_dataset(config.dataset_name, config.dataset_config_name, split=config.dataset_split)
        if config.image_column in data.column_names:
            data = data.cast_column(config.image_column, datasets.Image(decode=False))
    except Exception as error:  # datasets raises many kinds for a missing or malformed set
        name = "train_data_dir" if config.train_data_dir else "dataset_name"
        reason = first_line(error)
        raise ConfigError(f"{name}: {where!r} cannot be read ({reason})") from error
    return data
