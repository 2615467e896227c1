"""How a run looks while it trains: pictures from fixed prompts and noise, and the loss on held-out pictures."""

from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

from ..config.train import TrainConfig
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..distributed.fsdp import is_sharded, parts_put_back
from ..models.parts import FrozenParts, UNetWithTextEncoder, networks_of
from ..objectives.choice import objective_of
from ..objectives.tasks import task_of
from ..pipelines.latent_pipeline import NotFinite
from .data import Data
from .ema import EMA, PowerEMAs
from .export import as_pipeline
from .log import RunLog
from .trackers import log_picture


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
        self._task, self._objective = task_of(config), objective_of(config)
        self._folder = Path(config.output_dir) / "validation"

    def __call__(self, model: UNet2DConditionModel | UNetWithTextEncoder, done: int) -> None:
        """Measure and draw after optimizer step number `done`; the model's own weights are back afterwards.

        All processes call it. Those of a sharded UNet compute the same together, and the main one keeps the result.
        """
        if not (self._accelerator.is_main_process or is_sharded(model)):
            return
        swapped = self._ema.swapped_into(model) if self._ema else nullcontext()
        with swapped, parts_put_back(model), torch.compiler.set_stance("force_eager"):
            if self._held_out_loss.pictures and self._objective.denoises:
                self._measure(model, done)
            if done and self._task.draws(self._masked_examples):  # before the first step there is nothing to see
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
        grid, how = None, self._objective.drawing()
        try:
            with self._accelerator.autocast():
                grid = self._task.draw(pipeline, self._masked_examples, seed=self._config.seed, **how)
        except NotFinite as error:  # no reason to end a run whose gradient is finite
            tqdm.write(f"step {done}: no pictures: {error}")
        for part, device in homes:
            part.to(device)
        if grid is None or not self._accelerator.is_main_process:
            return
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step-{done:07d}.png"
        grid.save(path)
        log_picture(self._accelerator, grid, path, done)
