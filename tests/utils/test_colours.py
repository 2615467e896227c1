"""Another colour space than sRGB looks as it was meant to; a picture in sRGB stays what it is to the last bit."""

import io
import logging
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from latentdiff.utils.colours import matrix_profile
from latentdiff.utils.images import decode, open_upright, upright_rgb

D65 = (0.3127, 0.3290)
SRGB = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
DISPLAY_P3 = (*D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)  # SMPTE EG 432-1, with sRGB's curve
ADOBE_RGB = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)  # Adobe RGB (1998), with the power 563 / 256
SHADES = np.random.default_rng(0).integers(60, 190, (6, 7, 3), dtype=np.uint8)  # within what sRGB can show


def light(values: np.ndarray, gamma: float | None) -> np.ndarray:
    """IEC 61966-2-1, or a power."""
    if gamma:
        return values**gamma
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_xyz(primaries) -> np.ndarray:
    xyz = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(primaries[::2], primaries[1::2], strict=True)]
    columns = np.stack(xyz[1:], axis=1)
    return columns @ np.diag(np.linalg.inv(columns) @ xyz[0])


def in_srgb(shades: np.ndarray, gamma: float | None, primaries) -> np.ndarray:
    """By the definition of both spaces, which have one white."""
    linear = light(shades / 255, gamma) @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def stored(image: Image.Image, kind: str = "PNG", **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def grey_profile(gamma: float) -> bytes:
    """The red curve of a profile of three colours as one of grey."""
    rgb = bytearray(matrix_profile(gamma, SRGB).replace(b"RGB ", b"GRAY").replace(b"rTRC", b"kTRC"))
    return bytes(rgb)


def cmyk_profile(colours: dict[tuple[int, ...], tuple[float, float, float]]) -> bytes:
    """CIELAB at the sixteen corners of ink, by lut8Type (ICC.1:2022, 10.10); those that are not named are black."""
    corners = [tuple(int(bit) for bit in f"{number:04b}") for number in range(16)]
    lab = np.array([colours.get(corner, (0, 0, 0)) for corner in corners])
    ramp = bytes(range(256))
    table = (lab * (2.55, 1, 1) + (0, 128, 128)).round().astype(np.uint8).tobytes()
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + ramp * 4 + table + ramp * 3
    header = struct.pack(">I4xI4s4s4s12x4s", 144 + len(lut), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    header = (header.ljust(68, b"\0") + d50).ljust(128, b"\0")
    return header + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut


@pytest.mark.parametrize(
    ("gamma", "primaries"), [(None, DISPLAY_P3), (563 / 256, ADOBE_RGB), (1.8, SRGB)], ids=["P3", "Adobe", "power 1.8"]
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "RGBA", "palette"])
def test_another_colour_space(gamma, primaries, kind):
    """Telephones' and photographers' pictures would be learned, and edited, paler or redder than they are."""
    image, options = Image.fromarray(SHADES), {"icc_profile": matrix_profile(gamma, primaries)}
    if kind == "RGBA":
        image.putalpha(255)
    if kind == "palette":
        image = image.quantize(256)
    options |= {"lossless": True} if kind == "WEBP" else {}
    given = stored(image, kind if kind in ("TIFF", "WEBP") else "PNG", **options)
    before = np.asarray(given.convert("RGB"), dtype=int)
    found = decode(given)
    expected = in_srgb(before, gamma, primaries)
    assert found.converted and not found.complaint and np.abs(expected - before).max() > 8
    assert np.abs(np.asarray(found.image) - expected).max() <= 1.5
    # Converted once: it carries no profile, by which it would be converted again, or saved as what it no longer is.
    assert "icc_profile" not in found.image.info and not decode(found.image).converted


def test_the_red_that_everybody_compares_with():
    """sRGB's red is (234, 51, 35) in Display P3 (WebKit, "Improving Color on the Web")."""
    red = Image.new("RGB", (1, 1), (234, 51, 35))
    red.info["icc_profile"] = matrix_profile(None, DISPLAY_P3)
    assert upright_rgb(red).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_srgb_by_its_profile_stays_to_the_last_bit(mode):
    """Every picture that says what it is anyway would have other latents than before, by a rounding here and there."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 4), dtype=np.uint8)).convert(mode)
    plain = upright_rgb(stored(image))
    for profile in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        matrix_profile(None, SRGB),
        matrix_profile(None, (0.3127, 0.3290, 0.6400, 0.3300, 0.3000, 0.6010, 0.1501, 0.0602)),
    ):
        found = decode(stored(image, icc_profile=profile))
        assert not found.converted and found.image.tobytes() == plain.tobytes()


def test_grey_and_alpha():
    """Grey scans would come out too dark, and what is transparent with the colours under it."""
    shades = np.arange(0, 256, 5, dtype=np.uint8)[None]
    expected = in_srgb(shades.repeat(3).reshape(-1, 3), 1.8, SRGB)
    for image in (Image.fromarray(shades), Image.fromarray(shades).convert("LA")):
        found = decode(stored(image, icc_profile=grey_profile(1.8)))
        assert found.converted and np.abs(np.asarray(found.image)[0] - expected).max() <= 1.5
    rgba = Image.new("RGBA", (1, 1), (0, 200, 0, 0))
    assert upright_rgb(stored(rgba, icc_profile=matrix_profile(None, DISPLAY_P3))).getpixel((0, 0)) == (255,) * 3
    sixteen = Image.fromarray(shades.astype(np.uint16) * 256)
    found = decode(stored(sixteen, icc_profile=grey_profile(1.8)))
    assert found.converted and np.abs(np.asarray(found.image)[0] - expected).max() <= 1.5


def test_ink():
    """The picture of a printing house would have the colours of no ink in particular."""
    profile = cmyk_profile({(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): (60, -30, -40), (0, 1, 0, 0): (50, 70, 0)})
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0), (255, 0, 0, 0): lab((60, -30, -40))}
    for ink, expected in inks.items():
        found = decode(stored(Image.new("CMYK", (8, 8), ink), "TIFF", icc_profile=profile))
        assert found.converted and np.abs(np.subtract(found.image.getpixel((0, 0)), expected)).max() <= 4, ink
    plain = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert upright_rgb(stored(plain, "TIFF")).getpixel((0, 0)) == (0, 255, 255)


def lab(colour) -> np.ndarray:
    """CIELAB under D50 in sRGB, by Bradford's way from D50 to D65 (Lindbloom)."""
    y = (colour[0] + 16) / 116
    xyz = np.array([y + colour[1] / 500, y, y - colour[2] / 200]) ** 3 * (0.9642, 1, 0.8249)
    adapt = [
        [0.9555766, -0.0230393, 0.0631636], [-0.0282895, 1.0099416, 0.0210077], [0.0122982, -0.0204830, 1.3299098]
    ]  # fmt: skip
    linear = (np.linalg.inv(to_xyz(SRGB)) @ adapt @ xyz).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("image", "profile", "reason"),
    [
        (Image.new("RGB", (4, 4), (9, 99, 199)), b"no profile", "cannot open profile"),
        (Image.new("RGB", (4, 4), (9, 99, 199)), matrix_profile(1.8, DISPLAY_P3)[:200], "("),
        (Image.new("RGB", (4, 4), (9, 99, 199)), matrix_profile(1.8, DISPLAY_P3)[:132] + bytes(300), "("),
        (Image.new("RGB", (4, 4), (9, 99, 199)), cmyk_profile({}), "one for CMYK, and the picture is RGB"),
        (Image.new("RGB", (4, 4), (9, 99, 199)), grey_profile(1.8), "one for GRAY, and the picture is RGB"),
        (Image.new("CMYK", (4, 4), (9, 99, 199, 0)), matrix_profile(1.8, SRGB), "one for RGB, and the picture is CMYK"),
        (Image.new("RGB", (4, 4), (9, 99, 199)), b"x" * (2**24 + 1), "more than 16777216"),
    ],
    ids=["text", "cut", "zeros", "ink's", "grey", "for ink", "huge"],
)
def test_a_broken_profile_is_said_and_ignored(tmp_path, caplog, image, profile, reason):
    """A picture that can be seen would be refused for a part that nobody sees, or be changed without a word."""
    plain = upright_rgb(image)
    image.save(tmp_path / "odd.tiff", icc_profile=profile)
    with caplog.at_level(logging.WARNING):
        assert open_upright(tmp_path / "odd.tiff").tobytes() == plain.tobytes()
    (record,) = caplog.records
    assert "odd.tiff: its colour profile is ignored (" in record.getMessage() and reason in record.getMessage()


def png(image: Image.Image, *chunks: tuple[bytes, bytes]) -> Image.Image:
    info = PngInfo()
    for name, content in chunks:
        info.add(name, content)
    return stored(image, pnginfo=info)


def gama(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def chrm(primaries) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in primaries))


def test_a_png_without_a_profile_says_its_curve_and_primaries():
    """Renderings in linear light would be learned as nearly black; gAMA of 1/2.2 alone is sRGB's, as most mean it."""
    image = Image.fromarray(SHADES)
    for chunks, space in (
        ([gama(1.0)], (1.0, SRGB)),
        ([gama(1 / 1.8), chrm(DISPLAY_P3)], (1.8, DISPLAY_P3)),
        ([gama(0.45455), chrm(DISPLAY_P3)], (None, DISPLAY_P3)),
    ):
        found = decode(png(image, *chunks))
        assert found.converted and np.abs(np.asarray(found.image) - in_srgb(SHADES, *space)).max() <= 1.5
    for chunks in ([gama(0.45455)], [gama(0.45455), chrm(SRGB)], [(b"sRGB", b"\0"), gama(1.0)], [chrm(DISPLAY_P3)]):
        found = decode(png(image, *chunks))
        assert not found.converted and not found.complaint and found.image.tobytes() == image.tobytes()
    for chunks in ([gama(0.00001)], [gama(1.0), chrm([0.0] * 8)], [gama(1.0), chrm([0.3] * 8)]):
        found = decode(png(image, *chunks))
        assert not found.converted and found.complaint and found.image.tobytes() == image.tobytes()
    named = PngInfo()
    for name in ("gamma", "icc_profile", "chromaticity", "srgb"):
        named.add_text(name, "x")
    assert decode(stored(image, pnginfo=named))[1:] == (False, None)
