"""What stands around the loop of train_text2img.py: set-up before it, logs and validation in it."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from .batches import Batch, Batches
from .config import ConfigError, TrainConfig
from .deepspeed_zero import is_zero, zero_plugin
from .ema import EMA, PowerEMAs
from .finishing import as_pipeline, drawn_with
from .latents import downsampling_factor
from .lora import add_lora
from .losses import denoising_loss, min_snr_weight, training_target
from .models import (
    FrozenParts,
    UNet,
    UNetWithTextEncoder,
    add_guidance_input,
    build_unet,
    compile_blocks,
    hide_loading_bars,
    load_frozen,
    load_unet,
    networks_of,
    widen_input,
    with_trained_text_encoder,
)
from .mp_unet import MPUNet2DConditionModel
from .pipelines.inpaint import LatentDiffInpaintPipeline
from .scheduling_consistency import ConsistencyScheduler
from .scheduling_ddpm import DDPMScheduler
from .sharding import ShardingAccelerator, is_sharded, parts_put_back, sharding_plugin
from .training_data import Data
from .validation import inpainted_pictures, validation_pictures

# ------------------------------------------------------------------------------------------------ before the loop


def start(config: TrainConfig) -> tuple[Accelerator, Path]:
    """The accelerator and the output folder, with the run's whole configuration in it.

    Raises:
        ConfigError: the folder cannot be written, or the tracker is unknown.
    """
    hide_loading_bars()
    output_dir = make_output_dir(config, lambda folder: config.save(folder / "train_config.yaml"))
    return make_accelerator(config), output_dir


def make_output_dir(config: TrainConfig, write: Callable[[Path], None] = lambda folder: None) -> Path:
    """The output folder, created if need be, with what `write` puts into it.

    Raises:
        ConfigError: it cannot be written.
    """
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write(output_dir)
    except OSError as error:
        raise ConfigError(f"output_dir: {config.output_dir!r} cannot be written ({error.strerror})") from None
    return output_dir


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator that the settings ask for, with its tracker started.

    Raises:
        ConfigError: the precision or the way to shard is not to be had here, or the tracker is unknown.
    """
    fsdp, zero = sharding_plugin(config), zero_plugin(config)
    tracker, output_dir = None if config.report_to == "none" else config.report_to, config.output_dir
    try:
        accelerator = ShardingAccelerator(
            # Not as a number, which one of the launcher's, meant for DeepSpeed, would silently replace.
            gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
            mixed_precision=config.mixed_precision,
            fsdp_plugin=fsdp,
            deepspeed_plugin=zero,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=str(Path(output_dir) / "logs")),
        )
        if tracker:
            accelerator.init_trackers("latentdiff")
    except (ValueError, ImportError) as error:
        raise ConfigError(f"mixed_precision or report_to: {str(error).splitlines()[0]}") from None
    if fsdp and not accelerator.is_fsdp2:
        raise ConfigError("accelerate's use_fsdp: there are no GPUs, or no processes of its launcher, to shard over")
    if zero and not is_zero(accelerator):
        raise ConfigError("accelerate's use_deepspeed: there are no GPUs, or no processes of its launcher")
    return accelerator


def load_networks(config: TrainConfig) -> tuple[FrozenParts, UNet, DDPMScheduler | ConsistencyScheduler]:
    """The parts around the UNet, the UNet in fp32 and the noise schedule, as the scheduler of what is trained.

    Raises:
        ConfigError: a part is missing, the UNet does not fit the VAE or the text encoder, or that cannot be trained.
    """
    source = config.pretrained_model_name_or_path
    parts = load_frozen(source, config.revision, config.variant)
    latent_channels, text_width = parts.vae.config.latent_channels, parts.text_encoder.config.hidden_size
    # For inpainting the noisy latents, the mask and the masked picture's latents.
    in_channels = 2 * latent_channels + 1 if config.task == "inpaint" else latent_channels
    scheduler = _noise_schedule(config)
    if config.unet == "pretrained":
        unet = load_unet(source, config.revision, config.variant)
    else:
        unet = build_unet(
            config.unet,
            latent_channels=latent_channels,
            in_channels=in_channels,
            sample_size=(config.resolution or parts.vae.config.sample_size) // downsampling_factor(parts.vae),
            cross_attention_dim=text_width,
            seed=config.seed,
            schedule=scheduler.config,
            learned_uncertainty=config.learned_uncertainty,
        )
    _check_fits(config, unet, latent_channels, in_channels, text_width)
    if unet.config.in_channels != in_channels:
        widen_input(unet, in_channels)
    if config.consistency is not None:
        scheduler = ConsistencyScheduler.from_config(
            scheduler.config, original_inference_steps=config.consistency_steps
        )
        if config.has_teacher and len(config.consistency_guidance) == 2:
            add_guidance_input(unet)
    if isinstance(unet, MPUNet2DConditionModel):
        _settle_schedule(unet, scheduler)
    use_fast_attention(unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.train_text_encoder:
        parts = with_trained_text_encoder(parts, config.gradient_checkpointing)
    if config.lora_rank is not None:
        add_lora(unet, config.lora_rank, config.lora_alpha or config.lora_rank, config.seed)
    if config.dynamo_backend is not None:
        compile_blocks(unet, config.dynamo_backend)
    return parts, unet, scheduler


def use_fast_attention(unet: UNet) -> None:
    """Measured on CPUs in bf16: the backward pass of fused attention takes a third of a step, of plain far less."""
    if not torch.cuda.is_available() and isinstance(unet, UNet2DConditionModel):
        unet.set_attn_processor(AttnProcessor())


def _settle_schedule(unet: MPUNet2DConditionModel, scheduler: DDPMScheduler) -> None:
    """A pretrained one may have been saved with another prediction type than the run's, which it can all put out."""
    try:
        unet.follow_schedule(scheduler.config)
    except ValueError as error:
        raise ConfigError(f"unet: {error}") from None


def _check_fits(config: TrainConfig, unet: UNet, latent_channels: int, in_channels: int, text_width: int) -> None:
    has = unet.config.in_channels
    if has not in {latent_channels, in_channels} or unet.config.cross_attention_dim != text_width:
        hint = "; an inpainting model goes on with --task inpaint" if has == 2 * latent_channels + 1 else ""
        raise ConfigError(
            f"unet: it takes {has} channels and text of {unet.config.cross_attention_dim}; "
            f"VAE and text encoder give {in_channels} and {text_width}{hint}"
        )
    if config.lora_rank is not None and has != in_channels:
        raise ConfigError(
            f"lora_rank: task 'inpaint' has to train the inputs that a UNet of {has} channels lacks, and adapters are "
            f"on attention alone; leave it out, or start from an inpainting model ({in_channels} channels)"
        )


def _noise_schedule(config: TrainConfig) -> DDPMScheduler:
    """A new schedule or the pretrained model's own, with what the settings change in it."""
    if config.unet == "pretrained":
        scheduler = load_schedule(config.pretrained_model_name_or_path, config.revision)
    else:
        scheduler = DDPMScheduler(
            beta_schedule=config.beta_schedule,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            clip_sample=False,
            timestep_spacing="trailing",
        )
    changes = {"prediction_type": config.prediction_type} if config.prediction_type else {}
    if config.rescale_betas_zero_snr:  # then the last timestep has to be drawn from: section 3.3 of arXiv 2305.08891
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDPMScheduler.from_config(scheduler.config, **changes)
    if scheduler.config.rescale_betas_zero_snr:
        _check_zero_terminal_snr(config, scheduler.config.prediction_type)
    return scheduler


def load_schedule(source: str, revision: str | None = None) -> DDPMScheduler:
    """The noise schedule of a Stable-Diffusion-shaped folder or Hub id.

    Raises:
        ConfigError: there is none.
    """
    try:
        return DDPMScheduler.from_pretrained(source, subfolder="scheduler", revision=revision)
    except OSError:
        raise ConfigError(f"pretrained_model_name_or_path: no scheduler in {source!r}") from None


def _check_zero_terminal_snr(config: TrainConfig, prediction_type: str) -> None:
    if prediction_type == "epsilon":
        raise ConfigError(
            "rescale_betas_zero_snr: with zero terminal SNR the last step is all noise, and an epsilon says nothing of "
            "the picture there; choose --prediction_type v_prediction or sample"
        )
    if config.snr_gamma is not None:
        raise ConfigError(
            "snr_gamma: with zero terminal SNR its weight is 0 at the last step, from which pictures are drawn; "
            "leave one of the two out"
        )


def optimizer_steps(config: TrainConfig, batches: Batches) -> int:
    """How many the run takes: `max_train_steps`, or what `num_train_epochs` passes over the data make."""
    if config.num_train_epochs is None:
        return config.max_train_steps
    return -(-config.num_train_epochs * batches.epoch_length // batches.global_batch)


def learning_rate_at(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step alone, so that a resume has nothing to restore."""
    if config.lr_scheduler == "inverse_sqrt":  # of Karras et al. 2023, arXiv 2312.02696, section 2
        start, warmup = config.lr_decay_start_steps, config.lr_warmup_steps
        return lambda step: (
            config.learning_rate * min((step + 1) / max(warmup, 1), 1) / max((step + 1) / start, 1) ** 0.5
        )
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # diffusers' schedules are factors that hang on an optimizer
    schedule = get_scheduler(
        config.lr_scheduler, unused, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total_steps
    )
    (factor,) = schedule.lr_lambdas
    return lambda step: config.learning_rate * factor(step + 1 if step < config.lr_warmup_steps else step)


# ---------------------------------------------------------------------------------------------------- in the loop


def training_loss(model: torch.nn.Module, scheduler, batch: Batch, config: TrainConfig) -> torch.Tensor:
    """The weighted loss of each sample of a batch in what the UNet predicts -> (B,).

    Where the UNet learns its uncertainty u of each noise level, loss / exp(u) + u (arXiv 2312.02696, eq. 21): at its
    least u is the logarithm of the loss there, so that all levels count the same.

    Args:
        model: the UNet, or one with a text encoder in front of it, for batches without hidden states.
    """
    noisy_latents = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    seen = noisy_latents if batch.conditions is None else torch.cat([noisy_latents, batch.conditions], dim=1)
    text = batch.captions if batch.encoder_hidden_states is None else batch.encoder_hidden_states
    output = model(seen, batch.timesteps, text)
    kind, abar = scheduler.config.prediction_type, scheduler.alphas_cumprod
    losses = denoising_loss(output.sample, training_target(kind, batch.latents, batch.noise, abar, batch.timesteps))
    if (u := getattr(output, "log_variance", None)) is not None:
        losses = losses / u.exp() + u
    if config.snr_gamma is not None:
        losses = losses * min_snr_weight(abar, batch.timesteps, config.snr_gamma, kind)
    return losses


class RunLog:
    """What was measured at which optimizer step: a line of JSON each in `log.jsonl`, and the tracker's curves.

    A run that goes on from an earlier step first removes the lines after it, so that no step stands there twice.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, first_step: int):
        self._accelerator, self._path = accelerator, Path(config.output_dir) / "log.jsonl"
        if accelerator.is_main_process:
            lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() and first_step else []
            whole = [line for line in lines if line.endswith("\n")]  # a killed run may have cut its last one
            self._path.write_text("".join(line for line in whole if json.loads(line)["step"] <= first_step))

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Add `values` after optimizer step number `step`."""
        self._accelerator.log(values, step=step)
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


class Progress:
    """The progress bar with loss, pictures per second and time left; to be used in a with statement."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        log: RunLog,
        first_step: int,
        total_steps: int,
        pending: list[float],
    ):
        self._accelerator, self._log, self._every = accelerator, log, config.logging_steps
        self._global_batch = config.samples_per_step * accelerator.num_processes
        self._earlier = pending  # what a checkpoint between two lines of the log kept
        self._losses: list[torch.Tensor] = []
        self._since, self._last_step = time.perf_counter(), first_step
        self._bar = tqdm(
            initial=first_step,
            total=total_steps,
            desc="training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )

    def add(self, loss: torch.Tensor) -> None:
        """Take in a micro-batch's loss without waiting for the device."""
        self._losses.append(loss.detach())

    @property
    def pending(self) -> list[float]:
        """Losses since the last line of the log, means over the processes, for a checkpoint to keep."""
        if not self._losses:
            return self._earlier
        return self._earlier + self._accelerator.reduce(torch.stack(self._losses), "mean").tolist()

    def step(self, done: int, **values: float | torch.Tensor) -> None:
        """After optimizer step number `done`; every `logging_steps` the mean loss since the last time is shown, and
        logged beside `values`."""
        self._bar.update()
        if done % self._every and done != self._bar.total:
            return
        loss = float(torch.tensor(self.pending).mean())
        rate = (done - self._last_step) * self._global_batch / (time.perf_counter() - self._since)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} pictures/s")
        self._log(done, {"loss": loss, **{k: float(v) for k, v in values.items()}, "pictures_per_second": rate})
        self._earlier, self._losses = [], []
        self._last_step, self._since = done, time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()  # ends its line, so that a message does not stand behind it


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
