"""`latentdiff export`, and drawing from what it writes: the same pictures, for diffusers and for us."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from latentdiff import LatentDiffPipeline, cli
from latentdiff.inference.recipe import file_ingredient, folder_ingredient, read_recipe
from latentdiff.models.parts import fingerprint
from latentdiff.utils.files import packaged_checkpoint
from tests.inference.test_generate import STEPS, generate, pixels
from tests.test_cli import fails
from tiny import original_components


def export(folder: Path, output: Path, *flags) -> dict[str, torch.Tensor]:
    cli.main(["export", str(folder), str(output), *map(str, flags)])
    return load_file(output)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as weights:
        return weights.metadata()


def drawn(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipeline("a cat", num_inference_steps=3, latents=noise, output_type="np").images


@pytest.mark.parametrize(("version", "predicts"), [(1, "epsilon"), (2, "v_prediction")])
def test_the_file_draws_the_folder_s_picture(version, predicts, tmp_path, capsys):
    """diffusers' loader, given the folder for what a file lacks, is every other program's stand-in."""
    folder, file = tmp_path / "model", tmp_path / "model.safetensors"
    LatentDiffPipeline(**original_components(version, prediction_type=predicts)).save_pretrained(folder)
    export(folder, file)
    written = [file] if predicts == "epsilon" else [file, file.with_suffix(".yaml")]
    said = capsys.readouterr()
    assert said.out.split() == [str(path) for path in written]
    assert "warning: of another size than Stable Diffusion's" in said.err and "warning: its tokenizer" in said.err
    one = drawn(StableDiffusionPipeline.from_pretrained(folder))
    other = drawn(StableDiffusionPipeline.from_single_file(str(file), config=str(folder)))
    assert one.std() > 0.01 and abs(one - other).max() <= 1e-5
    kinds = {1: "stable-diffusion-v1", 2: "stable-diffusion-v2-768-v"}
    assert header(file) == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": kinds[version],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "model",
        "modelspec.resolution": "128x128",
        "modelspec.prediction_type": "v" if version == 2 else "epsilon",
    }


def test_precision_is_the_stored_one_or_the_one_asked_for(tmp_path):
    """A file would be twice as large as it need be, or worse than the folder; weights past fp16 become infinite."""
    parts = original_components()
    parts["vae"].half()
    pipeline = LatentDiffPipeline(**parts)
    pipeline.save_pretrained(tmp_path / "model")
    kinds = {"first_stage_model": torch.float16, "model": torch.float32, "cond_stage_model": torch.float32}
    for name, tensor in export(tmp_path / "model", tmp_path / "a.safetensors").items():
        assert tensor.dtype == kinds[name.split(".")[0]], name
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        weights = export(tmp_path / "model", tmp_path / f"{name}.safetensors", "--dtype", name)
        assert {tensor.dtype for tensor in weights.values()} == {dtype}
    umask = (tmp_path / "beside").touch() or (tmp_path / "beside").stat().st_mode
    assert (tmp_path / "a.safetensors").stat().st_mode == umask
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_a_model_that_predicts_v_says_so(tmp_path, capsys):
    """It would be drawn as noise: A1111 finds it in the YAML, ComfyUI in the marks, where it looks at all."""
    folder, file = tmp_path / "model", tmp_path / "v.safetensors"
    parts = original_components(prediction_type="v_prediction")
    LatentDiffPipeline(**parts).save_pretrained(folder)
    weights = export(folder, file)
    assert weights["v_pred"].numel() == weights["ztsnr"].numel() == 0
    assert "warning: it predicts v: tell ComfyUI" in capsys.readouterr().err
    settings = yaml.safe_load(file.with_suffix(".yaml").read_text())["model"]["params"]
    assert settings["parameterization"] == "v" and settings["linear_end"] == 0.012
    # diffusers makes a UNet by such settings, too.
    unet = UNet2DConditionModel.from_single_file(str(file), original_config=str(file.with_suffix(".yaml")))
    assert fingerprint(unet) == fingerprint(parts["unet"])
    same = ("block_out_channels", "cross_attention_dim", "layers_per_block", "use_linear_projection")
    assert all(tuple(np.ravel(unet.config[name])) == tuple(np.ravel(parts["unet"].config[name])) for name in same)
    generate(folder, tmp_path / "folder", "--prompts", "a cat")
    generate(file, tmp_path / "file", "--prompts", "a cat", "--single-file-config", folder)
    assert abs(pixels(tmp_path / "folder" / "000-a-cat.png") - pixels(tmp_path / "file" / "000-a-cat.png")).max() <= 1


def test_what_cannot_be_exported_is_one_line_and_nothing_is_lost(original_folder, tmp_path, capsys):
    file, there = original_folder.with_suffix(".safetensors"), tmp_path / "there.safetensors"
    there.write_text("somebody's")
    (tmp_path / "a.yaml").write_text("settings of another")
    shutil.copytree(original_folder, tmp_path / "large")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "large", subfolder="unet")
    with torch.no_grad():
        unet.conv_in.weight[0] = 1e6
    unet.save_pretrained(tmp_path / "large" / "unet")
    for folder, output, flags, said in (
        (packaged_checkpoint(), tmp_path / "b.safetensors", [], "emoji64: unet: block_out_channels is"),
        (original_folder, tmp_path / "b.ckpt", [], "b.ckpt: must end in .safetensors"),
        (original_folder, there, [], "there.safetensors is there: --overwrite replaces it"),
        (original_folder, tmp_path / "a.safetensors", [], "a.yaml is there: A1111 would read a.safetensors by it"),
        (original_folder, there / "b.safetensors", [], "b.safetensors cannot be written: "),
        (tmp_path / "no", tmp_path / "b.safetensors", [], "no such folder"),
        (file, tmp_path / "b.safetensors", [], "is a single file already"),
        (tmp_path / "large", tmp_path / "b.safetensors", ["--dtype", "fp16"], "conv_in.weight has a weight beyond"),
    ):
        assert said in fails(capsys, "export", folder, output, *flags)
    assert there.read_text() == "somebody's" and not (tmp_path / "b.safetensors").exists()
    export(original_folder, there, "--overwrite")


def test_a_single_file_is_drawn_with_and_named_by_its_hash(original_folder, tmp_path, capsys):
    """Its pictures would be others than the folder's, or not be drawn again."""
    file = original_folder.with_suffix(".safetensors")
    config = ["--single-file-config", original_folder]
    for source, flags in ((original_folder, []), (file, config)):
        generate(source, tmp_path / source.name, "--prompts", "a cat", *flags)
    picture = tmp_path / file.name / "000-a-cat.png"
    assert abs(pixels(picture) - pixels(tmp_path / "original" / "000-a-cat.png")).max() <= 1
    recipe = read_recipe(picture)
    assert recipe.checkpoint == file_ingredient(file) and recipe.checkpoint.name == "original.safetensors"
    assert recipe.single_file_config == folder_ingredient(original_folder, weights=False)
    cli.main([str(word) for word in ("redraw", picture, "--checkpoint", file, *config)])
    assert "the same picture" in capsys.readouterr().out
    assert "with 'original': give it with --single-file-config" in fails(
        capsys, "redraw", picture, "--checkpoint", file
    )
    other = shutil.copytree(original_folder, tmp_path / "other")
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"leading"', '"trailing"'))
    again = ["redraw", picture, "--checkpoint", file, "--single-file-config", other]
    assert "the single file config 'other' is not the 'original' of the recipe" in fails(capsys, *again)


def test_a_single_file_that_cannot_be_drawn_with_is_one_line(original_folder, tmp_path, capsys):
    file = original_folder.with_suffix(".safetensors")
    draw = ["--prompts", "a cat", *STEPS]
    for source, flags, said in (
        (tmp_path / "no.safetensors", [], "no.safetensors: no such file"),
        ("models/no.ckpt", [], "models/no.ckpt: no such file"),
        (file, [], "give the folder of a model of its kind with --single-file-config"),
        (original_folder, ["--single-file-config", original_folder], "--single-file-config: has no effect without"),
        (file, ["--ema-sigma-rel", 0.1], "is a single file, which has no snapshots"),
    ):
        assert said in fails(capsys, "generate", source, *draw, *flags)
