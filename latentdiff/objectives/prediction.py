"""A network's answer: the one call of all that train and measure, so that what it is told has one home."""

import torch

from ..data.batches import Batch
from ..diffusion.consistency import Network
from ..diffusion.unet_inputs import guidance_embedding


def predict(
    model: torch.nn.Module,
    batch: Batch,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    text: torch.Tensor | list[str] | None = None,
    guidance_width: int | None = None,
):
    """What a UNet puts out for x_t, given all that its batch says beside the latents.

    Args:
        model: the UNet, or one with a text encoder in front of it, for batches without hidden states.
        noisy_latents: x_t, (B, C, ...).
        timesteps: (B,) int64.
        text: in place of the batch's own, such as the empty caption's hidden states.
        guidance_width: of its embedding of the teacher's guidance weight, where it takes one.

    Returns:
        The network's output; `sample` is (B, C, ...).
    """
    seen = noisy_latents if batch.conditions is None else torch.cat([noisy_latents, batch.conditions], dim=1)
    guidance = {}
    if guidance_width is not None:
        guidance["timestep_cond"] = guidance_embedding(batch.guidance_scales - 1, guidance_width)
    return model(seen, timesteps, batch.text if text is None else text, **guidance)


def network_for(model: torch.nn.Module, batch: Batch, **options) -> Network:
    """A network as consistency models need it, of x_t and timesteps alone; `options` are those of `predict`."""
    return lambda x_t, timesteps: predict(model, batch, x_t, timesteps, **options).sample
