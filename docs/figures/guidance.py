"""The picture of guidance in drawing.md: a row for each way to guide, a column for each prompt, one noise a column.

python docs/figures/guidance.py
"""

import math
from dataclasses import dataclass
from pathlib import Path

import tyro
from diffusers import UNet2DConditionModel

from latentdiff import LatentDiffPipeline
from latentdiff.utils.files import packaged_checkpoint
from latentdiff.utils.grid import labelled_grid

PROMPTS = ["a dog", "a red apple", "a house", "a butterfly", "an umbrella on a pink background", "a slice of cake"]
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is drawn."""

    guide_unet: str = "checkpoints/emoji64-guide"
    """Folder of a worse UNet, for the rows of autoguidance."""
    output: str = "docs/figures/guidance.png"
    """Where the picture goes."""


def ways(guide_unet: str) -> dict[str, dict]:
    """Name of a row -> the pipeline's arguments."""
    rows = {f"guidance {w}": {"guidance_scale": float(w)} for w in (1, 2, 4, 8)}
    rows["guidance 8, interval"] = {"guidance_scale": 8.0, "guidance_interval": (0.5, 20.0)}
    rows["guidance 8 falling to 1"] = {"guidance_scale": lambda sigma: 1 + 7 * math.tanh(sigma)}
    rows["guidance 8, rescaled"] = {"guidance_scale": 8.0, "guidance_rescale": 0.7}
    worse = UNet2DConditionModel.from_pretrained(guide_unet)
    return rows | {f"autoguidance {w}": {"guidance_scale": w, "guide_unet": worse} for w in (1.5, 2.0, 3.0)}


def main(settings: Settings) -> None:
    pipeline = LatentDiffPipeline.from_pretrained(packaged_checkpoint())
    images, labels = [], []
    for name, arguments in ways(settings.guide_unet).items():
        images += pipeline(PROMPTS, seeds=[SEED] * len(PROMPTS), **arguments).images
        labels += [f"{prompt} ({name})" for prompt in PROMPTS]
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(images, labels, columns=len(PROMPTS)).save(settings.output)


if __name__ == "__main__":
    main(tyro.cli(Settings))
