"""`latentdiff generate` and `edit`: what is drawn, what is written, what is left alone."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff import ConsistencyScheduler, LatentDiffPipeline, cli
from latentdiff.inference import drawing
from latentdiff.inference import generate as picture_lists
from latentdiff.inference.loading import SCHEDULERS
from latentdiff.inference.recipe import file_ingredient, read_recipe
from latentdiff.models.lora import save_lora
from latentdiff.models.unet import add_guidance_input
from latentdiff.utils.files import folder_sha256
from tests.models.test_lora import adapted
from tests.test_cli import fails
from tiny import tiny_components

STEPS = ["--num-inference-steps", "2"]


def generate(folder: Path, output: Path, *flags, steps: list[str] = STEPS) -> None:
    cli.main(["generate", str(folder), *steps, "--output-dir", str(output), *map(str, flags)])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def asked(monkeypatch):
    """Draws grey pictures, and keeps what the pipelines were asked for: (pipeline, options)."""
    calls = []

    def grey(pipeline, prompts, seeds, batch_size, wanted=None, **options):
        calls.append((pipeline, options))
        yield from ((i, Image.new("RGB", (16, 16), "grey")) for i in range(len(prompts)) if i in wanted)

    monkeypatch.setattr(drawing, "draw_pictures", grey)
    return calls


def test_generate_saves_pictures_and_a_grid(tiny_pipeline_folder, tmp_path, capsys):
    pictures, grid = tmp_path / "pictures", tmp_path / "grid.png"
    generate(tiny_pipeline_folder, pictures, "--prompts", "A cat, red", "a dog", "--grid", grid, "--columns", 2)
    names = ["000-a-cat-red.png", "001-a-dog.png"]
    assert [path.name for path in sorted(pictures.iterdir())] == names
    assert capsys.readouterr().out.split() == [*(str(pictures / name) for name in names), str(grid)]
    both = [pixels(pictures / name) for name in names]
    assert both[0].shape == (16, 16, 3) and (both[0] != both[1]).any()
    assert Image.open(grid).width == 2 * 128 + 3 * 8

    # Picture i depends on seed + i and its prompt alone.
    generate(tiny_pipeline_folder, tmp_path / "alone", "--prompts", "a dog", "--seed", "1")
    assert abs(pixels(tmp_path / "alone" / "000-a-dog.png") - both[1]).max() <= 1

    recipe = read_recipe(pictures / names[1])
    assert (recipe.kind, recipe.prompt, recipe.seed, recipe.batch_size) == ("text2img", "a dog", 1, 2)
    assert (recipe.width, recipe.height, recipe.scheduler, recipe.dtype) == (16, 16, "DDIMScheduler", "float32")
    assert recipe.checkpoint.name == "pipeline" and recipe.checkpoint.sha256 == folder_sha256(tiny_pipeline_folder)


def test_several_seeds_for_each_prompt(tiny_pipeline_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa dog\n\n  a fish \n", encoding="utf-8")
    flags = ["--prompts", "a cat", "--prompts-file", file, "--seeds", 7, 3, "--grid", tmp_path / "grid.jpg"]
    generate(tiny_pipeline_folder, tmp_path / "pictures", *flags)
    drawn = [read_recipe(path) for path in sorted((tmp_path / "pictures").iterdir())]
    assert [(r.prompt, r.seed) for r in drawn] == [(p, s) for p in ("a cat", "a dog", "a fish") for s in (7, 3)]
    assert (tmp_path / "pictures" / "003-a-dog-3.png").is_file()
    grid = Image.open(tmp_path / "grid.jpg")
    assert grid.width == 2 * 128 + 3 * 8 and grid.height > 3 * 128, "a row for each prompt"


def test_what_was_interrupted_goes_on_to_the_same_bytes(tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    """Hours of drawing would be lost, or end in other pictures than without the interruption."""
    prompts = ["--prompts", *"abcdefg", "--batch-size", "3", "--eta", "1"]
    generate(tiny_pipeline_folder, tmp_path / "whole", *prompts)

    save_png, saved, batches = picture_lists.save_png, [], []

    def interrupted(image, path, recipe):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(path)
        save_png(image, path, recipe)

    monkeypatch.setattr(picture_lists, "save_png", interrupted)
    with pytest.raises(SystemExit) as stopped:
        generate(tiny_pipeline_folder, tmp_path / "parts", *prompts)
    assert stopped.value.code == 130 and len(list((tmp_path / "parts").iterdir())) == 4
    monkeypatch.setattr(picture_lists, "save_png", save_png)

    draw_pictures = drawing.draw_pictures

    def counted(pipeline, *args, **options):
        return draw_pictures(lambda prompts, **o: batches.append(prompts) or pipeline(prompts, **o), *args, **options)

    monkeypatch.setattr(drawing, "draw_pictures", counted)
    capsys.readouterr()
    generate(tiny_pipeline_folder, tmp_path / "parts", *prompts)
    assert batches == [["d", "e", "f"], ["g"]], "whole batches, and only those in which something is missing"
    assert capsys.readouterr().out.count(" is there\n") == 4
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_nothing_is_replaced_unasked(tiny_pipeline_folder, tmp_path, capsys, asked):
    """Somebody's pictures would be lost."""
    output, grid = tmp_path / "pictures", tmp_path / "grid.png"
    command = ["generate", tiny_pipeline_folder, "--output-dir", output, "--grid", grid, "--prompts", "a cat"]
    cli.main([*map(str, command)])
    picture = output / "000-a-cat.png"
    before = picture.read_bytes()
    said = fails(capsys, *command, "--guidance-scale", "3")
    assert f"{picture} is there and holds a picture of another guidance scale: --overwrite" in said
    assert picture.read_bytes() == before
    cli.main([*map(str, command), "--guidance-scale", "3", "--overwrite"])
    assert read_recipe(picture).guidance_scale == 3

    Image.new("RGB", (8, 8)).save(picture)
    assert "holds something else" in fails(capsys, *command)
    Image.new("RGB", (8, 8)).save(grid)
    assert f"{grid} is there, and no grid" in fails(capsys, *command)


def test_every_flag_reaches_the_pipeline_and_the_recipe(tiny_pipeline_folder, tmp_path, asked):
    """An option would be taken and not used, or a picture not be what its recipe says."""
    flags = [
        "--prompts", "a cat", "--negative-prompt", "a dog", "--scheduler", "dpm++", "--karras-sigmas",
        "--timestep-spacing", "trailing", "--guidance-scale", 3, "--guidance-rescale", 0.5,
        "--guidance-interval", 0.25, "inf", "--prompt-weights", "--long-prompts", "--height", 32, "--width", 24,
        "--dtype", "bf16", "--num-inference-steps", 7,
    ]  # fmt: skip
    generate(tiny_pipeline_folder, tmp_path, *flags)
    [(pipeline, options)] = asked
    assert options == {
        "negative_prompt": "a dog", "num_inference_steps": 7, "guidance_scale": 3.0, "guidance_rescale": 0.5,
        "guidance_interval": (0.25, math.inf), "eta": 0.0, "prompt_weights": True, "long_prompts": True,
        "guide_unet": None, "clip_guidance": None, "height": 32, "width": 24,
    }  # fmt: skip
    config = pipeline.scheduler.config
    assert type(pipeline.scheduler) is SCHEDULERS["dpm++"]
    assert config.use_karras_sigmas and config.timestep_spacing == "trailing" and config.beta_end == 0.012
    assert str(pipeline.dtype) == "torch.bfloat16"
    recipe = read_recipe(tmp_path / "000-a-cat.png")
    assert recipe.guidance_interval == (0.25, None) and recipe.scheduler == "DPMSolverMultistepScheduler"
    assert recipe.karras_sigmas and recipe.timestep_spacing == "trailing" and recipe.dtype == "bfloat16"
    assert (recipe.height, recipe.width, recipe.long_prompts, recipe.prompt_weights) == (32, 24, True, True)


def consistency_folder(folder: Path, takes_guidance: bool = False) -> Path:
    """A saved consistency model, with its guidance for good inside it or as an input."""
    components = tiny_components()
    if takes_guidance:
        add_guidance_input(components["unet"])
    components["scheduler"] = ConsistencyScheduler.from_config(components["scheduler"].config)
    LatentDiffPipeline(**components).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("takes_guidance", [True, False])
def test_a_consistency_model_is_drawn_with_in_four_steps(takes_guidance, tmp_path, capsys):
    """Else who says nothing waits for fifty steps, or burns pictures out by guiding what is guided already."""
    consistency_folder(tmp_path / "lcm", takes_guidance)
    generate(tmp_path / "lcm", tmp_path / "drawn", "--prompts", "a cat", steps=[])
    recipe = read_recipe(tmp_path / "drawn" / "000-a-cat.png")
    assert (recipe.scheduler, recipe.num_inference_steps) == ("ConsistencyScheduler", 4)
    assert recipe.guidance_scale == (7.5 if takes_guidance else 1.0)
    cli.main(["redraw", str(tmp_path / "drawn" / "000-a-cat.png"), "--checkpoint", str(tmp_path / "lcm")])
    assert "the same picture" in capsys.readouterr().out
    generate(tmp_path / "lcm", tmp_path / "asked", "--prompts", "a cat")
    assert read_recipe(tmp_path / "asked" / "000-a-cat.png").num_inference_steps == 2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws(name, tiny_pipeline_folder, tmp_path):
    spacing = [] if name == "lcm" else ["--timestep-spacing", "linspace"]
    generate(tiny_pipeline_folder, tmp_path, "--prompts", "a cat", "--scheduler", name, *spacing)
    assert read_recipe(tmp_path / "000-a-cat.png").scheduler == SCHEDULERS[name].__name__
    assert pixels(tmp_path / "000-a-cat.png").std() > 0


@pytest.fixture
def guides(tmp_path) -> tuple[Path, Path]:
    """The folders of a CLIP and of a worse UNet."""
    from transformers import CLIPImageProcessor

    from tests.diffusion.test_clip_guidance import SIZE, tiny_clip
    from tiny import tiny_components, tiny_tokenizer

    clip, unet = tmp_path / "clip", tmp_path / "worse"
    tiny_clip().save_pretrained(clip)
    tiny_tokenizer().save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": SIZE}).save_pretrained(clip)
    tiny_components(seed=1)["unet"].save_pretrained(unet)
    return clip, unet


def test_a_guiding_unet_and_a_guiding_clip(tiny_pipeline_folder, tmp_path, guides):
    """They would be loaded and have no effect, or not be named in the recipe."""
    clip, unet = guides
    plain = ["--prompts", "a cat"]
    by_clip, by_unet = ["--clip", clip, "--clip-guidance", 300], ["--guide-unet", unet]
    for name, flags in (("plain", []), ("clip", by_clip), ("unet", by_unet), ("zero", by_clip[:-1] + [0])):
        generate(tiny_pipeline_folder, tmp_path / "out" / name, *plain, *flags)
    drawn = {name: pixels(tmp_path / "out" / name / "000-a-cat.png") for name in ("plain", "clip", "unet", "zero")}
    assert (drawn["zero"] == drawn["plain"]).all()
    assert (drawn["clip"] != drawn["plain"]).any() and (drawn["unet"] != drawn["plain"]).any()
    recipe = read_recipe(tmp_path / "out" / "clip" / "000-a-cat.png")
    assert recipe.clip.name == "clip" and recipe.clip.sha256 == folder_sha256(clip) and recipe.clip_guidance == 300
    assert read_recipe(tmp_path / "out" / "unet" / "000-a-cat.png").guide_unet.sha256 == folder_sha256(unet)


def test_what_networks_cannot_do_is_one_line(tiny_pipeline_folder, tmp_path, capsys):
    folder, wrong = tiny_pipeline_folder, tmp_path / "wrong.txt"
    wrong.write_bytes(b"a cat\xff")
    (tmp_path / "empty.txt").write_text("\n \n")
    for flags, said in (
        (["--height", "18"], "--height is 18; it must be a multiple of 4"),
        (["--eta", "1", "--scheduler", "euler"], "--eta is 1; EulerDiscreteScheduler has none"),
        (["--karras-sigmas"], "DDIMScheduler has no use_karras_sigmas"),
        (["--scheduler", "lcm", "--eta", "1"], "--eta is 1; ConsistencyScheduler has none"),
        (["--scheduler", "lcm", "--timestep-spacing", "trailing"], "ConsistencyScheduler has no timestep_spacing"),
        (["--scheduler", "lcm", "--num-inference-steps", "51"], "num_inference_steps is 51; it must lie in 1 … 50"),
        (["--scheduler", "lcm", "--negative-prompt", "b"], "--negative-prompt: has no effect at guidance scale 1"),
        (["--lora", tmp_path], f"--lora {tmp_path}: holds no pytorch_lora_weights.safetensors"),
        (["--guide-unet", tmp_path], f"--guide-unet {tmp_path}: no UNet"),
        (["--clip", tmp_path / "no", "--clip-guidance", "1"], "no: no such folder"),
        (["--clip", tmp_path, "--clip-guidance", "1"], f"--clip {tmp_path}: no CLIP"),
        (["--prompts-file", wrong], "wrong.txt: it is not text in UTF-8 (at byte 5, 0xff)"),
        (["--prompts-file", tmp_path / "empty.txt"], "holds no prompt"),
        (["--prompts-file", tmp_path / "none.txt"], "cannot be read: No such file"),
        (["--output-dir", wrong], "wrong.txt/000-a.png cannot be written"),
    ):
        assert said in fails(capsys, "generate", folder, "--prompts", "a", *STEPS, *flags)


# ---- edit


@pytest.fixture
def picture(tmp_path) -> Path:
    """A picture of another shape than the model's, noise on the left of its middle."""
    shades = np.full((20, 40, 3), 250, dtype=np.uint8)
    shades[:, :20] = np.random.default_rng(0).integers(0, 256, (20, 20, 3))
    Image.fromarray(shades).save(tmp_path / "own.png")
    return tmp_path / "own.png"


@pytest.fixture
def mask(tmp_path) -> Path:
    """Its right half."""
    white = np.zeros((20, 40), dtype=np.uint8)
    white[:, 20:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_what_a_consistency_model_cannot_do_is_one_line(tmp_path, capsys, picture):
    """Else an option is taken that changes nothing, or a picture drawn back along a path that is none."""
    folder = consistency_folder(tmp_path / "lcm", takes_guidance=True)
    error = fails(capsys, "generate", folder, "--prompts", "a", "--negative-prompt", "b")
    assert "--negative-prompt: has no effect on this checkpoint" in error
    error = fails(capsys, "edit", folder, "--image", picture, "--prompts", "a", "--source-prompt", "b")
    assert "--source-prompt: this checkpoint draws in few steps" in error


@pytest.mark.parametrize("kind", ["img2img", "inpaint", "invert"])
def test_edit_draws_out_of_a_picture(kind, tiny_pipeline_folder, tmp_path, picture, mask):
    flags = {
        "img2img": ["--strength", "0.5"],
        "inpaint": ["--mask", mask, "--mask-blur", 2, "--keep-unmasked"],
        "invert": ["--source-prompt", "a cat", "--strength", "1"],
    }[kind]
    command = ["edit", tiny_pipeline_folder, "--image", picture, "--prompts", "a dog", "a cat", *STEPS, *flags]
    cli.main([*map(str, command), "--output-dir", str(tmp_path / "out")])
    recipe = read_recipe(tmp_path / "out" / "000-a-dog.png")
    assert recipe.kind == kind and recipe.image == file_ingredient(picture)
    assert recipe.strength == (0.5 if kind == "img2img" else 1.0)
    edited = pixels(tmp_path / "out" / "000-a-dog.png")
    own = np.asarray(drawing.open_inputs({"image": picture}, 16, 16)["image"]).astype(int)
    assert edited.shape == own.shape and (edited != own).any()
    assert (edited != pixels(tmp_path / "out" / "001-a-cat.png")).any()
    if kind == "inpaint":
        assert recipe.mask == file_ingredient(mask) and (recipe.mask_blur, recipe.keep_unmasked) == (2, True)
        assert (edited[:, :6] == own[:, :6]).all(), "left of the mask and its rim the picture's own pixels stay"


def test_a_picture_that_cannot_be_read_is_one_line(tiny_pipeline_folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, said in (("none.png", "No such file"), ("broken.png", "cannot be read as a picture")):
        command = ["edit", tiny_pipeline_folder, "--prompts", "a", "--image", tmp_path / name]
        assert f"--image {tmp_path / name}" in (error := fails(capsys, *command)) and said in error


def test_a_mask_of_another_shape_than_its_picture_is_refused(tiny_pipeline_folder, tmp_path, capsys):
    """Of each the middle would be taken, and other columns be painted than those that were masked."""
    for name, size in (("image", (40, 20)), ("square", (20, 20)), ("half", (20, 10))):
        Image.new("RGB", size, "white").save(tmp_path / f"{name}.png")
    edit = ["edit", tiny_pipeline_folder, "--image", tmp_path / "image.png", "--prompts", "a cat", *STEPS]
    said = fails(capsys, *edit, "--mask", tmp_path / "square.png")
    assert "square.png is 20x20, of another shape than the picture, which is 40x20" in said
    cli.main([str(word) for word in (*edit, "--mask", tmp_path / "half.png", "--output-dir", tmp_path / "drawn")])
    assert len(list((tmp_path / "drawn").iterdir())) == 1


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
def test_how_much_of_a_lora_fits_is_said(tiny_pipeline_folder, tmp_path, capsys, kept):
    """Adapters of another model would be drawn with as if they were not there, or half of them."""
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    save_lora(adapted(), file.parent)
    weights = load_file(file)
    layers = sorted({name.rsplit(".lora", 1)[0] for name in weights})
    gone = set(layers[round(len(layers) * kept) :])
    renamed = {
        name: name.replace("unet.", "unet.of_another.") for name in weights if name.rsplit(".lora", 1)[0] in gone
    }
    save_file({renamed.get(name, name): tensor for name, tensor in weights.items()}, file)
    draw = ["generate", tiny_pipeline_folder, *STEPS, "--prompts", "a cat", "--lora", file.parent]
    if not kept:
        assert "lora: " in fails(capsys, *draw, "--output-dir", tmp_path / "drawn")
        return
    cli.main([str(word) for word in (*draw, "--output-dir", tmp_path / "drawn")])
    said = capsys.readouterr().err
    assert f"lora: {len(layers) - len(gone)} of {len(layers)} LoRA layers fit this checkpoint" in said
    assert ("warning: the others are left out" in said) == (kept < 1)
