"""What the page's visitors have sent: pictures in a folder and strokes in memory, both within bounds; and which of
their files a request may name."""

import contextlib
import os
import stat
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from gradio.data_classes import DataWithFiles

if TYPE_CHECKING:
    import gradio

NOT_UPLOADED = "only pictures that were uploaded to this page can be used: upload it again"
FILES_KEPT = 64  # times as many bytes as one upload may have
SMALLEST = 2**16  # bytes that a file counts as at least, which bounds their number, too
STROKES_OF_ONE = 16 * 2**20  # bytes of one session's painting
STROKES_OF_ALL = 128 * 2**20
LAYERS = 4  # of a painting; the page has one
META = {"_type": "gradio.FileData"}


class Refused(Exception):
    """What a request asks for is not done.

    Args:
        status: of HTTP.
        reason: one line, which the visitor reads.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Uploads:
    """The folder into which Gradio puts what is uploaded, and what it shows.

    Args:
        most: bytes of a single upload.
    """

    def __init__(self, folder: Path, most: int):
        self.folder, self.most = Path(os.path.realpath(folder)), most

    def holds(self, path: Any) -> bool:
        """Whether it is the name of a file in the folder, links followed. No other place of the disk is looked at."""
        try:
            if not Path(os.path.abspath(path)).is_relative_to(self.folder):
                return False
            real = os.path.realpath(path, strict=True)
            return Path(real).is_relative_to(self.folder) and stat.S_ISREG(os.lstat(real).st_mode)
        except (OSError, ValueError, TypeError):
            return False

    def checked(self, value: Any) -> Any:
        """JSON from a client in which every file is an upload, without the addresses that Gradio would load instead.

        Raises:
            Refused: it names another file; what that is, and whether it is there, makes no difference.
        """
        if isinstance(value, list):
            return [self.checked(one) for one in value]
        if not isinstance(value, dict):
            return value
        if not value.keys() & {"path", "url"}:
            return {name: self.checked(one) for name, one in value.items()}
        if not isinstance(value.get("path"), str) or not self.holds(value["path"]):
            raise Refused(403, NOT_UPLOADED)
        name = value.get("orig_name")
        return {
            "path": value["path"],
            "orig_name": PurePath(name).name if isinstance(name, str) else None,
            "meta": META,
        }

    def make_room(self) -> None:
        """Remove what is oldest until another upload fits."""
        files = []
        for path in (path for path in self.folder.rglob("*") if not path.is_dir()):
            try:
                status = path.lstat()
            except OSError:  # Gradio removes some, too
                continue
            files.append((status.st_mtime, path, max(status.st_size, SMALLEST)))
        held = sum(size for _, _, size in files)
        for _, path, size in sorted(files):
            if held + self.most <= FILES_KEPT * self.most:
                return
            path.unlink(missing_ok=True)
            held -= size
            if path.parent != self.folder:
                with contextlib.suppress(OSError):  # others are in it
                    path.parent.rmdir()


class Strokes:
    """What was painted and not drawn from yet, which the canvas keeps by the number of a painting."""

    def __init__(self, canvas: "gradio.ImageMask"):
        self.canvas = canvas
        self._painters: dict[str, str] = {}  # painting: session

    def put(self, session: str, form: dict[str, str], picture: bytes) -> None:
        """Keep a part of a painting; what is oldest goes where there is too much.

        Args:
            form: "type" (background, layer or composite), "index" of the layer, "id" of the painting.

        Raises:
            Refused: there is no such part, or the painting is too large.
        """
        painting, index = form.get("id", ""), form.get("index") or "null"
        if form.get("type") not in ("background", "layer", "composite") or not 0 < len(painting) <= 64:
            raise Refused(400, "no such part of a painting")
        if index not in ("null", *map(str, range(LAYERS))):
            raise Refused(400, f"a painting has {LAYERS} layers at most")
        kept = self._sizes()
        kept[painting] = kept.get(painting, 0) + len(picture)
        self._painters = {name: self._painters[name] for name in kept if name in self._painters} | {painting: session}
        if kept[painting] > STROKES_OF_ONE:
            self.canvas.blob_storage.pop(painting, None)
            raise Refused(413, f"a painting may have {STROKES_OF_ONE // 2**20} MB")
        own = {name: size for name, size in kept.items() if self._painters.get(name) == session}
        self._forget_oldest(own, painting, STROKES_OF_ONE)
        self._forget_oldest(self._sizes() | {painting: kept[painting]}, painting, STROKES_OF_ALL)
        self.canvas.accept_blobs(DataWithFiles(data={**form, "index": index}, files=[("stroke", picture)]))

    def _forget_oldest(self, kept: dict[str, int], but: str, most: int) -> None:
        held = sum(kept.values())
        for painting in [name for name in kept if name != but]:
            if held <= most:
                return
            self.canvas.blob_storage.pop(painting, None)
            held -= kept[painting]

    def _sizes(self) -> dict[str, int]:
        """Bytes of each painting, the oldest first."""
        return {
            painting: SMALLEST + sum(len(part or b"") for part in (one.background, one.composite, *one.layers))
            for painting, one in list(self.canvas.blob_storage.items())
        }
