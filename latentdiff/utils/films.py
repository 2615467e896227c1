"""Frames as a film, GIF or MP4, and as a strip, one row of them in one picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import ConfigError
from .grid import labelled_grid

SUFFIXES = (".gif", ".mp4")
FASTEST_GIF = 50.0  # frames a second: what a GIF shows for less than 2/100 s, browsers show for 10/100 s


def check_animation(path: str | Path, fps: float) -> None:
    """Before frames are drawn: can they be saved there?

    Raises:
        ConfigError: another suffix than .gif or .mp4, a number of frames a second that cannot be, no ffmpeg for MP4.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a film is saved as {' or '.join(SUFFIXES)}, not {suffix or 'without a suffix'}")
    if not 0 < fps <= (FASTEST_GIF if suffix == ".gif" else 1000):
        most = (
            f" and {FASTEST_GIF:g} at most, which is what a GIF can show" if suffix == ".gif" else " and 1000 at most"
        )
        raise ConfigError(f"fps={fps}: it must be above 0{most}")
    if suffix == ".mp4":
        _ffmpeg()


def save_animation(frames: Sequence[Image.Image], path: str | Path, fps: float = 12) -> Path:
    """Save pictures of one size, one after the other, as a GIF that repeats or an MP4 that any browser plays.

    Args:
        frames: drawn in RGB. Each of a GIF has a palette of its own, with 256 colours, and no dithering, which would
            flicker. MP4 is H.264 with colours at half the resolution; an odd side grows by one pixel.
        path: its suffix says which; the folder is made.
        fps: frames a second; in a GIF they last whole hundredths of a second, which add up right.

    Raises:
        ConfigError: see `check_animation`.
        ValueError: no frames, or sizes that differ.
    """
    check_animation(path, fps)
    if not frames:
        raise ValueError("no frames: a film needs at least one")
    if len({frame.size for frame in frames}) > 1:
        raise ValueError(f"the frames of a film must be of one size, not {sorted({frame.size for frame in frames})}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save = _save_gif if path.suffix.lower() == ".gif" else _save_mp4
    save([frame.convert("RGB") for frame in frames], path, fps)
    return path


def strip(frames: Sequence[Image.Image], columns: int = 8, labels: Sequence[str] | None = None) -> Image.Image:
    """`columns` of the frames (or all, if they are fewer) at even distances, the first and the last among them, in a
    row.

    labels: one for each frame; those of the chosen ones stand below them.
    """
    if columns < 2:
        raise ValueError(f"columns={columns}: a strip shows the first and the last frame, so that it needs 2 or more")
    chosen = np.unique(np.rint(np.linspace(0, len(frames) - 1, columns)).astype(int)) if frames else []
    labels = [""] * len(frames) if labels is None else labels
    return labelled_grid([frames[i] for i in chosen], [labels[i] for i in chosen], columns)


def _save_gif(frames: list[Image.Image], path: Path, fps: float) -> None:
    ends = [round(100 * (i + 1) / fps) for i in range(len(frames))]  # in the hundredths of a second that a GIF counts
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    # kmeans: the colours that were chosen are then moved to where the pixels are.
    first, *rest = (frame.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, disposal=1, optimize=False)


def _save_mp4(frames: list[Image.Image], path: Path, fps: float) -> None:
    pixels = [np.asarray(frame) for frame in frames]
    height, width = pixels[0].shape[:2]
    odd = ((0, height % 2), (0, width % 2), (0, 0))  # colours are shared by 2 x 2 pixels
    size = (width + width % 2, height + height % 2)
    writer = _ffmpeg().write_frames(
        str(path),
        size,
        fps=fps,
        codec="libx264",
        quality=8,
        macro_block_size=1,
        output_params=["-movflags", "+faststart"],
    )
    writer.send(None)
    for frame in pixels:
        writer.send(np.ascontiguousarray(np.pad(frame, odd, mode="edge")))
    writer.close()


def _ffmpeg():
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ConfigError(
            "MP4 needs the package imageio-ffmpeg: pip install 'latentdiff[video]'; or save a .gif"
        ) from None
    return imageio_ffmpeg
