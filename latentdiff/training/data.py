"""What a run trains on, from its settings: pictures looked at and listed, run through the frozen networks, in order."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from ..config.train import TrainConfig
from ..data import emoji
from ..data.batches import Batches
from ..data.buckets import bucket_sizes
from ..data.latent_cache import HiddenStates, Moments
from ..data.masks import MaskedExample
from ..data.pictures import CaptionedPictures, EmojiPictures, OwnPictures, open_source
from ..data.survey import survey
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.latents import downsampling_factor
from ..models.parts import FrozenParts
from ..objectives.choice import objective_of
from ..objectives.tasks import task_of
from ..utils.errors import ConfigError
from ..utils.files import cache_folder
from ..utils.system import give_back_memory
from .held_out import HeldOutLoss
from .setup import resolution_of


@dataclass(frozen=True)
class Data:
    """What training and validation draw from."""

    pictures: CaptionedPictures
    moments: Moments
    hidden_states: HiddenStates | None
    batches: Batches
    held_out_loss: HeldOutLoss
    masked_examples: list[MaskedExample]
    """Pictures to inpaint at each validation; none where that is not what is trained."""


def load_data(
    config: TrainConfig,
    accelerator: Accelerator,
    parts: FrozenParts,
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
) -> Data:
    """Pictures, run through the frozen networks once (or at each step without `cache_latents`).

    Raises:
        ConfigError: the resolution does not suit VAE and UNet, or the pictures cannot be used.
    """
    factor = downsampling_factor(parts.vae)
    # Every block of the UNet but the last halves the latent too.
    multiple = factor * 2 ** (len(unet.config.block_out_channels) - 1)
    pictures = _load_pictures(config, accelerator, resolution_of(config, parts, unet), multiple)
    parts.to(accelerator.device)
    folder = _cache_folder(config) if config.cache_latents else None
    moments = Moments(pictures, parts.vae, config.random_flip, folder)
    # Of a text encoder that changes there is nothing to keep.
    hidden_states = None if config.train_text_encoder else HiddenStates(pictures, parts)
    if folder and hidden_states and _worth_keeping(config.cache_text, hidden_states.bytes, moments.bytes):
        hidden_states.keep(folder)
        parts.text_encoder.to("cpu")  # until validation it only takes up the device's memory
    task = task_of(config)
    if folder and not task.inpaints:
        parts.vae.to("cpu")
    shared = {
        "vae_config": parts.vae.config,
        "num_train_timesteps": scheduler.config.num_train_timesteps,
        "inpainting_vae": parts.vae if task.inpaints else None,
    }
    batches = Batches(
        pictures,
        moments,
        hidden_states,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        random_flip=config.random_flip,
        micro_batch=config.train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        processes=accelerator.num_processes,
        process=accelerator.process_index,
        noise_offset=config.noise_offset,
        shuffle_buffer=config.shuffle_buffer,
        device=accelerator.device,
        guidance_range=objective_of(config).guidance_range,
        **shared,
    )
    held_out_loss = HeldOutLoss(pictures, moments, hidden_states, **shared)
    give_back_memory()  # tens of bytes per picture, which setting up took for a while
    return Data(pictures, moments, hidden_states, batches, held_out_loss, task.examples(pictures))


def _load_pictures(config: TrainConfig, accelerator: Accelerator, resolution: int, multiple: int) -> CaptionedPictures:
    if resolution % multiple:
        raise ConfigError(f"resolution: {resolution} is no multiple of {multiple}, which VAE and UNet need together")
    if config.uses_emoji:
        if resolution != emoji.RESOLUTION:
            raise ConfigError(f"resolution: the embedded emoji are {emoji.RESOLUTION} pixels wide, not {resolution}")
        return EmojiPictures(config.max_train_samples)
    if accelerator.is_local_main_process:  # with a source of its own: what it reads of the data does not stay in memory
        survey(config, open_source(config), _cache_folder(config) / "seen.sqlite")
    accelerator.wait_for_everyone()
    sizes = bucket_sizes(resolution, multiple) if config.aspect_ratio_buckets else [(resolution, resolution)]
    return OwnPictures(config, lambda: open_source(config), sizes)


def _cache_folder(config: TrainConfig) -> Path:
    folder = Path(config.cache_dir) if config.cache_dir else cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache_dir: {str(folder)!r} cannot be written ({error.strerror})") from None
    return folder


# Hidden states that are larger than the latents are not worth their disk. By the shapes of Stable Diffusion 1.5 at
# 512x512, the text encoder's forward pass is 0.3 % of a step's arithmetic (13 GFLOP of 4 TFLOP), the VAE's a quarter.
SMALL_CACHE = 2 * 2**30


def _worth_keeping(cache_text: str, text_bytes: int, latent_bytes: int) -> bool:
    if cache_text == "auto":
        return text_bytes <= max(SMALL_CACHE, latent_bytes)
    return cache_text == "always"
