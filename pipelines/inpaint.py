"""Inpainting: a part of a picture is painted anew under a prompt, the rest stays.

It has Stable Diffusion's components and draws its pipeline's pictures.

A UNet that takes latents alone is made to inpaint by blending: after each step what is known is put back at the next
noise level (RePaint, arXiv 2201.09865, without its resampling). One that was trained to inpaint takes the mask and the
masked picture beside the latents. Soft masks: differential diffusion (Levin & Fried 2023, arXiv 2306.00950). With a
consistency model blending is algorithm 4 of Song et al. 2023 (arXiv 2303.01469).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.models import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.schedulers import LCMScheduler
from PIL import Image
from torch.nn import functional

from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.diffusion.guidance import GuidanceScale
from latentdiff.diffusion.scheduling_consistency import ConsistencyScheduler
from latentdiff.diffusion.unet_inputs import inpainting_channels
from latentdiff.pipelines.guided_sampling import StepCallback
from latentdiff.pipelines.latent_pipeline import LatentPipeline
from latentdiff.utils.images import upright, upright_rgb


def feather(mask: torch.Tensor, width: int) -> torch.Tensor:
    """A mask of zeros and ones (M, 1, H, W) with a rim of `width` pixels that falls from 1 to 0 around its ones.

    At the distance d, the larger of those along rows and columns, it is 1 - d / (width + 1): none of the ones is lost.
    """
    grown = [mask]
    for _ in range(width):
        grown.append(functional.max_pool2d(grown[-1], kernel_size=3, stride=1, padding=1))
    return torch.stack(grown).mean(dim=0)


@dataclass(frozen=True)
class Known:
    """N pictures and M masks, where one of the two numbers may be 1, and which of them the B drawn ones go with."""

    pixels: torch.Tensor | None  # (N, 3, H, W) in [-1, 1]
    latents: torch.Tensor | None  # (N, C, h, w), in place of pixels
    mask: torch.Tensor  # (M, 1, H, W) of zeros and ones
    rows: torch.Tensor  # (B,)
    mask_rows: torch.Tensor  # (B,)
    pair_rows: torch.Tensor  # (B,), of the max(N, M) masked pictures


def _feathered_picture(mask: Image.Image, width: int) -> Image.Image:
    """`feather` of a PIL mask, which is first made black and white; as it is if there is no rim."""
    if not width:
        return mask
    hard = torch.from_numpy(np.asarray(mask.convert("L")) >= 128).float()
    return Image.fromarray((feather(hard[None, None], width)[0, 0] * 255).round().byte().numpy())


def _put_over(known: torch.Tensor, share: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """`drawn` (B, 3, H, W) where `share` (B, 1, H, W) is 1, `known` where it is 0."""
    share = share.to(drawn)
    return (1 - share) * known.to(drawn) + share * drawn


def _as_number(mask: PipelineImageInput) -> PipelineImageInput:
    return mask * 1.0 if getattr(mask, "dtype", None) in (bool, torch.bool) else mask


class LatentDiffInpaintPipeline(LatentPipeline, DiffusionPipeline):
    """Inpainting pipeline; see `LatentPipeline` for its components.

    Its UNet takes C channels, the latents', and is made to inpaint by blending; or 2 C + 1: the noisy latents, the
    mask, and the latents of the picture with grey in place of what is masked.

    With the same weights, seed, steps and guidance it draws the picture of `StableDiffusionInpaintPipeline` to the last
    bit, except where that one takes a step too few (see `LatentDiffImg2ImgPipeline`), gives pictures each other's mask,
    forgets the picture when both `latents` and `strength` are given, or paints nothing because a mask is thin; and with
    a consistency model, which sees what is known from the first step on, under other noise at each.
    """

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """What makes masks of pictures: one channel, zeros and ones, of the size that is drawn."""
        return VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @property
    def _blends(self) -> bool:
        """Whether the UNet takes latents alone."""
        return self.unet.config.in_channels == self._latent_channels

    def _unet_inputs(self) -> dict[int, str]:
        both = inpainting_channels(self._latent_channels)
        return {**super()._unet_inputs(), both: "the latents, a mask and a masked picture's latents"}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        mask_image: PipelineImageInput = None,
        masked_image_latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
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
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        *,
        mask_blur: int = 0,
        keep_unmasked: bool = False,
        seeds: list[int] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guide_unet: UNet2DConditionModel | None = None,
        clip_guidance: ClipGuidance | None = None,
        prompt_weights: bool = False,
        long_prompts: bool = False,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Paint a part of pictures anew.

        Args:
            image: the pictures, as for `LatentDiffImg2ImgPipeline`, resized to `height` and `width`; or their latents.
            mask_image: white (1) where they are painted anew, black (0) where they stay: PIL pictures, (H, W) arrays or
                tensors, or (M, 1, H, W) tensors, one for all or one for each of `image`; resized with it, whatever
                their size, and made black and white. A latent pixel is painted where its upper left pixel is white.
            masked_image_latents: (M, C, h, w), in place of encoding the masked picture, for a UNet that takes it.
            height, width: in pixels, by default the size the UNet was trained at, as in Stable Diffusion.
            padding_mask_crop: draw only what the mask covers and so many pixels around it, at `height` by `width`, and
                put that back into the picture at the picture's own size. For one PIL picture with one PIL mask.
            strength: in (0, 1], as for `LatentDiffImg2ImgPipeline`; at 1 what is painted starts from noise alone.
            latents: the noise (pictures, C, height / factor, width / factor), in place of drawing it.
            mask_blur: pixels of a soft rim around the mask, over which the painting passes into the picture: at each
                step more of it is free, as the mask's value is how much of the way a pixel goes (arXiv 2306.00950). So
                no two noises are ever averaged, which would leave the rim blurred. In `keep_unmasked` and
                `padding_mask_crop` it is a share of each picture's pixels. The mask itself is painted as without it.
            keep_unmasked: put the pixels that are not masked back in the end; the VAE changes them a little.
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
        height, width = self.picture_size(height, width, given if latents is None else latents)
        callback_inputs = callback_on_step_end_tensor_inputs
        self._check_options(height, width, output_type, num_images_per_prompt, clip_skip, callback_inputs)
        self._check_inpainting(
            height, width, given, masked_image_latents, padding_mask_crop, mask_blur, keep_unmasked, output_type
        )
        device = self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt
        num_prompts = len(prompt_embeds if prompts is None else prompts)
        generator, num_images_per_prompt = self._generators(seeds, generator, num_prompts, num_images_per_prompt)

        mask_image = upright(mask_image)
        region, whole, whole_mask = None, image, mask_image
        if padding_mask_crop is not None:
            whole = upright_rgb(image) if isinstance(image, Image.Image) else image
            region = self._region(whole, mask_image, height, width, padding_mask_crop + mask_blur, output_type)
            image, mask_image = (self._cut_out(one, region, height, width) for one in (whole, mask_image))
        pixels = self._pixels(image, height, width) if given is None else None
        mask = self._mask(mask_image, height, width)
        known = self._known(pixels, given, mask, num_prompts, num_images_per_prompt)

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

        # Noise is drawn in Stable Diffusion's order: the picture's posterior, the first latents, the masked picture's.
        image_latents = self._image_latents(known, generator, dtype) if self._blends or strength < 1 else None
        shape = (batch_size, self._latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        noise = self._noise(shape, generator, dtype, device, latents)
        if strength < 1:
            latents = self.scheduler.add_noise(image_latents, noise, timesteps[:1].repeat(batch_size))
        else:
            latents = noise * self.scheduler.init_noise_sigma
        after_step = extra_channels = None
        if self._blends:
            soft = self._latent_mask(mask, mask_blur)[known.mask_rows].to(device)
            renew = None
            if isinstance(self.scheduler, ConsistencyScheduler | LCMScheduler):
                renew = functools.partial(self._normal, shape, generator, dtype, device)
                if strength == 1:
                    latents = self.scheduler.add_noise(image_latents * (soft < 1), noise, timesteps[:1])
            after_step = self._blending(image_latents, noise, timesteps, soft, renew)
            self._skip_masked_noise(known, generator, shape, device)
        else:
            extra_channels = self._mask_and_masked(known, masked_image_latents, generator)
            extra_channels = extra_channels.to(device=device, dtype=dtype)

        conditions = self._conditions(
            batch_size,
            device,
            dtype,
            ip_adapter_image,
            ip_adapter_image_embeds,
            guide_unet,
            clip_guidance,
            prompts,
            extra_channels,
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
            after_step,
        )
        keep = None
        if keep_unmasked:
            keep = functools.partial(_put_over, pixels[known.rows], feather(mask, mask_blur)[known.mask_rows])
        images, flagged = self._finish(latents, generator, output_type, return_dict=False, retouch=keep)
        if region is not None:
            whole_mask = _feathered_picture(whole_mask, mask_blur)
            images = [self.image_processor.apply_overlay(whole_mask, whole, one, region) for one in images]
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _check_inpainting(
        self,
        height: int,
        width: int,
        given: torch.Tensor | None,
        masked_image_latents: torch.Tensor | None,
        padding_mask_crop: int | None,
        mask_blur: int,
        keep_unmasked: bool,
        output_type: str,
    ) -> None:
        """Raises ValueError for what cannot work together."""
        if not isinstance(mask_blur, int) or mask_blur < 0:
            raise ValueError(f"mask_blur={mask_blur}: it must be a number of pixels, 0 or more")
        if self._blends and masked_image_latents is not None:
            raise ValueError("masked_image_latents: this UNet takes latents alone and has no use for them")
        if mask_blur and not self._blends and not keep_unmasked and padding_mask_crop is None:
            raise ValueError(
                "mask_blur: this UNet was trained with hard masks, and a soft one has an effect only where pixels are"
                " put back: pass keep_unmasked=True too"
            )
        if keep_unmasked and output_type == "latent":
            raise ValueError("keep_unmasked puts pixels back: output_type must be pil, np or pt, not latent")
        if given is not None and keep_unmasked:
            raise ValueError("keep_unmasked needs the picture's pixels: pass them as image, not its latents")
        if given is not None and masked_image_latents is None and not self._blends:
            raise ValueError("image: to these latents this UNet needs masked_image_latents too; or pass pixels")
        shape = (self._latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        for name, tensor in (("image", given), ("masked_image_latents", masked_image_latents)):
            if tensor is not None and tuple(tensor.shape[1:]) != shape:
                raise ValueError(f"{name}: latents of shape {tuple(tensor.shape)}, but this call draws (…, {shape})")

    # A part of the picture, drawn larger

    def _region(
        self,
        image: Image.Image,
        mask: Image.Image,
        height: int,
        width: int,
        padding: int,
        output_type: str,
    ) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what the mask covers and `padding` around it, in the shape that is drawn."""
        if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image) or output_type != "pil":
            raise ValueError("padding_mask_crop works on one PIL image with one PIL mask_image and output_type='pil'")
        if image.size != mask.size:
            raise ValueError(
                f"padding_mask_crop: the mask has to be of the picture's size, {image.size}, not {mask.size}"
            )
        if padding < 0:
            raise ValueError(f"padding_mask_crop={padding}: it must be a number of pixels, 0 or more")
        if not mask.convert("L").getbbox():
            raise ValueError("padding_mask_crop: the mask has no white, so that there is nothing to draw")
        return self.mask_processor.get_crop_region(mask, width, height, pad=padding)

    def _cut_out(self, picture: Image.Image, region: tuple[int, int, int, int], height: int, width: int) -> Image.Image:
        return self.image_processor.resize(picture.crop(region), height, width, resize_mode="fill")

    # The mask

    def _mask(self, mask_image: PipelineImageInput, height: int, width: int) -> torch.Tensor:
        """Masks as (M, 1, H, W) float32 of zeros and ones."""
        if mask_image is None or (isinstance(mask_image, list | tuple) and not mask_image):
            raise ValueError("mask_image: pass a picture that is white where the other is painted anew")
        # Of what is true or false the processor takes no nearest pixel.
        if isinstance(mask_image, list | tuple):
            mask_image = [_as_number(mask) for mask in mask_image]
        mask = self.mask_processor.preprocess(_as_number(mask_image), height=height, width=width).to(torch.float32)
        if mask.shape[1] != 1:
            raise ValueError(f"mask_image: a mask has one channel, not {mask.shape[1]}")
        if not mask.flatten(1).any(dim=1).all():
            raise ValueError("mask_image: it is black all over, so that nothing would be painted")
        return mask

    def _latent_mask(self, mask: torch.Tensor, mask_blur: int = 0) -> torch.Tensor:
        """The mask (M, 1, H, W) at the latents' size: Stable Diffusion's choice, or of a soft one the highest value.

        Raises:
            ValueError: nothing is left of a mask that is thinner than a latent pixel.
        """
        factor = self.vae_scale_factor
        if mask_blur:
            return functional.max_pool2d(feather(mask, mask_blur), kernel_size=factor)
        small = functional.interpolate(mask, size=(mask.shape[-2] // factor, mask.shape[-1] // factor))
        if (mask.flatten(1).any(dim=1) & ~small.flatten(1).any(dim=1)).any():
            raise ValueError(
                f"mask_image: its white parts are thinner than the {factor} pixels of a latent, and nothing would be"
                " painted: paint a wider mask, or pass mask_blur"
            )
        return small

    # What is known of the picture

    def _known(
        self,
        pixels: torch.Tensor | None,
        latents: torch.Tensor | None,
        mask: torch.Tensor,
        num_prompts: int,
        num_images_per_prompt: int,
    ) -> Known:
        count = len(latents if pixels is None else pixels)
        if len(mask) != count and 1 not in (len(mask), count):
            raise ValueError(f"mask_image: {len(mask)} masks for {count} pictures: pass 1 or {count}")
        counts = {"image": count, "mask_image": len(mask), "image and mask_image": max(count, len(mask))}
        rows = [self._rows(name, n, num_prompts, num_images_per_prompt) for name, n in counts.items()]
        return Known(pixels, latents, mask, *rows)

    def _image_latents(
        self, known: Known, generator: torch.Generator | list[torch.Generator] | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """(B, C, h, w) of the pictures as they are."""
        if known.pixels is None:
            latents = known.latents[known.rows]
        else:
            latents = self._encode_pixels(known.pixels, generator, known.rows, drawn=True)
        # In Stable Diffusion's order in memory, too: convolutions round differently in another.
        return latents.to(device=self._execution_device, dtype=dtype).contiguous()

    def _skip_masked_noise(
        self,
        known: Known,
        generator: torch.Generator | list[torch.Generator] | None,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        """Draw what Stable Diffusion draws for the masked picture, also where it is not used: stochastic steps draw on
        from there."""
        if known.pixels is not None:
            count = len(generator) if isinstance(generator, list) else max(len(known.pixels), len(known.mask))
            self._normal((count, *shape[1:]), generator, self.vae.dtype, device)

    def _mask_and_masked(
        self,
        known: Known,
        masked_image_latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """(B, 1 + C, h, w): the mask and the latents of the picture with grey in place of what is masked."""
        mask = self._latent_mask(known.mask)[known.mask_rows]
        if masked_image_latents is None:
            masked = self._encode_pixels(known.pixels * (known.mask < 0.5), generator, known.pair_rows, drawn=True)
        elif len(masked_image_latents) == 1:
            masked = masked_image_latents.expand(len(mask), -1, -1, -1)
        else:
            masked = masked_image_latents[known.pair_rows]
        return torch.cat([mask.to(masked), masked], dim=1)

    def _blending(
        self,
        image_latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor,
        renew: Callable[[], torch.Tensor] | None = None,
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """For `_denoise`: what is known, put back after each step at the noise level that the next one starts from.

        Args:
            renew: draws other noise for each step. A consistency model's answer has seen that of its step, and a model
                is trained on pictures that know nothing of the noise on them.
        """

        def put_back(step: int, latents: torch.Tensor) -> torch.Tensor:
            known = image_latents
            if step + 1 < len(timesteps):
                known = self.scheduler.add_noise(image_latents, renew() if renew else noise, timesteps[step + 1 :][:1])
            left = 1 - (step + 1) / len(timesteps)
            free = (mask > left).to(latents.dtype)  # of a hard mask the mask itself
            return (1 - free) * known + free * latents

        return put_back
