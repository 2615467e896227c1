"""Films and strips: what is saved is what was drawn, at the pace asked for, or the reason why not is one line."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageSequence

from latentdiff.utils.errors import ConfigError
from latentdiff.utils.films import check_animation, save_animation, strip


def moving(count: int, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    """Smooth shades that change from frame to frame, with a red disc that moves over them."""
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    shades = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    frames = [Image.fromarray(np.roll(shades, i, axis=2)) for i in range(count)]
    for i, frame in enumerate(frames):
        ImageDraw.Draw(frame).ellipse((i * 2, 4, i * 2 + 9, 13), fill=(220, 30, 30))
    return frames


def error(a: Image.Image, b: Image.Image) -> float:
    """Root mean square over pixels, of 255."""
    return float(np.sqrt(np.mean((np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)) ** 2)))


def test_gif_keeps_pictures_and_repeats(tmp_path):
    """Else colours are of the first frame or a fixed palette (44 and 19 of 255 apart), or the film stops."""
    frames = moving(8)
    path = save_animation(frames, tmp_path / "new" / "film.GIF", fps=10)
    with Image.open(path) as film:
        assert film.format == "GIF" and film.n_frames == 8 and film.info["loop"] == 0
        shown = [frame.copy() for frame in ImageSequence.Iterator(film)]
    assert max(error(a, b) for a, b in zip(frames, shown, strict=True)) < 5
    assert error(frames[0], shown[-1]) > 20


@pytest.mark.parametrize("fps", [8, 12, 30, 50])
def test_gif_lasts_as_long_as_asked_for(tmp_path, fps):
    """Else 30 frames a second, 3.33 hundredths each, play at 33."""
    path = save_animation(moving(10) * 2, tmp_path / "film.gif", fps)
    with Image.open(path) as film:
        lasting = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]
    assert sum(lasting) == pytest.approx(20_000 / fps, abs=10)
    assert max(lasting) - min(lasting) <= 10


def test_gif_of_pictures_that_stand_still_lasts_too(tmp_path):
    """Else a pause in a film is shorter than it was, since equal frames are stored once."""
    frames = moving(2)
    path = save_animation([frames[0]] * 5 + [frames[1]], tmp_path / "film.gif", fps=10)
    with Image.open(path) as film:
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(film)] == [500, 100]


@pytest.mark.parametrize("size", [(32, 32), (33, 31)])
def test_mp4_keeps_pictures_and_pace(tmp_path, size):
    """Else it does not open, runs at another pace, or odd pictures are stretched or refused."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    frames = moving(12, size)
    path = save_animation(frames, tmp_path / "film.mp4", fps=6)
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = size[0] + size[0] % 2, size[1] + size[1] % 2
    assert about["size"] == (width, height) and about["fps"] == 6 and about["codec"] == "h264"
    assert about["pix_fmt"].startswith("yuv420p")  # what browsers play
    shown = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    assert len(shown) == 12
    cut = [Image.fromarray(frame[: size[1], : size[0]]) for frame in shown]
    assert max(error(a, b) for a, b in zip(frames, cut, strict=True)) < 15
    assert error(frames[0], cut[-1]) > 20


@pytest.mark.parametrize(
    ("path", "fps", "message"),
    [
        ("film.avi", 12, "film.avi: .*[.]gif or [.]mp4, not [.]avi"),
        ("film", 12, "without a suffix"),
        ("film.gif", 60, "fps=60: .* 50 at most"),
        ("film.mp4", 0, "fps=0: .* above 0"),
        ("film.gif", float("nan"), "fps=nan"),
    ],
)
def test_what_cannot_be_saved_is_said_before_anything_is_drawn(path, fps, message):
    """Else minutes of drawing end in an error about the file's name."""
    with pytest.raises(ConfigError, match=message) as caught:
        check_animation(path, fps)
    assert "\n" not in str(caught.value)


def test_missing_package_is_named(tmp_path, monkeypatch):
    """Else a user meets an ImportError without a remedy; a GIF needs nothing."""
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ConfigError, match=r"latentdiff\[video\]"):
        save_animation(moving(2), tmp_path / "film.mp4")
    assert save_animation(moving(2), tmp_path / "film.gif").is_file()


def test_frames_must_be_there_and_of_one_size(tmp_path):
    """Else Pillow's own errors, or a film whose frames lie one over another."""
    with pytest.raises(ValueError, match="no frames"):
        save_animation([], tmp_path / "film.gif")
    with pytest.raises(ValueError, match=r"one size, not \[\(32, 32\), \(40, 32\)\]"):
        save_animation([*moving(1), *moving(1, (40, 32))], tmp_path / "film.gif")


def test_strip_shows_first_last_and_what_lies_between():
    """Else a picture of an interpolation lacks an end of it, or has frames in another order."""
    frames = [Image.new("RGB", (128, 128), (20 * i, 0, 0)) for i in range(11)]
    picture = strip(frames, 6)
    row = np.asarray(picture)[picture.height // 3, :, 0]
    reds = row[np.asarray(picture)[picture.height // 3, :, 1] == 0]  # not the white between
    assert np.unique(reds).tolist() == [0, 40, 80, 120, 160, 200] and np.all(np.diff(reds.astype(int)) >= 0)
    assert strip(frames[:3], 6).width < picture.width
    assert strip(frames, 6, [str(i) for i in range(11)]).height > picture.height
    with pytest.raises(ValueError, match="columns=1"):
        strip(frames, 1)
    with pytest.raises(ValueError, match="0 pictures"):
        strip([], 4)
