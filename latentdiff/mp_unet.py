"""The magnitude-preserving UNet of EDM2 with text (Karras et al. 2023, arXiv 2312.02696, section 2 and appendix B).

No layer changes the expected magnitude of what goes through it: every filter has unit norm, sums and concatenations are
scaled for independent terms of unit magnitude, and there are neither biases nor group norms. The stored weights are kept
at a magnitude of 1 per number by `normalize_weights`, a call after each step of the optimizer, so that the learning rate
alone decides how fast they turn.

It is called as `UNet2DConditionModel` is, and gives out what its `prediction_type` says of x_t at a timestep of its noise
schedule, so that every scheduler and pipeline runs on it. Inside it works on EDM's terms: with
sigma = sqrt((1 - abar_t) / abar_t) and x = x_t / sqrt(abar_t) = x_0 + sigma epsilon,

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                     (arXiv 2206.00364, eq. 7 and table 1)

For latents of unit variance (sigma_data = 1) c_in x is x_t itself, and F is the negative of v.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from .noise_schedule import PREDICTION_TYPES, alphas_cumprod, check_choice, make_betas, noise_levels

RESIDUAL = 0.3  # the weight of a residual branch
SILU_MAGNITUDE = 0.596  # of SiLU(x) for x ~ N(0, 1)

# ---- magnitude-preserving operations ---------------------------------------------------------------------------------


def pixel_norm(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Scaled to a root mean square of 1 over `dim` (eq. 30)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x * (x.shape[dim] ** 0.5 / norm.clamp(min=1e-4)).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU at the magnitude of its input (eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """Channels of both (B, C, …), scaled so that each has its share t of what follows, however many it has (eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = ((n_a + n_b) / ((1 - t) ** 2 + t**2)) ** 0.5
    return torch.cat([a * (scale * (1 - t) / n_a**0.5), b * (scale * t / n_b**0.5)], dim=1)


def _unit_filters(weight: torch.Tensor) -> torch.Tensor:
    """Each filter along the first dimension at norm 1. Gradients lose what would only lengthen a filter (eq. 67)."""
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True, dtype=torch.float32)
    return weight * norm.clamp(min=1e-12).reciprocal().to(weight.dtype)


class MPLinear(nn.Linear):
    """A linear layer without bias whose rows act at unit norm, whatever norm is stored, as that of an average is."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _unit_filters(self.weight))


class MPConv2d(nn.Conv2d):
    """A convolution without bias whose filters act at unit norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, _unit_filters(self.weight), padding=self.padding)


@torch.no_grad()
def normalize_weights(module: nn.Module) -> None:
    """Forced weight normalisation: after a step of the optimizer every stored filter gets the norm sqrt(fan-in) back, a
    magnitude of 1 per number (section 2.3). What the layers compute stays the same."""
    for layer in module.modules():
        if isinstance(layer, MPLinear | MPConv2d):
            layer.weight.copy_(_unit_filters(layer.weight) * layer.weight[0].numel() ** 0.5)


class FourierFeatures(nn.Module):
    """Numbers (B,) -> (B, C) cosines of random frequencies and phases, magnitude 1 (eq. 75)."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x.float()[:, None] * self.frequencies.float() + self.phases.float()
        return angles.cos() * 2**0.5


# ---- blocks ----------------------------------------------------------------------------------------------------------


class MPAttention(nn.Module):
    """Cosine attention (B, C, h, w) -> the same, to the pixels themselves, or to text (B, L, D)."""

    def __init__(self, channels: int, head_dim: int, text_dim: int | None = None):
        super().__init__()
        self.heads = max(1, channels // head_dim)
        self.to_q = MPLinear(channels, channels)
        self.to_k = MPLinear(text_dim or channels, channels)
        self.to_v = MPLinear(text_dim or channels, channels)
        self.to_out = nn.ModuleList([MPLinear(channels, channels)])

    def forward(self, x: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # (B, h w, C)
        seen = pixels if text is None else text
        q, k, v = self.to_q(pixels), self.to_k(seen), self.to_v(seen)
        q, k, v = (pixel_norm(one.unflatten(2, (self.heads, -1)), dim=3).transpose(1, 2) for one in (q, k, v))
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
        # A mean of many values is smaller than one of them: brought back to their magnitude.
        found = pixel_norm((weights @ v).transpose(1, 2).flatten(2), dim=2)
        return mp_sum(x, self.to_out[0](found).transpose(1, 2).unflatten(2, x.shape[2:]), RESIDUAL)


class MPBlock(nn.Module):
    """A residual block, after EDM2's figure 23, and behind it attention where it is wanted."""

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
        self.embedding_gain = nn.Parameter(torch.zeros(()))
        self.conv_1 = MPConv2d(out_channels, out_channels, 3)
        self.self_attention = MPAttention(out_channels, attention[0]) if attention else None
        self.cross_attention = MPAttention(out_channels, *attention) if attention else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.encodes:
            x = pixel_norm(x if self.conv_skip is None else self.conv_skip(x))
        y = self.conv_0(mp_silu(x))
        y = mp_silu(y * (self.embedding(embedding) * self.embedding_gain + 1)[:, :, None, None])
        y = self.conv_1(y)
        if not self.encodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, RESIDUAL)
        if self.self_attention is not None:
            x = self.cross_attention(self.self_attention(x), text)
        return x


# ---- the network -----------------------------------------------------------------------------------------------------


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
        prediction_type: what is put out, as in the scheduler.
        sigma_data: the latents' standard deviation.
        learned_uncertainty: whether `log_variance` is trained (section 2.2 of arXiv 2312.02696's appendix).
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["MPBlock"]
    _no_split_modules = ["MPBlock"]

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
        encoder_hid_dim_type: None = None,
    ):
        super().__init__()
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if len(attention_levels) != len(block_out_channels):
            raise ValueError(
                f"attention_levels has {len(attention_levels)} and block_out_channels {len(block_out_channels)} entries; "
                "both need one for each level"
            )
        betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end, None, rescale_betas_zero_snr)
        self.register_buffer("alphas_cumprod", alphas_cumprod(betas), persistent=False)
        noise_channels, width = block_out_channels[0], max(block_out_channels)
        self.noise_features = FourierFeatures(noise_channels)
        self.noise_embedding = MPLinear(noise_channels, width)
        self.text_embedding = nn.ModuleList([MPLinear(cross_attention_dim, width), MPLinear(width, width)])
        self.log_variance = MPLinear(noise_channels, 1) if learned_uncertainty else None

        def block(inside: int, level: int, *, attends: bool = False, **kind) -> MPBlock:
            attention = (attention_head_dim, cross_attention_dim) if attends else None
            return MPBlock(inside, block_out_channels[level], width, attention=attention, **kind)

        self.conv_in = MPConv2d(in_channels + 1, noise_channels, 3)  # one channel of ones, in place of biases
        self.encoder, skips = nn.ModuleList(), [noise_channels]
        for level, channels in enumerate(block_out_channels):
            if level:
                self.encoder.append(block(skips[-1], level - 1, encodes=True, resample="down"))
                skips.append(skips[-1])
            for _ in range(layers_per_block):
                self.encoder.append(block(skips[-1], level, attends=attention_levels[level], encodes=True))
                skips.append(channels)
        last = len(block_out_channels) - 1
        self.middle = nn.ModuleList(
            [block(skips[-1], last, attends=attends, encodes=False) for attends in (True, False)]
        )
        self.decoder, inside = nn.ModuleList(), skips[-1]
        for level in range(last, -1, -1):
            if level < last:
                self.decoder.append(block(inside, level + 1, encodes=False, resample="up"))
            for _ in range(layers_per_block + 1):
                attends = attention_levels[level]
                self.decoder.append(block(inside + skips.pop(), level, attends=attends, encodes=False))
                inside = block_out_channels[level]
        self.conv_out = MPConv2d(noise_channels, out_channels, 3)
        self.output_gain = nn.Parameter(torch.zeros(()))
        normalize_weights(self)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        *unused,
        return_dict: bool = True,
        **others,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """What `prediction_type` says of x_t (B, C, h, w).

        Args:
            sample: x_t, with what else is to be seen behind it: (B, in_channels, h, w).
            timestep: (B,) or one for all.
            encoder_hidden_states: (B, L, D).
            others: further arguments of `UNet2DConditionModel`, which must be None.

        Raises:
            ValueError: an argument that this network has no use for.
        """
        refused = [name for name, value in others.items() if value is not None] + [
            "…" for value in unused if value is not None
        ]
        if refused:
            raise ValueError(f"MPUNet2DConditionModel has no use for {', '.join(refused)}; leave it out")
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        sigma = noise_levels(self.alphas_cumprod, timesteps).clamp(max=1e4)
        x_t = sample[:, : self.config.out_channels]
        c = _Preconditioning(sigma.reshape(-1, 1, 1, 1), self.config.sigma_data)
        seen = torch.cat([(x_t * c.of_input).to(x_t.dtype), sample[:, self.config.out_channels :]], dim=1)
        answer = self._raw(seen, self._noise(sigma), encoder_hidden_states)
        output = c.output(self.config.prediction_type, x_t.float(), answer.float()).to(sample.dtype)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def log_variance_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The learned uncertainty u of the loss at timesteps (B,) -> (B,)."""
        return self.log_variance(self._noise(noise_levels(self.alphas_cumprod, timesteps).clamp(max=1e4)))[:, 0]

    def _noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """Features (B, C) of c_noise = ln(sigma) / 4."""
        return self.noise_features(sigma.log() / 4).to(self.dtype)

    def _raw(self, x: torch.Tensor, noise_features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """F of preconditioned latents."""
        text = pixel_norm(text.to(self.dtype), dim=2)
        # What all tokens say together reaches every pixel at once, which teaches a small network to follow words long
        # before attention does.
        said = self.text_embedding[1](mp_silu(self.text_embedding[0](pixel_norm(text.mean(dim=1)))))
        embedding = mp_silu(mp_sum(self.noise_embedding(noise_features), said))
        x = self.conv_in(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for block in self.encoder:
            x = self._run(block, x, embedding, text)
            skips.append(x)
        for block in self.middle:
            x = self._run(block, x, embedding, text)
        for block in self.decoder:
            x = self._run(block, x if block.resample == "up" else mp_cat(x, skips.pop()), embedding, text)
        return self.conv_out(x) * self.output_gain

    def _run(self, block: MPBlock, *inputs: torch.Tensor) -> torch.Tensor:
        if self.training and getattr(self, "gradient_checkpointing", False):
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


class _Preconditioning:
    """EDM's scales at noise levels (arXiv 2206.00364, table 1), between x_t = x / sqrt(1 + sigma^2) and each output."""

    def __init__(self, sigma: torch.Tensor, sigma_data: float):
        self.sigma, self.sigma_data = sigma, sigma_data
        self.root = (sigma.square() + sigma_data**2).sqrt()
        self.x_scale = (1 + sigma.square()).sqrt()  # x = x_scale x_t

    @property
    def of_input(self) -> torch.Tensor:
        """c_in x over x_t."""
        return self.x_scale / self.root

    def output(self, prediction_type: str, x_t: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """D = c_skip x + c_out F, or the noise or v that follow from it, written so that nothing large is subtracted."""
        x = self.x_scale * x_t
        x_0 = (self.sigma_data / self.root) ** 2 * x + self.sigma * self.sigma_data / self.root * answer
        if prediction_type == "sample":
            return x_0
        epsilon = self.sigma / self.root**2 * x - self.sigma_data / self.root * answer  # (x - D) / sigma
        if prediction_type == "epsilon":
            return epsilon
        return (epsilon - self.sigma * x_0) / self.x_scale  # sqrt(abar) epsilon - sqrt(1 - abar) x_0
