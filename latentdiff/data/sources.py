"""Where one's own pictures come from: a folder, or a table that the `datasets` library reads. Nothing is decoded here.

A source has rows, each with a name, captions and the file behind the picture. What is wrong with a row is kept as its
problem and ends nothing.
"""

import csv
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from ..config.train import TrainConfig
from ..utils.errors import ConfigError, first_line
from ..utils.images import SUFFIXES
from ..utils.text import Lines, NotText, decoded, lines


@dataclass(frozen=True)
class Row:
    """One picture with its captions.

    Attributes:
        name: what to call it in a message.
        problem: why it cannot be used, where that is known without opening its file.
        place: where the file is, as plain JSON; what the source's `open` takes.
        stamp: tells without opening it whether the file is the one that was seen before; None where nothing does.
    """

    name: str
    captions: list[str] = field(default_factory=list)
    problem: str | None = None
    place: object = None
    stamp: str | None = None


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


# ------------------------------------------------------------------------------------------------------- a folder


class Folder:
    """Pictures in a folder and its subfolders, sorted by name, with captions from `metadata.jsonl`, `metadata.csv` or
    a .txt file beside each, one caption a line.

    A line of the metadata holds `file_name`, relative to the metadata's own folder, and the caption column: a text, or
    in jsonl a list of texts. A name that leads out of the data folder is refused.

    Args:
        folder: where the pictures are.
        caption_column: the column or key of the captions.

    Raises:
        ConfigError: no picture has a caption of any kind.
    """

    def __init__(self, folder: Path, caption_column: str):
        self._folder, self._caption_column = folder, caption_column

    def rows(self) -> Iterator[Row]:
        folder, caption_column = self._folder, self._caption_column
        rows: dict[str, Row] = {}
        columns: set[str] = set()
        for metadata in metadata_files(folder):
            inside = PurePosixPath(metadata.parent.relative_to(folder).as_posix())
            for where, record, problem in _records(metadata):
                row = _row(folder, inside, where, record, problem, caption_column)
                if earlier := rows.get(row.name):  # another line for the same picture
                    row = replace(row, captions=earlier.captions + row.captions, problem=earlier.problem or row.problem)
                rows[row.name] = row
                columns |= {key for key in record if key} if isinstance(record, dict) else set()
        if columns and caption_column not in columns:
            raise ConfigError(
                f"caption_column: no {caption_column!r} in the metadata of {str(folder)!r}; it has "
                f"{', '.join(map(repr, sorted(columns)))}"
            )
        for path in picture_files(folder):
            name = path.relative_to(folder).as_posix()
            if name not in rows:
                rows[name] = Row(name, *_captions_beside(path))
        if not any(row.captions for row in rows.values()):
            raise ConfigError(
                f"train_data_dir: no captions in {str(folder)!r}: a metadata.jsonl or metadata.csv names each picture "
                "and its text, or a .txt file stands beside it"
            )
        for name in sorted(rows):
            row = rows[name]
            yield row if row.problem else replace(row, place=name, stamp=stamp_of(folder / name))

    def open(self, place: str) -> Path:
        return self._folder / place


def metadata_files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for name in ("metadata.jsonl", "metadata.csv") for path in folder.rglob(name))


def picture_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())


def _records(metadata: Path) -> Iterator[tuple[str, object, str | None]]:
    """(name of the line, its values, what is wrong with it)."""
    with open(metadata, "rb") as stream:
        some = Lines(stream)
        if metadata.suffix == ".csv":
            yield from _csv_records(metadata, some)
            return
        for number, line in enumerate(some, start=1):
            if line.strip() or some.problem:
                record, problem = None, some.problem
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    problem = problem or f"it is no JSON ({error})"
                yield f"{metadata.name}, line {number}", record, problem
                some.problem = None


def _csv_records(metadata: Path, some: Lines) -> Iterator[tuple[str, dict | None, str | None]]:
    reader = csv.DictReader(iter(some))
    if reader.fieldnames and some.problem:  # the header's, not its first record's
        yield f"{metadata.name}, line 1", None, some.problem
        if "file_name" not in reader.fieldnames:
            return
        some.problem = None
    while True:
        record, problem = None, None
        try:
            record = next(reader)
        except StopIteration:
            if not some.problem:
                return
        except csv.Error as error:
            problem = f"it is no CSV ({error})"
        yield f"{metadata.name}, line {reader.line_num}", record, some.problem or problem
        some.problem = None


def _row(
    folder: Path, inside: PurePosixPath, where: str, record: object, problem: str | None, caption_column: str
) -> Row:
    at = (inside / where).as_posix()
    if not isinstance(record, dict):
        return Row(at, problem=problem or "it is no JSON object")
    name = record.get("file_name")
    if not isinstance(name, str) or not name:
        return Row(at, problem=problem or "it has no file_name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        return Row(f"{at}: {name}", problem="it leads out of the data folder")
    name = (inside / path).as_posix()
    try:
        if not (folder / name).is_file():
            return Row(name, problem="there is no such file")
    except OSError as error:  # a name that no file can have
        return Row(at, problem=f"there is no such file ({error.strerror})")
    if problem:
        return Row(name, problem=f"{at}: {problem}")
    return Row(name, clean(record.get(caption_column)))


def _captions_beside(picture: Path) -> tuple[list[str], str | None]:
    """The captions, and what is wrong with them."""
    text = picture.with_suffix(".txt")
    if not text.is_file():
        return [], None
    try:
        return clean(lines(decoded(text.read_bytes()))), None
    except (OSError, NotText) as error:
        return [], f"{text.name}: {first_line(error)}"


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
