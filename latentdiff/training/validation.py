"""How a run looks while it trains: pictures from fixed prompts and noise, and a loss at fixed timesteps and noise."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image
from tqdm.auto import tqdm

from ..config.train import TrainConfig
from ..data.masks import MaskedExample
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.parts import FrozenParts, UNetWithTextEncoder, networks_of
from ..pipelines.inpaint import LatentDiffInpaintPipeline
from ..utils.grid import labelled_grid
from .card import drawn_with
from .data import Data
from .ema import EMA, PowerEMAs
from .export import as_pipeline
from .fsdp import is_sharded, parts_put_back
from .log import RunLog


class Validation:
    """Held-out loss and pictures under the averaged weights, to the output folder and the tracker."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        parts: FrozenParts,
        scheduler: DDPMScheduler,
        data: Data,
        ema: EMA | PowerEMAs | None,
        log: RunLog,
    ):
        self._config, self._accelerator, self._parts = config, accelerator, parts
        self._scheduler, self._ema, self._log = scheduler, ema, log
        self._held_out_loss, self._masked_examples = data.held_out_loss, data.masked_examples
        self._draws = bool(data.masked_examples if config.task == "inpaint" else config.validation_prompts)
        self._folder = Path(config.output_dir) / "validation"

    def __call__(self, model: UNet2DConditionModel | UNetWithTextEncoder, done: int) -> None:
        """Measure and draw after optimizer step number `done`; the model's own weights are back afterwards.

        All processes call it. Those of a sharded UNet compute the same together, and the main one keeps the result.
        """
        if not (self._accelerator.is_main_process or is_sharded(model)):
            return
        swapped = self._ema.swapped_into(model) if self._ema else nullcontext()
        with swapped, parts_put_back(model), torch.compiler.set_stance("force_eager"):
            if self._held_out_loss.pictures and self._config.consistency is None:  # it is no denoising loss
                self._measure(model, done)
            if self._draws and done:  # before the first step there is nothing to see
                self._draw(networks_of(model)["unet"], done)

    def _measure(self, model: torch.nn.Module, done: int) -> None:
        loss = self._held_out_loss(model, self._scheduler, autocast=self._accelerator.autocast)
        self._log(done, {"held_out_loss": loss})
        if self._accelerator.is_main_process:
            tqdm.write(f"step {done}: held-out loss {loss:.4f}")

    def _draw(self, unet: UNet2DConditionModel, done: int) -> None:
        homes = [(part, part.device) for part in (self._parts.vae, self._parts.text_encoder)]
        self._parts.to(unet.device)
        pipeline = as_pipeline(self._parts, unet, self._scheduler)
        how = {"seed": self._config.seed, **drawn_with(self._config)}
        with self._accelerator.autocast():
            if self._config.task == "inpaint":
                pipeline = LatentDiffInpaintPipeline.from_pipe(pipeline)
                grid = inpainted_pictures(pipeline, self._masked_examples, **how)
            else:
                grid = validation_pictures(pipeline, self._config.validation_prompts, **how)
        for part, device in homes:
            part.to(device)
        if not self._accelerator.is_main_process:
            return
        self._folder.mkdir(exist_ok=True)
        grid.save(self._folder / f"step-{done:07d}.png")
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                picture = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
                tracker.writer.add_image(
                    "validation", picture.view(grid.height, grid.width, 3), done, dataformats="HWC"
                )


def validation_pictures(
    pipeline, prompts: Sequence[str], *, seed: int, num_inference_steps: int, guidance_scale: float
) -> Image.Image:
    """One picture for each prompt, picture i from the noise of seed + i, as a labelled grid."""
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    images = pipeline(
        list(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=generators,
    ).images
    pipeline.unet.train(was_training)
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
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    images, labels = [], []
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
    pipeline.unet.train(was_training)
    return labelled_grid(images, labels, columns=3)
