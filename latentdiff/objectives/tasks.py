"""What a UNet is trained to do: draw after words, or paint what a mask leaves open.

Each task says what the UNet is given beside the noisy latents, what a validation draws, and what a card says of it.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from ..config.train import TrainConfig
from ..data.masks import MaskedExample, masked_examples
from ..data.pictures import CaptionedPictures
from ..diffusion.unet_inputs import inpainting_channels
from ..models.parts import in_eval_mode
from ..pipelines.inpaint import LatentDiffInpaintPipeline
from ..public import LatentDiffPipeline
from ..utils.grid import labelled_grid


class TextToImage:
    """A picture after words alone. A new task is a subclass and a line in `TASKS`."""

    inpaints = False
    """Whether batches bring masks and masked pictures."""
    kind = "text-to-image model"
    """For a card."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def in_channels(self, latent_channels: int) -> int:
        """Of the UNet."""
        return latent_channels

    def examples(self, pictures: CaptionedPictures) -> list[MaskedExample]:
        """What is drawn of the data at each validation."""
        return []

    def draws(self, examples: Sequence[MaskedExample]) -> bool:
        """Whether there is anything to draw at a validation."""
        return bool(self.config.validation_prompts)

    def draw(self, pipeline: LatentDiffPipeline, examples: Sequence[MaskedExample], **how) -> Image.Image:
        """A validation's pictures; `how` is that of `validation_pictures`."""
        return validation_pictures(pipeline, self.config.validation_prompts, **how)

    @property
    def drawn_in_words(self) -> str:
        """What `draw` shows, for a card."""
        return "; ".join(self.config.validation_prompts)


class Inpainting(TextToImage):
    """What a mask leaves open of a picture, after words."""

    inpaints = True
    kind = "inpainting model: it paints what a mask leaves open, after words"
    drawn_in_words = "masked, drawn, and as it was"

    def in_channels(self, latent_channels: int) -> int:
        """Of the UNet."""
        return inpainting_channels(latent_channels)

    def examples(self, pictures: CaptionedPictures) -> list[MaskedExample]:
        """Pictures with a mask each."""
        return masked_examples(pictures)

    def draws(self, examples: Sequence[MaskedExample]) -> bool:
        """Whether there is anything to draw at a validation."""
        return bool(examples)

    def draw(self, pipeline: LatentDiffPipeline, examples: Sequence[MaskedExample], **how) -> Image.Image:
        """A validation's pictures; `how` is that of `inpainted_pictures`."""
        return inpainted_pictures(LatentDiffInpaintPipeline.from_pipe(pipeline), examples, **how)


TASKS: dict[str, type[TextToImage]] = {"text2img": TextToImage, "inpaint": Inpainting}


def task_of(config: TrainConfig) -> TextToImage:
    """What the settings ask for."""
    return TASKS[config.task](config)


def validation_pictures(
    pipeline, prompts: Sequence[str], *, seed: int, num_inference_steps: int, guidance_scale: float
) -> Image.Image:
    """One picture for each prompt, picture i from the noise of seed + i, as a labelled grid."""
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    pipeline.set_progress_bar_config(disable=True)
    with in_eval_mode(pipeline.unet):
        images = pipeline(
            list(prompts),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
        ).images
    return labelled_grid(images, prompts, columns=min(4, len(prompts)))


def inpainted_pictures(
    pipeline: LatentDiffInpaintPipeline,
    examples: Sequence[MaskedExample],
    *,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> Image.Image:
    """For each example what the UNet sees of it, what it draws from the noise of seed + i, and what it was: a grid."""
    pipeline.set_progress_bar_config(disable=True)
    images, labels = [], []
    with in_eval_mode(pipeline.unet):
        for i, example in enumerate(examples):
            drawn = pipeline(
                example.caption,
                image=example.image,
                mask_image=example.mask,
                width=example.image.width,
                height=example.image.height,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed + i),
            ).images[0]
            images += [example.masked, drawn, example.image]
            labels += [example.caption, "drawn", "as it was"]
    return labelled_grid(images, labels, columns=3)
