"""WebDataset tars as a source of captioned pictures: each is listed once, then any picture is read where it lies.

Members that follow each other and share a key are a sample: a picture, and a .txt, .caption or .json with its captions.
The key is the name up to the first dot after the last slash. Nothing is unpacked to disk. A tar may come from anyone:
no name, size or link in it is believed, and what is wrong with it is a row's problem and ends nothing.
Format: https://github.com/webdataset/webdataset and POSIX.1-2001, pax interchange format.
"""

import io
import json
import os
import re
import tarfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ..utils.errors import ConfigError
from ..utils.images import SUFFIXES
from ..utils.text import decoded, lines
from .sources import Row, clean, stamp_of
from .walk import UNREAD, is_clutter, why_unread

_PICTURES = {suffix[1:] for suffix in SUFFIXES}
_PICTURE = "image/*"  # what no extension is
_CAPTIONS = ("json", "txt", "caption")  # the first that has any is used
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_COMPRESSED_BYTES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")

_UNPACK = "it is compressed; unpack it to a plain .tar first, since samples are read at random"
_APART = "; the members of a sample stand together in the tar (tar --sort=name)"

# Bytes that are read into memory at once, whatever the tar claims.
_MAX_HEADER = 1 << 14  # a path has at most 4096; reading some hostile headers takes tarfile time and memory squared
_MAX_CAPTIONS = 1 << 20
_MAX_PICTURE = 1 << 30  # more than the pixels that Pillow agrees to decode take uncompressed


def tar_files(folder: Path) -> list[Path]:
    """The tars of a folder by name, compressed ones too, which `Tars` refuses rather than leaves out."""
    kinds = (".tar", *_COMPRESSED)
    return sorted(
        path for path in folder.iterdir() if path.name.endswith(kinds) and not path.is_dir() and path.name[0] != "."
    )


class Tars:
    """Uncompressed local tars of samples.

    Args:
        paths: the tars, in the order of their samples.
        caption_column: the key of the captions in a .json: a text, or a list of texts. Without it a .txt or .caption
            counts, one caption a line.

    Raises:
        ConfigError: one is compressed, or two have the same name.
    """

    def __init__(self, paths: Sequence[Path], caption_column: str):
        self._caption_column = caption_column
        self._paths = {path.name: path for path in paths}
        if len(self._paths) < len(paths):
            raise ConfigError(f"train_data_dir: two tars have the same name among {', '.join(map(str, paths))}")
        for path in paths:
            if path.name.endswith(_COMPRESSED):
                raise ConfigError(f"train_data_dir: {str(path)!r}: {_UNPACK}")
            if os.path.lexists(path) and not path.is_file():  # at a pipe a run would wait for ever
                raise ConfigError(f"train_data_dir: {str(path)!r} is no file (a pipe, a device, a dead link)")

    def rows(self) -> Iterator[Row]:
        """Every sample in the order of the tars, and after a tar that cannot be read to its end a row that says so."""
        for path in self._paths.values():
            try:
                with _Tar(path) as tar:
                    for key, members in groupby(_members(tar), key=lambda member: member.key):
                        yield self._row(tar, key, members)
            except OSError as error:
                yield Row(path.name, [], f"it cannot be read ({error.strerror or error})")

    def open(self, place: Sequence) -> io.BytesIO:
        """The bytes of one picture.

        Raises:
            OSError: the tar cannot be read.
            ValueError: the tar is not there, or no longer the one that was listed.
        """
        name, offset, size, *state = place
        if name not in self._paths:
            raise ValueError(f"there is no tar {name!r}")
        with _Tar(self._paths[name]) as tar:
            content = tar.content(offset, size)
            if tar.state() != state or len(content) < size:  # asked last, so that a change while reading shows
                raise ValueError(f"{name!r} has changed since its samples were listed")
        return io.BytesIO(content)

    def _row(self, tar: "_Tar", key: str, members: "Iterable[_Member]") -> Row:
        """One sample. However many members share the key, only those that count are kept."""
        found: dict[str, _Member] = {}
        texts, problem, unread = {}, None, ""
        for member in members:
            wrong = member.problem
            kind = _PICTURE if member.extension in _PICTURES else member.extension
            unread = unread or (kind if f".{kind}" in UNREAD else "")
            if kind in found:
                wrong = f"it has two of a kind, {found[kind].name} and {member.name}"
            elif kind in _CAPTIONS and not wrong:
                texts[kind], wrong = _text(tar, member)
            if kind in (_PICTURE, *_CAPTIONS):
                found.setdefault(kind, member)
            problem = problem or wrong
        captions, missing = self._captions(texts)
        picture = found.get(_PICTURE)
        none = why_unread(f".{unread}") if unread else f"it has no picture{_APART}"
        problem = problem or (missing if picture else none)
        name = "/".join(filter(None, (tar.path.name, (picture.name if picture else key).removeprefix("./"))))
        if problem:
            return Row(name, captions, problem)
        place = [tar.path.name, picture.offset, picture.size, *tar.listed]
        return Row(name, captions, None, place, tar.stamp and f"{tar.stamp}|{picture.offset}|{picture.size}")

    def _captions(self, texts: dict) -> tuple[list[str], str | None]:
        """The captions, or none and why."""
        record = texts.get("json") or {}
        for said in (record.get(self._caption_column), texts.get("txt"), texts.get("caption")):
            if captions := clean(said):
                return captions, None
        if not record:
            return [], f"its caption is missing{_APART}"
        keys = textwrap.shorten(", ".join(map(repr, record)), 200)
        return [], f"its caption is missing: its .json has no {self._caption_column!r} (caption_column), but {keys}"


# ------------------------------------------------------------------------------------------------ the inside of a tar


@dataclass(frozen=True)
class _Member:
    """A member that can be part of a sample, or with an empty key what is wrong with the tar itself."""

    key: str
    problem: str | None
    name: str = ""
    extension: str = ""
    offset: int = 0
    size: int = 0


class _Tar(io.BufferedReader):
    """An open tar, of which `tarfile` reads the headers; its reads are bounded, since it believes what a header claims.

    Attributes:
        listed: size and time of change when it was opened.
        stamp: the `stamp_of` the tar.
    """

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.path, self.listed, self.stamp = path, self.state(), stamp_of(path)
        self._allowance = _MAX_HEADER

    def state(self) -> list[int]:
        """What changes with the tar: its size in bytes and its time of change in nanoseconds."""
        status = os.fstat(self.fileno())
        return [status.st_size, status.st_mtime_ns]

    def content(self, offset: int, size: int) -> bytes:
        """`size` bytes, or fewer where the tar ends."""
        self.seek(offset)
        return super().read(size)

    def read(self, size: int = -1) -> bytes:
        """For `tarfile`, which reads nothing but headers here."""
        self._allowance -= size
        if size < 0 or self._allowance < 0:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADER} bytes")
        return super().read(size)

    def headers(self) -> Iterator[tarfile.TarInfo]:
        """The header of each member.

        Raises:
            Exception: of many kinds, at a header that is broken and at the end of a tar without an end mark.
        """
        reader = tarfile.TarFile(fileobj=self, encoding="utf-8", errors="backslashreplace")
        end = 0
        while member := reader.next():
            if member.size < 0 or reader.offset <= end:
                raise tarfile.ReadError(f"the size at byte {end} is negative")
            end = reader.offset
            yield member
            self._allowance = _MAX_HEADER
            reader.members.clear()  # it would keep them all, and every global header
            reader.pax_headers.clear()
        self._check_end(end)

    def _check_end(self, end: int) -> None:
        """`tarfile` takes a damaged header for the end, and does not look whether anything follows it."""
        self.seek(end)
        block, rest = super().read(512), super().read(1 << 20)  # it is filled up with zeros, usually to 10 KiB
        if not block:
            raise tarfile.ReadError(f"no end mark at byte {end}: it may be cut off")
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {end}")
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"more after the end mark at byte {end}: two tars in one?")


def _members(tar: _Tar) -> Iterator[_Member]:
    """What a tar holds of samples, and last, with an empty key, what is wrong with the tar itself."""
    at, empty = 0, True
    try:
        for header in tar.headers():
            at = header.offset_data + header.size
            if member := _member(header, tar.listed[0]):
                empty = False
                yield member
    except Exception as error:  # tarfile raises many kinds for a broken header
        yield _Member("", _why_broken(tar, at, error))
    else:
        if empty:
            yield _Member("", "it holds no samples")


def _why_broken(tar: _Tar, at: int, error: Exception) -> str:
    if at:
        return f"it is not read beyond byte {at} ({error})"
    if tar.content(0, 6).startswith(_COMPRESSED_BYTES):
        return _UNPACK
    return f"it is no tar ({error})"


def _member(header: tarfile.TarInfo, tar_size: int) -> _Member | None:
    """A member with its key, extension and what is wrong with it. None is a folder or a file of no sample, such as what
    systems and programs leave in folders."""
    folder, slash, file = header.name.rpartition("/")
    stem, _, extension = file.partition(".")
    extension = extension.lower()
    problem = _refusal(header, file, extension, tar_size)
    if header.isdir() or not (problem or (stem and extension)) or re.match(r"__[^/]*__(/|$)", header.name):
        return None
    if any(is_clutter(part) for part in header.name.split("/") if part not in (".", "..")):
        return None
    return _Member(folder + slash + stem or file, problem, header.name, extension, header.offset_data, header.size)


def _refusal(header: tarfile.TarInfo, file: str, extension: str, tar_size: int) -> str | None:
    limit = _MAX_PICTURE if extension in _PICTURES else _MAX_CAPTIONS if extension in _CAPTIONS else tar_size
    if header.name.startswith("/") or ".." in header.name.split("/"):  # Python 3.12 keeps all parts of all paths
        return "its name leads out of the tar"
    if header.issym() or header.islnk():
        return f"{file} is a link"
    if not header.isreg() or header.issparse():
        return f"{file} is no ordinary file (a device, a pipe, a sparse file)"
    if header.offset_data + header.size > tar_size:
        return f"{file} is cut off: the tar ends before its {header.size} bytes do"
    if header.size > limit:
        return f"{file} has {header.size} bytes, more than {limit}"
    return None


def _text(tar: _Tar, member: _Member) -> tuple[dict | list[str] | None, str | None]:
    """The lines of a text or the object of a JSON, and what is wrong with it."""
    try:
        text = decoded(tar.content(member.offset, member.size))
        if member.extension != "json":
            return lines(text), None
        record = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        return None, f"its .{member.extension} cannot be read ({error})"
    return (record, None) if isinstance(record, dict) else (None, "its .json is no JSON object")
