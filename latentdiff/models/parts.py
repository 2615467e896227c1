"""The networks of a run, VAE, CLIP text encoder, UNet: what of them is frozen, and what is trained."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..utils.errors import ConfigError


@dataclass(frozen=True)
class FrozenParts:
    """What stands around the UNet: run once and never trained, but for a text encoder that is trained with the UNet."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    text_encoder_is_trained: bool = False

    def to(self, device: torch.device | str) -> "FrozenParts":
        """Move what is frozen; a text encoder that is trained stays where its training has it."""
        self.vae.to(device)
        if not self.text_encoder_is_trained:
            self.text_encoder.to(device)
        return self


class UNetWithTextEncoder(torch.nn.Module):
    """A UNet that is given captions for hidden states, since the text encoder before it is trained with it.

    One module has one set of parameters to optimize, average and clip, and one backward pass to synchronise. Both are
    in train mode in training, in which alone transformers computes activations anew (gradient checkpointing); nothing
    is drawn there, see `with_trained_text_encoder`.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet, self.text_encoder, self._tokenizer = unet, text_encoder, tokenizer

    def forward(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, captions: list[str]):
        """As the UNet, with (B, C, h, w) latents, (B,) timesteps and B captions."""
        return self.unet(noisy_latents, timesteps, _encode(self.text_encoder, self._tokenizer, captions))

    @property
    def device(self) -> torch.device:
        """Where both are."""
        return self.unet.device


def trained_model(parts: FrozenParts, unet: UNet2DConditionModel) -> UNet2DConditionModel | UNetWithTextEncoder:
    """The module that a run trains: the UNet, with the text encoder in front of it where that is not frozen."""
    return UNetWithTextEncoder(unet, parts.text_encoder, parts.tokenizer) if parts.text_encoder_is_trained else unet


def networks_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """What a trained module consists of, by the names of diffusers' folders: "unet", perhaps "text_encoder"."""
    return dict(model.named_children()) if isinstance(model, UNetWithTextEncoder) else {"unet": model}


def freeze(module: torch.nn.Module) -> torch.nn.Module:
    """Eval mode and no gradients."""
    return module.eval().requires_grad_(False)


@contextmanager
def in_eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """The module in eval mode for the block, and as it was after it, whatever comes of it."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def with_trained_text_encoder(parts: FrozenParts, gradient_checkpointing: bool = False) -> FrozenParts:
    """The same parts, of which the text encoder is to be trained with the UNet.

    Raises:
        ConfigError: it has a dropout, whose draws would follow from no seed; CLIP's have none.
    """
    if rate := parts.text_encoder.config.attention_dropout:
        raise ConfigError(
            f"train_text_encoder: the text encoder's config.json has attention_dropout {rate}; it may only be 0.0"
        )
    encoder = parts.text_encoder.requires_grad_(True)
    if gradient_checkpointing:
        # The first is the name in newer versions of transformers 5, where the second warns.
        getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)()
    return replace(parts, text_encoder_is_trained=True)


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of the weights' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def encode_prompt(parts: FrozenParts, captions: list[str]) -> torch.Tensor:
    """Captions -> the text encoder's last hidden states (B, L, D) float32, padded and cut to the tokenizer's length."""
    return _encode(parts.text_encoder, parts.tokenizer, captions)


def _encode(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    tokens = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    # Stable Diffusion 2's encoders ask for the attention mask; the others are called without one.
    mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask).last_hidden_state.float()
