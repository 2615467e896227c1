"""The sampling loop that every pipeline here shares: noise, timesteps, guidance, callbacks.

Any diffusers scheduler can take part: what its `step` and `set_timesteps` do not have in their signatures they are not
given. Guidance: see `guidance` and `clip_guidance`.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.models import UNet2DConditionModel
from diffusers.schedulers import PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor

from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.diffusion.guidance import GuidanceScale, check_guidance_interval, guidance_weight, guide
from latentdiff.diffusion.latent_scale import unscale_latents
from latentdiff.diffusion.noise_schedule import noise_level
from latentdiff.diffusion.unet_inputs import guidance_embedding

StepCallback = Callable | PipelineCallback | MultiPipelineCallbacks


@dataclass(frozen=True)
class Conditions:
    """What the UNet is told besides the prompt, and what leads away from where it leads."""

    timestep_cond: torch.Tensor | None = None  # (B, width): the guidance weight, for UNets that take it as an input
    image_embeds: list[torch.Tensor] | None = None  # of IP-Adapters; under guidance the unconditional half first
    extra_channels: torch.Tensor | None = None  # (B, E, H, W), put behind the latents' own channels
    guide_unet: UNet2DConditionModel | None = None
    clip_guidance: ClipGuidance | None = None
    clip_text: torch.Tensor | None = None  # (B, D): what `clip_guidance` compares the pictures with

    def of_prompt(self, batch_size: int) -> "Conditions":
        """Those of a batch without its unconditional half."""
        if self.image_embeds is None:
            return self
        return Conditions(**{**self.__dict__, "image_embeds": [e[-batch_size:] for e in self.image_embeds]})


class GuidedSampling:
    """The loop, for a pipeline that has `unet`, `scheduler`, `vae`, and the state of a call in its attributes."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    # State of the current call. A callback may change it between steps: `pipe._interrupt = True` ends the loop there,
    # `pipe._guidance_scale = 0.0` the guidance.
    _guidance_scale: GuidanceScale = 7.5
    _guidance_rescale = 0.0
    _guidance_interval: tuple[float, float] | None = None
    _clip_skip = None
    _cross_attention_kwargs = None
    _num_timesteps = 0
    _interrupt = False
    _autoguided = False

    @property
    def guidance_scale(self) -> GuidanceScale:
        """The guidance weight w of the current call, or the function of the noise level that gives it."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """The share phi of rescaled guidance in the current call."""
        return self._guidance_rescale

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        """The noise levels between which the current call is guided; None is all of them."""
        return self._guidance_interval

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether steps run an unconditional pass too: w can be above 1, and neither another UNet leads away from its
        own answer nor does the UNet take w as an input."""
        return self._is_guided(self._guidance_scale) and not self._autoguided and self._guidance_embedding_dim is None

    @staticmethod
    def _is_guided(guidance_scale: GuidanceScale) -> bool:
        return callable(guidance_scale) or guidance_scale > 1

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

    # What goes in

    def _set_guidance(
        self,
        guidance_scale: GuidanceScale,
        guidance_rescale: float,
        guidance_interval: tuple[float, float] | None,
        guide_unet: UNet2DConditionModel | None,
        negative_prompt: str | list[str] | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> None:
        """Keep a call's guidance; raises ValueError for what cannot go together."""
        check_guidance_interval(guidance_interval)
        if guide_unet is not None and (negative_prompt or negative_prompt_embeds is not None):
            raise ValueError("guide_unet leads away from its own answer to the prompt: leave out the negative prompt")
        if self._guidance_embedding_dim is not None:
            for name, given in (
                ("guidance_interval", guidance_interval is not None),
                ("guide_unet", guide_unet is not None),
                ("a function as guidance_scale", callable(guidance_scale)),
            ):
                if given:
                    raise ValueError(f"this UNet takes the guidance weight as an input: {name} has no effect on it")
        if guidance_interval is not None or callable(guidance_scale):
            self._noise_levels([])  # a scheduler without any is told here
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._guidance_interval, self._autoguided = guidance_interval, guide_unet is not None

    def _generators(
        self,
        seeds: list[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        num_prompts: int,
        num_images_per_prompt: int,
    ) -> tuple[torch.Generator | list[torch.Generator] | None, int]:
        """(what the noise is drawn with, pictures per prompt).

        With `seeds` every picture has a generator of its own, on the CPU, so that its noise is the same in any batch
        and on any device. One prompt is drawn once for each seed.
        """
        if seeds is None:
            return generator, num_images_per_prompt
        if generator is not None:
            raise ValueError("pass seeds or generator, not both")
        if num_prompts == 1 and num_images_per_prompt == 1:
            num_images_per_prompt = len(seeds)
        if not seeds or len(seeds) != num_prompts * num_images_per_prompt:
            raise ValueError(
                f"{len(seeds)} seeds for {num_prompts * num_images_per_prompt} pictures: pass one for each"
            )
        return [torch.Generator("cpu").manual_seed(seed) for seed in seeds], num_images_per_prompt

    def _noise_levels(self, timesteps: Iterable[float]) -> list[float]:
        """The noise level sigma of each timestep."""
        alphas_cumprod = getattr(self.scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(
                f"{type(self.scheduler).__name__} has no alphas_cumprod, so that guidance cannot follow noise levels: "
                "leave out guidance_interval, clip_guidance and a function as guidance_scale"
            )
        return [noise_level(alphas_cumprod, t) for t in timesteps]

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
        return self._noise(shape, generator, dtype, device, latents) * self.scheduler.init_noise_sigma

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        dtype: torch.dtype,
        device: torch.device,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`latents` if they have that shape, or noise of `generator` if there are none."""
        if latents is None:
            return self._normal(shape, generator, dtype, device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this call draws {shape}")
        return latents.to(device=device, dtype=dtype)

    @staticmethod
    def _normal(
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Standard normal noise, of a list of generators a picture each."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} pictures: pass one, or one for each")
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def _set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """Set the scheduler's timesteps, by number or as given, and return the last `strength` share of them.

        A scheduler that takes a strength itself, as those of few-step models do, takes all its steps within that share.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("pass timesteps or sigmas, not both")
        if not 0 < strength <= 1:
            raise ValueError(
                f"strength={strength}: it must lie above 0 and at most at 1, which starts from noise alone"
            )
        custom = {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
        takes = inspect.signature(self.scheduler.set_timesteps).parameters.keys()
        for name in custom.keys() - takes:
            raise ValueError(f"{type(self.scheduler).__name__} takes no {name} of yours: pass num_inference_steps")
        options = custom or {"num_inference_steps": num_inference_steps}
        if not custom and "strength" in takes:
            options["strength"], strength = strength, 1.0
        self.scheduler.set_timesteps(**options, device=device)
        steps = num_inference_steps
        if custom:  # of which samplers of order 2 make two each but the last
            steps = math.ceil(len(self.scheduler.timesteps) / self.scheduler.order)
        # 0.29 * 100 steps is 28.999… in floating point; and never none, which would return the picture as it is.
        skipped = (steps - max(int(round(steps * strength, 6)), 1)) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skipped)
        remaining = self.scheduler.timesteps[skipped:]
        if skipped and isinstance(self.scheduler, PNDMScheduler):
            remaining = self._last_pndm_timesteps(skipped)
        self._num_timesteps = len(remaining)
        return remaining

    def _last_pndm_timesteps(self, skipped: int) -> torch.Tensor:
        """Without the first `skipped` of PNDM's N steps.

        PNDM calls the network twice for its first step, wherever it begins, and so names the second timestep twice.
        Without that its samples would lag a step behind the timesteps.
        """
        if not self.scheduler.config.skip_prk_steps:
            raise ValueError("PNDMScheduler begins in the middle only with skip_prk_steps=True: set it, or strength=1")
        timesteps = self.scheduler.timesteps
        once = torch.cat([timesteps[:1], timesteps[2:]])[skipped:]
        return torch.cat([once[:2], once[1:]])

    def _conditions(
        self,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        guide_unet: UNet2DConditionModel | None = None,
        clip_guidance: ClipGuidance | None = None,
        prompts: list[str] | None = None,
        extra_channels: torch.Tensor | None = None,
    ) -> Conditions:
        """The conditions of a call's B pictures; `prompts`: B texts, for CLIP guidance alone."""
        timestep_cond = image_embeds = clip_text = None
        if self._guidance_embedding_dim is not None:
            weights = torch.full((batch_size,), self.guidance_scale - 1)
            timestep_cond = guidance_embedding(weights, self._guidance_embedding_dim).to(device=device, dtype=dtype)
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, batch_size, self.do_classifier_free_guidance
            )
        if guide_unet is not None:
            theirs, ours = guide_unet.config.in_channels, self.unet.config.in_channels
            if theirs != ours:
                raise ValueError(f"guide_unet takes {theirs} channels and the pipeline's own UNet {ours}")
            if hasattr(guide_unet, "check_schedule"):
                guide_unet.check_schedule(self.scheduler.config)
            guide_unet = (guide_unet if guide_unet.dtype == dtype else guide_unet.to(dtype)).to(device)
        if clip_guidance is not None:
            self._noise_levels([])
            if prompts is None:
                raise ValueError("clip_guidance compares pictures with words: pass prompt, not prompt_embeds")
            clip_text = clip_guidance.to(device).embed_text(prompts, device)
        return Conditions(timestep_cond, image_embeds, extra_channels, guide_unet, clip_guidance, clip_text)

    def _step_kwargs(self, **candidates) -> dict[str, Any]:
        """Those of `candidates` that the scheduler's `step` has in its signature: they differ from one to another."""
        return {k: v for k, v in candidates.items() if k in inspect.signature(self.scheduler.step).parameters}

    # The loop

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        conditions: Conditions,
        step_kwargs: dict[str, Any] | Callable[[], dict[str, Any]],
        callback: StepCallback | None,
        callback_inputs: list[str],
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The sampling loop, from the first latents to the last, both (B, C, H, W).

        As in Stable Diffusion, a callback's `prompt_embeds` are those of the network's batch: under guidance first the
        negative half. What it returns takes the place of what it was given.

        Args:
            step_kwargs: for `scheduler.step`; a function gives them anew for each step.
            after_step: (index of the step, its latents) -> the latents to go on with, before the callback sees them.
        """
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            callback_inputs = callback.tensor_inputs
        needs_levels = self.guidance_interval is not None or callable(self.guidance_scale) or conditions.clip_guidance
        # Known before the loop, which then never waits for the device.
        sigmas = self._noise_levels(timesteps.tolist()) if needs_levels else [math.nan] * len(timesteps)
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        for i, t in enumerate(self.progress_bar(timesteps)):
            output = self._predict(latents, t, sigmas[i], prompt_embeds, conditions)
            options = step_kwargs() if callable(step_kwargs) else step_kwargs
            latents = self.scheduler.step(output, t, latents, **options, return_dict=False)[0]
            if after_step is not None:
                latents = after_step(i, latents)
            if callback is not None:
                state = self._call_back(callback, callback_inputs, i, t, latents, prompt_embeds, negative_prompt_embeds)
                latents, prompt_embeds, negative_prompt_embeds = state
            if self.interrupt:
                break
        return latents

    def _predict(
        self, latents: torch.Tensor, t: torch.Tensor, sigma: float, prompt_embeds: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """The network's output (B, C, H, W) at timestep t, guided."""
        model_input = latents
        if hasattr(self.scheduler, "scale_model_input"):
            model_input = self.scheduler.scale_model_input(latents, t)
        weight = guidance_weight(self.guidance_scale, sigma, self.guidance_interval)

        def predict(x_t: torch.Tensor) -> torch.Tensor:
            return self._guided(x_t, t, weight, prompt_embeds, conditions)

        if conditions.clip_guidance is None:
            return predict(model_input)
        return conditions.clip_guidance.guide(
            predict,
            model_input,
            alpha_cumprod=1 / (1 + sigma**2),
            prediction_type=self.scheduler.config.prediction_type,
            decode=lambda x_0: self.vae.decode(unscale_latents(x_0.to(self.vae.dtype), self.vae.config)).sample,
            text=conditions.clip_text,
        )

    def _guided(
        self,
        model_input: torch.Tensor,
        t: torch.Tensor,
        weight: float,
        prompt_embeds: torch.Tensor,
        conditions: Conditions,
    ) -> torch.Tensor:
        """Both passes as one batch of 2 B; one pass where there is no guidance; by another UNet a pass of each."""
        batch_size = len(model_input)
        guided = weight > 1 and self._guidance_embedding_dim is None
        if guided and self.do_classifier_free_guidance:
            output = self._run_unet(self.unet, torch.cat([model_input] * 2), t, prompt_embeds, conditions)
            return guide(*output.chunk(2), weight, self.guidance_rescale)
        prompt_embeds, conditions = prompt_embeds[-batch_size:], conditions.of_prompt(batch_size)
        output = self._run_unet(self.unet, model_input, t, prompt_embeds, conditions)
        if not (guided and conditions.guide_unet):
            return output
        worse = self._run_unet(conditions.guide_unet, model_input, t, prompt_embeds, conditions)
        return guide(worse, output, weight, self.guidance_rescale)

    def _run_unet(
        self,
        unet: UNet2DConditionModel,
        model_input: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
        conditions: Conditions,
    ) -> torch.Tensor:
        if conditions.extra_channels is not None:
            halves = len(model_input) // len(conditions.extra_channels)
            model_input = torch.cat([model_input, torch.cat([conditions.extra_channels] * halves)], dim=1)
        added = None if conditions.image_embeds is None else {"image_embeds": conditions.image_embeds}
        return unet(
            model_input,
            t,
            encoder_hidden_states=prompt_embeds,
            timestep_cond=conditions.timestep_cond,
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _call_back(
        self,
        callback: StepCallback,
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
