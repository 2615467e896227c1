"""The pictures of image to image and of inpainting, from the shipped checkpoint: `python docs/figures/editing.py`.

img2img.png: drawings of a few strokes and real emoji, then what becomes of them at rising strengths.
inpaint.png: a real emoji, the mask (white is painted anew), and the picture under another caption, with a hard and a
soft mask. What is not masked is kept to the last pixel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageDraw

from latentdiff import LatentDiffImg2ImgPipeline, LatentDiffInpaintPipeline
from latentdiff.data import emoji
from latentdiff.utils.files import packaged_checkpoint
from latentdiff.utils.grid import labelled_grid

SIZE = emoji.RESOLUTION
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
RIM = 4  # pixels over which what is painted passes into the picture


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the pictures go, and what draws them."""

    checkpoint: str = packaged_checkpoint()
    """A folder or a repository of the Hub."""
    output_dir: str = "docs/figures"
    """Folder of img2img.png and inpaint.png."""
    num_inference_steps: int = 50
    """Steps from noise to picture, of which image to image takes the last ones."""
    guidance_scale: float = 4.0
    """Of every picture."""
    seed: int = 1
    """Of every picture."""


def real(name: str, colour: str = "white") -> Image.Image:
    """An emoji of the embedded set by one of its names."""
    pictures = emoji.load()
    row = next(i for i, (concept, style) in enumerate(pictures.rows) if style == "twemoji" and name in concept.names)
    return pictures.composite(row, colour)


def sketch(strokes: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    """What somebody draws with the mouse, on a canvas of 256 pixels."""
    canvas = Image.new("RGB", (256, 256), "white")
    strokes(ImageDraw.Draw(canvas))
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def apple(pen: ImageDraw.ImageDraw) -> None:
    pen.ellipse((50, 70, 206, 230), fill=(220, 30, 40))
    pen.line((128, 80, 140, 30), fill=(100, 60, 20), width=12)
    pen.ellipse((140, 25, 190, 55), fill=(60, 170, 60))


def house(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((60, 120, 196, 230), fill=(240, 180, 90))
    pen.polygon([(40, 120), (128, 40), (216, 120)], fill=(190, 50, 40))
    pen.rectangle((110, 160, 146, 230), fill=(110, 60, 30))


def white_box(left: int, top: int, right: int, bottom: int) -> Image.Image:
    """A mask, in shares of 64."""
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).rectangle([side * SIZE // 64 for side in (left, top, right - 1, bottom - 1)], fill=255)
    return mask


def framed(mask: Image.Image) -> Image.Image:
    """A mask whose white can be told from the page's."""
    picture = mask.convert("RGB")
    ImageDraw.Draw(picture).rectangle((0, 0, SIZE - 1, SIZE - 1), outline="gray")
    return picture


def draw_img2img(settings: Settings) -> Image.Image:
    pipeline = LatentDiffImg2ImgPipeline.from_pretrained(settings.checkpoint)
    examples = [
        ("a red apple", sketch(apple)),
        ("a house", sketch(house)),
        ("a tangerine", real("red apple")),
        ("a cactus", real("deciduous tree")),
        ("a cat face", real("dog face")),
        ("a honeybee", real("butterfly")),
    ]
    images, labels = [], []
    for prompt, before in examples:
        images.append(before)
        labels.append("before")
        for strength in STRENGTHS:
            images += pipeline(
                prompt,
                before,
                strength,
                settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                seeds=[settings.seed],
            ).images
            labels.append(f"{prompt}, {strength}")
    return labelled_grid(images, labels, columns=1 + len(STRENGTHS))


def draw_inpaint(settings: Settings) -> Image.Image:
    pipeline = LatentDiffInpaintPipeline.from_pretrained(settings.checkpoint)
    right, top, bottom = white_box(32, 0, 64, 64), white_box(0, 0, 64, 32), white_box(0, 32, 64, 64)
    examples = [
        ("a basketball", real("soccer ball"), right),
        ("a green apple", real("red apple"), right),
        ("a cat face", real("dog face"), top),
        ("an evergreen tree", real("deciduous tree"), top),
        ("a crying face", real("grinning face"), bottom),
        ("a pig face", real("tiger face"), bottom),
    ]
    images, labels = [], []
    for prompt, before, mask in examples:
        images += [before, framed(mask)]
        labels += ["before", "mask"]
        for rim, label in ((0, prompt), (RIM, f"with a rim of {RIM}")):
            images += pipeline(
                prompt,
                before,
                mask,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                seeds=[settings.seed],
                mask_blur=rim,
                keep_unmasked=True,
            ).images
            labels.append(label)
    return labelled_grid(images, labels, columns=8)


def main(settings: Settings) -> None:
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    for name, draw in (("img2img", draw_img2img), ("inpaint", draw_inpaint)):
        draw(settings).save(Path(settings.output_dir, f"{name}.png"))


if __name__ == "__main__":
    main(tyro.cli(Settings))
