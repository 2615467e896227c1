"""`metadata.jsonl` and `metadata.csv`: what each line says, and what is wrong with it."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from ..utils.errors import ConfigError, first_line
from ..utils.text import Lines

NAMES = ("metadata.jsonl", "metadata.csv")


def records(metadata: Path) -> Iterator[tuple[str, object, str | None]]:
    """(name of the line, its values, what is wrong with it), one of the last two at least.

    Raises:
        ConfigError: it cannot be read, or is a pipe or a folder.
    """
    try:
        if not metadata.is_file():
            raise ConfigError(f"train_data_dir: {str(metadata)!r} cannot be read (it is no file)")
        with open(metadata, "rb") as stream:
            some = Lines(stream)
            yield from (_of_csv if metadata.suffix.lower() == ".csv" else _of_jsonl)(metadata.name, some)
    except OSError as error:
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
    reader = csv.DictReader(iter(some))
    try:
        header = reader.fieldnames or []
    except csv.Error as error:
        header, some.problem = [], f"it is no CSV ({error})"
    if some.problem:  # the header's, not its first record's
        yield f"{name}, line 1", None, some.problem
        if "file_name" not in header:
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
        yield f"{name}, line {reader.line_num}", record, some.problem or problem
        some.problem = None
