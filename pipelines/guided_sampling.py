"""The sampling loop that every pipeline here shares: guidance, steps, callbacks.

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

from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.diffusion.guidance import GuidanceScale, check_guidance_interval, guidance_weight, guide
from latentdiff.diffusion.latent_scale import unscale_latents
from latentdiff.diffusion.noise_schedule import noise_level, predict_x0_and_epsilon
from latentdiff.diffusion.unet_inputs import guidance_embedding
from latentdiff.pipelines.noise_and_timesteps import NoiseAndTimesteps

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


class GuidedSampling(NoiseAndTimesteps):
    """The loop, for a pipeline that has `unet`, `scheduler`, `vae`, and the state of a call in its attributes."""

    # The last is x_0 as the network predicts it in the step, for previews; a callback cannot change it.
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample"]

    # State of the current call. A callback may change it between steps: `pipe._interrupt = True` ends the loop there,
    # `pipe._guidance_scale = 0.0` the guidance.
    _guidance_scale: GuidanceScale = 7.5
    _guidance_rescale = 0.0
    _guidance_interval: tuple[float, float] | None = None
    _clip_skip = None
    _cross_attention_kwargs = None
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
        return self._is_guided(self._guidance_scale) and not self._autoguided and not self.takes_guidance_as_input

    @staticmethod
    def _is_guided(guidance_scale: GuidanceScale) -> bool:
        return callable(guidance_scale) or guidance_scale > 1

    @property
    def guidance_embedding_dim(self) -> int | None:
        """The width of the UNet's input for the guidance weight, where it has one."""
        return getattr(self.unet.config, "time_cond_proj_dim", None)

    @property
    def takes_guidance_as_input(self) -> bool:
        """Whether the UNet is told the guidance weight, so that there is nothing to lead away from."""
        return self.guidance_embedding_dim is not None

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoder's last layers the current call leaves out."""
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """What the current call hands to the UNet's attention processors."""
        return self._cross_attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Whether the current call has been asked to stop denoising."""
        return self._interrupt

    # What goes in

    def _begin(self, clip_skip: int | None, cross_attention_kwargs: dict[str, Any] | None) -> None:
        """Keep what a call is told for all of its steps."""
        self._clip_skip, self._cross_attention_kwargs, self._interrupt = clip_skip, cross_attention_kwargs, False

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
        if self.takes_guidance_as_input:
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

    def _noise_levels(self, timesteps: Iterable[float]) -> list[float]:
        """The noise level sigma of each timestep."""
        alphas_cumprod = self._alphas_cumprod("guidance_interval, clip_guidance and a function as guidance_scale")
        return [noise_level(alphas_cumprod, t) for t in timesteps]

    def _alphas_cumprod(self, needed_by: str) -> torch.Tensor:
        alphas_cumprod = getattr(self.scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} has no alphas_cumprod, so that noise levels are not known: leave out {needed_by}")
        return alphas_cumprod

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
        """The conditions of a call's B pictures; `prompts`: a text for each or for several side by side, for CLIP
        guidance alone."""
        timestep_cond = image_embeds = clip_text = None
        if self.takes_guidance_as_input:
            weights = torch.full((batch_size,), self.guidance_scale - 1)
            timestep_cond = guidance_embedding(weights, self.guidance_embedding_dim).to(device=device, dtype=dtype)
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
            of_each = [text for text in prompts for _ in range(batch_size // len(prompts))]
            clip_text = clip_guidance.to(device).embed_text(of_each, device)
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
            x_0 = self._predicted_x0(output, t, latents) if "pred_original_sample" in callback_inputs else None
            latents = self.scheduler.step(output, t, latents, **options, return_dict=False)[0]
            if after_step is not None:
                latents = after_step(i, latents)
            if callback is not None:
                state = self._call_back(
                    callback, callback_inputs, i, t, latents, prompt_embeds, negative_prompt_embeds, x_0
                )
                latents, prompt_embeds, negative_prompt_embeds = state
            if self.interrupt:
                break
        return latents

    def _predicted_x0(self, model_output: torch.Tensor, t: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """x_0 (B, C, H, W) as the network predicts it in the step that the scheduler is about to take from `sample`.

        Not all schedulers hand it out. Those that keep x_0 + sigma epsilon scale it for the network to the x_t that all
        others keep.
        """
        x_t = sample
        if hasattr(self.scheduler, "scale_model_input"):
            x_t = self.scheduler.scale_model_input(sample, t)
        timestep = round(float(t))  # some schedulers stand between whole ones
        alphas_cumprod = self._alphas_cumprod("pred_original_sample from callback_on_step_end_tensor_inputs")
        prediction_type = self.scheduler.config.prediction_type
        return predict_x0_and_epsilon(alphas_cumprod, model_output, x_t, timestep, prediction_type)[0]

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
        guided = weight > 1 and not self.takes_guidance_as_input
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
        x_0: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Show a user's callback the tensors it asked for; return the first three, changed as it wants."""
        state = {
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pred_original_sample": x_0,
        }
        state |= callback(self, step, timestep, {name: state[name] for name in inputs}) or {}
        changed = state["negative_prompt_embeds"]
        if changed is not negative_prompt_embeds and self.do_classifier_free_guidance:
            state["prompt_embeds"] = torch.cat([changed, state["prompt_embeds"].chunk(2)[1]])
        return state["latents"], state["prompt_embeds"], changed
