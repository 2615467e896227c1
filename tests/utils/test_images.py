"""A picture of any kind comes out upright, on white and of the size asked for."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from latentdiff.utils.images import crop_box, resized, upright_rgb


def stored(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    """The picture as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def first_row(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image)[0].tolist()]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    """A telephone's pictures would be learned lying on their side or mirrored."""
    upright = Image.new("RGB", (3, 2), "white")
    upright.putpixel((0, 0), (255, 0, 0))
    upright.putpixel((2, 0), (0, 0, 255))
    # EXIF 2.3: what has to be done to the stored picture so that it stands upright, by orientation. Here the inverse.
    turn = Image.Transpose
    inverse = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }  # fmt: skip
    as_shot = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(upright_rgb(stored(as_shot, exif=exif))), np.asarray(upright))


def test_alpha_lies_on_white():
    """Transparent parts would be black, or whatever colour hides under them."""
    rgba = Image.fromarray(np.array([[[255, 0, 0, 255], [9, 9, 9, 0], [0, 0, 0, 51]]], dtype=np.uint8))
    # 51 / 255 = 0.2 of black on white: 0.8 * 255 = 204
    assert first_row(upright_rgb(stored(rgba))) == [(255, 0, 0), (255, 255, 255), (204, 204, 204)]
    grey = Image.merge("LA", (Image.new("L", (1, 1), 40), Image.new("L", (1, 1), 0)))
    assert first_row(upright_rgb(stored(grey))) == [(255, 255, 255)]


def test_palette():
    """Palette numbers would be taken for shades, or the transparent entry for a colour."""
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    image.putdata([0, 1, 2])
    assert first_row(upright_rgb(stored(image))) == [(10, 20, 30), (200, 100, 50), (0, 255, 0)]
    transparent = stored(image, transparency=1)
    assert first_row(upright_rgb(transparent)) == [(10, 20, 30), (255, 255, 255), (0, 255, 0)]
    assert first_row(upright_rgb(stored(image, "GIF", transparency=1)))[1] == (255, 255, 255)


@pytest.mark.parametrize("options", [{}, {"transparency": 65535}, {"transparency": 0}], ids=str)
def test_sixteen_bits(options):
    """All but the darkest 256 of 65,536 shades would be white."""
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    expected = [(v, v, v) for v in (0, 1, 128, 255)]
    assert first_row(upright_rgb(stored(image, **options))) == expected
    assert first_row(upright_rgb(Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.int32)))) == expected


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "RGB", "YCbCr"])
def test_other_modes(mode):
    """A grey, black-and-white or print-colour picture would be rejected or come out in false colours."""
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    assert upright_rgb(stored(image, kind)).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("size", [(30, 10), (10, 30), (17, 23), (8, 8), (1, 400), (640, 427)])
@pytest.mark.parametrize("target", [(8, 8), (16, 8), (24, 32)])
@pytest.mark.parametrize("at", [(0.5, 0.5), (0.0, 1.0), (0.3, 0.9)])
def test_the_same_as_pillow_s_own_fit(size, target, at):
    """The subject would be off centre, or a picture squeezed where it should be cropped."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = np.asarray(resized(image, target, crop_box(size, target, at)), dtype=int)
    pillows = np.asarray(ImageOps.fit(image, target, Image.Resampling.LANCZOS, centering=at), dtype=int)
    # Pillow rounds the part taken to whole pixels, as long as nothing is resized.
    assert np.abs(ours - pillows).max() <= 1


def test_the_whole_picture_stretched():
    wide = Image.new("RGB", (30, 10), "white")
    wide.paste((0, 0, 255), (10, 0, 20, 10))
    stretched = np.asarray(resized(wide, (30, 30), (0, 0, 30, 10)))
    assert stretched.shape == (30, 30, 3)
    assert stretched[15, 2].tolist() == [255] * 3 and stretched[15, 15].tolist() == [0, 0, 255]
    assert resized(wide, (10, 10), crop_box(wide.size, (10, 10))).getextrema() == ((0, 0), (0, 0), (255, 255))
