"""inversion.png, real emoji edited by their words with the shipped checkpoint: `python docs/figures/inversion.py`.

In a row: the picture; drawn again from the noise that inversion found, under the same words; then under others.
"""

from dataclasses import dataclass

import tyro
from editing import real

from latentdiff import LatentDiffInversionPipeline
from latentdiff.utils.files import packaged_checkpoint
from latentdiff.utils.grid import labelled_grid

EDITS = (  # emoji, background, words for it, other words
    (
        "rocket",
        "blue",
        "a rocket on a blue background",
        ("a rocket on a red background", "a rocket on a green background"),
    ),
    ("red apple", "white", "a red apple", ("a green apple", "a red apple on a purple background")),
    ("cat face", "white", "a cat face", ("a dog face", "a cat face on a light blue background")),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the picture goes, and what draws it."""

    checkpoint: str = packaged_checkpoint()
    """A folder or a repository of the Hub."""
    output: str = "docs/figures/inversion.png"
    """File of the picture."""
    num_inference_steps: int = 25
    """Steps from noise to picture, of which the last `strength` share is taken, upwards and downwards."""
    strength: float = 0.6
    """How far up the pictures go."""


def main(settings: Settings) -> None:
    pipeline = LatentDiffInversionPipeline.from_pretrained(settings.checkpoint)
    pictures, labels = [], []
    for name, colour, source, others in EDITS:
        image = real(name, colour)
        pictures += [
            image,
            *pipeline(
                [source, *others],
                image,
                source,
                strength=settings.strength,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=4.0,
            ).images,
        ]
        labels += [f"a real picture of {source}", "drawn again", *others]
    labelled_grid(pictures, labels, columns=4).save(settings.output)


if __name__ == "__main__":
    main(tyro.cli(Settings))
