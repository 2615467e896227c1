"""Text to image with a latent diffusion model: Stable Diffusion's components, and the same picture as its pipeline."""

from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.diffusion.guidance import GuidanceScale
from latentdiff.pipelines.guided_sampling import StepCallback
from latentdiff.pipelines.latent_pipeline import LatentPipeline


class LatentDiffPipeline(LatentPipeline, DiffusionPipeline):
    """Text-to-image pipeline; see `LatentPipeline` for its components.

    With the same weights, seed, steps and guidance it draws the picture of plain `StableDiffusionPipeline` to the last
    bit.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: GuidanceScale | None = None,
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
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        *,
        seeds: list[int] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide_unet: UNet2DConditionModel | None = None,
        clip_guidance: ClipGuidance | None = None,
        prompt_weights: bool = False,
        long_prompts: bool = False,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draw pictures.

        Args:
            prompt: one prompt or a list of B; or give `prompt_embeds` (B, tokens, width) instead.
            height, width: in pixels, multiples of the VAE's factor; by default the size the UNet was trained at.
            num_inference_steps: denoising steps, by default as `usual_drawing` has it; `timesteps` or `sigmas` set them
                one by one where the scheduler can.
            guidance_scale: w in e_u + w (e_c - e_u), by default as `usual_drawing` has it, or a function that gives w
                for a noise level sigma. Where it is 1 or below there is no unconditional pass. A UNet with
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
            seeds: one for each picture, which it and its noise then do not depend on anything else; with one prompt as
                many pictures as there are seeds.
            guidance_interval: (sigma_lo, sigma_hi): guide only at noise levels sigma_lo < sigma <= sigma_hi, where
                sigma = sqrt((1 - abar) / abar); elsewhere the unconditional pass is not run (arXiv 2404.07724).
            guide_unet: autoguidance (arXiv 2406.02507): lead away from the answer of this smaller or less trained UNet
                to the same prompt instead of from the unconditional one.
            clip_guidance: lead towards what a CLIP finds like the prompt, too.
            prompt_weights, long_prompts: read "(word:1.3)" as a weight; encode all of a long prompt. See
                `encode_prompt`.

        Returns:
            An output with `images` and `nsfw_content_detected` (None without a safety checker), or both as a tuple.

        Raises:
            ValueError: an argument that cannot work, with its name, its value and what it may be.
        """
        self._begin(clip_skip, cross_attention_kwargs)
        num_inference_steps, guidance_scale = self.usual_drawing(num_inference_steps, guidance_scale)
        self._set_guidance(
            guidance_scale, guidance_rescale, guidance_interval, guide_unet, negative_prompt, negative_prompt_embeds
        )
        height, width = self.picture_size(height, width, latents)
        self._check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        callback_inputs = callback_on_step_end_tensor_inputs
        self._check_options(height, width, output_type, num_images_per_prompt, clip_skip, callback_inputs)
        device = self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt
        num_prompts = len(prompt_embeds if prompts is None else prompts)
        generator, num_images_per_prompt = self._generators(seeds, generator, num_prompts, num_images_per_prompt)

        prompt_embeds, negative_prompt_embeds = self._embed_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            num_images_per_prompt,
            prompt_weights,
            long_prompts,
        )
        batch_size, dtype = len(prompt_embeds), prompt_embeds.dtype
        timesteps = self._set_timesteps(num_inference_steps, device, timesteps, sigmas)
        latents = self.prepare_latents(
            batch_size, self.unet.config.in_channels, height, width, dtype, device, generator, latents
        )
        conditions = self._conditions(
            batch_size,
            device,
            dtype,
            ip_adapter_image,
            ip_adapter_image_embeds,
            guide_unet,
            clip_guidance,
            prompts,
        )
        latents = self._denoise(
            latents,
            timesteps,
            prompt_embeds,
            negative_prompt_embeds,
            conditions,
            self._step_kwargs(eta=eta, generator=generator),
            callback_on_step_end,
            callback_inputs,
        )
        return self._finish(latents, generator, output_type, return_dict)
