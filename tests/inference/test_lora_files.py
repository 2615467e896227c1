"""LoRA weights in others' files: sd-scripts' (kohya's) names of weights, names of files, and how many of them fit."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from latentdiff import LatentDiffPipeline, cli
from latentdiff.config.commands import Serve
from latentdiff.inference.loading import load_networks
from latentdiff.inference.recipe import file_ingredient, folder_ingredient, read_recipe
from latentdiff.inference.serve import open_studio
from latentdiff.inference.session import Settings
from latentdiff.models.lora import save_lora
from tests.inference.test_generate import STEPS, generate, pixels
from tests.models.test_lora import adapted
from tests.test_cli import fails
from tiny import tiny_components

RANK, ALPHA = 2, 6.0


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The same adapters in a folder `ours`, as a run leaves it, and in `style.safetensors`, as sd-scripts writes it."""
    folder = tmp_path_factory.mktemp("lora")
    save_lora(adapted(RANK, ALPHA), folder / "ours")
    kohya = {}
    for name, tensor in load_file(folder / "ours" / "pytorch_lora_weights.safetensors").items():
        module, which = name.removeprefix("unet.").removesuffix(".weight").split(".lora.")
        module = f"lora_unet_{module.replace('.', '_')}"
        kohya |= {f"{module}.lora_{which}.weight": tensor, f"{module}.alpha": torch.tensor(ALPHA)}
    save_file(kohya, folder / "style.safetensors", metadata={"ss_network_module": "networks.lora"})
    return folder


def draw(checkpoint: Path, output: Path, lora: Path) -> Path:
    generate(checkpoint, output, "--prompts", "a cat", "--lora", lora)
    return output / "000-a-cat.png"


def test_a_file_of_sd_scripts_draws_what_ours_draws(files, tiny_pipeline_folder, tmp_path, capsys):
    """It would be refused for its name, act with another strength, or its layers be miscounted."""
    ours = draw(tiny_pipeline_folder, tmp_path / "ours", files / "ours")
    said = capsys.readouterr().err
    theirs = draw(tiny_pipeline_folder, tmp_path / "theirs", files / "style.safetensors")
    assert (pixels(ours) == pixels(theirs)).all()
    generate(tiny_pipeline_folder, tmp_path / "plain", "--prompts", "a cat")
    assert (pixels(ours) != pixels(tmp_path / "plain" / "000-a-cat.png")).any()
    count = len(load_file(files / "style.safetensors")) // 3
    assert f"ours: {count} of {count} LoRA layers fit" in said
    assert f"style.safetensors: {count} of {count} LoRA layers fit" in capsys.readouterr().err

    recipe = read_recipe(theirs)
    assert recipe.lora == file_ingredient(files / "style.safetensors") and recipe.lora.name == "style.safetensors"
    again = ["redraw", theirs, "--checkpoint", tiny_pipeline_folder, "--lora", files / "style.safetensors"]
    cli.main([str(word) for word in again])
    assert "the same picture" in capsys.readouterr().out


def test_a_folder_with_one_file_of_another_name(files, tiny_pipeline_folder, tmp_path):
    """Who keeps one adapter in a folder would have to rename it."""
    (tmp_path / "mine").mkdir()
    shutil.copy(files / "style.safetensors", tmp_path / "mine" / "my style v2.safetensors")
    path = draw(tiny_pipeline_folder, tmp_path / "drawn", tmp_path / "mine")
    assert read_recipe(path).lora == folder_ingredient(tmp_path / "mine")
    # A run's file is known by its folder, which may hold a scheduler, too.
    file = files / "ours" / "pytorch_lora_weights.safetensors"
    assert read_recipe(draw(tiny_pipeline_folder, tmp_path / "ours", file)).lora == folder_ingredient(files / "ours")


def test_what_is_no_lora_is_one_line(files, tiny_pipeline_folder, tmp_path, capsys):
    weights = load_file(files / "style.safetensors")
    several, empty = tmp_path / "several", tmp_path / "empty"
    several.mkdir()
    empty.mkdir()
    for name in "ab":
        shutil.copy(files / "style.safetensors", several / f"{name}.safetensors")
    other = {name.replace("blocks_0", "blocks_7"): one for name, one in weights.items()}
    save_file(other, tmp_path / "other.safetensors")
    hada = {f"{name.split('.')[0]}.hada_w1_a": one for name, one in weights.items() if "lora_up" in name}
    save_file(hada, tmp_path / "loha.safetensors")
    half = {name: one for name, one in weights.items() if "lora_up" not in name}
    save_file(half, tmp_path / "half.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((files / "style.safetensors").read_bytes()[:-9])
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    for lora, said in (
        (several, f"holds 2 .safetensors files: give one, such as {several / 'a.safetensors'}"),
        (empty, "holds no pytorch_lora_weights.safetensors, nor another"),
        (tmp_path / "no.safetensors", "no.safetensors: no such file or folder"),
        (tmp_path / "other.safetensors", "other.safetensors: its layers are those of another model"),
        (tmp_path / "loha.safetensors", "loha.safetensors: does not fit this checkpoint"),
        (tmp_path / "half.safetensors", "half.safetensors: does not fit this checkpoint"),
        (tmp_path / "cut.safetensors", "cut.safetensors: does not fit this checkpoint"),
        (tmp_path / "old.ckpt", "may run code when it is read"),
    ):
        assert said in fails(capsys, "generate", tiny_pipeline_folder, "--prompts", "a cat", *STEPS, "--lora", lora)


def test_a_text_encoder_s_layers_and_all_that_sd_scripts_trains(tiny_pipeline_folder, tmp_path, capsys):
    """Half of an adapter would be left out in silence, or act with another strength. What is right: W + alpha/r U D."""
    generator = torch.Generator().manual_seed(0)
    parts, layers = tiny_components(), {}
    networks = {"unet": parts["unet"], "te_text_model": parts["text_encoder"]}
    for prefix, network in networks.items():
        for name, module in network.named_modules():
            trained = ".transformer_blocks." in name or "proj_in" in name or "encoder.layers" in name
            if trained and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                key, rest = f"lora_{prefix}_{name.removeprefix('text_model.').replace('.', '_')}", module.weight.shape
                up = torch.randn(rest[0], RANK, *rest[2:], generator=generator) / 10
                down = torch.randn(RANK, *rest[1:], generator=generator) / 10
                layers |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
                layers[f"{key}.alpha"] = torch.tensor(1.0)
                with torch.no_grad():
                    module.weight += (up.flatten(1) @ down.flatten(1)).reshape(rest) / RANK
    assert {name.split("_self")[0][-1] for name in layers if "te_" in name and "self" in name} == {"0", "1", "2"}
    save_file(layers, tmp_path / "both.safetensors")
    given = load_networks(str(tiny_pipeline_folder), "cpu", lora=tmp_path / "both.safetensors").pipeline
    count = len(layers) // 3
    assert f"both.safetensors: {count} of {count} LoRA layers fit" in capsys.readouterr().err
    merged = LatentDiffPipeline(**parts)
    merged.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "np"}
    one, other = (pipe(**call, generator=torch.Generator().manual_seed(1)).images for pipe in (given, merged))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-5, rtol=0)
    assert isinstance(merged.text_encoder, CLIPTextModel)


def test_the_page_takes_such_a_file(files, tiny_pipeline_folder):
    studio = open_studio(Serve(checkpoint=str(tiny_pipeline_folder), lora=files / "style.safetensors", device="cpu"))
    settings = Settings(prompt="a cat", num_inference_steps=1)
    [*_, drawing] = studio.text_to_image(settings, threading.Event())
    assert drawing.recipe.lora == file_ingredient(files / "style.safetensors")
    studio.close()
