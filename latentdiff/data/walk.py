"""The files of a data folder: which are data, which cannot be read, and what systems and programs left among them."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..utils.errors import first_line
from ..utils.images import SUFFIXES

# Of folders and files that nobody put there by hand: what begins with a dot (`.ipynb_checkpoints`, `._0.png` of macOS),
# and these.
_CLUTTER = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"}
# Any of these makes a folder one that training or saving wrote; pictures in it were drawn.
_OUTPUT = ("train_config.yaml", "log.jsonl", "model_index.json")

_HEIC = {".heic", ".heics", ".heif", ".heifs", ".hif"}
_RAW = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".kdc", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf",
    ".raw", ".rw2", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip
_OTHERS = {
    ".ai", ".avif", ".avifs", ".dds", ".eps", ".exr", ".fits", ".hdp", ".hdr", ".jxl", ".jxr", ".pdf", ".psb", ".psd",
    ".qoi", ".svg", ".svgz", ".wdp", ".xcf",
}  # fmt: skip
UNREAD = frozenset(_HEIC | _RAW | _OTHERS) - SUFFIXES
"""Suffixes of pictures that are not read here."""


def why_unread(suffix: str) -> str:
    """What to do about a suffix of `UNREAD`."""
    if suffix in _HEIC:
        return f"{suffix} is read where pillow-heif is installed (pip install 'latentdiff[heic]')"
    return f"{suffix} is no kind of picture that is read here; save it as PNG, JPEG or WebP"


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is none of the data."""
    return name.startswith(".") or name.lower() in _CLUTTER


class Entry(NamedTuple):
    """What lies in a data folder: its name from there, with slashes, and "file", "folder" or "other" (a pipe, a device,
    a link that leads nowhere)."""

    name: str
    kind: str


def walk(root: Path, tell: Callable[[str, str, bool], None] = lambda name, reason, is_output: None) -> Iterator[Entry]:
    """All that lies in a folder and below, also behind links to folders, each folder once; no clutter.

    Args:
        tell: gets the name of a folder that is left out, the reason, and whether that is that a run or a model lies in
            it (the root may be one).
    """
    seen: set[tuple[int, int]] = set()
    folders, links = deque([""]), deque()  # links last, so that a folder goes by its own name where it has one
    while folders or links:
        inside = folders.popleft() if folders else links.popleft()
        try:
            status = os.stat(os.path.join(root, inside))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, inside)) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            tell(inside or str(root), f"the folder cannot be read ({first_line(error)})", False)
            continue
        if inside and (marks := [entry.name for entry in entries if entry.name in _OUTPUT]):
            tell(inside, f"a run or a model lies there ({marks[0]}): nothing in it is taken for data", True)
            continue
        for entry in entries:
            if not is_clutter(entry.name):
                found = Entry(os.path.join(inside, entry.name), _kind(entry))
                if found.kind == "folder":
                    (links if entry.is_symlink() else folders).append(found.name)
                yield found


def _kind(entry: os.DirEntry) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link to itself
        return "other"
