"""Text to image with a latent diffusion model: Stable Diffusion's components, and the same picture as its pipeline.

Classifier-free guidance is that of Ho & Salimans 2022 (arXiv 2207.12598), its rescaling that of Lin et al. 2023 (arXiv
2305.08891). This file travels with the weights: `save_pretrained` puts it beside them as `pipeline.py`, with the
scheduler files, so that diffusers alone can run it. It therefore imports nothing else of this project.
"""

import contextlib
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.models import AutoencoderKL, ImageProjection, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

# From a local folder diffusers takes only the files `pipeline.py` itself imports, not what those import in turn: so
# the noise schedule, which only the schedulers use, is imported here as well.
from .noise_schedule import make_betas
from .scheduling_ddim import DDIMScheduler
from .scheduling_ddpm import DDPMScheduler

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

_OUR_SCHEDULERS = {diffusers.DDIMScheduler: DDIMScheduler, diffusers.DDPMScheduler: DDPMScheduler}
# StableDiffusionPipeline sets these two in any scheduler it is given, whatever the scheduler's config file says.
_STABLE_DIFFUSION_SETTINGS = {"steps_offset": 1, "clip_sample": False}


def adopt_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler that the pipeline uses for `scheduler`: ours for diffusers' own DDIM and DDPM.

    `steps_offset` and `clip_sample` get the values that StableDiffusionPipeline forces on every scheduler, so that both
    pipelines draw the same picture; a value that has to change for it is logged.
    """
    changes = {k: v for k, v in _STABLE_DIFFUSION_SETTINGS.items() if scheduler.config.get(k, v) != v}
    for name, value in changes.items():
        logger.warning(
            f"{type(scheduler).__name__}: {name}={scheduler.config[name]} becomes {value}, as in Stable Diffusion"
        )
    scheduler_class = _OUR_SCHEDULERS.get(type(scheduler), type(scheduler))
    if scheduler_class is type(scheduler) and not changes:
        return scheduler
    return scheduler_class.from_config(scheduler.config, **changes)


def guide(
    uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Classifier-free guidance: e_u + w (e_c - e_u), rescaled as in arXiv 2305.08891, eq. 14-16.

    Args:
        uncond, cond: (B, C, H, W), the network's output without and with the prompt.
        guidance_scale: w; 1 gives `cond`.
        guidance_rescale: phi in [0, 1]; 1 gives the result the deviation of `cond`, 0 leaves it as it is.
    """
    guided = uncond + guidance_scale * (cond - uncond)
    if guidance_rescale > 0.0:
        dims = list(range(1, cond.ndim))
        rescaled = guided * (cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
        guided = guidance_rescale * rescaled + (1 - guidance_rescale) * guided
    return guided


def guidance_embedding(guidance_scale: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding (B, dim) of 1000 w, for UNets distilled to take the guidance weight as an input; w: (B,)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (guidance_scale * 1000.0).float()[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


@contextlib.contextmanager
def _text_lora_scale(text_encoder: torch.nn.Module | None, scale: float | None):
    """Run the text encoder's LoRA layers at `scale`; undone at the end, also after an error."""
    if scale is None or text_encoder is None:
        yield
        return
    scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(text_encoder, scale)


class LatentDiffPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Text-to-image pipeline over Stable Diffusion's components, with this project's DDIM and DDPM schedulers.

    It loads any Stable Diffusion folder, and saves one that plain `StableDiffusionPipeline` loads; with the same
    weights, seed, steps and guidance both draw the same picture to the last bit. Every other diffusers scheduler works
    as well, passed in or set as `pipe.scheduler`. Any component may be None as long as a call does not need it.

    Args:
        vae: decodes latents; their scale is `vae.config.scaling_factor`.
        text_encoder, tokenizer: give the hidden states (B, tokens, width) that the UNet attends to.
        unet: predicts what `scheduler.config.prediction_type` says.
        scheduler: diffusers' own DDIM and DDPM are replaced by ours, see `adopt_scheduler`.
        safety_checker, feature_extractor: optional; a checker needs the extractor.
        image_encoder: optional, for IP-Adapters.
        requires_safety_checker: kept in the saved index; a missing checker is logged if it is True.

    Raises:
        ValueError: a safety checker without a feature extractor.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    # State of the current call. A callback may change it between steps: `pipe._interrupt = True` ends the loop there,
    # `pipe._guidance_scale = 0.0` the guidance.
    _guidance_scale = 7.5
    _guidance_rescale = 0.0
    _clip_skip = None
    _cross_attention_kwargs = None
    _num_timesteps = 0
    _interrupt = False

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = False,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs a feature_extractor: pass one, or safety_checker=None")
        if safety_checker is None and requires_safety_checker:
            logger.warning("requires_safety_checker is True but there is no safety_checker: pictures are not filtered")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=None if scheduler is None else adopt_scheduler(scheduler),
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        """The guidance weight w of the current call."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """The share phi of rescaled guidance in the current call."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a step runs the unconditional pass too: w > 1, and the UNet does not take w as an input instead."""
        return self._guidance_scale > 1 and self._guidance_embedding_dim is None

    @property
    def _guidance_embedding_dim(self) -> int | None:
        return getattr(self.unet.config, "time_cond_proj_dim", None)

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoder's last layers the current call leaves out."""
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """What the current call hands to the UNet's attention processors."""
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the current call has been asked to stop denoising."""
        return self._interrupt

    # Text and image conditions

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the text encoder's hidden states for the prompts and for what guidance leads away from.

        Args:
            prompt: one prompt or B of them; None if `prompt_embeds` (B, tokens, width) are given.
            negative_prompt: one for every prompt or B of them; None is the empty text.
            lora_scale: strength of the text encoder's LoRA layers.
            clip_skip: take the hidden states this many layers before the last (of the prompt, not of the negative one).

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, each (B * num_images_per_prompt, tokens, width), those of one
            prompt side by side. Without guidance the second is what was passed in.

        Raises:
            ValueError: not as many negative prompts as prompts; text given but no text encoder.
        """
        with _text_lora_scale(self.text_encoder, lora_scale):
            if prompt_embeds is None:
                prompts = [prompt] if isinstance(prompt, str) else prompt
                prompt_embeds = self._encode_text(prompts, device, self._max_tokens, clip_skip)
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                negative_prompts = self._negative_prompts(negative_prompt, len(prompt_embeds))
                negative_prompt_embeds = self._encode_text(negative_prompts, device, prompt_embeds.shape[1])

        dtype = next((m.dtype for m in (self.text_encoder, self.unet) if m is not None), prompt_embeds.dtype)
        prompt_embeds = prompt_embeds.to(device=device, dtype=dtype)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device=device, dtype=dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    @property
    def _max_tokens(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.model_max_length

    def _encode_text(
        self, prompts: list[str], device: torch.device, max_length: int | None, clip_skip: int | None = None
    ) -> torch.Tensor:
        """(len(prompts), max_length, width): the text encoder's hidden states after its final norm."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text_encoder or no tokenizer: pass prompt_embeds, and for guidance_scale above 1"
                " negative_prompt_embeds too"
            )
        prompts = self.maybe_convert_prompt(prompts, self.tokenizer)  # a textual inversion of several vectors
        self._log_cut_text(prompts, max_length)
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
        )
        needs_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        output = self.text_encoder(
            tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device) if needs_mask else None,
            output_hidden_states=clip_skip is not None,
        )
        if clip_skip is None:
            return output[0]
        # Inner layers come without the final norm. transformers 5 has it on the model itself, 4 one level down.
        text_model = getattr(self.text_encoder, "text_model", self.text_encoder)
        return text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])

    def _log_cut_text(self, prompts: list[str], max_length: int) -> None:
        for prompt, token_ids in zip(prompts, self.tokenizer(prompts, verbose=False).input_ids, strict=True):
            if len(token_ids) > max_length:
                cut = self.tokenizer.decode(token_ids[max_length - 1 : -1])
                logger.warning(f"{max_length} tokens are the most the text encoder reads; cut from {prompt!r}: {cut!r}")

    @staticmethod
    def _negative_prompts(negative_prompt: str | list[str] | None, batch_size: int) -> list[str]:
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt or ""] * batch_size
        if len(negative_prompt) != batch_size:
            raise ValueError(
                f"{len(negative_prompt)} negative prompts for {batch_size} prompts: pass 1 or {batch_size}"
            )
        return negative_prompt

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: PipelineImageInput | None,
        ip_adapter_image_embeds: list[torch.Tensor] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> list[torch.Tensor]:
        """Return one batch of image features per loaded IP-Adapter, the unconditional half first under guidance.

        Raises:
            ValueError: images and features both; not as many images as IP-Adapters.
        """
        if ip_adapter_image is not None and ip_adapter_image_embeds is not None:
            raise ValueError("pass ip_adapter_image or ip_adapter_image_embeds, not both")
        if ip_adapter_image_embeds is None:
            images = ip_adapter_image if isinstance(ip_adapter_image, list) else [ip_adapter_image]
            layers = self.unet.encoder_hid_proj.image_projection_layers
            if len(images) != len(layers):
                raise ValueError(f"ip_adapter_image: {len(images)} images for {len(layers)} IP-Adapters")
            ip_adapter_image_embeds = [
                self._encode_image(image, device, isinstance(layer, ImageProjection), do_classifier_free_guidance)
                for image, layer in zip(images, layers, strict=True)
            ]
        batches = []
        for embeds in ip_adapter_image_embeds:
            halves = embeds.chunk(2) if do_classifier_free_guidance else (embeds,)
            batches.append(torch.cat([torch.cat([half] * num_images_per_prompt) for half in halves]).to(device))
        return batches

    def _encode_image(
        self, image: PipelineImageInput, device: torch.device, pooled: bool, with_uncond: bool
    ) -> torch.Tensor:
        """CLIP features of `image`, (1, ...); with_uncond puts those of no image before them, (2, ...)."""
        if not isinstance(image, torch.Tensor):
            image = self.feature_extractor(image, return_tensors="pt").pixel_values
        image = image.to(device=device, dtype=next(self.image_encoder.parameters()).dtype)
        if pooled:
            embeds = self.image_encoder(image).image_embeds
            uncond = torch.zeros_like(embeds)
        else:
            embeds = self.image_encoder(image, output_hidden_states=True).hidden_states[-2]
            uncond = self.image_encoder(torch.zeros_like(image), output_hidden_states=True).hidden_states[-2]
        return torch.stack([uncond, embeds]) if with_uncond else embeds[None]

    # Checks

    def _check_prompts(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt: str | list[str] | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> None:
        _check_text("prompt", prompt, prompt_embeds, required=True)
        _check_text("negative_prompt", negative_prompt, negative_prompt_embeds, required=False)
        if prompt_embeds is not None and negative_prompt_embeds is not None:
            shape, negative_shape = tuple(prompt_embeds.shape), tuple(negative_prompt_embeds.shape)
            if shape != negative_shape:
                raise ValueError(f"prompt_embeds {shape} and negative_prompt_embeds {negative_shape} differ in shape")
        if not self.do_classifier_free_guidance and (negative_prompt or negative_prompt_embeds is not None):
            logger.warning(f"without guidance (guidance_scale={self.guidance_scale}) the negative prompt has no effect")

    def _check_options(
        self,
        height: int,
        width: int,
        output_type: str,
        num_images_per_prompt: int,
        clip_skip: int | None,
        callback_inputs: list[str],
    ) -> None:
        factor = self.vae_scale_factor
        if height % factor or width % factor or min(height, width) <= 0:
            raise ValueError(f"height={height}, width={width}: both must be positive multiples of {factor}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: it must be one of {', '.join(OUTPUT_TYPES)}")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: it must be a positive integer")
        layers = getattr(getattr(self.text_encoder, "config", None), "num_hidden_layers", None)
        if clip_skip is not None and layers is not None and not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip={clip_skip}: the text encoder has {layers} layers to skip")
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            allowed = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs={unknown}: a callback can have {allowed}")

    def _picture_size(self, height: int | None, width: int | None, latents: torch.Tensor | None) -> tuple[int, int]:
        """Height and width in pixels: as asked for, else of the given latents, else what the UNet was trained at."""
        if height is not None and width is not None:
            return height, width
        size = self.unet.config.sample_size if latents is None else tuple(latents.shape[-2:])
        if size is None:
            raise ValueError("unet.config.sample_size is not set: pass height and width")
        rows, columns = (size, size) if isinstance(size, int) else size
        return (
            rows * self.vae_scale_factor if height is None else height,
            columns * self.vae_scale_factor if width is None else width,
        )

    # Sampling

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the first latents (B, C, H, W): `latents`, or noise of `generator`, times the scheduler's sigma.

        Raises:
            ValueError: a list of generators that is not one for each picture; latents of another shape.
        """
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} pictures: pass one, or one for each")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this call draws {shape}")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def _set_timesteps(
        self, num_inference_steps: int, device: torch.device, timesteps: list[int] | None, sigmas: list[float] | None
    ) -> torch.Tensor:
        """Set the scheduler's timesteps, by number or as given, and return them."""
        if timesteps is not None and sigmas is not None:
            raise ValueError("pass timesteps or sigmas, not both")
        custom = {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
        for name in custom.keys() - inspect.signature(self.scheduler.set_timesteps).parameters.keys():
            raise ValueError(f"{type(self.scheduler).__name__} takes no {name} of yours: pass num_inference_steps")
        self.scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device=device)
        return self.scheduler.timesteps

    def _step_kwargs(self, **candidates) -> dict[str, Any]:
        """Those of `candidates` that the scheduler's `step` has in its signature: they differ from one to another."""
        return {k: v for k, v in candidates.items() if k in inspect.signature(self.scheduler.step).parameters}

    def _conditions(
        self,
        ip_adapter_image: PipelineImageInput | None,
        ip_adapter_image_embeds: list[torch.Tensor] | None,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """What the UNet is told besides the prompt, where it takes them: guidance weight and IP-Adapters' images."""
        conditions = {"timestep_cond": None, "added_cond_kwargs": None}
        if self._guidance_embedding_dim is not None:
            weights = torch.full((batch_size,), self.guidance_scale - 1)
            embedding = guidance_embedding(weights, self._guidance_embedding_dim)
            conditions["timestep_cond"] = embedding.to(device=device, dtype=dtype)
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, batch_size, self.do_classifier_free_guidance
            )
            conditions["added_cond_kwargs"] = {"image_embeds": image_embeds}
        return conditions

    def _predict(
        self, latents: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor, conditions: dict[str, Any]
    ) -> torch.Tensor:
        """The network's output (B, C, H, W) at timestep t; under guidance both passes are one batch of 2 B."""
        guided = self.do_classifier_free_guidance
        model_input = torch.cat([latents] * 2) if guided else latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(model_input, t)
        output = self.unet(
            model_input,
            t,
            encoder_hidden_states=prompt_embeds,
            cross_attention_kwargs=self.cross_attention_kwargs,
            return_dict=False,
            **conditions,
        )[0]
        return guide(*output.chunk(2), self.guidance_scale, self.guidance_rescale) if guided else output

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        conditions: dict[str, Any],
        step_kwargs: dict[str, Any],
        callback: Callable | None,
        callback_inputs: list[str],
    ) -> torch.Tensor:
        """The sampling loop, from the first latents to the last, both (B, C, H, W).

        As in Stable Diffusion, a callback's `prompt_embeds` are those of the network's batch: under guidance first the
        negative half. What it returns takes the place of what it was given.
        """
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        for i, t in enumerate(self.progress_bar(timesteps)):
            output = self._predict(latents, t, prompt_embeds, conditions)
            latents = self.scheduler.step(output, t, latents, **step_kwargs, return_dict=False)[0]
            if callback is not None:
                state = self._call_back(callback, callback_inputs, i, t, latents, prompt_embeds, negative_prompt_embeds)
                latents, prompt_embeds, negative_prompt_embeds = state
            if self.interrupt:
                break
        return latents

    def _call_back(
        self,
        callback: Callable,
        inputs: list[str],
        step: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Show a user's callback the tensors it asked for; return all three, changed as it wants."""
        state = {
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        state |= callback(self, step, timestep, {name: state[name] for name in inputs}) or {}
        changed = state["negative_prompt_embeds"]
        if changed is not negative_prompt_embeds and self.do_classifier_free_guidance:
            state["prompt_embeds"] = torch.cat([changed, state["prompt_embeds"].chunk(2)[1]])
        return state["latents"], state["prompt_embeds"], changed

    def _decode(
        self, latents: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None, output_type: str
    ) -> tuple[Any, list[bool] | None]:
        """Latents (B, C, H, W) to pictures of `output_type`, with the safety checker's verdicts if there is one."""
        if output_type == "latent":
            return latents, None
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False, generator=generator)[0]
        pixels, flagged = self.run_safety_checker(pixels, latents.dtype)
        denormalize = [True] * len(pixels) if flagged is None else [not flag for flag in flagged]
        return self.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=denormalize), flagged

    def run_safety_checker(self, pixels: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, list[bool] | None]:
        """Return `pixels` (B, 3, H, W in [-1, 1]), blacked out where flagged, and the flags; None without a checker."""
        if self.safety_checker is None:
            return pixels, None
        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        clip_input = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(pixels.device, dtype)
        return self.safety_checker(images=pixels, clip_input=clip_input)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draw pictures.

        Args:
            prompt: one prompt or a list of B; or give `prompt_embeds` (B, tokens, width) instead.
            height, width: in pixels, multiples of the VAE's factor; by default the size the UNet was trained at.
            num_inference_steps: denoising steps; `timesteps` or `sigmas` set them one by one where the scheduler can.
            guidance_scale: w in e_u + w (e_c - e_u). At 1 or below there is no unconditional pass. A UNet with
                `time_cond_proj_dim` takes w as an input instead.
            negative_prompt: what guidance leads away from, one for all or B; or `negative_prompt_embeds`.
            num_images_per_prompt: pictures for each prompt, side by side in the result.
            eta: DDIM's eta in [0, 1]; other schedulers do not use it.
            generator: one for the batch, or one for each picture, which then does not depend on its neighbours.
            latents: the first noise (pictures, channels, height / factor, width / factor), in place of drawing it.
            ip_adapter_image, ip_adapter_image_embeds: an image, or its features, for each loaded IP-Adapter.
            output_type: "pil"; "np" (pictures, height, width, 3) or "pt" (pictures, 3, height, width) in [0, 1]; or
                "latent", not decoded.
            return_dict: False returns the tuple (pictures, flags).
            cross_attention_kwargs: for the attention processors; "scale" is the strength of LoRA layers.
            guidance_rescale: phi of arXiv 2305.08891, eq. 16.
            clip_skip: leave out this many of the text encoder's last layers.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step, with those named in
                `callback_on_step_end_tensor_inputs`; it may return new ones and set `pipeline._interrupt = True`.

        Returns:
            An output with `images` and `nsfw_content_detected` (None without a safety checker), or both as a tuple.

        Raises:
            ValueError: an argument that cannot work, with its name, its value and what it may be.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._clip_skip, self._cross_attention_kwargs, self._interrupt = clip_skip, cross_attention_kwargs, False
        height, width = self._picture_size(height, width, latents)
        self._check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        callback_inputs = callback_on_step_end_tensor_inputs
        self._check_options(height, width, output_type, num_images_per_prompt, clip_skip, callback_inputs)
        device = self._execution_device

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        batch_size, dtype = len(prompt_embeds), prompt_embeds.dtype
        timesteps = self._set_timesteps(num_inference_steps, device, timesteps, sigmas)
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(
            batch_size, self.unet.config.in_channels, height, width, dtype, device, generator, latents
        )

        latents = self._denoise(
            latents,
            timesteps,
            prompt_embeds,
            negative_prompt_embeds,
            self._conditions(ip_adapter_image, ip_adapter_image_embeds, batch_size, device, dtype),
            self._step_kwargs(eta=eta, generator=generator),
            callback_on_step_end,
            callback_inputs,
        )
        images, flagged = self._decode(latents, generator, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    # Saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """Save a Stable Diffusion folder that also carries this pipeline and its schedulers as code.

        `StableDiffusionPipeline` and this class load it; diffusers alone loads this class from it, given
        `custom_pipeline=` the same folder and `trust_remote_code=True`. With `push_to_hub` the whole folder, with the
        README.md in it, goes to `repo_id` (by default the folder's name); the arguments after it are for that.
        """
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        for name, source in _code_files().items():
            Path(save_directory, name).write_text(source, encoding="utf-8")
        if push_to_hub:
            # Of what diffusers can push, only the index takes all that lies beside it along and replaces no README.md.
            hub = {"private": private, "token": token, "commit_message": commit_message, "create_pr": create_pr}
            repo_id = repo_id or Path(save_directory).resolve().name
            self.save_config(str(save_directory), push_to_hub=True, repo_id=repo_id, **hub)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write model_index.json in diffusers' names alone, so that it loads where latentdiff is not installed."""
        index = json.loads(self.to_json_string())
        index["_class_name"] = "StableDiffusionPipeline"
        index.pop("_name_or_path", None)  # where these weights were loaded from is nobody else's path
        name = type(self.scheduler).__name__
        if name in {scheduler.__name__ for scheduler in _OUR_SCHEDULERS}:
            index["scheduler"] = ["diffusers", name]
        Path(json_file_path).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_text(name: str, text: str | list[str] | None, embeds: torch.Tensor | None, required: bool) -> None:
    if text is not None and embeds is not None:
        raise ValueError(f"pass {name} or {name}_embeds, not both")
    if text is None and embeds is None and required:
        raise ValueError(f"pass {name} or {name}_embeds")
    if text is not None and not isinstance(text, str):
        if not isinstance(text, list) or not all(isinstance(item, str) for item in text):
            raise ValueError(f"{name} must be a text or a list of texts, not {text!r}")
        if not text:
            raise ValueError(f"{name} is an empty list: pass at least one text")


def _code_files() -> dict[str, str]:
    """The code that travels with the weights, by file name; in that flat folder this file imports relatively."""
    parts = {
        "pipeline.py": LatentDiffPipeline,
        "noise_schedule.py": make_betas,
        "scheduling_ddim.py": DDIMScheduler,
        "scheduling_ddpm.py": DDPMScheduler,
    }
    sources = {name: Path(inspect.getfile(part)).read_text(encoding="utf-8") for name, part in parts.items()}
    sources["pipeline.py"] = re.sub(r"^from latentdiff\.", "from .", sources["pipeline.py"], flags=re.MULTILINE)
    return sources
