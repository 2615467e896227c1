"""The magnitude-preserving UNet of EDM2 with text (Karras et al. 2023, arXiv 2312.02696, section 2 and appendix B).

No layer changes the expected magnitude of what goes through it: every filter has unit norm, sums and concatenations
are scaled for independent terms of unit magnitude, and there are neither biases nor group norms. The stored weights are
kept at a magnitude of 1 per number by a call after each step of the optimizer, so that the learning rate alone decides
how fast they turn.

In two things it goes further than the paper, whose grids are larger. Filters make up for the zeros around a grid, which
on 4 x 4 take a third of what they sum up (`mp_layers.MPConv2d`). And as encoder blocks normalise what they take,
decoder blocks normalise what they hand on: residual branches come to agree with what they are added to, and sums of
what agrees grow.

It is called as `UNet2DConditionModel` is, and gives out what its `prediction_type` says of x_t at a timestep of its
noise schedule, so that every scheduler and pipeline runs on it. Inside it works on EDM's terms: with
sigma = sqrt((1 - abar_t) / abar_t) and x = x_t / sqrt(abar_t) = x_0 + sigma epsilon,

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                     (arXiv 2206.00364, eq. 7 and table 1)

For latents of unit variance (sigma_data = 1) c_in x is x_t itself, and F is the negative of v.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import nn

from ..diffusion.noise_schedule import PREDICTION_TYPES, alphas_cumprod, check_choice, make_betas, noise_levels
from .mp_layers import (
    SILU_MAGNITUDE,
    FourierFeatures,
    MPConv2d,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weights,
    pixel_norm,
)

RESIDUAL = 0.3  # the weight of a residual branch
LARGEST_SIGMA = 1e4  # what an infinite noise level, that of zero terminal SNR, is told to the network as
# What a scheduler says of the noise and of what is predicted; the network's configuration says the same.
SCHEDULE_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr",
            "prediction_type")  # fmt: skip

# ---- blocks ----------------------------------------------------------------------------------------------------------


class MPAttention(nn.Module):
    """Cosine attention (B, C, h, w) -> the same, to the pixels themselves, or to text (B, L, D)."""

    def __init__(self, channels: int, head_dim: int, text_dim: int | None = None):
        super().__init__()
        self.heads = max(1, channels // head_dim)
        if channels % self.heads:
            raise ValueError(f"{channels} channels cannot be shared out among {self.heads} heads of about {head_dim}")
        self.to_q = MPLinear(channels, channels)
        self.to_k = MPLinear(text_dim or channels, channels)
        self.to_v = MPLinear(text_dim or channels, channels)
        self.to_out = nn.ModuleList([MPLinear(channels, channels)])

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # (B, h w, C)
        seen = pixels if text is None else text
        q, k, v = self.to_q(pixels), self.to_k(seen), self.to_v(seen)
        q, k, v = (pixel_norm(one.unflatten(2, (self.heads, -1)), dim=3).transpose(1, 2) for one in (q, k, v))
        # A mean of many values is smaller than one of them: brought back to their magnitude.
        found = pixel_norm(_attend(q, k, v).transpose(1, 2).flatten(2), dim=2)
        return mp_sum(x, self.to_out[0](found).transpose(1, 2).unflatten(2, x.shape[2:]), RESIDUAL)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention (B, heads, L, d)."""
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    # Measured on CPUs in bf16: the backward pass of fused attention takes a third of a step, of plain far less.
    return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1).to(v.dtype) @ v


class MPBlock(nn.Module):
    """A residual block, after EDM2's figure 21, and behind it attention where it is wanted.

    A block that `encodes` begins with its trunk at magnitude 1 in each pixel, another one ends with it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        *,
        encodes: bool,
        resample: str = "keep",
        attention: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.encodes, self.resample = encodes, resample
        self.conv_skip = MPConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.conv_0 = MPConv2d(out_channels if encodes else in_channels, out_channels, 3)
        self.embedding = MPLinear(embedding_dim, out_channels)
        self.embedding_gain = nn.Parameter(torch.zeros(1))
        self.conv_1 = MPConv2d(out_channels, out_channels, 3)
        self.attn1 = MPAttention(out_channels, attention[0]) if attention else None
        self.attn2 = MPAttention(out_channels, *attention) if attention else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.conv_skip is not None and self.encodes:
            x = self.conv_skip(x)
        if self.encodes:
            x = pixel_norm(x)
        # The scales of `mp_silu` and `mp_sum` are put into the filters, which costs less than scaling activations.
        y = self.conv_0(F.silu(x), gain=1 / SILU_MAGNITUDE)
        modulation = 1 + self.embedding(embedding) * self.embedding_gain.to(embedding.dtype)
        norm = math.hypot(1 - RESIDUAL, RESIDUAL)
        y = self.conv_1(F.silu(y * modulation[:, :, None, None]), gain=RESIDUAL / norm / SILU_MAGNITUDE)
        if self.conv_skip is not None and not self.encodes:
            x = self.conv_skip(x)
        x = torch.add(y, x, alpha=(1 - RESIDUAL) / norm)
        if self.attn1 is not None:
            x = self.attn2(self.attn1(x), text)
        return x if self.encodes else pixel_norm(x)


# ---- the network -----------------------------------------------------------------------------------------------------


@dataclass
class MPUNet2DConditionOutput(UNet2DConditionOutput):
    """What `UNet2DConditionModel` gives out, and the learned uncertainty u of its error (B,) where that is learned."""

    log_variance: torch.Tensor | None = None


class MPUNet2DConditionModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """EDM2's network (config G) with cross-attention to text, with the call of diffusers' UNet2DConditionModel.

    Args:
        sample_size, in_channels, out_channels: of the latents; what else than x_t is to be seen lies in the channels
            behind x_t's own.
        cross_attention_dim: width of the text's hidden states.
        block_out_channels: of each level, the finest first; each level but the first has half the resolution.
        layers_per_block: residual blocks of a level in the encoder; the decoder has one more.
        attention_levels: whether a level's blocks attend to the pixels and to the text; the middle block always does.
        attention_head_dim: channels of a head.
        num_train_timesteps, beta_start, beta_end, beta_schedule, rescale_betas_zero_snr: the noise schedule that gives
            each timestep its noise level, as in the scheduler.
        prediction_type: what is put out, as in the scheduler. The weights are the same for each of the three.
        sigma_data: the latents' standard deviation.
        learned_uncertainty: whether the network learns how large its error is at each noise level (arXiv 2312.02696,
            appendix B.2, eq. 21-22).
        time_cond_proj_dim, addition_embed_type: what pipelines ask a UNet for; it takes no further input.

    Raises:
        ValueError: what cannot be built.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["MPBlock"]
    _no_split_modules = ["MPBlock"]
    gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 4,
        out_channels: int = 4,
        cross_attention_dim: int = 192,
        block_out_channels: tuple[int, ...] = (64, 128, 192),
        layers_per_block: int = 1,
        attention_levels: tuple[bool, ...] = (False, True, False),
        attention_head_dim: int = 32,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        sigma_data: float = 1.0,
        learned_uncertainty: bool = False,
        time_cond_proj_dim: None = None,
        addition_embed_type: None = None,
    ):
        super().__init__()
        _refuse(time_cond_proj_dim=time_cond_proj_dim, addition_embed_type=addition_embed_type)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if len(attention_levels) != len(block_out_channels):
            raise ValueError(
                f"attention_levels has {len(attention_levels)} and block_out_channels {len(block_out_channels)} "
                "entries; both need one for each level"
            )
        noise_channels, width = block_out_channels[0], max(block_out_channels)
        self.noise_features = FourierFeatures(noise_channels)
        self.noise_embedding = MPLinear(noise_channels, width)
        self.text_embedding = nn.ModuleList([MPLinear(cross_attention_dim, width), MPLinear(width, width)])
        self.log_variance = MPLinear(noise_channels, 1) if learned_uncertainty else None

        def block(inside: int, channels: int, *, attends: bool = False, **kind) -> MPBlock:
            attention = (attention_head_dim, cross_attention_dim) if attends else None
            return MPBlock(inside, channels, width, attention=attention, **kind)

        self.conv_in = MPConv2d(in_channels + 1, noise_channels, 3)  # one channel of ones, in place of biases
        self.encoder, skips = nn.ModuleList(), [noise_channels]
        for level, channels in enumerate(block_out_channels):
            if level:
                self.encoder.append(block(skips[-1], channels, encodes=True, resample="down"))
                skips.append(channels)
            for _ in range(layers_per_block):
                self.encoder.append(block(skips[-1], channels, attends=attention_levels[level], encodes=True))
                skips.append(channels)
        inside = skips[-1]
        self.middle = nn.ModuleList(block(inside, inside, attends=attends, encodes=False) for attends in (True, False))
        self.decoder = nn.ModuleList()
        for level, channels in reversed(list(enumerate(block_out_channels))):
            if level < len(block_out_channels) - 1:
                self.decoder.append(block(inside, channels, encodes=False, resample="up"))
                inside = channels
            for _ in range(layers_per_block + 1):
                attends = attention_levels[level]
                self.decoder.append(block(inside + skips.pop(), channels, attends=attends, encodes=False))
                inside = channels
        self.conv_out = MPConv2d(noise_channels, out_channels, 3)
        self.output_gain = nn.Parameter(torch.zeros(1))
        normalize_weights(self)

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: None = None,
        timestep_cond: None = None,
        attention_mask: None = None,
        cross_attention_kwargs: dict | None = None,
        added_cond_kwargs: None = None,
        down_block_additional_residuals: None = None,
        mid_block_additional_residual: None = None,
        down_intrablock_additional_residuals: None = None,
        encoder_attention_mask: None = None,
        return_dict: bool = True,
    ) -> MPUNet2DConditionOutput | tuple[torch.Tensor]:
        """What `prediction_type` says of x_t (B, C, h, w).

        Args:
            sample: x_t, with what else is to be seen behind it: (B, in_channels, h, w).
            timestep: (B,) or one for all; between whole ones the noise level is interpolated.
            encoder_hidden_states: (B, L, D).
            cross_attention_kwargs: may hold the `scale` of LoRA adapters.

        Raises:
            ValueError: one of the other arguments is given, for which this network has no use.
        """
        _refuse(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
            added_cond_kwargs=added_cond_kwargs or None,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
        )
        sigma = self._sigmas(torch.as_tensor(timestep, device=sample.device).expand(len(sample)))
        features = self.noise_features(sigma.clamp(max=LARGEST_SIGMA).log() / 4).to(sample.dtype)
        x_t, others = sample.split([self.config.out_channels, sample.shape[1] - self.config.out_channels], dim=1)
        scales = Preconditioning(sigma.reshape(-1, 1, 1, 1), self.config.sigma_data)
        seen = torch.cat([(x_t * scales.of_input).to(x_t.dtype), others, torch.ones_like(x_t[:, :1])], dim=1)
        answer = self._answer(seen, features, encoder_hidden_states)
        output = scales.output(self.config.prediction_type, x_t.float(), answer.float()).to(sample.dtype)
        if not return_dict:
            return (output,)
        uncertainty = None if self.log_variance is None else self.log_variance(features)[:, 0].float()
        return MPUNet2DConditionOutput(sample=output, log_variance=uncertainty)

    def widen_input(self, in_channels: int) -> None:
        """Take more input channels, behind its own. Their weights are zero: what it puts out is still the same."""
        conv, more = self.conv_in, in_channels - self.config.in_channels
        *own, ones = conv.weight.detach().unbind(dim=1)
        wider = torch.stack([*own, *[torch.zeros_like(ones)] * more, ones], dim=1)
        conv.weight, conv.in_channels = nn.Parameter(wider), in_channels + 1
        normalize_weights(conv)
        self.register_to_config(in_channels=in_channels)

    def follow_schedule(self, config: Mapping[str, Any]) -> None:
        """Put out from now on what a scheduler of this configuration expects. What it knows of x_0 stays the same.

        Raises:
            ValueError: it has betas of its own.
        """
        self.register_to_config(**{name: config[name] for name in SCHEDULE_SETTINGS})
        self.check_schedule(config)

    def fuse_lora(self, *args, **kwargs) -> None:
        """Refused: filters act at unit norm, whatever is added to them.

        Raises:
            ValueError: always.
        """
        raise ValueError("MPUNet2DConditionModel: LoRA weights cannot be fused into filters that act at unit norm")

    def get_parameter_or_buffer(self, name: str) -> torch.Tensor:
        """As of transformers' models: accelerate asks for it under FSDP2, and else fails at a name without a dot."""
        return self.get_parameter(name)

    def check_schedule(self, config: Mapping[str, Any]) -> None:
        """Whether a scheduler's configuration means the same noise and the same output as this network's.

        Raises:
            ValueError: another one.
        """
        for name in SCHEDULE_SETTINGS:
            if name in config and config[name] != self.config[name]:
                raise ValueError(
                    f"the scheduler's {name} is {config[name]!r} and the UNet's {self.config[name]!r}: this UNet works "
                    "by noise levels, so that both must say the same"
                )
        if config.get("trained_betas") is not None:
            raise ValueError("the scheduler has trained_betas, which this UNet does not know: it works by noise levels")

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise levels of timesteps (B,), float32."""
        *schedule, _ = (self.config[name] for name in SCHEDULE_SETTINGS)
        return noise_levels(_alphas_cumprod(*schedule, timesteps.device), timesteps)

    def _answer(self, x: torch.Tensor, noise_features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """F of preconditioned latents (B, in_channels + 1, h, w)."""
        text = pixel_norm(text.to(x.dtype), dim=2)
        # What all tokens say together reaches every pixel at once, which teaches a small network to follow words long
        # before attention does.
        said = self.text_embedding[1](mp_silu(self.text_embedding[0](pixel_norm(text.mean(dim=1)))))
        embedding = mp_silu(mp_sum(self.noise_embedding(noise_features), said))
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # in which all that follows is faster
        skips = [x]
        for block in self.encoder:
            x = self._run(block, x, embedding, text)
            skips.append(x)
        for block in self.middle:
            x = self._run(block, x, embedding, text)
        for block in self.decoder:
            x = self._run(block, x if block.resample == "up" else mp_cat(x, skips.pop()), embedding, text)
        return self.conv_out(x) * self.output_gain.to(x.dtype)

    def _run(self, block: MPBlock, *inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


def _refuse(**arguments) -> None:
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(f"MPUNet2DConditionModel has no use for {', '.join(given)}: leave it out")


@functools.lru_cache(maxsize=16)
def _alphas_cumprod(
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    rescale_betas_zero_snr: bool,
    device: torch.device,
) -> torch.Tensor:
    """The table of a schedule, in float32 whatever the weights are kept in."""
    betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end, None, rescale_betas_zero_snr)
    return alphas_cumprod(betas).to(device)


class Preconditioning:
    """EDM's scales (arXiv 2206.00364, table 1), written for x_t = s x_0 + n epsilon of unit variance, not for
    x = x_t / s: then none is infinite where x_t is all noise.

    Args:
        sigma: n / s, shaped to multiply x_t.
        sigma_data: the standard deviation of x_0.
    """

    def __init__(self, sigma: torch.Tensor, sigma_data: float):
        self.signal = (1 + sigma.square()).rsqrt()
        self.noise = (1 - self.signal.square()).sqrt()
        self.sigma_data = sigma_data
        self.magnitude = (self.noise.square() + (sigma_data * self.signal).square()).sqrt()  # of x_t

    @property
    def of_input(self) -> torch.Tensor:
        """c_in x / x_t."""
        return 1 / self.magnitude

    def output(self, prediction_type: str, x_t: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """D = c_skip x + c_out F, or the epsilon or v that follow from D, each a sum of x_t and F.

        With r^2 = n^2 + s^2 sigma_data^2:
            D       = s sigma_data^2 / r^2 x_t        + n sigma_data / r F
            epsilon = n / r^2 x_t                     - s sigma_data / r F          = (x_t - s D) / n
            v       = s n (1 - sigma_data^2) / r^2 x_t - sigma_data / r F           = s epsilon - n D
        """
        s, n, r, deviation = self.signal, self.noise, self.magnitude, self.sigma_data
        if prediction_type == "sample":
            return s * (deviation / r) ** 2 * x_t + n * deviation / r * answer
        if prediction_type == "epsilon":
            return n / r**2 * x_t - s * deviation / r * answer
        return s * n * (1 - deviation**2) / r**2 * x_t - deviation / r * answer
