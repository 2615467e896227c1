"""`metadata.jsonl`, `metadata.csv` and `metadata.parquet`: what each line says, and what is wrong with it."""

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet

from ..utils.errors import ConfigError, first_line
from ..utils.text import Lines

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SEPARATORS = ",;\t"  # a spreadsheet writes one or the other, by the language it speaks


def records(metadata: Path) -> Iterator[tuple[str, object, str | None]]:
    """(name of the line, its values, what is wrong with it), one of the last two at least.

    Raises:
        ConfigError: it cannot be read, or is a pipe or a folder.
    """
    try:
        if not metadata.is_file():
            raise ConfigError(f"train_data_dir: {str(metadata)!r} cannot be read (it is no file)")
        if metadata.suffix.lower() == ".parquet":
            yield from _of_parquet(metadata)
            return
        with open(metadata, "rb") as stream:
            some = Lines(stream)
            yield from (_of_csv if metadata.suffix.lower() == ".csv" else _of_jsonl)(metadata.name, some)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"train_data_dir: {str(metadata)!r} cannot be read ({first_line(error)})") from None


def _of_jsonl(name: str, some: Lines) -> Iterator[tuple[str, object, str | None]]:
    for number, line in enumerate(some, start=1):
        if line.strip() or some.problem:
            record, problem = None, some.problem
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = problem or f"it is no JSON ({error})"
            yield f"{name}, line {number}", record, problem
            some.problem = None


def _of_csv(name: str, some: Lines) -> Iterator[tuple[str, dict | None, str | None]]:
    lines, blank = iter(some), 0
    first = next(lines, "")
    while first and not first.strip():
        first, blank = next(lines, ""), blank + 1
    separator = next((mark for mark in _SEPARATORS if mark in first), ",")
    reader = csv.DictReader(chain([first], lines), delimiter=separator)
    try:
        header = reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
    except csv.Error as error:
        header, some.problem = [], f"it is no CSV ({error})"
    if some.problem:  # the header's, not its first record's
        yield f"{name}, line {blank + 1}", None, some.problem
        if "file_name" not in header:
            return
        some.problem = None
    count = 0
    while True:
        record, problem = None, None
        try:
            record = next(reader)
        except StopIteration:
            if not some.problem:
                break
        except csv.Error as error:
            problem = f"it is no CSV ({error})"
        count += 1
        yield f"{name}, line {reader.line_num + blank}", record, some.problem or problem
        some.problem = None
    if not count:
        yield f"{name}, line {blank + 1}", None, "no line follows this first one, which names the columns"


def _of_parquet(metadata: Path) -> Iterator[tuple[str, dict, str | None]]:
    with pyarrow.parquet.ParquetFile(metadata) as file:
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
        for number, record in enumerate(rows):
            yield f"{metadata.name}, row {number}", record, None
