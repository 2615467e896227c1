"""Random masks to learn inpainting from, at pixel resolution; 1 is to be painted, 0 is known.

A mixture, since a mask of one kind teaches that kind alone: rectangles; strokes of a brush, as a person paints them
(Yu et al. 2018, "Free-Form Image Inpainting with Gated Convolution", arXiv 1806.03589, supplement; thick ones are what
LaMa, arXiv 2109.07161, found to matter); borders, for outpainting; and in a quarter of the cases everything, as Stable
Diffusion's inpainting model was trained, so that drawing whole pictures from words stays trained.

Each function draws from the generator it is given, and from nothing else.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..models.latents import masked_pixels, to_images, to_pixels
from ..utils import randomness
from .pictures import CaptionedPictures

WHOLE_PICTURE = 0.25  # probability
MASKED_EXAMPLES = 6


def random_masks(
    generators: Iterable[torch.Generator], size: tuple[int, int], whole_picture: float = WHOLE_PICTURE
) -> torch.Tensor:
    """One mask from each generator -> (B, 1, H, W) float32 of zeros and ones.

    Args:
        generators: of the CPU, fresh ones for each mask, so that it does not depend on the others.
        size: width and height.
        whole_picture: probability of a mask that leaves nothing known.
    """
    masks = [np.asarray(_random_mask(generator, *size, whole_picture), np.float32) for generator in generators]
    return torch.from_numpy(np.stack(masks))[:, None]


def _random_mask(generator: torch.Generator, width: int, height: int, whole_picture: float) -> Image.Image:
    if _uniform(generator)[0] < whole_picture:
        return Image.new("1", (width, height), 1)
    draw_kind = (_rectangles, _strokes, _border)[_integer(generator, 0, 2)]
    mask = Image.new("1", (width, height), 0)
    draw_kind(generator, ImageDraw.Draw(mask), width, height)
    return mask


def _rectangles(generator: torch.Generator, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """One to three, with sides of an eighth to five eighths of the picture's."""
    for _ in range(_integer(generator, 1, 3)):
        sides = _uniform(generator, 2) * 0.5 + 0.125
        left, top = _uniform(generator, 2) * (1 - sides)
        right, bottom = left + sides[0], top + sides[1]
        _fill(pen, left * width, top * height, right * width, bottom * height, 1)


def _strokes(generator: torch.Generator, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """One to three strokes with round ends: from a random place, each next piece turns by up to 2/5 of a half circle to
    alternating sides."""
    shorter = min(width, height)
    for _ in range(_integer(generator, 1, 3)):
        thickness = float(_uniform(generator)[0] * 0.25 + 0.06) * shorter
        points = [tuple(_uniform(generator, 2) * (width - 1, height - 1))]
        heading = float(_uniform(generator)[0]) * 2 * math.pi
        for piece in range(_integer(generator, 1, 5)):
            length, turn = _uniform(generator, 2)
            heading += (1 if piece % 2 else -1) * turn * 0.4 * math.pi
            reach = (0.1 + 0.4 * length) * shorter
            x, y = points[-1]
            # Within the picture: a stroke that runs out of it would paint nothing.
            x, y = x + reach * math.cos(heading), y + reach * math.sin(heading)
            points.append((min(max(x, 0), width - 1), min(max(y, 0), height - 1)))
        pen.line(points, fill=1, width=max(1, round(thickness)))
        for x, y in points:
            radius = thickness / 2
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)


def _border(generator: torch.Generator, pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """What lies beyond a straight line at any angle, or in as many cases all but a rectangle."""
    if _uniform(generator)[0] < 0.5:
        sides = _uniform(generator, 2) * 0.5 + 0.3
        left, top = _uniform(generator, 2) * (1 - sides)
        right, bottom = left + sides[0], top + sides[1]
        _fill(pen, 0, 0, width, height, 1)
        _fill(pen, left * width, top * height, right * width, bottom * height, 0)
        return
    angle, depth = _uniform(generator, 2)
    x, y = math.cos(2 * math.pi * angle), math.sin(2 * math.pi * angle)
    # How far the picture reaches from its centre that way; the line lies at -1/2 to 1/2 of that.
    reach = (abs(x) * width + abs(y) * height) / 2
    near, far = (depth - 0.5) * reach, width + height
    edges = [(near, -far), (near, far), (far, far), (far, -far)]
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    pen.polygon([(middle_x + a * x - b * y, middle_y + a * y + b * x) for a, b in edges], fill=1)


def _fill(pen: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, value: int) -> None:
    """The pixels whose middles lie within; a pen's own edges are numbers of pixels, the last one included."""
    pen.rectangle([round(left), round(top), round(right) - 1, round(bottom) - 1], fill=value)


def _uniform(generator: torch.Generator, count: int = 1) -> np.ndarray:
    return torch.rand(count, generator=generator, dtype=torch.float64).numpy()


def _integer(generator: torch.Generator, least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, (), generator=generator))


@dataclass(frozen=True)
class MaskedExample:
    """A picture to inpaint at every validation under its own caption."""

    caption: str
    image: Image.Image
    mask: Image.Image
    """White is to be painted."""

    @property
    def masked(self) -> Image.Image:
        """What the UNet sees of it."""
        mask = torch.from_numpy(np.asarray(self.mask, np.float32) / 255)
        return to_images(masked_pixels(to_pixels([self.image]), mask))[0]


def masked_examples(pictures: CaptionedPictures, count: int = MASKED_EXAMPLES) -> list[MaskedExample]:
    """Of the first pictures that are held out, then of those that are not, each with a mask that is always the same."""
    held_out, trained = np.flatnonzero(pictures.held_out), np.flatnonzero(~pictures.held_out)
    rows = [*held_out[: max(count // 2, count - len(trained))], *trained][:count]
    examples = []
    for row in map(int, rows):
        image = pictures.image(row)
        generator = randomness.generator(0, "example's mask", row)
        mask = random_masks([generator], image.size, whole_picture=0.0)[0, 0]
        examples.append(MaskedExample(pictures.captions[row][0], image, Image.fromarray(mask.byte().numpy() * 255)))
    return examples
