"""What UNets take in beside noisy latents, timesteps and text."""

import torch


def inpainting_channels(latent_channels: int) -> int:
    """How many channels a UNet has that was made to inpaint, as Stable Diffusion's: the noisy latents, the mask, and
    the latents of the picture with grey in place of what is masked."""
    return 2 * latent_channels + 1


def is_for_inpainting(in_channels: int, latent_channels: int) -> bool:
    """Whether a UNet of that many channels can do nothing but inpaint."""
    return in_channels == inpainting_channels(latent_channels)


def guidance_embedding(guidance_scale: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding (B, dim) of 1000 w, for UNets distilled to take the guidance weight as an input; w: (B,)."""
    half = dim // 2
    number = torch.arange(half, dtype=torch.float32, device=guidance_scale.device)
    frequencies = torch.exp(number * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (guidance_scale * 1000.0).float()[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
