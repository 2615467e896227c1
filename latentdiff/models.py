"""Build, load and freeze the three networks: VAE, CLIP text encoder, UNet; and what of them a run trains."""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from .config import ConfigError
from .mp_unet import SCHEDULE_SETTINGS, MPBlock, MPUNet2DConditionModel

logger = logging.getLogger(__name__)

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


def load_frozen(path: str, revision: str | None = None, variant: str | None = None) -> FrozenParts:
    """VAE, text encoder and tokenizer of a Stable-Diffusion-shaped folder or Hub id, in fp32, eval mode, no gradients.

    Raises:
        ConfigError: one of them is not there or cannot be read.
    """
    parts = {}
    for name, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel), ("tokenizer", CLIPTokenizer)):
        options = {"subfolder": name, "revision": revision}
        if kind is not CLIPTokenizer:
            options |= {"variant": variant or _variant_of(path, name), "use_safetensors": True}
        parts[name] = _load(kind, path, options)
    if set(parts["tokenizer"].get_vocab()) <= set(parts["tokenizer"].all_special_tokens):
        # transformers makes an empty one where its files are missing; all captions would be the same to it
        raise ConfigError(f"pretrained_model_name_or_path: no tokenizer could be loaded from {path!r} (it is empty)")
    return FrozenParts(freeze(parts["vae"].float()), freeze(parts["text_encoder"].float()), parts["tokenizer"])


def load_vae(path: str) -> AutoencoderKL:
    """The VAE of a Stable-Diffusion-shaped folder or Hub id, in fp32, whose decoder is to go on training.

    Raises:
        ConfigError: it is not there or cannot be read.
    """
    options = {"subfolder": "vae", "variant": _variant_of(path, "vae"), "use_safetensors": True}
    return _load(AutoencoderKL, path, options, setting="decoder_of").float()


def load_unet(path: str, revision: str | None = None, variant: str | None = None) -> UNet:
    """The UNet of a Stable-Diffusion-shaped folder or Hub id, in fp32, to go on training.

    Raises:
        ConfigError: it is not there or cannot be read.
    """
    variant = variant or _variant_of(path, "unet")
    options = {"subfolder": "unet", "revision": revision, "variant": variant, "use_safetensors": True}
    return _load(unet_class(path, subfolder="unet", revision=revision), path, options).float()


def load_guide_unet(folder: str | Path, setting: str, **options) -> UNet:
    """A UNet from its folder or that of a pipeline that has one.

    Args:
        setting: what named it, for the error.
        options: as `from_pretrained` takes them, such as `dtype`.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(folder)
    if (folder / "unet" / "config.json").is_file():
        folder = folder / "unet"
    try:
        return unet_class(folder).from_pretrained(str(folder), use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{setting} {folder}: no UNet can be loaded from it: {what}") from None


def unet_class(path: str | os.PathLike, **options) -> type[UNet]:
    """Which kind of UNet a folder or Hub id holds; diffusers' own where its config.json does not say.

    Args:
        options: as `from_pretrained` takes them, such as `subfolder`.
    """
    try:
        config = UNet2DConditionModel.load_config(str(path), **options)
    except (OSError, ValueError):  # loading it says what is wrong
        return UNet2DConditionModel
    return UNET_CLASSES.get(config.get("_class_name"), UNet2DConditionModel)


def _variant_of(path: str, name: str) -> str | None:
    """ "fp16" where a local folder holds only that variant of the part's weights."""
    weights = [file.name for file in (Path(path) / name).glob("*.safetensors")]
    return "fp16" if weights and all(".fp16." in file for file in weights) else None


def _load(kind, path: str, options: dict, setting: str = "pretrained_model_name_or_path"):
    """From safetensors, or of an old model that has none, from what torch reads without running any code."""
    folder = Path(path) / options["subfolder"]
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        logger.warning("%s holds no safetensors: its pickled weights are read with weights_only=True", folder)
        options = options | {"use_safetensors": False}
    try:
        with _only_weights_unpickled():
            return kind.from_pretrained(path, **options)
    except UnpicklingError as error:
        raise ConfigError(
            f"{setting}: no {options['subfolder']} could be loaded from {path!r} (its pickle holds more than weights)"
        ) from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        first_line = (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
        raise ConfigError(
            f"{setting}: no {options['subfolder']} could be loaded from {path!r} ({first_line})"
        ) from error


@contextmanager
def _only_weights_unpickled() -> Iterator[None]:
    """torch.load refuses to run code in this block, whatever a library or the environment asks of it."""
    kept = {name: os.environ.pop(name, None) for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",)}
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


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
        saved = json.loads(Path(path).read_text())
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


def hide_loading_bars() -> None:
    """Switch off the libraries' bars for loading and saving weights, which take no time here and hide our own lines."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def freeze(module: torch.nn.Module) -> torch.nn.Module:
    """Eval mode and no gradients."""
    return module.eval().requires_grad_(False)


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
