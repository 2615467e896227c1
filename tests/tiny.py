"""What many tests are made of: a tiny Stable Diffusion of random weights, pictures of noise, a fresh accelerate."""

import json
from pathlib import Path

import torch


def tiny_tokenizer(max_tokens: int = 8):
    """A byte-level CLIP tokenizer of 521 tokens: every byte, every byte that ends a word, and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
    tokens = [*characters, *(f"{character}</w>" for character in characters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def tiny_components(seed: int = 0) -> dict:
    """The parts of a Stable Diffusion pipeline at toy size, with random weights: an f4 VAE, 16 pixels, 8 tokens."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from latentdiff import DDIMScheduler

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=16,
            scaling_factor=0.7,
        )
        unet = UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
        )
        text_encoder = CLIPTextModel(text_config)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": scheduler,
    }


def reset_accelerate() -> None:
    """accelerate keeps its state between accelerators of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_pictures(folder: Path, count: int) -> Path:
    """Pictures of noise with metadata."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        shades = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(shades).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i} of a cat"}) for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def original_components(version: int = 1, in_channels: int = 4, prediction_type: str = "epsilon") -> dict:
    """As `tiny_components`, but of the shape of Stable Diffusion 1 or 2: four levels, an f8 VAE, 128 pixels.

    Of fewer the coarsest grid would be a single position, whose norms are of too few numbers to repeat.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from latentdiff import DDIMScheduler

    parts = tiny_components()
    with torch.random.fork_rng():
        torch.manual_seed(version)
        text_config = parts["text_encoder"].config
        text_config.hidden_size, text_config.num_attention_heads = 64, 1
        text_config.num_hidden_layers = {1: 2, 2: 23}[version]
        text_config.hidden_act = {1: "quick_gelu", 2: "gelu"}[version]
        parts["text_encoder"] = CLIPTextModel(text_config).eval()
        parts["vae"] = AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=128,
        ).eval()
        shape = {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 8}
        if version == 2:
            shape = {"block_out_channels": (64, 64, 64, 128), "attention_head_dim": (1, 1, 1, 2)}
        parts["unet"] = UNet2DConditionModel(
            sample_size=16,
            in_channels=in_channels,
            cross_attention_dim=64,
            use_linear_projection=version == 2,
            **shape,
        ).eval()
    snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if prediction_type != "epsilon" else {}
    scheduler = DDIMScheduler.from_config(parts["scheduler"].config, prediction_type=prediction_type, **snr)
    return parts | {"scheduler": scheduler}
