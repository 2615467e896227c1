"""Build UNets, and change what they take in."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D

from ..utils.devices import default_device
from ..utils.errors import ConfigError
from ..utils.files import read_json
from .mp_unet import SCHEDULE_SETTINGS, MPBlock, MPUNet2DConditionModel

_COMPILED = (ResnetBlock2D, BasicTransformerBlock, MPBlock)

# Text reaches the UNet twice: by cross-attention, and pooled into the time embedding (addition_embed_type="text"),
# which makes a small UNet follow words long before cross-attention alone does. Attention stands at the middle grid
# and in the middle block; at the coarsest grid too it would make a step a quarter slower.
_SMALL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "addition_embed_type": "text",
}
UNET_PRESETS: dict[str, dict] = {
    "emoji64": {
        **_SMALL_UNET,
        "block_out_channels": (64, 128, 192),
        "attention_head_dim": 4,  # in diffusers' UNet this is the number of heads
        "addition_embed_type_num_heads": 4,
    },
    "tiny": {
        **_SMALL_UNET,
        "block_out_channels": (32, 64, 96),
        "attention_head_dim": 2,
        "addition_embed_type_num_heads": 4,
    },
    # Magnitude-preserving: as many operations a picture as "emoji64", as "tiny", and a fifth of the latter's weights.
    "mp": {"_class_name": "MPUNet2DConditionModel", "block_out_channels": (64, 144, 192), "attention_head_dim": 32},
    "mp-tiny": {"_class_name": "MPUNet2DConditionModel", "block_out_channels": (32, 72, 96), "attention_head_dim": 32},
    "mp-mini": {"_class_name": "MPUNet2DConditionModel", "block_out_channels": (16, 32, 40), "attention_head_dim": 16},
}
UNET_CLASSES = {kind.__name__: kind for kind in (UNet2DConditionModel, MPUNet2DConditionModel)}
UNet = UNet2DConditionModel | MPUNet2DConditionModel


def build_unet(
    preset: str,
    *,
    latent_channels: int,
    sample_size: int,
    cross_attention_dim: int,
    seed: int,
    in_channels: int | None = None,
    schedule: Mapping | None = None,
    learned_uncertainty: bool = False,
) -> UNet:
    """A UNet with new weights.

    Args:
        preset: a key of `UNET_PRESETS`, or the path of a JSON file with a UNet's arguments, of diffusers' or, by its
            `_class_name`, of the magnitude-preserving one.
        latent_channels, sample_size, cross_attention_dim: what the VAE and the text encoder fix.
        seed: of the weights.
        in_channels: of what it is given, where that is more than the latents.
        schedule: the scheduler's configuration, which a magnitude-preserving UNet has to know.
        learned_uncertainty: of such a one.

    Raises:
        ConfigError: unknown preset, or uncertainty of a plain UNet.
    """
    if preset in UNET_PRESETS:
        arguments = dict(UNET_PRESETS[preset])
    elif preset.endswith(".json") and Path(preset).is_file():
        arguments = _read_unet_config(preset)
    else:
        raise ConfigError(
            f"unet: {preset!r} is unknown; it may be 'pretrained', {', '.join(map(repr, UNET_PRESETS))}, "
            "or the path of a UNet's config.json"
        )
    kind = UNET_CLASSES[arguments.pop("_class_name", UNet2DConditionModel.__name__)]
    fixed = {
        "in_channels": in_channels or latent_channels,
        "out_channels": latent_channels,
        "sample_size": sample_size,
        "cross_attention_dim": cross_attention_dim,
    }
    if kind is MPUNet2DConditionModel:
        fixed |= {name: schedule[name] for name in SCHEDULE_SETTINGS if schedule and name in schedule}
        fixed |= {"learned_uncertainty": learned_uncertainty}
    elif learned_uncertainty:
        mp = ", ".join(name for name, settings in UNET_PRESETS.items() if "_class_name" in settings)
        raise ConfigError(f"learned_uncertainty: is for magnitude-preserving UNets ({mp}); unet is {preset!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights are drawn from the global generator
        return kind(**{**arguments, **fixed})


def widen_input(unet: UNet, in_channels: int) -> None:
    """Give a UNet more input channels, behind its own. Their weights are zero: what it puts out is still the same."""
    if isinstance(unet, MPUNet2DConditionModel):
        unet.widen_input(in_channels)
        return
    old = unet.conv_in
    new = torch.nn.utils.skip_init(
        torch.nn.Conv2d, in_channels, old.out_channels, old.kernel_size, padding=old.padding, dtype=old.weight.dtype
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=in_channels)


def compile_blocks(unet: UNet, backend: str) -> None:
    """torch.compile the residual and the transformer blocks, each in place, when they are first run.

    Nearly all of a UNet's work is in them, they are compiled in a fraction of the time that the whole takes, and names
    of weights stay as they are. Validation, which has other batches, runs them as they were.

    Raises:
        ConfigError: torch has no such backend here.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ConfigError(f"dynamo_backend: {backend!r} is not to be had here; it may be {known}")
    blocks = [block for block in unet.modules() if isinstance(block, _COMPILED)]
    # One code for all blocks of a kind, compiled anew for each shape: torch would give up after eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(blocks))
    for block in blocks:
        block.compile(backend=backend, dynamic=False)


def add_guidance_input(unet: UNet, width: int = 256) -> None:
    """Let a UNet take an embedding of the guidance weight (B, width), `timestep_cond`, as latent consistency models do
    (arXiv 2310.04378, section 4.2). Its weights are zero: what the UNet puts out is still the same.

    Raises:
        ConfigError: this kind of UNet has no such input.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise ConfigError(
            f"consistency_guidance: a {type(unet).__name__} has no input for a range; give one value, such as 4"
        )
    if unet.config.time_cond_proj_dim is not None:
        return
    first = unet.time_embedding.linear_1
    projection = torch.nn.Linear(width, first.in_features, bias=False, device=first.weight.device)
    unet.time_embedding.cond_proj = projection.requires_grad_(first.weight.requires_grad)
    torch.nn.init.zeros_(projection.weight)
    unet.register_to_config(time_cond_proj_dim=width)


def _read_unet_config(path: str) -> dict:
    try:
        saved = read_json(path)
        arguments = {name: value for name, value in saved.items() if not name.startswith("_")}
        name = saved.get("_class_name", UNet2DConditionModel.__name__)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"unet: {path!r} is no UNet's config.json ({error})") from None
    if name not in UNET_CLASSES:
        raise ConfigError(f"unet: {path!r} is of a {name}; it may be of {' or '.join(UNET_CLASSES)}")
    known = inspect.signature(UNET_CLASSES[name].__init__).parameters
    if unknown := [name for name in arguments if name not in known]:
        raise ConfigError(f"unet: {path!r} has {unknown[0]!r}, which {name} does not take")
    return arguments | {"_class_name": name}


def use_fast_attention(unet: UNet) -> None:
    """Measured on CPUs in bf16: the backward pass of fused attention takes a third of a step, of plain far less."""
    if default_device().type == "cpu" and isinstance(unet, UNet2DConditionModel):
        unet.set_attn_processor(AttnProcessor())
