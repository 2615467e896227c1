"""What can be wrong with the files of a model, as a table: each a way to damage a saved pipeline, and the part that the
one line about it has to name."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
CONFIGS = {
    "vae": "config.json",
    "unet": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


class Damage(NamedTuple):
    """One way to damage a saved pipeline.

    Attributes:
        part: what has to be named.
        file: the file, from the pipeline's folder.
        spoil: does it, given the file.
    """

    name: str
    part: str
    file: str
    spoil: Callable[[Path], object]


def content(value: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(value)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return spoil


def without(ending: str) -> Callable[[dict], object]:
    return lambda weights: weights.pop(next(name for name in sorted(weights) if name.endswith(ending)))


def reshaped(weights: dict) -> None:
    weights[sorted(weights)[3]] = torch.zeros(3, 5, 7)


def renamed(weights: dict) -> None:
    for name in sorted(weights):
        weights[f"of.another.{name}"] = weights.pop(name)


def setting(name: str, value: object) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return spoil


ANY_FILE = {
    "empty": content(b""),
    "cut in half": half,
    "a few bytes": content(b"abc"),
    "a folder": folder,
    "a link that leads nowhere": dead_link,
    "a pipe": pipe,
}
NO_WEIGHTS = ANY_FILE | {
    "gone": Path.unlink,
    "noise": content(bytes(range(256)) * 4),
    "zeros": content(bytes(1000)),
    "a header of exabytes": content(b"\xff" * 64),
    "a pointer of Git LFS": content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "no tensor": tensors(dict.clear),
    "a weight is missing": tensors(without(".weight")),
    "a bias is missing": tensors(without(".bias")),
    "a tensor of another shape": tensors(reshaped),
    "another network's tensors": tensors(renamed),
}
NO_JSON = ANY_FILE | {
    "a list": content(b"[]"),
    "a list of lists": content(b"[[]]"),
    "null": content(b"null"),
    "a text": content(b'"x"'),
    "a number": content(b"3"),
    "UTF-16": content('{"a": 1}'.encode("utf-16")),
    "Latin-1": content(b'{"a": "\xe9"}'),
    "lists 100,000 deep": content(b"[" * 100_000 + b"]" * 100_000),
    "objects 100,000 deep": content(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
}
SETTINGS: dict[str, dict[str, tuple]] = {
    "vae": {
        "block_out_channels": (None, 7, [4, 8], [], "x"),
        "latent_channels": (None, 0, -1, "x", 3),
        "layers_per_block": (None, 0, -1, 10**9, "x"),
        "norm_num_groups": (None, 0, -1, 3, "x"),
        "scaling_factor": (None, "x", [], 0),
        "shift_factor": ("x", [1, 2]),
        "act_fn": (None, "x", 3),
        "up_block_types": (None, ["x"], 3),
    },
    "unet": {
        "_class_name": ("SD3Transformer2DModel", "UNet2DModel", "x", None, []),
        "act_fn": (None, "x", {}),
        "addition_embed_type": ("text_time", "x"),
        "attention_head_dim": (None, 0, -1, "x"),
        "block_out_channels": (None, 7, [8, 16], [0], [], "x"),
        "class_embed_type": ("timestep", "projection"),
        "cross_attention_dim": (None, -1, 17, 10**9, "x", {}),
        "down_block_types": (None, [], ["x"], 3),
        "encoder_hid_dim_type": ("text_image_proj", "x"),
        "freq_shift": (None, "x", []),
        "in_channels": (None, 0, 7, "x"),
        "layers_per_block": (None, 0, -1, 10**9, "x"),
        "mid_block_scale_factor": (None, "x"),
        "norm_eps": (None, "x", []),
        "norm_num_groups": (0, -1, 3, "x"),
        "num_class_embeds": (10,),
        "out_channels": (None, 0, 8, "x"),
        "time_cond_proj_dim": (32, "x"),
        "transformer_layers_per_block": (None, 10**9, "x"),
    },
    "text_encoder": {
        "eos_token_id": ([], "x"),
        "hidden_act": (None, "x", 3),
        "hidden_size": (None, 0, -1, 17, "x"),
        "layer_norm_eps": (None, "x"),
        "max_position_embeddings": (None, 0, -1, 4, "x"),
        "num_attention_heads": (None, 0, -1, 3, "x"),
        "num_hidden_layers": (None, 0, -1, 10**9, "x"),
        "vocab_size": (None, 0, -1, 12, "x"),
    },
    "tokenizer": {
        "model_max_length": (0, 1, -1, "x", [], 2.5, True),
    },
    "scheduler": {
        "beta_schedule": ("x", None, 3),
        "beta_start": (None, "x", [], -1.0, 2.0),
        "beta_end": ("x", 1e30),
        "num_train_timesteps": (None, 0, -1, "x", 2.5),
        "prediction_type": ("x", None),
        "trained_betas": ("x", [2.0], [[]]),
    },
}
INDEX = {
    "no unet": setting("unet", [None, None]),
    "SDXL's second text encoder": setting("text_encoder_2", ["transformers", "CLIPTextModelWithProjection"]),
    "a transformer": setting("transformer", ["diffusers", "SD3Transformer2DModel"]),
    "an unconditional UNet": setting("unet", ["diffusers", "UNet2DModel"]),
    "a UNet of nobody's": setting("unet", ["nowhere", "Nothing"]),
}


def damages() -> Iterator[Damage]:
    """All of them."""
    for part, file in WEIGHTS.items():
        for name, spoil in NO_WEIGHTS.items():
            yield Damage(f"{part}'s weights: {name}", part, f"{part}/{file}", spoil)
    for part, file in CONFIGS.items():
        for name, spoil in NO_JSON.items():
            yield Damage(f"{part}'s {file}: {name}", part, f"{part}/{file}", spoil)
        if part not in ("tokenizer",):  # whose own files may say nothing
            yield Damage(f"{part}'s {file}: gone", part, f"{part}/{file}", Path.unlink)
        for name, values in SETTINGS[part].items():
            for value in values:
                yield Damage(f"{part}'s {name}: {value!r}", part, f"{part}/{file}", setting(name, value))
    for name, spoil in (NO_JSON | {"an empty object": content(b"{}")}).items():
        yield Damage(f"tokenizer.json: {name}", "tokenizer", "tokenizer/tokenizer.json", spoil)
        yield Damage(f"model_index.json: {name}", "model_index", "model_index.json", spoil)
    for name, spoil in INDEX.items():
        yield Damage(f"model_index.json: {name}", "", "model_index.json", spoil)
