"""Emoji in other colours, so that a word for the colour of a thing has been seen: a green car, a purple star.

A picture's own colour is the hue that most of it has. Everything of about that hue takes the hue and the depth of
another colour and keeps its shading; outlines, whites and other colours stay. In OKLab, where equal steps look equal
(B. Ottosson, "A perceptual color space for image processing", 2020, https://bottosson.github.io/posts/oklab).
"""

from dataclasses import dataclass

import numpy as np

# Linear sRGB to cones, and their cube roots to lightness and two opponent colours.
_CONES = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                   [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                 [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
# sRGB's curve: the light of each of its 256 values.
_LEVELS = np.arange(256) / 255
_LIGHT = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)
_GREY = 0.04  # the chroma under which a pixel has no hue to speak of
_SAME_HUE, _OTHER_HUE = np.radians(30), np.radians(50)  # from the dominant one; in between, pixels change in part
_LEAST_SHARE = 0.4  # of the thing's pixels: with less, the colour would not be the thing's
_BINS = 72


@dataclass(frozen=True)
class OwnColour:
    """The colour that most of a thing has, in OKLab: lightness, chroma, and hue in radians; how much of it has it."""

    lightness: float
    chroma: float
    hue: float
    share: float

    @property
    def is_its_own(self) -> bool:
        """Whether one would call the thing by it."""
        return self.share >= _LEAST_SHARE

    @property
    def lab(self) -> np.ndarray:
        """(3,) float64."""
        return np.array([self.lightness, self.chroma * np.cos(self.hue), self.chroma * np.sin(self.hue)])


def own_colour(rgb: np.ndarray, thing: np.ndarray) -> OwnColour | None:
    """The dominant hue of a thing, with the median lightness and chroma of what has it; None where all of it is grey.

    Args:
        rgb: (H, W, 3) uint8. thing: (H, W) bool, the pixels that belong to it.
    """
    lightness, chroma, hue = _polar(to_oklab(rgb[thing]))
    coloured = chroma > _GREY
    if not coloured.any():
        return None
    counts, edges = np.histogram(hue[coloured], _BINS, (-np.pi, np.pi), weights=chroma[coloured])
    smooth = sum(np.roll(counts, shift) for shift in (-2, -1, 0, 1, 2))
    peak = (edges[smooth.argmax()] + edges[smooth.argmax() + 1]) / 2
    near = coloured & (_apart(hue, peak) < _SAME_HUE)
    middle = peak + np.median(_turn(hue[near] - peak))
    return OwnColour(np.median(lightness[near]), np.median(chroma[near]), middle, near.sum() / thing.sum())


def recoloured(picture: np.ndarray, own: OwnColour, colour: tuple[int, int, int]) -> np.ndarray:
    """The picture (H, W, 4) uint8 RGBA with its own colour replaced by another one; alpha stays.

    Black stays black and white white: lightness is stretched below the own colour's and above it to fit the other's.
    """
    lab = to_oklab(picture[..., :3])
    lightness, chroma, hue = _polar(lab)
    (to_lightness,), (to_chroma,), (to_hue,) = _polar(to_oklab(np.array([colour], np.uint8)))
    share = np.clip((_OTHER_HUE - _apart(hue, own.hue)) / (_OTHER_HUE - _SAME_HUE), 0, 1)
    share *= np.clip(chroma / _GREY, 0, 1)
    levels = [0, own.lightness, 1], [0, to_lightness, 1]
    new_chroma, new_hue = chroma * to_chroma / own.chroma, to_hue + _turn(hue - own.hue)
    new = np.stack([np.interp(lightness, *levels), new_chroma * np.cos(new_hue), new_chroma * np.sin(new_hue)], axis=-1)
    mixed = from_oklab(lab + share[..., None] * (new - lab))
    return np.dstack([mixed, picture[..., 3]])


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """(…, 3) uint8 sRGB to (…, 3) float64 OKLab."""
    return np.cbrt(_LIGHT[rgb] @ _CONES.T) @ _LAB.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    """(…, 3) float64 OKLab to (…, 3) uint8 sRGB; what lies outside is cut off."""
    linear = np.clip((lab @ np.linalg.inv(_LAB).T) ** 3 @ np.linalg.inv(_CONES).T, 0, 1)
    value = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * value).astype(np.uint8)


def _polar(lab: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lightness, chroma and hue."""
    return lab[..., 0], np.hypot(lab[..., 1], lab[..., 2]), np.arctan2(lab[..., 2], lab[..., 1])


def _turn(angle: np.ndarray) -> np.ndarray:
    """The same direction, in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _apart(hue: np.ndarray, other: float) -> np.ndarray:
    return np.abs(_turn(hue - other))
