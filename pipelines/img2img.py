"""Image to image: a picture is noised part of the way and denoised under a prompt (SDEdit, Meng et al. 2021, arXiv
2108.01073), with Stable Diffusion's components and the same picture as its pipeline."""

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


class LatentDiffImg2ImgPipeline(LatentPipeline, DiffusionPipeline):
    """Image-to-image pipeline; see `LatentPipeline` for its components.

    With the same weights, seed, steps and guidance it draws the picture of `StableDiffusionImg2ImgPipeline` to the last
    bit, except where that one takes a step too few because 0.29 * 100 is 28.999… in floating point, lags a step behind
    with PNDM or skips too many custom timesteps with Heun, gives one prompt's second picture the image of the next
    prompt, or takes a transparent picture's four channels for latents. With a consistency model it is that of
    `LatentConsistencyModelImg2ImgPipeline`: strokes become a picture (arXiv 2303.01469, algorithm 4).
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: GuidanceScale | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        *,
        seeds: list[int] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guide_unet: UNet2DConditionModel | None = None,
        clip_guidance: ClipGuidance | None = None,
        prompt_weights: bool = False,
        long_prompts: bool = False,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draw pictures out of others.

        Args:
            image: what to start from: a PIL picture, an array (H, W, 3) or a tensor (3, H, W) in [0, 1], or a list or
                batch of them, one for all prompts, one for each, or one for each picture that is drawn. Its size, cut
                to multiples of the VAE's factor, is that of the result. Latents (N, C, h, w) are taken as they are.
            strength: in (0, 1], how much of the way to noise the picture goes, and so what it may lose: the last
                `strength` share of the steps is taken, at least one. At 1 what is left of the picture is what the
                highest noise level leaves of it. A consistency model takes all `num_inference_steps` from there, or as
                many as it was distilled at up to there.
            seeds: one for each picture, which it and its noise then do not depend on anything else; with one prompt as
                many pictures as there are seeds.

        The other arguments, and what is returned: see `LatentDiffPipeline`.

        Raises:
            ValueError: an argument that cannot work, with its name, its value and what it may be.
        """
        self._begin(clip_skip, cross_attention_kwargs)
        num_inference_steps, guidance_scale = self.usual_drawing(num_inference_steps, guidance_scale)
        self._set_guidance(
            guidance_scale, guidance_rescale, guidance_interval, guide_unet, negative_prompt, negative_prompt_embeds
        )
        self._check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        given = self._given_latents(image)
        pixels = self._pixels(image) if given is None else None
        height, width = self.picture_size(None, None, given) if pixels is None else pixels.shape[-2:]
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
        timesteps = self._set_timesteps(num_inference_steps, device, timesteps, sigmas, strength)
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
        rows = self._rows("image", len(given if pixels is None else pixels), num_prompts, num_images_per_prompt)
        image_latents = given[rows] if pixels is None else self._encode_pixels(pixels, generator, rows, drawn=True)
        image_latents = image_latents.to(device=device, dtype=dtype)
        noise = self._normal(tuple(image_latents.shape), generator, dtype, device)
        latents = self._denoise(
            self.scheduler.add_noise(image_latents, noise, timesteps[:1].repeat(batch_size)),
            timesteps,
            prompt_embeds,
            negative_prompt_embeds,
            conditions,
            self._step_kwargs(eta=eta, generator=generator),
            callback_on_step_end,
            callback_inputs,
        )
        return self._finish(latents, generator, output_type, return_dict)
