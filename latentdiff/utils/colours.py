"""What a picture's numbers mean: those of another colour space than sRGB are converted, by LittleCMS.

The intent is relative colorimetric with black point compensation, the default of photo editors: a colour that both
spaces have stays what it is, white is white, and ink's black is black. Between spaces given by primaries and a curve
(Display P3, Adobe RGB) there is no other. What lies outside of sRGB is cut off.

A profile counts before a PNG's gAMA and cHRM, and so does its sRGB chunk. gAMA is then the curve, cHRM the primaries
(sRGB's where it is missing). A gAMA within 5 % of 1/2.2 is how older writers say sRGB's own curve, as libpng takes it.

ICC.1:2022; PNG (third edition), 11.3.2; the primaries' matrix: Lindbloom, "RGB/XYZ Matrices", http://brucelindbloom.com.
"""

import struct
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

# By how many of 255 levels a profile may differ from sRGB anywhere and still be taken for it: as much as the profiles
# of that name differ. Of a power of 2.2 dark shades differ by 7, of Display P3 its green by 80.
TOLERANCE = 2
_MOST_BYTES = 1 << 24  # the largest ones of printers have 3 MB
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of white, red, green, blue
_D50 = (0.9642, 1.0, 0.8249)


def to_srgb(image: Image.Image) -> tuple[Image.Image, bool, str | None]:
    """A picture of 8 bits by its profile, or a PNG's gAMA and cHRM, in sRGB.

    Returns:
        The picture: one that is in sRGB already, or does not say, is itself, to the last bit. Another one is RGB or
        RGBA, without a profile.
        Whether it was converted.
        What is wrong with its profile, which is then ignored.
    """
    try:
        profile = _profile(image)
        if profile is None:
            return image, False, None
        space = _space(profile)
        colours, alpha = _channels(image, space)
        transform = _transform(profile, colours.mode)
    except Exception as error:  # LittleCMS and Pillow raise many kinds for what strangers call a profile
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return image, False, f"its colour profile is ignored ({reason})"
    if transform is None:
        return image, False, None
    converted = transform.apply(colours)
    converted.info.clear()
    if alpha:
        converted.putalpha(alpha)
    return converted, True, None


def _profile(image: Image.Image) -> bytes | None:
    info = image.info
    profile = info.get("icc_profile")
    if isinstance(profile, bytes) and profile:  # a PNG's text may have any name
        if len(profile) > _MOST_BYTES:
            raise ValueError(f"it has {len(profile)} bytes, more than {_MOST_BYTES}")
        return profile
    gamma, primaries = info.get("gamma"), info.get("chromaticity")
    if not isinstance(gamma, float) or isinstance(info.get("srgb"), int):
        return None
    like_srgb = abs(gamma * 2.2 - 1) < 0.05
    if like_srgb and not primaries:
        return None
    return matrix_profile(None if like_srgb else 1 / max(gamma, 1e-9), primaries or _SRGB_PRIMARIES)


def _space(profile: bytes) -> str:
    return ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip()


def _channels(image: Image.Image, space: str) -> tuple[Image.Image, Image.Image | None]:
    """The channels that a profile of this space speaks of, as L, RGB or CMYK, and the alpha channel.

    Raises:
        ValueError: the picture has others.
    """
    fits = {"GRAY": ("1", "L", "LA", "La"), "CMYK": ("CMYK",), "RGB": ("1", "L", "P", "RGB", "RGBX", "YCbCr", *_ALPHA)}
    if image.mode not in fits.get(space, ()):
        raise ValueError(f"it is one for {space}, and the picture is {image.mode}")
    if space == "CMYK":
        return image, None
    if image.mode in _ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return rgba.getchannel("R") if space == "GRAY" else rgba.convert("RGB"), rgba.getchannel("A")
    return image.convert("L" if space == "GRAY" else "RGB"), None


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB, None where that changes nothing."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return transform
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    shown = (greys if mode == "L" else np.concatenate([greys, colours]))[None]
    given = Image.fromarray(shown).convert(mode)
    change = np.asarray(transform.apply(given), dtype=int) - shown
    return transform if np.abs(change).max() > TOLERANCE else None


def matrix_profile(gamma: float | None, primaries: tuple[float, ...]) -> bytes:
    """An ICC profile of an RGB space.

    Args:
        gamma: the power that makes light of a value from 0 to 1; None for sRGB's curve.
        primaries: x and y of white, red, green and blue.

    Raises:
        ValueError: there is no such space.
    """
    numbers = np.array([*primaries, gamma or 1.0])
    if len(primaries) != 8 or not np.isfinite(numbers).all() or numbers.min() < 0 or not 0.1 <= (gamma or 1) <= 10:
        raise ValueError("its gAMA or cHRM is no colour space")
    xy = np.array(primaries).reshape(4, 2)
    if xy[:, 1].min() <= 0:
        raise ValueError("its cHRM is no colour space")
    white, *columns = np.stack([xy[:, 0] / xy[:, 1], np.ones(4), (1 - xy.sum(axis=1)) / xy[:, 1]], axis=1)
    columns = np.stack(columns, axis=1)
    # Bradford's: to the white of D50, which profiles are about.
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapt = np.linalg.inv(cones) @ np.diag((cones @ _D50) / (cones @ white)) @ cones
    colorants = adapt @ columns @ np.diag(np.linalg.solve(columns, white))
    # A parametric curve: type 0 is a power; type 3 has sRGB's straight piece (IEC 61966-2-1).
    kind, values = (0, [gamma]) if gamma else (3, [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045])
    curve = b"para" + struct.pack(">IHH", 0, kind, 0) + _fixed(values)
    tags = {name: b"XYZ \0\0\0\0" + _fixed(column) for name, column in zip("rgb", colorants.T, strict=True)}
    content = {f"{name}XYZ": tags[name] for name in "rgb"} | {f"{name}TRC": curve for name in "rgb"}
    content |= {"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50)}
    return _icc_file(content)


def _fixed(values) -> bytes:
    """As ICC's s15Fixed16Number."""
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def _icc_file(content: dict[str, bytes]) -> bytes:
    start = 128 + 4 + 12 * len(content)
    table, data = struct.pack(">I", len(content)), b""
    for name, tag in content.items():
        table += struct.pack(">4sII", name.encode(), start + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s", start + len(data), 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    header = (header.ljust(68, b"\0") + _fixed(_D50)).ljust(128, b"\0")
    return header + table + data
