"""The checkpoint in the repository: small, complete, the same in plain diffusers, and it follows words."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from latentdiff import DDIMScheduler, LatentDiffPipeline
from latentdiff.pipelines.portable_saving import write_code
from stranger import stranger_draws

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "emoji64"
FEW_STEPS = FOLDER.parent / "emoji64-lcm"


@pytest.fixture(scope="module")
def pipeline():
    return _quiet(LatentDiffPipeline.from_pretrained(FOLDER))


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, steps=10, guidance_scale=4.0):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipeline(
        prompts, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, output_type="np"
    ).images


def background_colours_found(pipeline, **how) -> int:
    """In how many of six pictures it is the colour that was asked for."""
    from PIL import Image

    from latentdiff.evaluation.backgrounds import border_colour, nearest_colour

    colours = ["red", "blue", "green", "purple", "yellow", "black"]
    images = draw(pipeline, [f"a rocket on a {colour} background" for colour in colours], **how)
    drawn = [nearest_colour(border_colour(Image.fromarray((image * 255).round().astype("uint8")))) for image in images]
    return sum(a == b for a, b in zip(drawn, colours, strict=True))


@pytest.mark.parametrize("folder", [FOLDER, FEW_STEPS], ids=lambda folder: folder.name)
def test_size_and_parts(folder):
    """It would not fit beside the code, or lack what a stranger needs."""
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40e6
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert (folder / "README.md").is_file()
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pkl"))


@pytest.mark.parametrize("folder", [FOLDER, FEW_STEPS], ids=lambda folder: folder.name)
def test_card_names_licences(folder):
    card = (folder / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "Twemoji" in card and "OpenMoji" in card


def test_plain_stable_diffusion_draws_the_same_to_the_last_bit(pipeline):
    from diffusers import StableDiffusionPipeline

    plain = _quiet(StableDiffusionPipeline.from_pretrained(FOLDER))
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert np.array_equal(draw(pipeline, ["a cat"]), draw(plain, ["a cat"]))


def test_stranger_without_latentdiff_draws_the_same_to_the_last_bit(pipeline, tmp_path):
    """With the code that a push puts beside the weights."""
    shutil.copytree(FOLDER, tmp_path / "pushed")
    write_code(tmp_path / "pushed")
    drawn = pipeline(
        "a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert torch.equal(stranger_draws(str(tmp_path / "pushed")), torch.as_tensor(drawn))


def test_background_has_the_colour_that_was_asked_for(pipeline):
    """The prompt would not reach the UNet: chance is 1 in 13 for each."""
    assert background_colours_found(pipeline, steps=20) >= 4


@pytest.fixture(scope="module")
def few_steps_pipeline():
    return _quiet(LatentDiffPipeline.from_pretrained(FEW_STEPS))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_few_steps_follow_words(few_steps_pipeline, steps):
    """Chance is 1 in 13 for each."""
    assert background_colours_found(few_steps_pipeline, steps=steps, guidance_scale=1.0) >= 4


def test_few_steps_are_drawn_in_without_asking_and_the_same_in_diffusers(few_steps_pipeline):
    """A call that says nothing would be refused, or draw with guidance upon guidance."""
    from diffusers import StableDiffusionPipeline

    plain = _quiet(StableDiffusionPipeline.from_pretrained(FEW_STEPS))
    unasked = draw(few_steps_pipeline, ["a cat"], steps=None, guidance_scale=None)
    assert np.array_equal(unasked, draw(few_steps_pipeline, ["a cat"], steps=4, guidance_scale=1.0))
    assert np.array_equal(unasked, draw(plain, ["a cat"], steps=4, guidance_scale=1.0))
