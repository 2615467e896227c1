"""The scale of latents: what a VAE puts out is shifted and scaled to about unit variance before a UNet sees it.

The one home of `scaling_factor` and `shift_factor`. Stable Diffusion's VAEs have no shift; those of newer models have,
and diffusers' pipelines for these apply it as here.
"""

import torch


def scale_latents(raw: torch.Tensor, vae_config) -> torch.Tensor:
    """What the VAE puts out (B, C, h, w) -> latents as the UNet sees them: (raw - shift) * scaling_factor.

    Args:
        vae_config: `vae.config`; its `shift_factor` may be None or absent.
    """
    return (raw - _shift(vae_config)) * vae_config.scaling_factor


def unscale_latents(latents: torch.Tensor, vae_config) -> torch.Tensor:
    """Latents as the UNet sees them (B, C, h, w) -> what the VAE decodes: latents / scaling_factor + shift."""
    return latents / vae_config.scaling_factor + _shift(vae_config)


def _shift(vae_config) -> float:
    return getattr(vae_config, "shift_factor", None) or 0.0
