"""What Linux, macOS and Windows have each in their own way, or not at all."""

import ctypes
import mmap
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

try:
    import resource
except ImportError:  # Windows
    resource = None

WINDOWS = os.name == "nt"
_SEEKING = threading.Lock()


def most_memory_used() -> int:
    """The most memory that this process has had at once, in bytes; where no system keeps it, what it has now."""
    if resource is None:
        import psutil

        now = psutil.Process().memory_info()
        return getattr(now, "peak_wset", now.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_there() -> int:
    """The machine's memory in bytes."""
    import psutil  # only now: its loading would be felt in `--help`

    return psutil.virtual_memory().total


def give_back_memory() -> None:
    """Return to the system what is free again, of which glibc would keep some; other C libraries are left alone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk; Windows has that for files alone, open for writing."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def advise(pages: mmap.mmap, advice: str, *where: int) -> None:
    """Say how a map will be read: "RANDOM", "WILLNEED" or "DONTNEED", of all of it or of (start, length) in bytes.

    Windows takes no advice.
    """
    if hasattr(pages, "madvise"):
        pages.madvise(getattr(mmap, f"MADV_{advice}"), *where)


def read_at(file: BinaryIO, start: int, count: int) -> bytes:
    """Bytes of an open file, for any number of threads; the file's position may be another one afterwards."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), count, start)
    with _SEEKING:
        file.seek(start)
        return file.read(count)
