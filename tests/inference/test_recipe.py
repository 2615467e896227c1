"""Recipes: what a PNG says of itself, and that nothing a file says is believed unread."""

import hashlib
import json
import math
import struct
import zlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from latentdiff.inference import recipe as recipes
from latentdiff.inference.recipe import Ingredient, Recipe, RecipeError, read_recipe, save_png

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints"

SHA = "0123456789abcdef" * 4


def a_recipe(**changes) -> Recipe:
    values = {
        "kind": "text2img", "prompt": "a cat, “red”\n(very:1.2)", "negative_prompt": "a dog", "seed": 5,
        "num_inference_steps": 20, "scheduler": "DPMSolverMultistepScheduler", "karras_sigmas": True,
        "guidance_scale": 4.5, "guidance_rescale": 0.7, "guidance_interval": (0.25, None), "height": 64, "width": 96,
        "checkpoint": Ingredient(name="tester/emoji64", sha256=SHA), "dtype": "float32", "device": "cpu",
        "version": "0.1.0",
    }  # fmt: skip
    return Recipe(**{**values, **changes})


def of_kind(kind: str) -> Recipe:
    """A recipe of each kind, with what it needs."""
    picture = Ingredient(name="cat.png", sha256=SHA)
    values = {
        "image": picture, "mask": picture, "strength": 0.6, "mask_blur": 2, "keep_unmasked": True,
        "source_prompt": "a dog", "prompts": ("a dog", "a fish"), "seeds": (1, 2), "frames": 8, "loop": False,
        "columns": 4,
    }  # fmt: skip
    return a_recipe(kind=kind, **{name: values[name] for name in recipes._OF_KIND[kind]})


def changed(**changes) -> str:
    """A recipe's JSON with other values; `...` takes one out."""
    values = {**json.loads(a_recipe().to_json()), **changes}
    return json.dumps({name: value for name, value in values.items() if value is not ...})


def film(**changes) -> str:
    """An interpolation's JSON with other values."""
    return json.dumps({**json.loads(of_kind("interpolate").to_json()), **changes})


def test_shipped_pictures_are_of_the_shipped_checkpoints_still():
    """`latentdiff redraw` would say that something else drew them, though only the names of weights have changed."""
    for folder in (folder for folder in SHIPPED.iterdir() if (folder / "samples").is_dir()):
        checkpoint = recipes.folder_ingredient(folder)
        for path in (folder / "samples").glob("*.png"):
            assert recipes.read_recipe(path).checkpoint == checkpoint, path
    known = {recipes.folder_sha256(folder) for folder in SHIPPED.iterdir()}
    assert set(recipes._SAME_WEIGHTS.values()) <= known and not known & set(recipes._SAME_WEIGHTS)


@pytest.mark.parametrize("kind", recipes._OF_KIND)
def test_a_png_carries_its_recipe_and_its_pixels(kind, tmp_path):
    """Else what is drawn again would not be what was drawn."""
    path, recipe = tmp_path / "new" / "a.png", of_kind(kind)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    save_png(Image.fromarray(pixels), path, recipe)
    assert read_recipe(path) == recipe
    assert (np.asarray(Image.open(path)) == pixels).all()
    assert [each.name for each in path.parent.iterdir()] == ["a.png"], "nothing is left aside"


def test_every_field_survives():
    """Else a recipe would lose what it does not often hold."""
    other = Ingredient(name="clip", sha256=SHA[::-1])
    full = a_recipe(
        timestep_spacing="trailing", guidance_interval=(0.0, 5.5), eta=0.5, prompt_weights=True, long_prompts=True,
        guide_unet=other, clip=other, clip_guidance=100.0, batch_size=8,
    )  # fmt: skip
    assert Recipe.from_json(full.to_json()) == full


def test_the_longest_prompt_can_be_read_back(tmp_path):
    """A picture would be written whose recipe nobody can read."""
    longest = a_recipe(prompt="\U0001f600" * recipes.MAX_TEXT, negative_prompt="")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", longest)
    assert read_recipe(tmp_path / "a.png") == longest


def test_the_second_chunk_is_what_other_programs_show(tmp_path):
    """The first line is the prompt, the last one "name: value, …", as AUTOMATIC1111's own reader splits it."""
    save_png(Image.new("RGB", (96, 64)), tmp_path / "a.png", a_recipe(prompt="a cat"))
    prompt, negative, settings = Image.open(tmp_path / "a.png").info["parameters"].split("\n")
    assert (prompt, negative) == ("a cat", "Negative prompt: a dog")
    assert dict(pair.split(": ") for pair in settings.split(", ")) == {
        "Steps": "20", "Sampler": "DPM++ 2M Karras", "CFG scale": "4.5", "Seed": "5", "Size": "96x64",
        "Model hash": SHA[:10], "Model": "tester/emoji64", "CFG Rescale phi": "0.7", "Version": "latentdiff 0.1.0",
    }  # fmt: skip
    named = a_recipe(checkpoint=Ingredient(name="cats, dogs", sha256=SHA))
    assert 'Model: "cats, dogs",' in named.parameters()


def png_with(**chunks) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for name, text in chunks.items():
        info.add_text(name, text, zip=True)
    return info


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[" * 60_000, "not JSON"),
        ("9" * 60_000, "not JSON"),
        ('"' + "a" * 2**19 + '"', "524288 are the most"),
        ("[1]", "not a dictionary"),
        (changed(seed=...), "no 'seed'"),
        (changed(colour="red"), "unknown 'colour'"),
        (changed(checkpoint={"name": "a", "sha256": SHA, "path": "/etc"}), "unknown 'path'"),
        (changed(checkpoint={"name": "a", "sha256": "no"}), "no SHA-256"),
        (changed(checkpoint={"name": "a\x1b[2J", "sha256": SHA}), "one line"),
        (changed(checkpoint="a"), "checkpoint is not a dictionary"),
        (changed(scheduler="a\nb"), "scheduler must be one line"),
        (changed(kind="anything"), "kind is not what it must be"),
        (changed(seed="5"), "seed is not what it must be: int"),
        (changed(seed=True), "seed is not what it must be"),
        (changed(seed=-1), "seed is -1; it must lie in 0"),
        (changed(num_inference_steps=10**9), "num_inference_steps is 1000000000; it must lie in 1 … 10000"),
        (changed(width=10**6), "width is 1000000"),
        (changed(prompt="a" * 20_000, negative_prompt="b" * 20_000), "40000 characters; 32768 are the most"),
        (changed(width=8192, height=8192, batch_size=8), "8 pictures of 8192x8192 have"),
        (changed(guidance_scale=math.nan), "not JSON"),
        (changed(guidance_scale=10**400), "guidance_scale is not what it must be"),
        (changed(guidance_interval=[1]), "guidance_interval is not what it must be"),
        (changed(prompt="\ud800"), "not JSON"),
        (changed(kind="img2img", strength=0.5), "img2img needs image"),
        (changed(strength=0.5), "text2img has no use for strength"),
        (changed(clip_guidance=1.0), "clip and clip_guidance go together"),
        (film(prompts=["a", 1]), "prompts is not what it must be"),
        (film(seeds=[-1, 1]), "each must lie in"),
        (film(seeds=[1]), "2 prompts and 1 seeds"),
        (film(frames=10**6), "frames is 1000000; it must lie in 2 … 10000"),
    ],
)
def test_a_hostile_recipe_is_one_line(text, said, tmp_path):
    """Else a picture from somewhere could crash the program, fill the memory or write to the terminal."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=png_with(latentdiff=text))
    with pytest.raises(RecipeError) as error:
        read_recipe(tmp_path / "a.png")
    line = str(error.value)
    assert line.startswith(f"{tmp_path / 'a.png'}: its recipe cannot be followed: ") and said in line
    assert line.isprintable() and len(line) < len(str(tmp_path)) + 400


def test_what_carries_no_recipe_is_one_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png", pnginfo=png_with(parameters="a cat"))
    with pytest.raises(RecipeError, match="plain.png carries no recipe"):
        read_recipe(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    for name, said in (("photo.jpg", "cannot be read as a PNG"), ("none.png", "no such file"), (".", "cannot be read")):
        with pytest.raises(RecipeError, match=said):
            read_recipe(tmp_path / name)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_bombs_are_not_unpacked(tmp_path):
    """A text of a gigabyte in a megabyte, or a picture of 10^10 pixels, would take all the memory."""
    small_header, large_header = (struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0) for side in (8, 100_000))
    text = b"latentdiff\0\0" + zlib.compress(b"a" * 2**26)
    for header, chunks in ((small_header, chunk(b"zTXt", text)), (large_header, b"")):
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(content)
        with pytest.raises(RecipeError, match="cannot be read as a PNG"):
            read_recipe(tmp_path / "bomb.png")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    """Else a full disk would cost the picture that was there, too."""
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", a_recipe())
    before = (tmp_path / "a.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recipes.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", a_recipe(seed=6))
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_hash_of_a_checkpoint(tiny_pipeline_folder, tmp_path, monkeypatch):
    """It is the same wherever the folder lies and whatever lies beside its parts; any other weight is another one."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_pipeline_folder, copy)
    first = recipes.folder_ingredient(copy)
    assert first.name == "copy" and first.sha256 == recipes.folder_sha256(tiny_pipeline_folder)
    monkeypatch.chdir(copy)
    assert recipes.folder_ingredient(".") == first

    (copy / "samples").mkdir()
    (copy / "samples" / "log.json").write_text("{}")
    (copy / "README.md").write_text("a card")
    assert recipes.folder_sha256(copy) == first.sha256

    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert recipes.folder_sha256(copy) != first.sha256
    # A part alone, as CLIP and a guiding UNet are, is hashed over its own files.
    assert recipes.folder_sha256(copy / "unet") != recipes.folder_sha256(tiny_pipeline_folder / "unet")
    assert recipes.folder_sha256(copy / "vae") == recipes.folder_sha256(tiny_pipeline_folder / "vae")


def test_a_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "a\nb.png"
    path.write_bytes(b"content")
    assert recipes.file_ingredient(path) == Ingredient(name="a?b.png", sha256=hashlib.sha256(b"content").hexdigest())


def test_a_recipe_holds_nothing_of_the_machine(tmp_path, tiny_pipeline_folder):
    """A published picture would tell where its author's files lie."""
    recipe = a_recipe(checkpoint=recipes.folder_ingredient(tiny_pipeline_folder))
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", recipe)
    content = (tmp_path / "a.png").read_bytes()
    assert str(tiny_pipeline_folder.parent).encode() not in content and str(tmp_path).encode() not in content


def test_recipes_are_values():
    """They are compared to find out whether a picture is drawn already."""
    assert a_recipe() == a_recipe() and a_recipe() != replace(a_recipe(), seed=6)
    assert {field.name for field in fields(Recipe)} >= {*sum(recipes._OF_KIND.values(), ())}
