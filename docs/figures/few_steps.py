"""The pictures of docs/few_steps.md: `python docs/figures/few_steps.py`.

few-steps.png: a row for each number of steps and two of fifty, a column for each prompt, always the same noise.
few-steps-img2img.png, -inpaint.png, -interpolation.png: what the same checkpoint makes of pictures, in four steps, as
`editing.py` and `interpolation.py` have it.
"""

from dataclasses import dataclass
from pathlib import Path

import interpolation
import tyro
from editing import Settings as EditSettings
from editing import draw_img2img, draw_inpaint

from latentdiff import LatentDiffPipeline
from latentdiff.models.loading import load_guide_unet
from latentdiff.utils.files import packaged_checkpoint
from latentdiff.utils.grid import labelled_grid

PROMPTS = ["a cat", "a red apple", "a house", "a blue car", "a smiling face", "a guitar", "a butterfly"]
PROMPTS += ["an umbrella on a pink background"]
SEED = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is drawn."""

    checkpoint: str = "checkpoints/emoji64-lcm"
    """What draws in few steps."""
    guide_unet: str = "checkpoints/emoji64-guide"
    """That its teacher was guided by."""
    output_dir: Path = Path("docs/figures")
    """Where the pictures go."""


def main(settings: Settings) -> None:
    few = LatentDiffPipeline.from_pretrained(settings.checkpoint)
    many = LatentDiffPipeline.from_pretrained(packaged_checkpoint())
    guide = load_guide_unet(settings.guide_unet, "guide_unet")
    images, labels = [], []
    for steps in (1, 2, 4, 8):
        images += few(PROMPTS, num_inference_steps=steps, seeds=[SEED] * len(PROMPTS)).images
        labels += [f"{prompt} ({steps} step{'s' * (steps > 1)})" for prompt in PROMPTS]
    how = {"num_inference_steps": 50, "seeds": [SEED] * len(PROMPTS)}
    images += many(PROMPTS, guidance_scale=2.0, guide_unet=guide, **how).images
    images += many(PROMPTS, guidance_scale=4.0, **how).images
    for way in ("DDIM 50, autoguidance 2", "DDIM 50, guidance 4"):
        labels += [f"{prompt} ({way})" for prompt in PROMPTS]
    labelled_grid(images, labels, columns=len(PROMPTS)).save(settings.output_dir / "few-steps.png")

    edits = EditSettings(checkpoint=settings.checkpoint, num_inference_steps=4, guidance_scale=1.0)
    for name, draw in (("img2img", draw_img2img), ("inpaint", draw_inpaint)):
        draw(edits).save(settings.output_dir / f"few-steps-{name}.png")
    interpolation.main(
        interpolation.Settings(
            checkpoint=settings.checkpoint,
            output=str(settings.output_dir / "few-steps-interpolation.png"),
            num_inference_steps=4,
            guidance_scale=1.0,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
