"""Pixels <-> raw moments <-> scaled latents, for training and measuring (the scale itself: `diffusion.latent_scale`).

Names follow the way of the data: *pixels* are (B, 3, H, W) in [-1, 1]; *raw moments* are the mean and standard
deviation of the VAE's posterior, unscaled, as the cache keeps them; *latents* are drawn, shifted and scaled, as the
UNet sees them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ..diffusion.latent_scale import scale_latents, unscale_latents


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> (B, 3, H, W) float32 in [-1, 1]."""
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] (what is outside is clipped) -> RGB pictures."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in array]


def downsampling_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent along a side: every block but the last halves it."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, H, W) pixels -> raw posterior mean and standard deviation, each (B, C, H/f, W/f) float32."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()


def sample_latents(vae_config, mean: torch.Tensor, std: torch.Tensor, posterior_noise: torch.Tensor) -> torch.Tensor:
    """Draw from the posterior and bring it to the UNet's scale.

    Args:
        vae_config: `vae.config`.
        mean, std: raw moments, (B, C, h, w).
        posterior_noise: standard normal, the same shape.
    """
    return scale_latents(mean + std * posterior_noise, vae_config)


def masked_pixels(pixels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) pixels, grey where the masks (B, 1, H, W) are 1: what an inpainting model sees of a picture."""
    return pixels * (masks < 0.5)


@torch.no_grad()
def inpainting_conditions(
    vae: AutoencoderKL, pixels: torch.Tensor, masks: torch.Tensor, posterior_noise: torch.Tensor
) -> torch.Tensor:
    """What an inpainting UNet is given behind the noisy latents: the mask, then latents of the masked picture.

    The form of Stable Diffusion's inpainting model, made as diffusers' `StableDiffusionInpaintPipeline` makes it: the
    masked pixels are grey before the VAE sees the picture, its latents are drawn from the posterior, and the mask is
    brought to the latents' size by taking the nearest pixel.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        masks: (B, 1, H, W); 1 is to be painted.
        posterior_noise: standard normal, (B, C, h, w).

    Returns:
        (B, 1 + C, h, w) float32 on the VAE's device.
    """
    mean, std = encode_moments(vae, masked_pixels(pixels, masks))
    latents = sample_latents(vae.config, mean, std, posterior_noise.to(mean.device))
    small = torch.nn.functional.interpolate(masks, size=latents.shape[-2:])
    return torch.cat([small.to(latents.device), latents], dim=1)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) -> (B, 3, H, W) pixels, about in [-1, 1]."""
    raw = unscale_latents(latents, vae.config)
    return vae.decode(raw.to(vae.device, vae.dtype)).sample.float()


def psnr(pixels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture, in dB over the range [0, 1], at most 100.

    Args:
        pixels, reference: (B, 3, H, W) in [-1, 1]; what of the first is outside is clipped.

    Returns:
        (B,) float32.
    """
    error = (pixels.float().clamp(-1, 1) - reference) / 2
    return -10 * error.square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()
