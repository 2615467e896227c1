"""Where files lie, files written whole or not at all, and what they are known by."""

import contextlib
import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .system import sync


def cache_folder() -> Path:
    """Where the built emoji and everything encoded is kept: $LATENTDIFF_CACHE, else the user's cache folder.

    Raises:
        ConfigError: the user has none.
    """
    if own := os.environ.get("LATENTDIFF_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "latentdiff"
    try:
        return Path.home() / ".cache" / "latentdiff"
    except RuntimeError:
        raise ConfigError("there is no home folder for the cache: set HOME or LATENTDIFF_CACHE") from None


def packaged_checkpoint() -> str:
    """The shipped checkpoint beside the package in a checkout; a plain relative path elsewhere."""
    beside = Path(__file__).resolve().parents[2] / "checkpoints" / "emoji64"
    if not beside.is_dir():
        return "checkpoints/emoji64"
    try:
        return os.path.relpath(beside)
    except ValueError:  # Windows, from another drive
        return str(beside)


def check_shipped(name: str, setting: str = "") -> None:
    """Refuse the name of a shipped checkpoint that is not here, which would be looked for on the Hub.

    Args:
        setting: what named it.

    Raises:
        ConfigError: it is not here.
    """
    if Path(name).parts[:1] == ("checkpoints",) and not Path(name).exists():
        raise ConfigError(
            f"{setting}{name}: no such folder; the checkpoints that latentdiff ships are in its repository, not in the "
            "installed package: start in a checkout, or name another model"
        )


def read_json(path: str | os.PathLike) -> Any:
    """What a file of JSON holds.

    Raises:
        OSError: it cannot be read, or is no file, of which a pipe would be waited at.
        ValueError: it is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_at_most(path: str | os.PathLike, most: int) -> bytes:
    """What a file holds, which may be a pipe that a shell made of a command's output.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds more than `most` bytes, as a device may for ever.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most // 2**20} MiB")
    return content


def write_whole(path: str | os.PathLike, content: bytes | Callable[[Path], object], aside: Path | None = None) -> None:
    """Write aside, sync, rename: nobody ever finds half a file. The folder is made if need be.

    Args:
        content: the bytes, or what writes them to a path where memory should not hold them twice.
        aside: where it is written at first, in the same folder; by default a hidden name of this process.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside or path.with_name(f".{path.name}.{os.getpid()}")
    try:
        content(aside) if callable(content) else aside.write_bytes(content)
        move_into_place(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def remove_asides(folder: Path) -> None:
    """Remove what killed processes were writing by `write_whole` in a folder that this one alone writes to."""
    for path in folder.glob(".*"):
        if path.suffix[1:].isdigit() and path.is_file():
            path.unlink()


def give_usual_mode(written: Path) -> None:
    """Give a file, or what lies in a folder, the mode that the umask says: safetensors writes for the owner alone."""
    folder = written if written.is_dir() else written.parent
    files = [written] if written.is_file() else [path for path in written.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors" and not path.is_symlink()]
    if weights:
        probe = folder / f".mode.{os.getpid()}"  # to ask for the umask is to set it, for all threads
        probe.touch()
        mode = probe.stat().st_mode & 0o666
        probe.unlink()
        for path in weights:
            path.chmod(mode)


def move_into_place(aside: Path, final: Path) -> None:
    """Give what was written aside, a file or a folder, its name once it is on the disk, and put that onto it, too."""
    give_usual_mode(aside)
    for path in [aside] if aside.is_file() else (path for path in aside.rglob("*") if path.is_file()):
        sync(path)
    os.replace(aside, final)
    sync(final.parent)


def is_single_file(path: str | os.PathLike) -> bool:
    """Whether a path, there or not, is one of a model in a single file, and not a folder or a name on the Hub."""
    named = Path(path).suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
    return os.path.isfile(path) or (named and not os.path.isdir(path))


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: str | os.PathLike, weights: bool = True) -> str:
    """SHA-256 over the names and contents of the configs, vocabularies and safetensors of a pipeline or a model.

    Of a pipeline only the folders of its parts count, not what else lies there, such as pictures and checkpoints of its
    training. A file is read once in a process unless it changes.

    Args:
        weights: False leaves these out.
    """
    folder = Path(folder)
    roots = [path for path in folder.iterdir() if path.is_dir()] if (folder / "model_index.json").is_file() else []
    if roots:
        parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        roots = [root for root in roots if isinstance(parts.get(root.name), list)]
    digest = hashlib.sha256()
    files = (path for root in roots or [folder] for path in _read_at_loading(root))
    for path in sorted(path for path in files if weights or path.suffix in (".json", ".txt")):
        status = path.stat()
        content = _content_sha256(path, status.st_size, status.st_mtime_ns)
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _read_at_loading(folder: Path) -> list[Path]:
    """A part's configs, vocabularies and weights; pickled ones only where there are no others."""
    files = [path for path in folder.iterdir() if path.is_file()]
    weights = ".safetensors" if any(path.suffix == ".safetensors" for path in files) else ".bin"
    return [path for path in files if path.suffix in (".json", ".txt", weights)]


@functools.lru_cache(maxsize=4096)
def _content_sha256(path: Path, size: int, modified: int) -> str:
    return file_sha256(path)
