"""`latentdiff redraw`: the same picture again, and a word about whatever is not as it was."""

# ruff: noqa: F401, F811 - the fixtures of another file

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff import ConsistencyScheduler, LatentDiffPipeline, cli
from latentdiff.diffusion import posthoc_ema, scheduling_ddim
from latentdiff.inference import drawing
from latentdiff.inference import redraw as redrawing
from latentdiff.inference.recipe import folder_ingredient, read_recipe, save_png
from latentdiff.models import lora
from latentdiff.training.ema import save_snapshot
from tests.inference.test_generate import STEPS, guides, mask, picture, pixels
from tests.test_cli import fails
from tiny import tiny_components


def draw(folder: Path, output: Path, *flags) -> Path:
    """Draw one picture or several; return the first."""
    cli.main(["generate", str(folder), *STEPS, "--output-dir", str(output), *map(str, flags)])
    return sorted(output.iterdir())[0]


def redraw(path: Path, *flags) -> Path:
    cli.main(["redraw", str(path), *map(str, flags)])
    return path.with_name(f"{path.stem}-redrawn.png")


@pytest.mark.parametrize("flags", [[], ["--scheduler", "ddpm"], ["--eta", "1"], ["--scheduler", "unipc"]], ids=str)
def test_a_picture_alone_in_a_batch_and_drawn_again(flags, tiny_pipeline_folder, tmp_path, capsys):
    """A picture would depend on the batch it was drawn in, or its recipe not hold all that it depends on.

    Alone and in a batch of eight it may differ by the rounding of sums, which is a shade at the most; drawn again,
    it does not differ.
    """
    alone = draw(tiny_pipeline_folder, tmp_path / "alone", "--prompts", "a cat", "--seeds", 5, *flags)
    draw(tiny_pipeline_folder, tmp_path / "eight", "--prompts", "a cat", "--seeds", *range(8), *flags)
    among = tmp_path / "eight" / "005-a-cat-5.png"
    assert read_recipe(among).batch_size == 8 and read_recipe(alone).batch_size == 1
    assert abs(pixels(alone) - pixels(among)).max() <= 1
    assert (pixels(tmp_path / "eight" / "004-a-cat-4.png") != pixels(among)).any()
    for path in (alone, among):
        capsys.readouterr()
        again = redraw(path, "--checkpoint", tiny_pipeline_folder)
        assert (pixels(again) == pixels(path)).all() and read_recipe(again) == read_recipe(path)
        assert "the same picture" in capsys.readouterr().out


def test_the_average_that_was_chosen_is_in_the_recipe(tiny_pipeline_folder, tmp_path, capsys):
    """A picture of one average would be drawn again with another, or pass for one of the weights that were saved."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_pipeline_folder, folder)
    (folder / posthoc_ema.SNAPSHOTS).mkdir()
    for step in (10, 20):
        unet = tiny_components(seed=step)["unet"]
        save_snapshot(folder / posthoc_ema.SNAPSHOTS, "unet", step, 0.1, unet.state_dict(), unet.config)
    path = draw(folder, tmp_path / "averaged", "--prompts", "a cat", "--ema-sigma-rel", "0.1")
    other = draw(folder, tmp_path / "saved", "--prompts", "a cat")
    assert (read_recipe(path).ema_sigma_rel, read_recipe(other).ema_sigma_rel) == (0.1, None)
    assert (pixels(path) != pixels(other)).any()
    assert (pixels(redraw(path, "--checkpoint", folder)) == pixels(path)).all()
    error = fails(capsys, "redraw", path, "--checkpoint", tiny_pipeline_folder, "--anyway", "--overwrite")
    assert "holds no EMA snapshots" in error


def test_seeds_make_noise_that_no_batch_changes(tiny_pipeline_folder, monkeypatch):
    """To the last bit: the first noise, and that of each step of a stochastic sampler."""

    def noise(seeds) -> list:
        drawn, randn = [], scheduling_ddim.randn_tensor
        pipeline = LatentDiffPipeline.from_pretrained(tiny_pipeline_folder)
        pipeline.set_progress_bar_config(disable=True)
        normal = pipeline._normal
        monkeypatch.setattr(pipeline, "_normal", lambda *a, **k: drawn.append(normal(*a, **k)) or drawn[-1], False)
        monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda *a, **k: drawn.append(randn(*a, **k)) or drawn[-1])
        list(drawing.draw_pictures(pipeline, ["a cat"] * len(seeds), seeds, 8, num_inference_steps=3, eta=1.0))
        monkeypatch.undo()
        return drawn

    alone, eight = noise([5]), noise(list(range(8)))
    assert len(alone) == len(eight) >= 3
    assert all((one[0] == many[5]).all() for one, many in zip(alone, eight, strict=True))


@pytest.mark.parametrize("kind", ["img2img", "inpaint", "invert"])
def test_an_edit_needs_its_picture(kind, tiny_pipeline_folder, tmp_path, picture, mask, capsys):
    """Else another picture would be edited without a word."""
    flags = {"img2img": [], "inpaint": ["--mask", mask], "invert": ["--source-prompt", "a dog"]}[kind]
    inputs = ["--image", picture, *(flags if kind == "inpaint" else [])]
    command = ["edit", tiny_pipeline_folder, "--image", picture, "--prompts", "a cat", "a dog", *STEPS, *flags]
    cli.main([*map(str, command), "--output-dir", str(tmp_path / "out")])
    path, where = tmp_path / "out" / "001-a-dog.png", ["--checkpoint", tiny_pipeline_folder]
    assert "was made with 'own.png': give it with --image" in fails(capsys, "redraw", path, *where)
    assert (pixels(redraw(path, *where, *inputs)) == pixels(path)).all()

    other = tmp_path / "other.png"
    Image.new("RGB", (40, 20), "red").save(other)
    wrong = [other if word is picture else word for word in inputs]
    said = fails(capsys, "redraw", path, *where, *wrong, "--output", tmp_path / "x.png")
    assert "the image 'other.png' is not the 'own.png' of the recipe" in said


def test_another_checkpoint_or_version_is_said(tiny_pipeline_folder, tmp_path, capsys):
    """Somebody would wonder for an hour why the picture is another one."""
    path = draw(tiny_pipeline_folder, tmp_path / "out", "--prompts", "a cat")
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline_folder, other)
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.02}))
    said = fails(capsys, "redraw", path, "--checkpoint", other)
    assert "the checkpoint 'other' is not the 'pipeline' of the recipe (SHA-256 differs): --anyway" in said
    again = redraw(path, "--checkpoint", other, "--anyway")
    captured = capsys.readouterr()
    assert "warning: the checkpoint 'other' is not" in captured.err and "of 255 at most" in captured.out
    assert read_recipe(again).checkpoint.name == "other", "its recipe says what it was really drawn by"

    save_png(Image.open(path), path, replace(read_recipe(path), version="0.0.1"))
    said = fails(capsys, "redraw", path, "--checkpoint", tiny_pipeline_folder, "--output", tmp_path / "x.png")
    assert "it was drawn by latentdiff '0.0.1', and this is" in said


def test_where_a_checkpoint_is_looked_for(tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    """What is shipped is found by its name; what is not is not guessed at, and never fetched on a picture's word."""
    shutil.copytree(tiny_pipeline_folder, tmp_path / "checkpoints" / "shipped")
    monkeypatch.setattr(redrawing, "packaged_checkpoint", lambda: str(tmp_path / "checkpoints" / "other"))
    path = draw(tmp_path / "checkpoints" / "shipped", tmp_path / "out", "--prompts", "a cat")
    assert (pixels(redraw(path)) == pixels(path)).all()
    path = draw(tiny_pipeline_folder, tmp_path / "out2", "--prompts", "a cat")
    assert "was drawn by 'pipeline': say where it lies with --checkpoint" in fails(capsys, "redraw", path)
    recipe = read_recipe(path)
    for name in ("..", "somebody/model"):
        save_png(Image.open(path), path, replace(recipe, checkpoint=replace(recipe.checkpoint, name=name)))
        assert "--checkpoint" in fails(capsys, "redraw", path)


def test_a_film_and_its_strip(tiny_pipeline_folder, tmp_path, capsys):
    film = tmp_path / "film.gif"
    command = ["interpolate", tiny_pipeline_folder, "--prompts", "a cat", "a dog", *STEPS, "--num-frames", 6]
    command += ["--columns", 3, "--batch-size", 4, "--seeds", 1, 2, "--output", film]
    cli.main([*map(str, command)])
    row = tmp_path / "film.png"
    assert capsys.readouterr().out.split() == [str(film), str(row)]
    assert Image.open(film).n_frames == 6 and Image.open(row).width == 3 * 128 + 4 * 8
    recipe = read_recipe(row)
    assert (recipe.prompt, recipe.prompts, recipe.seed, recipe.seeds) == ("a cat", ("a dog",), 1, (2,))
    again = redraw(row, "--checkpoint", tiny_pipeline_folder)
    assert (np.asarray(Image.open(again)) == np.asarray(Image.open(row))).all()

    cli.main([*map(str, command)])
    assert f"{film} is there" in capsys.readouterr().out
    assert "another guidance scale" in fails(capsys, *command, "--guidance-scale", "2")
    row.unlink()
    assert f"{film} is there, and no film" in fails(capsys, *command)
    assert "a film is saved as .gif or .mp4" in fails(capsys, *command[:-1], tmp_path / "film.txt")


def test_guides_and_devices_are_in_the_recipe(tiny_pipeline_folder, tmp_path, guides, capsys):
    """What led the picture would be left out when it is drawn again."""
    clip, unet = guides
    flags = ["--clip", clip, "--guide-unet", unet]
    path = draw(tiny_pipeline_folder, tmp_path / "out", "--prompts", "a cat", "--clip-guidance", 300, *flags)
    recipe, where = read_recipe(path), ["--checkpoint", tiny_pipeline_folder]
    save_png(Image.open(path), path, replace(recipe, device="cuda"))
    assert "was made with 'worse': give it with --guide-unet" in fails(capsys, "redraw", path, *where)
    assert "was made with 'clip': give it with --clip" in fails(capsys, "redraw", path, *where, "--guide-unet", unet)
    assert "--mask: " in fails(capsys, "redraw", path, *where, *flags, "--mask", path)
    assert (pixels(redraw(path, *where, *flags)) == pixels(path)).all()
    assert "drawn on 'cuda', and here on cpu" in capsys.readouterr().err


def test_lora_weights_are_in_the_recipe(tiny_pipeline_folder, tmp_path, capsys):
    """Else a distilled adapter could not be used from the command line, or its pictures not be drawn again."""
    from tests.models.test_lora import adapted

    for name, seed in (("few", 0), ("other", 1)):
        lora.save_lora(adapted(seed=seed), tmp_path / name)
    ConsistencyScheduler(original_inference_steps=3).save_pretrained(tmp_path / "few")
    cli.main(["generate", str(tiny_pipeline_folder), "--prompts", "a cat", "--output-dir", str(tmp_path / "plain"),
              "--scheduler", "lcm", "--num-inference-steps", "3"])  # fmt: skip
    cli.main(["generate", str(tiny_pipeline_folder), "--prompts", "a cat", "--output-dir", str(tmp_path / "out"),
              "--lora", str(tmp_path / "few")])  # fmt: skip
    plain, path = (tmp_path / name / "000-a-cat.png" for name in ("plain", "out"))
    assert (pixels(path) != pixels(plain)).any()
    drawn = read_recipe(path)
    assert (drawn.scheduler, drawn.num_inference_steps, drawn.guidance_scale) == ("ConsistencyScheduler", 3, 1.0)
    recipe, where = read_recipe(path), ["--checkpoint", tiny_pipeline_folder]
    assert recipe.lora == folder_ingredient(tmp_path / "few") and recipe.lora.name == "few"
    assert "was made with 'few': give it with --lora" in fails(capsys, "redraw", path, *where)
    error = fails(capsys, "redraw", path, *where, "--lora", tmp_path / "other")
    assert "the lora 'other' is not the 'few' of the recipe" in error
    assert (pixels(redraw(path, *where, "--lora", tmp_path / "few")) == pixels(path)).all()


def test_what_is_no_recipe_of_ours(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "carries no recipe" in fails(capsys, "redraw", tmp_path / "a.png")
    assert "no such file" in fails(capsys, "redraw", tmp_path / "b.png")


def test_a_recipe_that_cannot_be_followed_here_is_one_line(tiny_pipeline_folder, tmp_path, capsys):
    """Whoever made the file would have us look up any name among diffusers' classes, or end in a traceback."""
    path = draw(tiny_pipeline_folder, tmp_path / "out", "--prompts", "a cat")
    recipe, where = read_recipe(path), ["--checkpoint", tiny_pipeline_folder]
    for changes, said in (
        ({"scheduler": "DiffusionPipeline"}, "scheduler 'DiffusionPipeline' is not known here"),
        ({"dtype": "int8"}, "dtype is 'int8'; it may be float32, float16, bfloat16"),
        ({"timestep_spacing": "anyhow"}, "its timestep_spacing is not what it must be: leading, trailing, linspace"),
        ({"karras_sigmas": True}, "DDIMScheduler has no use_karras_sigmas"),
        ({"height": 15}, "both must be positive multiples of 4"),
        ({"guidance_interval": (3.0, 1.0)}, "guidance_interval=(3.0, 1.0)"),
    ):
        save_png(Image.open(path), path, replace(recipe, **changes))
        assert said in fails(capsys, "redraw", path, *where)
    save_png(Image.open(path), path, recipe)
    assert "must end in .png" in fails(capsys, "redraw", path, *where, "--output", tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "huge", [{"width": 8192, "height": 8192}, {"num_inference_steps": 10_000, "batch_size": 4}], ids=str
)
def test_a_picture_does_not_decide_how_long_a_machine_works(huge, tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    """A file from somewhere would keep it busy for days, or take all its memory."""
    path = draw(tiny_pipeline_folder, tmp_path / "one", "--prompts", "a cat")
    save_png(Image.open(path), path, replace(read_recipe(path), **huge))
    monkeypatch.setattr(redrawing, "draw_recipes", lambda *args, **kwargs: pytest.fail("it was drawn"))
    said = fails(capsys, "redraw", path, "--checkpoint", tiny_pipeline_folder)
    assert "far more than this checkpoint is made for, which is 16 x 16: --anyway draws it" in said
    with pytest.raises(pytest.fail.Exception, match="it was drawn"):
        cli.main(["redraw", str(path), "--checkpoint", str(tiny_pipeline_folder), "--anyway"])
