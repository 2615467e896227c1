"""The checkpoint in the repository: small, complete, the same in plain diffusers, and it follows words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff import DDIMScheduler, LatentDiffPipeline
from stranger import stranger_draws

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints" / "emoji64"


@pytest.fixture(scope="module")
def pipeline():
    return _quiet(LatentDiffPipeline.from_pretrained(FOLDER))


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, steps=10):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipeline(
        prompts, num_inference_steps=steps, guidance_scale=4.0, generator=generators, output_type="np"
    ).images


def test_size_and_parts():
    """It would not fit beside the code, or lack what a stranger needs."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 40e6
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for name in ("pipeline.py", "noise_schedule.py", "scheduling_ddim.py", "scheduling_ddpm.py", "README.md"):
        assert (FOLDER / name).is_file()
    assert not list(FOLDER.rglob("*.bin")) and not list(FOLDER.rglob("*.pkl"))


def test_code_in_the_folder_is_the_packages():
    """A stranger would run an older scheduler or pipeline than the repository's."""
    from latentdiff.pipelines.portable_saving import code_files

    for name, source in code_files().items():
        assert (FOLDER / name).read_text() == source, f"{name}: save the checkpoint anew"


def test_card_names_licences():
    card = (FOLDER / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "Twemoji" in card and "OpenMoji" in card


def test_plain_stable_diffusion_draws_the_same_to_the_last_bit(pipeline):
    from diffusers import StableDiffusionPipeline

    plain = _quiet(StableDiffusionPipeline.from_pretrained(FOLDER))
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert np.array_equal(draw(pipeline, ["a cat"]), draw(plain, ["a cat"]))


def test_stranger_without_latentdiff_draws_the_same_to_the_last_bit(pipeline):
    drawn = pipeline(
        "a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert torch.equal(stranger_draws(str(FOLDER)), torch.as_tensor(drawn))


def test_background_has_the_colour_that_was_asked_for(pipeline):
    """The prompt would not reach the UNet: chance is 1 in 13 for each."""
    from PIL import Image

    from latentdiff.backgrounds import border_colour, nearest_colour

    colours = ["red", "blue", "green", "purple", "yellow", "black"]
    images = draw(pipeline, [f"a rocket on a {colour} background" for colour in colours], steps=20)
    drawn = [nearest_colour(border_colour(Image.fromarray((image * 255).round().astype("uint8")))) for image in images]
    assert sum(a == b for a, b in zip(drawn, colours, strict=True)) >= 4, drawn


# ---- the one that inpaints ------------------------------------------------------------------------------------------

INPAINTING = FOLDER.with_name("emoji64-inpaint")
has_inpainting = pytest.mark.skipif(not INPAINTING.is_dir(), reason="checkpoints/emoji64-inpaint is not here")


@has_inpainting
def test_the_inpainting_checkpoint_is_a_unet_on_the_same_parts():
    """The repository would hold VAE and text encoder twice, or a stranger get older code with one of the two."""
    assert json.loads((INPAINTING / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for path in (FOLDER / part).iterdir():
            assert (INPAINTING / part / path.name).read_bytes() == path.read_bytes(), path
    for path in FOLDER.glob("*.py"):
        assert (INPAINTING / path.name).read_text() == path.read_text(), f"{path.name}: publish the checkpoint anew"
    card = (INPAINTING / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "Twemoji" in card and "OpenMoji" in card and "- inpainting" in card


@has_inpainting
def test_it_sees_what_is_known():
    """Plain diffusers would paint another picture than ours, or the known half make no difference to the open one."""
    from diffusers import StableDiffusionInpaintPipeline
    from PIL import Image

    from latentdiff import LatentDiffInpaintPipeline, emoji

    pictures = emoji.load()
    rows = pictures.indices()[100:1300:200]
    images = [pictures.composite(row, "white") for row in rows]
    captions = [emoji.captions(*pictures.rows[row])[1] for row in rows]
    left_open = Image.fromarray(np.repeat([[255] * 32 + [0] * 32], 64, axis=0).astype(np.uint8))
    all_open = Image.new("L", (64, 64), 255)

    def paint(pipeline, mask, count=6):
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        painted = pipeline(
            captions[:count], image=images[:count], mask_image=[mask] * count, num_inference_steps=10,
            guidance_scale=2.0, generator=generators,
        ).images  # fmt: skip
        return np.stack([np.asarray(image) for image in painted]) / 255

    ours = _quiet(LatentDiffInpaintPipeline.from_pretrained(INPAINTING))
    theirs = _quiet(StableDiffusionInpaintPipeline.from_pretrained(INPAINTING))
    assert np.array_equal(paint(ours, left_open, 2), paint(theirs, left_open, 2))
    wanted = np.stack([np.asarray(image) for image in images]) / 255
    errors = [np.square(paint(ours, mask) - wanted).mean((0, 1, 3)) for mask in (left_open, all_open)]  # by column
    (open_half, known_half), (drawn_left, drawn_right) = ((error[:32].mean(), error[32:].mean()) for error in errors)
    assert known_half < 0.5 * drawn_right and open_half < drawn_left


def test_the_worse_unet_beside_it_guides_it(pipeline):
    """The folder to guide by would not fit the checkpoint, or name the machine it was trained on."""
    from diffusers import UNet2DConditionModel

    folder = FOLDER.parent / "emoji64-guide"
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())
    worse = UNet2DConditionModel.from_pretrained(folder)
    assert worse.num_parameters() < pipeline.unet.num_parameters() / 3
    options = {"num_inference_steps": 10, "seeds": [3], "output_type": "np"}
    guided = pipeline("a butterfly", guidance_scale=3.0, guide_unet=worse, **options).images
    plain = pipeline("a butterfly", guidance_scale=1.0, **options).images
    # Clean lines and even colours: of each value of a picture, its distance from the middle grey grows.
    assert np.abs(guided - 0.5).mean() > np.abs(plain - 0.5).mean()
