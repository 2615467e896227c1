"""Things in other colours: what changes, what stays, and by which numbers."""

import numpy as np
import pytest

from latentdiff.data import emoji
from latentdiff.data.recolour import from_oklab, own_colour, recoloured, to_oklab


@pytest.mark.parametrize(
    "xyz, lab",
    [
        ((0.950, 1.000, 1.089), (1.000, 0.000, 0.000)),
        ((1.000, 0.000, 0.000), (0.450, 1.236, -0.019)),
        ((0.000, 1.000, 0.000), (0.922, -0.671, 0.263)),
        ((0.000, 0.000, 1.000), (0.153, -1.415, -0.449)),
    ],
)
def test_oklab_is_that_of_its_paper(xyz, lab):
    """The table of pairs of XYZ and OKLab in Ottosson's text."""
    from latentdiff.data import recolour

    to_rgb = np.array([[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560],
                       [0.0556434, -0.2040259, 1.0572252]])  # fmt: skip
    linear = to_rgb @ np.array(xyz)
    np.testing.assert_allclose(np.cbrt(recolour._CONES @ linear) @ recolour._LAB.T, lab, atol=2e-3)


def test_oklab_and_back():
    levels = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1)
    np.testing.assert_array_equal(from_oklab(to_oklab(levels)), levels)


def a_picture() -> np.ndarray:
    """A red disc with a shade, a white spot, a black rim and a green leaf, on nothing: (32, 32, 4) uint8."""
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[4:28, 4:28] = (0, 0, 0, 255)
    picture[5:27, 5:27] = (200, 40, 40, 255)
    picture[5:27, 20:27] = (140, 20, 20, 255)
    picture[10:12, 10:12] = (255, 255, 255, 255)
    picture[4:8, 14:18] = (40, 160, 60, 255)
    return picture


def own(picture):
    return own_colour(picture[..., :3], picture[..., 3] > 127)


@pytest.mark.parametrize("name", emoji.COLOURS)
def test_only_the_own_colour_changes(name):
    """White, black and other colours stay; the own colour becomes the one asked for, and its shade a shade of that."""
    picture = a_picture()
    new = recoloured(picture, own(picture), emoji.BACKGROUNDS[name])
    assert np.abs(new[15, 15, :3].astype(int) - emoji.BACKGROUNDS[name]).max() <= 2
    for place in ((4, 5), (10, 10), (5, 15)):
        np.testing.assert_array_equal(new[place], picture[place])
    assert to_oklab(new[15, 25, :3])[0] < to_oklab(new[15, 15, :3])[0]
    np.testing.assert_array_equal(new[..., 3], picture[..., 3])


def test_things_without_a_colour_have_none():
    picture = a_picture()
    grey = picture.copy()
    grey[..., :3] = picture[..., :3].mean(axis=-1, keepdims=True)
    assert own(grey) is None
    mixed = picture.copy()
    mixed[5:27, 5:14, :3], mixed[5:27, 14:20, :3] = (40, 60, 200), (240, 220, 40)
    assert not own(mixed).is_its_own and own(picture).is_its_own


def test_the_colour_of_a_recoloured_emoji_is_the_one_asked_for():
    """What training is told is true of its pictures."""
    built = emoji.load()
    can = [index for index in built.indices() if built.can_be_recoloured(index)]
    assert len(can) > 0.5 * len(built.indices())
    for index in can[::40]:
        for name in ("red", "green", "blue", "yellow"):
            seen = own_colour(np.asarray(built.composite(index, "white", name)), built.pictures[index, ..., 3] > 127)
            distance = {other: np.linalg.norm(seen.lab - to_oklab(np.array(emoji.BACKGROUNDS[other])))
                        for other in emoji.COLOURS}  # fmt: skip
            assert min(distance, key=distance.get) == name, (built.rows[index][0].names[0], name)
