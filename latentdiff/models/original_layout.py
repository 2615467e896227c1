"""Stable Diffusion's original names of weights, in which A1111, ComfyUI, sd-scripts and stable-diffusion.cpp read a
model from one file: those of CompVis' latent diffusion (arXiv 2112.10752) and of CLIP, in Stable Diffusion 2 OpenCLIP.

Such a file holds weights alone. What is no weight, such as how many groups a norm has, its readers know: of what they
take for granted nothing may be otherwise, or they would draw something else without a word.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from ..utils.errors import ConfigError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
LEVELS, LAYERS = 4, 2  # of UNet and VAE, and residual blocks in a level
OPEN_CLIP_LAYERS = 24  # of which the readers leave out the last one's answer, and diffusers the layer itself

Weights = dict[str, torch.Tensor]


def _defaults(kind: type) -> dict[str, Any]:
    return {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items() if name != "self"}


# What the readers take for granted; diffusers' defaults are Stable Diffusion 1's but where something stands here.
_UNET_CONFIG = _defaults(UNet2DConditionModel)
_VAE_CONFIG = _defaults(AutoencoderKL) | {
    "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
    "layers_per_block": LAYERS,
}
_CLIP_CONFIG = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0}
_HIDDEN_ACT = {1: "quick_gelu", 2: "gelu"}
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
}
# What the weights themselves show, or is told otherwise, or changes no number.
_FREE = {
    "unet": {"in_channels", "block_out_channels", "cross_attention_dim", "attention_head_dim", "num_attention_heads"}
    | {"use_linear_projection", "sample_size", "upcast_attention", "dropout"},
    "vae": {"in_channels", "out_channels", "latent_channels", "block_out_channels", "sample_size", "force_upcast"},
}
# Of what the weights show, what is Stable Diffusion's own: some readers know nothing else.
_USUAL = {
    "unet": {"block_out_channels": (320, 640, 1280, 1280)},
    "vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4},
    "text_encoder": {"vocab_size": 49408, "max_position_embeddings": 77},
}
_USUAL_TEXT = {1: (768, 12), 2: (1024, OPEN_CLIP_LAYERS - 1)}  # width and layers


def version_of(unet: UNet2DConditionModel) -> int:
    """Of which Stable Diffusion a UNet has the shape, 1 or 2."""
    return 2 if unet.config.use_linear_projection else 1


def check_layout(
    unet: torch.nn.Module, vae: torch.nn.Module, text_encoder: torch.nn.Module, schedule: Mapping[str, Any]
) -> None:
    """Look whether everything about a model can be said in the original layout.

    Args:
        schedule: the scheduler's configuration.

    Raises:
        ConfigError: the first that cannot, with its value and what it would have to be.
    """
    parts = {"unet": (unet, UNet2DConditionModel), "vae": (vae, AutoencoderKL)}
    for part, (network, kind) in (parts | {"text_encoder": (text_encoder, CLIPTextModel)}).items():
        if type(network) is not kind:
            _refuse(part, "class", type(network).__name__, kind.__name__)
    _compare("unet", unet.config, _UNET_CONFIG)
    _compare("vae", vae.config, _VAE_CONFIG)
    version, inputs = version_of(unet), (4, 9)
    if unet.config.in_channels not in inputs:
        _refuse("unet", "in_channels", unet.config.in_channels, "4, or 9 of a UNet for inpainting")
    heads = _each_level(unet.config.num_attention_heads or unet.config.attention_head_dim)
    if version == 1 and set(heads) != {8}:
        _refuse("unet", "attention_head_dim (the number of heads)", heads, "8 without use_linear_projection")
    widths = unet.config.block_out_channels
    if version == 2 and any(width != 64 * of for width, of in zip(widths, heads, strict=True)):
        may_be = "a 64th of block_out_channels with use_linear_projection"
        _refuse("unet", "attention_head_dim (the number of heads)", heads, may_be)
    config = text_encoder.config
    _compare("text_encoder", config.to_dict(), _CLIP_CONFIG | {"hidden_act": _HIDDEN_ACT[version]})
    if config.hidden_size != 64 * config.num_attention_heads:
        may_be = f"a 64th of hidden_size, {config.hidden_size}"
        _refuse("text_encoder", "num_attention_heads", config.num_attention_heads, may_be)
    if version == 2 and config.num_hidden_layers != OPEN_CLIP_LAYERS - 1:
        _refuse("text_encoder", "num_hidden_layers", config.num_hidden_layers, OPEN_CLIP_LAYERS - 1)
    for name, usual in _SCHEDULE.items():
        if (value := schedule.get(name, usual)) != usual:
            _refuse("scheduler", name, value, usual)
    if (predicts := schedule.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
        _refuse("scheduler", "prediction_type", predicts, "epsilon or v_prediction")
    if predicts == "epsilon" and schedule.get("rescale_betas_zero_snr"):
        _refuse("scheduler", "rescale_betas_zero_snr", True, "False with prediction_type epsilon")


def unusual_sizes(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> list[str]:
    """What of a model that passes `check_layout` is of another size than Stable Diffusion's own, in words."""
    width, layers = _USUAL_TEXT[version_of(unet)]
    usual = _USUAL | {
        "text_encoder": _USUAL["text_encoder"] | {"hidden_size": width, "num_hidden_layers": layers},
    }
    found = []
    for part, network in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        for name, size in usual[part].items():
            value = getattr(network.config, name)
            value = tuple(value) if isinstance(value, list) else value
            if value != size:
                found.append(f"{part} {name} {value} instead of {size}")
    return found


def _compare(part: str, config: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    if "block_out_channels" in usual and len(config["block_out_channels"]) != LEVELS:
        _refuse(part, "block_out_channels", config["block_out_channels"], f"{LEVELS} levels")
    for name, must_be in usual.items():
        value = config.get(name, must_be)
        if name not in _FREE.get(part, ()) and _plain(value) != _plain(must_be):
            _refuse(part, name, value, must_be)


def _plain(value: Any) -> Any:
    """A list as a tuple, and one number for what has the same at each level."""
    if isinstance(value, list | tuple):
        same = len(set(map(repr, value))) == 1 and not isinstance(value[0], str)
        return value[0] if same else tuple(value)
    return value


def _each_level(value: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) * LEVELS if isinstance(value, int) else tuple(value)


def _refuse(part: str, name: str, value: Any, may_be: Any) -> None:
    raise ConfigError(f"{part}: {name} is {value}; Stable Diffusion's single files can hold {may_be} alone")


# ---- names


def original_weights(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> Weights:
    """All weights of a model that passes `check_layout`, by their original names; shapes and values as those have
    them."""
    weights = {UNET + name: one for name, one in _renamed(unet.state_dict(), _unet_modules(), _UNET_INSIDE).items()}
    for name, tensor in _renamed(vae.state_dict(), _vae_modules(), _VAE_INSIDE).items():
        convolves = ".attn_1." in name and name.endswith("weight") and tensor.ndim == 2  # 1x1, where diffusers has none
        weights[VAE + name] = tensor[:, :, None, None] if convolves else tensor
    # transformers has written these names with "text_model." and, from 5 on, without.
    text = {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
    text = {name: tensor for name, tensor in text.items() if not name.endswith("position_ids")}
    if version_of(unet) == 1:
        return weights | {CLIP + name: tensor for name, tensor in text.items()}
    return weights | {OPEN_CLIP + name: tensor for name, tensor in _open_clip(text).items()}


def _renamed(weights: Mapping[str, torch.Tensor], modules: Mapping[str, str], inside: Mapping[str, str]) -> Weights:
    """Weights by the names of the modules that they lie in, and of what lies inside these."""
    result = {}
    for name, tensor in weights.items():
        module = next(prefix for prefix in _prefixes(name) if prefix in modules)
        rest = name[len(module) :]
        within = next((one for one in inside if rest.startswith(f".{one}.")), None)
        if within is not None:
            rest = f".{inside[within]}{rest[len(within) + 1 :]}"
        result[modules[module] + rest] = tensor
    return result


def _prefixes(name: str) -> list[str]:
    """Of "a.b.c": "a.b.c", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


_UNET_INSIDE = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_modules() -> dict[str, str]:
    """Blocks are counted through all levels; that of a finer or coarser grid is one of them, going down, or stands
    last in one, going up."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    of_level = LAYERS + 1
    for level in range(LEVELS):
        for layer in range(of_level):
            down, up = f"input_blocks.{1 + level * of_level + layer}", f"output_blocks.{level * of_level + layer}"
            for place, kind in enumerate(("resnets", "attentions")):
                names[f"down_blocks.{level}.{kind}.{layer}"] = f"{down}.{place}"
                names[f"up_blocks.{level}.{kind}.{layer}"] = f"{up}.{place}"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"{down}.0.op"
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"{up}.{1 if level == 0 else 2}.conv"  # 1: without attention
    return names


_VAE_INSIDE = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _vae_modules() -> dict[str, str]:
    """The decoder's levels are counted from the finest, too, which is its last."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for coder in ("encoder", "decoder"):
        names |= {f"{coder}.{end}": f"{coder}.{end}" for end in ("conv_in", "conv_out")}
        names[f"{coder}.conv_norm_out"] = f"{coder}.norm_out"
        names[f"{coder}.mid_block.attentions.0"] = f"{coder}.mid.attn_1"
        names |= {f"{coder}.mid_block.resnets.{i}": f"{coder}.mid.block_{i + 1}" for i in range(2)}
    for level in range(LEVELS):
        up = f"decoder.up.{LEVELS - 1 - level}"
        for layer in range(LAYERS + 1):
            names[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            names[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"{up}.block.{layer}"
        names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        names[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    return names


_OPEN_CLIP_INSIDE = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _open_clip(weights: Weights) -> Weights:
    """A CLIP text encoder of 23 layers as OpenCLIP's of 24, whose queries, keys and values are one matrix each.

    No reader asks for what the last layer answers, but stable-diffusion.cpp refuses a file without one: it is the
    layer before it once more, as sd-scripts writes it.
    """
    modules = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    modules |= {f"encoder.layers.{i}": f"transformer.resblocks.{i}" for i in range(OPEN_CLIP_LAYERS)}
    last, added = f"encoder.layers.{OPEN_CLIP_LAYERS - 2}.", f"encoder.layers.{OPEN_CLIP_LAYERS - 1}."
    weights = weights | {name.replace(last, added): one.clone() for name, one in weights.items() if last in name}
    joined = {}
    for name, tensor in weights.items():
        if "self_attn.q_proj." in name:
            three = [weights[name.replace("q_proj", of)] for of in ("q_proj", "k_proj", "v_proj")]
            joined[name.replace("q_proj.", "in_proj_")] = torch.cat(three)
        elif "k_proj." not in name and "v_proj." not in name:
            joined[name] = tensor
    return _renamed(joined, modules, _OPEN_CLIP_INSIDE)


# ---- the settings beside


def original_config(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, schedule: Mapping[str, Any]
) -> dict[str, Any]:
    """What the weights do not say, as the programs on the original code read it from a YAML of the file's name.

    Only there A1111 finds that a Stable Diffusion 1.x predicts v; it makes the networks by it, too.
    """
    version, inpaints = version_of(unet), unet.config.in_channels != unet.config.out_channels
    channels, widths = unet.config.block_out_channels, vae.config.block_out_channels
    heads = {"num_heads": 8} if version == 1 else {"num_head_channels": 64, "use_linear_in_transformer": True}
    encoders = {
        1: {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        2: {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        },
    }
    process = "LatentInpaintDiffusion" if inpaints else "LatentDiffusion"
    params = {
        "parameterization": "v" if schedule.get("prediction_type") == "v_prediction" else "eps",
        "linear_start": _SCHEDULE["beta_start"],
        "linear_end": _SCHEDULE["beta_end"],
        "num_timesteps_cond": 1,
        "timesteps": _SCHEDULE["num_train_timesteps"],
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet.config.sample_size,
        "channels": vae.config.latent_channels,
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if inpaints else "crossattn",
        "scale_factor": vae.config.scaling_factor,
        "use_ema": False,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {
                "image_size": unet.config.sample_size,
                "in_channels": unet.config.in_channels,
                "out_channels": unet.config.out_channels,
                "model_channels": channels[0],
                "attention_resolutions": [4, 2, 1],
                "num_res_blocks": LAYERS,
                "channel_mult": [width // channels[0] for width in channels],
                **heads,
                "use_spatial_transformer": True,
                "transformer_depth": 1,
                "context_dim": unet.config.cross_attention_dim,
                "use_checkpoint": False,
                "legacy": False,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": vae.config.latent_channels,
                "ddconfig": {
                    "double_z": True,
                    "z_channels": vae.config.latent_channels,
                    "resolution": vae.config.sample_size,
                    "in_channels": vae.config.in_channels,
                    "out_ch": vae.config.out_channels,
                    "ch": widths[0],
                    "ch_mult": [width // widths[0] for width in widths],
                    "num_res_blocks": LAYERS,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                },
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": encoders[version],
    }
    return {"model": {"target": f"ldm.models.diffusion.ddpm.{process}", "params": params}}
