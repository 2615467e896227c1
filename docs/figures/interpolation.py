"""interpolation.png, frames between pictures of the shipped checkpoint: `python docs/figures/interpolation.py`."""

from dataclasses import dataclass

import tyro
from PIL import Image

from latentdiff import LatentDiffInterpolatePipeline
from latentdiff.utils.files import packaged_checkpoint
from latentdiff.utils.films import strip

COLUMNS = 9
PATHS = (  # prompts, seeds
    (["a red apple", "a smiling face"], [0, 0]),
    (["a rocket on a blue background", "a rocket on a red background"], [3, 3]),
    (["a cat", "a dog"], [1, 2]),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the picture goes, and what draws it."""

    checkpoint: str = packaged_checkpoint()
    """A folder or a repository of the Hub."""
    output: str = "docs/figures/interpolation.png"
    """File of the picture."""
    num_inference_steps: int = 20
    """Steps from noise to picture."""
    guidance_scale: float = 4.0
    """Of every picture."""


def main(settings: Settings) -> None:
    pipeline = LatentDiffInterpolatePipeline.from_pretrained(settings.checkpoint)
    rows = []
    for prompts, seeds in PATHS:
        how = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
        frames = pipeline(prompts, seeds, COLUMNS, **how).images
        rows.append(strip(frames, COLUMNS, [prompts[0], *[""] * (COLUMNS - 2), prompts[1]]))
    picture = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    picture.save(settings.output)


if __name__ == "__main__":
    main(tyro.cli(Settings))
