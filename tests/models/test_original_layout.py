"""Every weight gets the name and the place that the programs on Stable Diffusion's original code look for."""

import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff import LatentDiffPipeline
from latentdiff.models.original_layout import (
    CLIP,
    OPEN_CLIP,
    UNET,
    VAE,
    check_layout,
    original_weights,
    unusual_sizes,
    version_of,
)
from latentdiff.models.unet import build_unet
from latentdiff.utils.errors import ConfigError
from tiny import original_components

NETWORKS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize(("version", "in_channels"), [(1, 4), (1, 9), (2, 4)])
def test_diffusers_reads_back_every_weight(version, in_channels, tmp_path, caplog):
    """A weight under another's name, transposed or left out would change the picture, or be random elsewhere."""
    parts = original_components(version, in_channels)
    LatentDiffPipeline(**parts).save_pretrained(tmp_path / "model")
    networks = [parts[name] for name in NETWORKS]
    check_layout(*networks, parts["scheduler"].config)
    weights = original_weights(*networks)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        read = StableDiffusionPipeline.from_single_file(
            str(tmp_path / "model.safetensors"), config=str(tmp_path / "model")
        )
    assert "were not used" not in caplog.text
    for name, network in zip(NETWORKS, networks, strict=True):
        before, after = network.state_dict(), getattr(read, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items()), name


def real_size(version: int) -> list[torch.nn.Module]:
    """Stable Diffusion's own networks, without memory for their weights."""
    text = {"vocab_size": 49408, "max_position_embeddings": 77}
    if version == 1:
        text |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
        unet = {"cross_attention_dim": 768}
    else:
        text |= {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
        unet = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
        text |= {"hidden_act": "gelu"}
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        return [UNet2DConditionModel(**unet), vae, CLIPTextModel(CLIPTextConfig(**text))]


# Published names and shapes, by which other programs tell what a file is: ComfyUI's model_detection.py and
# supported_models.py, A1111's sd_models_config.py, and the numbers of tensors in v1-5-pruned-emaonly and v2-1.
PUBLISHED = {
    1: {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.9.0.op.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    },
    2: {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.23.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.ln_final.bias": (1024,),
    },
}
COUNTS = {1: {UNET: 686, VAE: 248, CLIP: 196}, 2: {UNET: 686, VAE: 248, OPEN_CLIP: 292}}


@pytest.mark.parametrize("version", [1, 2])
def test_names_and_shapes_are_the_published_ones(version):
    """diffusers may read what no other program does."""
    networks = real_size(version)
    assert version_of(networks[0]) == version and unusual_sizes(*networks) == []
    weights = original_weights(*networks)
    assert {beginning: sum(n.startswith(beginning) for n in weights) for beginning in COUNTS[version]} == COUNTS[
        version
    ]
    assert sum(COUNTS[version].values()) == len(weights)
    shapes = {name: tuple(weights[name].shape) for name in PUBLISHED[version]}
    assert shapes == PUBLISHED[version]


@pytest.mark.parametrize("version", [1, 2])
def test_a_text_encoder_may_have_its_names_in_either_way(version):
    """transformers 5 names the same weights without "text_model.", which then were unknown."""
    parts = original_components(version)
    networks = [parts[name] for name in NETWORKS]
    bare = {name.removeprefix("text_model."): one for name, one in parts["text_encoder"].state_dict().items()}
    bare["embeddings.position_ids"] = torch.arange(8)[None]  # a buffer that older versions save
    config = parts["text_encoder"].config
    expected = original_weights(*networks)
    for names in (bare, {f"text_model.{name}": one for name, one in bare.items()}):
        other = SimpleNamespace(state_dict=lambda names=names: names, config=config)
        weights = original_weights(*networks[:2], other)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(one, expected[name]) for name, one in weights.items())


@pytest.fixture(scope="module")
def shaped() -> dict[int, dict]:
    return {version: original_components(version) for version in (1, 2)}


@pytest.mark.parametrize(
    ("version", "part", "changes", "said"),
    [
        (1, "unet", {"block_out_channels": (32, 64, 64)}, r"unet: block_out_channels is \(32, 64, 64\); .* 4 levels"),
        (1, "unet", {"addition_embed_type": "text"}, "unet: addition_embed_type is text; .* can hold None alone"),
        (1, "unet", {"time_cond_proj_dim": 256}, "unet: time_cond_proj_dim is 256"),
        (1, "unet", {"class_embed_type": "timestep"}, "unet: class_embed_type is timestep"),
        (1, "unet", {"encoder_hid_dim": 32}, "unet: encoder_hid_dim is 32"),
        (1, "unet", {"down_block_types": ("DownBlock2D",) * 4}, "unet: down_block_types is"),
        (1, "unet", {"layers_per_block": (2, 2, 2, 1)}, r"unet: layers_per_block is \(2, 2, 2, 1\); .* 2 alone"),
        (1, "unet", {"transformer_layers_per_block": 2}, "unet: transformer_layers_per_block is 2; .* 1 alone"),
        (1, "unet", {"norm_num_groups": 16}, "unet: norm_num_groups is 16; .* 32 alone"),
        (1, "unet", {"in_channels": 8}, "unet: in_channels is 8; .* 4, or 9"),
        (1, "unet", {"attention_head_dim": 4}, r"unet: attention_head_dim .* is \(4, 4, 4, 4\); .* 8 without"),
        (2, "unet", {"attention_head_dim": 8}, r"unet: attention_head_dim .* is \(8, 8, 8, 8\); .* a 64th"),
        (1, "vae", {"block_out_channels": (32, 32, 32)}, r"vae: block_out_channels is \(32, 32, 32\); .* 4 levels"),
        (1, "vae", {"scaling_factor": 0.7}, "vae: scaling_factor is 0.7; .* 0.18215 alone"),
        (1, "vae", {"shift_factor": 0.1}, "vae: shift_factor is 0.1"),
        (1, "vae", {"use_quant_conv": False}, "vae: use_quant_conv is False"),
        (1, "text_encoder", {"hidden_act": "gelu"}, "text_encoder: hidden_act is gelu; .* quick_gelu alone"),
        (2, "text_encoder", {"hidden_act": "quick_gelu"}, "text_encoder: hidden_act is quick_gelu; .* gelu alone"),
        (1, "text_encoder", {"num_attention_heads": 2}, "text_encoder: num_attention_heads is 2; .* a 64th"),
        (2, "text_encoder", {"num_hidden_layers": 24}, "text_encoder: num_hidden_layers is 24; .* 23 alone"),
        (1, "scheduler", {"beta_end": 0.02}, "scheduler: beta_end is 0.02; .* 0.012 alone"),
        (1, "scheduler", {"beta_schedule": "linear"}, "scheduler: beta_schedule is linear"),
        (1, "scheduler", {"prediction_type": "sample"}, "scheduler: prediction_type is sample"),
        (1, "scheduler", {"rescale_betas_zero_snr": True}, "scheduler: rescale_betas_zero_snr is True"),
    ],
)  # fmt: skip
def test_what_the_layout_cannot_hold_is_named(version, part, changes, said, shaped):
    """Other programs would draw something else with the same weights, and nobody say so."""
    parts = shaped[version]
    schedule, config = dict(parts["scheduler"].config), getattr(parts[part], "config", {})
    before = {name: config[name] if part != "text_encoder" else getattr(config, name) for name in changes}
    set_config(parts, part, schedule, changes)
    try:
        with pytest.raises(ConfigError, match=said):
            check_layout(*(parts[name] for name in NETWORKS), schedule)
    finally:
        set_config(parts, part, schedule, before)
    check_layout(*(parts[name] for name in NETWORKS), dict(parts["scheduler"].config))


def set_config(parts: dict, part: str, schedule: dict, values: dict) -> None:
    if part == "scheduler":
        schedule.update(values)
    elif part == "text_encoder":
        parts[part].config.update(values)
    else:
        parts[part].register_to_config(**values)


def test_networks_of_other_kinds_are_named():
    parts = original_components()
    unet = build_unet("mp-mini", latent_channels=4, sample_size=4, cross_attention_dim=64, seed=0)
    with pytest.raises(ConfigError, match="unet: class is MPUNet2DConditionModel; .* UNet2DConditionModel alone"):
        check_layout(unet, parts["vae"], parts["text_encoder"], parts["scheduler"].config)
