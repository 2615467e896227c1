"""Pictures with their captions underneath, as one picture."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SMALLEST_CELL = 128  # smaller pictures are enlarged to this, so that a caption has room
MARGIN = 8
FONT_SIZE = 12


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels, between words, or inside a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def labelled_grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size in rows of `columns`, each with its label under it, on white.

    Pictures less than 128 pixels wide are enlarged by a whole factor (64 -> 128).

    Raises:
        ValueError: no pictures, not one label for each, sizes that differ, or no columns.
    """
    if not images or len(images) != len(labels) or columns < 1:
        raise ValueError(f"{len(images)} pictures, {len(labels)} labels and {columns} columns do not make a grid")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"the pictures of a grid must be of one size, not {sorted({image.size for image in images})}")
    width, height = images[0].size
    factor = max(1, SMALLEST_CELL // width)
    width, height = width * factor, height * factor
    columns = min(columns, len(images))
    font = ImageFont.load_default(FONT_SIZE)
    texts = ["\n".join(wrap(label, font, width)) for label in labels]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_height = math.ceil(max(pen.multiline_textbbox((0, 0), text, font=font)[3] for text in texts))

    step_x, step_y = width + MARGIN, height + text_height + 2 * MARGIN
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    pen = ImageDraw.Draw(grid)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (x, y))
        pen.multiline_text((x, y + height + MARGIN // 2), text, fill="black", font=font)
    return grid
