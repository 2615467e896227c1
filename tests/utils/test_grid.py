"""The grid: pictures in their places, captions that fit."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from latentdiff.utils.grid import labelled_grid, wrap


def test_grid_places_enlarged_pictures_with_room_for_the_longest_label():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    short, long = (labelled_grid(images, ["a", "b", label], columns=2) for label in ("c", "a long caption " * 6))
    assert short.width == long.width == 2 * 128 + 3 * 8 and long.height > short.height
    pixels = np.asarray(short)
    step = (short.height - 8) // 2
    for i, colour in enumerate(colours):
        x, y = 8 + i % 2 * 136, 8 + i // 2 * step
        assert (pixels[y : y + 128, x : x + 128] == colour).all()
        assert (pixels[y + 128 : y + step, x : x + 128] < 128).any(), "its label stands below"


def test_wrapped_lines_fit_and_lose_nothing():
    font = ImageFont.load_default(12)
    text = "a donaudampfschifffahrtsgesellschaft on a light blue background"
    lines = wrap(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines) and len(lines) > 3
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("", font, 100) == [""]


def test_grid_refuses_what_does_not_fit_together():
    image = Image.new("RGB", (64, 64))
    for images, labels, columns in (([], [], 1), ([image], ["a", "b"], 1), ([image], ["a"], 0)):
        with pytest.raises(ValueError, match="do not make a grid"):
            labelled_grid(images, labels, columns)
    with pytest.raises(ValueError, match="one size"):
        labelled_grid([image, Image.new("RGB", (32, 64))], ["a", "b"], 1)
