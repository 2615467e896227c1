"""What UNets take in beside noisy latents, timesteps and text."""

from typing import Any

import torch

MOST_PIXELS = 2**16  # along a side


def inpainting_channels(latent_channels: int) -> int:
    """How many channels a UNet has that was made to inpaint, as Stable Diffusion's: the noisy latents, the mask, and
    the latents of the picture with grey in place of what is masked."""
    return 2 * latent_channels + 1


def is_for_inpainting(in_channels: int, latent_channels: int) -> bool:
    """Whether a UNet of that many channels can do nothing but inpaint."""
    return in_channels == inpainting_channels(latent_channels)


def trained_size(unet_config: Any, vae_config: Any, factor: int) -> tuple[int, int] | None:
    """Height and width in pixels that a UNet was trained at: what its `sample_size` says, one number or two, and where
    it says nothing that of the VAE. None where neither does.

    Args:
        vae_config: None where there is no VAE.
        factor: pixels per latent along a side.

    Raises:
        ValueError: what one of them says is no size.
    """
    for name, config, scale in (("unet", unet_config, factor), ("vae", vae_config, 1)):
        size = getattr(config, "sample_size", None)
        if size is None:
            continue
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and 0 < side * scale <= MOST_PIXELS for side in sides):
            raise ValueError(
                f"the {name}'s config.json has sample_size {size!r}: it may be one side or [height, width]"
            )
        return sides[0] * scale, sides[1] * scale
    return None


def guidance_embedding(guidance_scale: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding (B, dim) of 1000 w, for UNets distilled to take the guidance weight as an input; w: (B,)."""
    half = dim // 2
    number = torch.arange(half, dtype=torch.float32, device=guidance_scale.device)
    frequencies = torch.exp(number * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (guidance_scale * 1000.0).float()[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
