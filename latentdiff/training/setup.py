"""What a run is set up with before its first step: accelerator, networks, noise schedule, learning rate."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from diffusers.optimization import get_scheduler

from ..config.train import TrainConfig
from ..data.batches import Batches
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..diffusion.unet_inputs import is_for_inpainting, trained_size
from ..distributed.deepspeed import is_zero, zero_plugin
from ..distributed.fsdp import ShardingAccelerator, sharding_plugin
from ..models.latents import downsampling_factor
from ..models.loading import hide_loading_bars, load_frozen, load_schedule, load_unet
from ..models.lora import add_lora
from ..models.mp_unet import MPUNet2DConditionModel
from ..models.parts import FrozenParts, encode_prompt, with_trained_text_encoder
from ..models.trial import try_parts
from ..models.unet import UNet, build_unet, compile_blocks, use_fast_attention, widen_input
from ..objectives.choice import objective_of
from ..objectives.tasks import task_of
from ..pipelines.portable_saving import keep_code
from ..utils.errors import ConfigError, first_line
from .trackers import start_tracker


def start(config: TrainConfig) -> Accelerator:
    """The accelerator, with the output folder made.

    Raises:
        ConfigError: the folder cannot be written, or the tracker is unknown.
    """
    hide_loading_bars()
    make_output_dir(config)
    return make_accelerator(config)


def make_output_dir(config: TrainConfig) -> None:
    """Create the output folder if need be.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {config.output_dir!r} cannot be written ({first_line(error)})") from None


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator that the settings ask for, with its tracker started.

    Raises:
        ConfigError: the precision, the way to shard or the tracker is not to be had here.
    """
    fsdp, zero = sharding_plugin(config), zero_plugin(config)
    output_dir = config.output_dir
    try:
        accelerator = ShardingAccelerator(
            # Not as a number, which one of the launcher's, meant for DeepSpeed, would silently replace.
            gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
            mixed_precision=config.mixed_precision,
            fsdp_plugin=fsdp,
            deepspeed_plugin=zero,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=str(Path(output_dir) / "logs")),
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"mixed_precision or report_to: {first_line(error)}") from None
    if fsdp and not accelerator.is_fsdp2:
        raise ConfigError("accelerate's use_fsdp: there are no GPUs, or no processes of its launcher, to shard over")
    if zero and not is_zero(accelerator):
        raise ConfigError("accelerate's use_deepspeed: there are no GPUs, or no processes of its launcher")
    start_tracker(config, accelerator)
    return accelerator


def load_networks(config: TrainConfig) -> tuple[FrozenParts, UNet, DDPMScheduler | ConsistencyScheduler]:
    """The parts around the UNet, the UNet in fp32 and the noise schedule, as the scheduler of what is trained.

    Raises:
        ConfigError: a part is missing, the UNet does not fit the VAE or the text encoder, or that cannot be trained.
    """
    source = config.pretrained_model_name_or_path
    parts = load_frozen(source, config.revision, config.variant, config.single_file_config)
    latent_channels, text_width = parts.vae.config.latent_channels, parts.text_encoder.config.hidden_size
    objective, in_channels = objective_of(config), task_of(config).in_channels(latent_channels)
    scheduler = _noise_schedule(config)
    if config.unet == "pretrained":
        unet = load_unet(source, config.revision, config.variant, config.single_file_config)
    else:
        unet = build_unet(
            config.unet,
            latent_channels=latent_channels,
            in_channels=in_channels,
            sample_size=resolution_of(config, parts) // downsampling_factor(parts.vae),
            cross_attention_dim=text_width,
            seed=config.seed,
            schedule=scheduler.config,
            learned_uncertainty=config.learned_uncertainty,
        )
    keep_code(unet)
    _check_fits(config, unet, latent_channels, in_channels, text_width)
    try_parts(repr(source), lambda: encode_prompt(parts, ["a"]), parts.vae, unet, encodes=True)
    if unet.config.in_channels != in_channels:
        widen_input(unet, in_channels)
    scheduler = objective.scheduler(scheduler)
    objective.add_inputs(unet)
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


def resolution_of(config: TrainConfig, parts: FrozenParts, unet: UNet | None = None) -> int:
    """Side of the square pictures in pixels, as asked for or as the UNet, or the VAE of one to be built, was trained.

    Raises:
        ConfigError: that is not known, or no square.
    """
    if config.resolution is not None:
        return config.resolution
    try:
        size = trained_size(unet and unet.config, parts.vae.config, downsampling_factor(parts.vae))
    except ValueError as error:
        raise ConfigError(f"{error}; --resolution says how large the pictures are to be") from None
    if size is None or size[0] != size[1]:
        what = "no config.json has a sample_size" if size is None else f"the model's pictures are {size[1]}x{size[0]}"
        raise ConfigError(f"resolution: {what}, and training is on squares: give their side, such as --resolution 512")
    return size[0]


def _settle_schedule(unet: MPUNet2DConditionModel, scheduler: DDPMScheduler) -> None:
    """A pretrained one may have been saved with another prediction type than the run's, which it can all put out."""
    try:
        unet.follow_schedule(scheduler.config)
    except ValueError as error:
        raise ConfigError(f"unet: {error}") from None


def _check_fits(config: TrainConfig, unet: UNet, latent_channels: int, in_channels: int, text_width: int) -> None:
    has = unet.config.in_channels
    if has not in {latent_channels, in_channels} or unet.config.cross_attention_dim != text_width:
        hint = "; an inpainting model goes on with --task inpaint" if is_for_inpainting(has, latent_channels) else ""
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
        scheduler = load_schedule(config.pretrained_model_name_or_path, config.revision, config.single_file_config)
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
