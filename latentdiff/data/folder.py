"""A folder of pictures with captions beside them or in metadata. Nothing is decoded here."""

import logging
import os
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from ..utils.errors import ConfigError, first_line
from ..utils.images import SUFFIXES
from ..utils.text import NotText, decoded, lines
from .metadata import NAMES, records
from .sources import Row, clean, stamp_of
from .walk import UNREAD, walk, why_unread

logger = logging.getLogger(__name__)

_NO_FILE = "is no file (a pipe, a device, a link that leads nowhere)"
# Texts that lie among pictures and are captions of none.
_NO_CAPTIONS = {"readme", "license", "licence", "notice", "credits", "changelog", "requirements"}


class Folder:
    """Pictures in a folder and its subfolders, sorted by name, with captions from `metadata.jsonl`, `metadata.csv`
    (with commas, semicolons or tabs), `metadata.parquet` or a .txt file beside each, one caption a line.

    A line of the metadata holds `file_name`, relative to the metadata's own folder, and the caption column: a text, or
    but for csv a list of texts. A name that leads out of the data folder is refused. One that no file has is looked for
    with slashes in place of backslashes, in the other way to write its accents, and with its suffix in other letters.

    What lies there and cannot be used is a row with a problem: a picture of a kind that is not read and has a caption,
    a folder that cannot be read, and, last, captions without a picture.

    Args:
        folder: where the pictures are.
        caption_column: the column or key of the captions.

    Raises:
        ConfigError: no picture has a caption of any kind, or metadata cannot be read.
    """

    def __init__(self, folder: Path, caption_column: str):
        self._folder, self._caption_column = folder, caption_column

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether there is anything for it in a folder."""
        names = (name for name, kind in walk(folder) if kind != "folder")
        # A table, which is a source of its own, may have that name, too.
        return any(_is_metadata(name, (".jsonl", ".csv")) or _suffix(name) in SUFFIXES | UNREAD for name in names)

    def rows(self) -> Iterator[Row]:
        files = _Files(self._folder)
        rows = self._from_metadata(files)
        rows |= {row.name: row for row in files.pictures_without(rows)}
        captions = list(files.captions_without_picture())
        if not any(row.captions for row in rows.values()):
            raise ConfigError(self._why_no_captions([*rows.values(), *captions]))
        for name in sorted(rows):
            row = rows[name]
            yield row if row.problem else replace(row, place=name, stamp=stamp_of(self._folder / name))
        yield from captions

    def open(self, place: str) -> Path:
        return self._folder / place

    def _from_metadata(self, files: "_Files") -> dict[str, Row]:
        rows: dict[str, Row] = {}
        columns: set[str] = set()
        for metadata in files.metadata:
            inside = PurePosixPath(metadata).parent
            for where, record, problem in records(self._folder / metadata):
                row = self._row(files, inside, where, record, problem)
                if earlier := rows.get(row.name):  # another line for the same picture
                    row = replace(row, captions=earlier.captions + row.captions, problem=earlier.problem or row.problem)
                rows[row.name] = row
                columns |= {key for key in record if key} if isinstance(record, dict) else set()
        if columns and self._caption_column not in columns:
            raise ConfigError(
                f"caption_column: no {self._caption_column!r} in the metadata of {str(self._folder)!r}; it has "
                f"{_list(sorted(columns))}"
            )
        return rows

    def _row(self, files: "_Files", inside: PurePosixPath, where: str, record: object, problem: str | None) -> Row:
        at = (inside / where).as_posix()
        if not isinstance(record, dict):
            return Row(at, problem=problem or "it is no JSON object")
        said = record.get("file_name")
        if not isinstance(said, str) or not said:
            has = "" if "file_name" in record else f", but {_list(filter(None, record))}"
            return Row(at, problem=problem or f"it has no file_name{has}")
        name, missing = files.named(inside, said)
        if name is None:
            return Row(f"{at}: {textwrap.shorten(said, 200)}", problem=missing)
        if problem:
            return Row(name, problem=f"{at}: {problem}")
        if _suffix(name) in UNREAD:
            return Row(name, problem=why_unread(_suffix(name)))
        return Row(name, clean(record.get(self._caption_column)))

    def _why_no_captions(self, rows: list[Row]) -> str:
        text = f"train_data_dir: no captions in {str(self._folder)!r}: "
        for row in rows:
            if row.problem:
                return f"{text}{textwrap.shorten(row.name, 200)}: {row.problem}"
        return (
            f"{text}a metadata.jsonl or metadata.csv names each picture and its text, or a .txt file stands beside it"
        )


class _Files:
    """What lies in a data folder, by name.

    Attributes:
        metadata: names of the files that may be metadata, in order.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.metadata: list[str] = []
        self._left_out: list[Row] = []
        self._pictures: list[str] = []
        self._unread: list[str] = []
        self._no_files: list[str] = []
        self._no_captions: set[str] = set()
        self._captions: dict[str, str] = {}  # by the name without suffix
        for name, kind in walk(folder, self._leave_out):
            suffix = _suffix(name)
            if _is_metadata(name):
                self.metadata.append(name)
            elif kind != "file" and suffix == ".txt":
                self._no_captions.add(name)
            elif kind == "file" and suffix == ".txt":
                # .TXT counts where there is no .txt
                self._captions[_stem(name)] = max(name, self._captions.get(_stem(name), name))
            elif kind == "file" and suffix in UNREAD:
                self._unread.append(name)
            elif kind != "folder" and suffix in SUFFIXES:
                (self._pictures if kind == "file" else self._no_files).append(name)
        self.metadata.sort(key=PurePosixPath)

    def _leave_out(self, name: str, reason: str, is_output: bool) -> None:
        if is_output:
            logger.warning("%s: %s", os.path.join(self._folder, name), reason)
        else:
            self._left_out.append(Row(name, problem=reason))

    def named(self, inside: PurePosixPath, said: str) -> tuple[str | None, str | None]:
        """The file that metadata in the folder `inside` means, or None and why there is none."""
        slashes = said.replace("\\", "/")
        for spelling in dict.fromkeys((said, slashes, slashes.strip())):
            path = PurePosixPath(spelling)
            if path.is_relative_to(self._folder.absolute()):
                path, inside = path.relative_to(self._folder.absolute()), PurePosixPath()
            if path.is_absolute() or ".." in path.parts or "\0" in spelling:
                return None, "it leads out of the data folder"
            name = (inside / path).as_posix()
            try:
                if (self._folder / name).is_file():
                    return name, None
            except OSError as error:  # a name that no file can have
                return None, f"there is no such file ({error.strerror})"
        alike = self._by_spelling.get(_spelling(name), [])
        if len(alike) > 1:
            return None, f"there is no such file, but {_list(alike)}"
        return (alike[0], None) if alike else (None, "there is no such file")

    def pictures_without(self, rows: Iterable[str]) -> Iterator[Row]:
        """The pictures that are not among these names, with the captions beside them, and what cannot be used."""
        yield from self._left_out
        for name in self._pictures:
            if name not in rows:
                yield Row(name, *self._beside(name))
        for name in self._no_files:
            if name not in rows:
                yield Row(name, problem=f"it {_NO_FILE}")
        stems = {self._caption_of(name) for name in self._pictures if self._unread}
        for name in self._unread:
            caption = self._caption_of(name)
            if name not in rows and caption and caption not in stems:  # beside a.png, a.psd is what that was made of
                yield Row(name, problem=why_unread(_suffix(name)))

    def captions_without_picture(self) -> Iterator[Row]:
        used = {self._caption_of(name) for name in (*self._pictures, *self._unread, *self._no_files)}
        for name in sorted(self._captions.values()):
            if name not in used and PurePosixPath(name).stem.lower() not in _NO_CAPTIONS:
                yield Row(name, problem="there is no picture beside this caption", is_picture=False)

    def _beside(self, picture: str) -> tuple[list[str], str | None]:
        """The captions, and what is wrong with them."""
        name = self._caption_of(picture)
        if name is None:
            wrong = f"{_stem(picture)}.txt" in self._no_captions
            return [], f"its .txt {_NO_FILE}" if wrong else None
        try:
            captions = clean(lines(decoded((self._folder / name).read_bytes())))
            return captions, None if captions else f"{PurePosixPath(name).name} is empty"
        except (OSError, NotText) as error:
            return [], f"{PurePosixPath(name).name}: {first_line(error)}"

    def _caption_of(self, picture: str) -> str | None:
        stem = _stem(picture)
        return self._captions.get(stem) or (None if stem.isascii() else self._accented_captions.get(_nfc(stem)))

    @cached_property
    def _accented_captions(self) -> dict[str, str]:
        return {_nfc(stem): name for stem, name in self._captions.items() if not stem.isascii()}

    @cached_property
    def _by_spelling(self) -> dict[str, list[str]]:
        """Pictures by what is the same in all ways to write their names; needed only where one is not found."""
        found: dict[str, list[str]] = {}
        for name in (*self._pictures, *self._unread):
            found.setdefault(_spelling(name), []).append(name)
        return found


def _is_metadata(name: str, kinds: tuple[str, ...] = (".jsonl", ".csv", ".parquet")) -> bool:
    return os.path.basename(name).lower() in NAMES and _suffix(name) in kinds


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _nfc(name: str) -> str:
    """Accents in one character: macOS writes an é as an e and an accent."""
    return unicodedata.normalize("NFC", name)


def _spelling(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return _nfc(stem) + suffix.lower()


def _list(names: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(map(repr, names)), 200)
