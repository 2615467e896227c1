"""`latentdiff push` and `pull`: a model to the Hub and back, drawn from there, and what is said when that fails."""

import shutil
from dataclasses import replace

from PIL import Image

from hub_server import TOKEN, USER
from latentdiff import cli
from latentdiff.inference.recipe import read_recipe, save_png
from tests.inference.test_generate import STEPS, pixels
from tests.inference.test_redraw import draw, redraw
from tests.test_cli import fails


def test_a_model_of_the_hub_from_push_to_redraw(hub, tiny_pipeline_folder, tmp_path, capsys):
    """What is pushed could not be pulled, or its pictures not be drawn again by its name."""
    folder = tmp_path / "mine"
    shutil.copytree(tiny_pipeline_folder, folder)
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "state.json").write_text("{}")
    (folder / "pipeline.py").unlink()  # a checkout has no code beside its weights
    cli.main(["push", str(folder), f"{USER}/mine"])
    assert {"pipeline.py", "scheduling_ddim.py"} <= set(hub.files(f"{USER}/mine"))
    assert hub.url in capsys.readouterr().out
    assert not [name for name in hub.files(f"{USER}/mine") if name.startswith("checkpoint-")]

    cli.main(["pull", f"{USER}/mine", "--output-dir", str(tmp_path / "pulled")])
    own, pulled = (root / "unet" / "diffusion_pytorch_model.safetensors" for root in (folder, tmp_path / "pulled"))
    assert own.read_bytes() == pulled.read_bytes()
    assert "holds other things" in fails(capsys, "pull", f"{USER}/mine", "--output-dir", tiny_pipeline_folder)

    cli.main(["generate", f"{USER}/mine", *STEPS, "--prompts", "a cat", "--output-dir", str(tmp_path / "out")])
    path = tmp_path / "out" / "000-a-cat.png"
    assert read_recipe(path).checkpoint.name == f"{USER}/mine"
    assert (pixels(redraw(path)) == pixels(path)).all(), "it has been loaded before, so that its name is enough"
    hub.requests.clear()
    (again := path.with_name("000-a-cat-redrawn.png")).unlink()
    recipe = read_recipe(path)
    save_png(Image.open(path), path, replace(recipe, checkpoint=replace(recipe.checkpoint, sha256="0" * 64)))
    assert "is not that of the recipe" in fails(capsys, "redraw", path)
    cli.main(["redraw", str(path), "--anyway"])
    assert again.is_file() and hub.requests == [], "a picture had the network asked"
    save_png(Image.open(path), path, recipe)
    local = draw(folder, tmp_path / "local", "--prompts", "a cat")
    assert read_recipe(local).checkpoint.sha256 == read_recipe(path).checkpoint.sha256


def test_a_push_or_pull_that_fails_is_one_line(hub, tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    """A token would be shown, or twenty lines of a library."""
    assert "holds no model_index.json" in fails(capsys, "push", tmp_path, f"{USER}/x")
    assert "no such model" in fails(capsys, "pull", f"{USER}/nothing", "--output-dir", tmp_path / "a")
    assert "is no repository name" in fails(capsys, "pull", "a b", "--output-dir", tmp_path / "b")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = fails(capsys, "push", tiny_pipeline_folder, f"{USER}/x")
    assert "hf_wrong" not in said and "token" in said


def test_a_hub_that_cannot_be_reached_and_a_revision_that_is_not_there(
    hub, tiny_pipeline_folder, tmp_path, monkeypatch, capsys
):
    """Either would look like a model that does not exist."""
    from huggingface_hub import constants

    cli.main(["push", str(shutil.copytree(tiny_pipeline_folder, tmp_path / "mine")), f"{USER}/mine"])
    said = fails(capsys, "pull", f"{USER}/mine", "--revision", "v9", "--output-dir", tmp_path / "a")
    assert f"{USER}/mine has no revision 'v9'" in said
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = fails(capsys, "pull", f"{USER}/mine", "--output-dir", tmp_path / "b")
    assert "http://127.0.0.1:9 cannot be reached" in said and TOKEN not in said
