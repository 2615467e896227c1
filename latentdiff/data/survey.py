"""Every picture looked at once: which can be used, how large it is, and the SHA-256 of its bytes.

What was found out about a file is remembered beside the caches under its path, size and time of change, so that a start
on unchanged pictures opens none of them. What a run trains on stands in `pictures.jsonl` in its output folder, a line
each, and what it leaves out in `rejected.jsonl`.
"""

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from accelerate import PartialState
from PIL import UnidentifiedImageError
from tqdm.auto import tqdm

from ..config.train import TrainConfig
from ..utils.errors import ConfigError, first_line, printable
from ..utils.files import move_into_place
from ..utils.images import open_decoded
from ..utils.randomness import fraction
from .sources import Row, Source

logger = logging.getLogger(__name__)

PICTURES, REJECTED = "pictures.jsonl", "rejected.jsonl"
_CHUNK = 1024  # rows looked at together
_WAIT = 5.0  # seconds for another run to write what it has seen, which takes it milliseconds
_COMPLAINTS = 5  # how many are said one by one
_LOOKS = "looks_in_srgb"  # "looks", of version 0.1.0, does not say which pictures are converted


@dataclass(frozen=True)
class Rejected:
    """A picture that cannot be used, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Look:
    """What looking at a picture's file told; a complaint, unlike a problem, does not keep it from being used."""

    sha256: str = ""
    width: int = 0
    height: int = 0
    converted: bool = False
    complaint: str | None = None
    problem: str | None = None


def survey(config: TrainConfig, source: Source, memory: Path) -> None:
    """Look at all pictures of a source and write `pictures.jsonl` and, where some cannot be used, `rejected.jsonl`.

    Args:
        config: where the files go, how many pictures are used, and how many may be rejected.
        memory: the file that remembers what was seen.

    Raises:
        ConfigError: more than `max_rejected_fraction` cannot be used, or none is left to train on.
    """
    folder = Path(config.output_dir)
    aside = folder / f".{PICTURES}-{PartialState().process_index}"  # the next run writes over what a killed one left
    rejected: list[Rejected] = []
    others: list[Rejected] = []
    count = used = trained = complaints = 0
    try:
        with open(aside, "w", encoding="ascii") as lines:
            for row, look in _looked_at(islice(source.rows(), config.max_train_samples), source, memory):
                if row.problem and not row.is_picture:
                    others.append(Rejected(row.name, row.problem))
                    continue
                count += 1
                if problem := row.problem or (None if row.captions else "its caption is missing") or look.problem:
                    rejected.append(Rejected(row.name, problem))
                    continue
                complaints += bool(look.complaint)
                if look.complaint and complaints <= _COMPLAINTS:
                    logger.warning("%s: %s", row.name, look.complaint)
                held_out = fraction("held out", row.name) < config.held_out_fraction
                lines.write(json.dumps(_line(row, look, held_out)) + "\n")
                used, trained = used + 1, trained + (not held_out)
        if complaints > _COMPLAINTS:
            logger.warning("%d more pictures have such a profile", complaints - _COMPLAINTS)
        _report(rejected, others, count, config)
        if not trained:
            raise ConfigError(
                f"no picture is left to train on: {count} read, {len(rejected)} rejected, {used} held out"
            )
        move_into_place(aside, folder / PICTURES)
    finally:
        aside.unlink(missing_ok=True)


def left_out(folder: Path) -> list[Rejected]:
    """What the last `survey` of a run with this output folder left out."""
    path = folder / REJECTED
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [Rejected(**json.loads(line)) for line in lines]


def _line(row: Row, look: Look, held_out: bool) -> dict:
    """One line of `pictures.jsonl`."""
    return {
        "name": row.name,
        "captions": row.captions,
        "sha256": look.sha256,
        "size": [look.width, look.height],
        "held_out": held_out,
        "place": row.place,
        **({"converted": True} if look.converted else {}),
    }


def _report(rejected: list[Rejected], others: list[Rejected], count: int, config: TrainConfig) -> None:
    """Write and say what is left out; `others` are no pictures, and may be any number."""
    path = Path(config.output_dir) / REJECTED
    if not rejected and not others:
        path.unlink(missing_ok=True)  # an earlier run's
        return
    lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejected + others)
    path.write_text(lines, encoding="utf-8", errors="backslashreplace")  # a file's name need not be text
    first = "the first is {0.file}: {0.reason}; all are in {1}".format((rejected + others)[0], path)
    if len(rejected) > config.max_rejected_fraction * count:
        raise ConfigError(
            f"{len(rejected)} of {count} pictures cannot be used, more than max_rejected_fraction = "
            f"{config.max_rejected_fraction}; {first}"
        )
    more = f", and {len(others)} other file{'s' * (len(others) > 1)}" if others else ""
    logger.warning("%d of %d pictures are left out%s; %s", len(rejected), count, more, printable(first))


def _looked_at(rows: Iterable[Row], source: Source, memory: Path) -> Iterator[tuple[Row, Look]]:
    """Each row with what is known of its picture; of a row that cannot be used anyway nothing is looked at."""
    rows, known = iter(rows), _Memory(memory)
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(desc="looking at pictures", unit="picture", delay=2) as bar:
        while chunk := list(islice(rows, _CHUNK)):
            usable = [row for row in chunk if row.captions and not row.problem]
            looks = known.recall(usable)
            new = [row for row in usable if row.stamp not in looks]
            found = list(pool.map(lambda row: _look(source, row), new))  # Pillow decodes outside Python's lock
            known.remember(new, found)
            looks |= {id(row): look for row, look in zip(new, found, strict=True)}
            for row in chunk:
                yield row, looks.get(row.stamp) or looks.get(id(row)) or Look()
            bar.update(len(chunk))


def _look(source: Source, row: Row) -> Look:
    """Hash and decode a picture's file."""
    try:
        file = source.open(row.place)
        with open(file, "rb") if isinstance(file, Path) else file as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            image, converted, complaint = open_decoded(stream)
            return Look(sha256, *image.size, converted, complaint)
    except UnidentifiedImageError:
        return Look(problem="it cannot be read as a picture (of no format that is known here)")
    except Exception as error:  # Pillow raises many kinds for a broken file
        reason = first_line(error)
        return Look(problem=f"it cannot be read as a picture ({reason})")


class _Memory:
    """What was seen of each usable file, by its stamp, in an SQLite file that runs share.

    It only saves time: where it cannot be read or written, that is said once, and everything is looked at again. So is
    what could not be used, since a disk may have failed rather than the picture.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, None
        with self._or_without():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=_WAIT)
            self._file.execute(
                f"CREATE TABLE IF NOT EXISTS {_LOOKS} (stamp BLOB PRIMARY KEY, sha256 TEXT, width INT, height INT, "
                "converted INT, complaint TEXT) WITHOUT ROWID"
            )

    def recall(self, rows: Iterable[Row]) -> dict[str, Look]:
        """What is known, by stamp."""
        known = {}
        with self._or_without():
            for row in rows if self._file else ():
                query = f"SELECT sha256, width, height, converted, complaint FROM {_LOOKS} WHERE stamp = ?"
                if row.stamp and (found := self._file.execute(query, (_digest(row.stamp),)).fetchone()):
                    known[row.stamp] = Look(*found)
        return known

    def remember(self, rows: Iterable[Row], looks: Iterable[Look]) -> None:
        """Keep what was found out about files that have a stamp."""
        seen = [
            (_digest(row.stamp), look.sha256, look.width, look.height, look.converted, look.complaint)
            for row, look in zip(rows, looks, strict=True)
            if row.stamp and not look.problem
        ]
        with self._or_without():
            if seen and self._file:
                with self._file:
                    self._file.executemany(f"INSERT OR REPLACE INTO {_LOOKS} VALUES (?, ?, ?, ?, ?, ?)", seen)

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """Give it up at the first thing that goes wrong: each further try could wait as long."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self._file = None
            what = "which remembers the pictures that were looked at, is not used"
            logger.warning("%s, %s (%s): the next start looks at them again", self._path, what, first_line(error))


def _digest(stamp: str) -> bytes:
    return hashlib.sha256(stamp.encode("utf-8", "surrogatepass")).digest()[:16]
