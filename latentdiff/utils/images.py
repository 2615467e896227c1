"""One picture: opened whatever it is, turned upright, in sRGB, put on white, cropped and brought to size."""

import importlib
import logging
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageOps

from .colours import to_srgb

logger = logging.getLogger(__name__)

# Pictures of pixels, whatever a file calls itself. Not EPS, which Pillow would hand to Ghostscript to run.
_PIXELS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"
)  # fmt: skip
Image.init()  # Pillow registers most of its formats only when it is asked to
with suppress(ImportError):  # telephones' HEIC, with the extra `heic`; asked for at run time: diffusers does without
    importlib.import_module("pillow_heif").register_heif_opener()
FORMATS = tuple(kind for kind in _PIXELS if kind in Image.OPEN)  # MPO is opened as JPEG
SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _PIXELS)


class Decoded(NamedTuple):
    """A picture as `upright_rgb` makes it.

    Attributes:
        converted: whether its colours were others than sRGB's.
        complaint: what was wrong with it that did not keep it from being read.
    """

    image: Image.Image
    converted: bool
    complaint: str | None


def open_decoded(file: Path | BinaryIO) -> Decoded:
    """The picture in a file.

    Raises:
        Exception: Pillow raises many kinds for a broken file, and one for a picture so large that it may be a trap.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            return decode(image)


def open_upright(file: Path | BinaryIO) -> Image.Image:
    """The picture in a file; a complaint is logged.

    Raises:
        Exception: as `open_decoded`.
    """
    return _said(open_decoded(file), file)


def upright(image):
    """A PIL picture, or those of a list, turned as EXIF says; anything else as it is."""
    if isinstance(image, list | tuple):
        return [upright(one) for one in image]
    return ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB: the first frame, turned as its EXIF says, in sRGB, what is transparent on white.

    A colour profile that cannot be used is ignored, and that is logged.

    Raises:
        ValueError: its shades are floating-point numbers, of which none is known to be white.
    """
    return _said(decode(image), getattr(image, "filename", ""))


def decode(image: Image.Image) -> Decoded:
    """As `upright_rgb`, which says what this only returns.

    Raises:
        ValueError: as there.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its shades are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I;16") or image.mode == "I":
        image.info.pop("transparency", None)  # a shade of 16 bits, which Pillow cannot apply
        image = image.point(lambda value: value / 256).convert("L")
    image, converted, complaint = to_srgb(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return Decoded(image.convert("RGB"), converted, complaint)


def _said(decoded: Decoded, file: Path | BinaryIO | str) -> Image.Image:
    if decoded.complaint:
        name = file if isinstance(file, Path | str) else getattr(file, "name", "")
        logger.warning("%s: %s", name or "a picture", decoded.complaint)
    return decoded.image


def crop_box(
    size: tuple[int, int], target: tuple[int, int], at: tuple[float, float] = (0.5, 0.5)
) -> tuple[float, float, float, float]:
    """The largest part of a picture that has the target's shape, as (left, top, right, bottom) in pixels.

    Args:
        size, target: width and height.
        at: how far along what is left over the part lies, each from 0 to 1; the middle by default.
    """
    width, height = size
    ratio = target[0] / target[1]
    part = (height * ratio, height) if width >= height * ratio else (width, width / ratio)
    left, top = (width - part[0]) * at[0], (height - part[1]) * at[1]
    return left, top, left + part[0], top + part[1]


def resized(image: Image.Image, target: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """The part `box` of a picture at the size `target`, by Lanczos' filter."""
    return image.resize(target, Image.Resampling.LANCZOS, box=box)
