"""One small call of each network of a pipeline, before anything is made of it.

A configuration can hold what no check of its values would find: a network that asks for inputs that nobody here gives
it, or whose parts do not go together. What comes of it would end a run at its first step, in a traceback.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL

from .latents import decode_latents, downsampling_factor, encode_moments
from .parts import in_eval_mode
from .unet import UNet
from .whole import loading


@torch.no_grad()
def try_parts(
    what: str, hidden_states: Callable[[], torch.Tensor], vae: AutoencoderKL, unet: UNet, encodes: bool = False
) -> None:
    """Call the networks on latents of zeros, as small as the UNet takes them. Nothing is drawn.

    Args:
        what: the pipeline, for the error.
        hidden_states: the text encoder's, of one text: (1, L, D).
        encodes: whether the VAE has to encode, too.

    Raises:
        ConfigError: one cannot be called so, or gives what the next one does not take.
    """
    side = 2 ** len(unet.config.block_out_channels)
    with loading(f"{what}: its text_encoder or its tokenizer cannot be used"):
        hidden = hidden_states().to(unet.device, unet.dtype)
    with loading(f"{what}: its unet cannot be used with its other parts"), in_eval_mode(unet):
        noisy = torch.zeros(1, unet.config.in_channels, side, side, device=unet.device, dtype=unet.dtype)
        latents = unet(noisy, torch.ones(1, device=unet.device, dtype=torch.long), hidden).sample
        _check_shape("it gives", latents, (1, vae.config.latent_channels, side, side))
    with loading(f"{what}: its vae cannot be used with its other parts"):
        pixels = decode_latents(vae, torch.zeros_like(latents))
        wanted = side * downsampling_factor(vae)
        _check_shape("it decodes to", pixels, (1, 3, wanted, wanted))
        if not pixels.isfinite().all():
            raise ValueError(f"it decodes zeros to what is not finite, with scaling_factor {vae.config.scaling_factor}")
        if encodes:
            mean, _ = encode_moments(vae, pixels)
            _check_shape("it encodes to", mean, latents.shape)


def _check_shape(does: str, tensor: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{does} {tuple(tensor.shape)}, and {tuple(wanted)} is wanted")
