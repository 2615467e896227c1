"""`--task inpaint` from end to end, at toy size: what is trained, resumed, saved and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from latentdiff import LatentDiffPipeline
from latentdiff.config.train import TrainConfig
from latentdiff.models.loading import load_frozen, load_unet
from latentdiff.models.parts import fingerprint
from latentdiff.training.setup import load_networks
from latentdiff.utils.errors import ConfigError
from tiny import reset_accelerate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


@pytest.fixture
def settings(settings) -> dict:
    return {**settings, "task": "inpaint", "held_out_fraction": 0.3, "validation_steps": 2,
            "validation_inference_steps": 1, "random_flip": True, "caption_dropout": 0.3}  # fmt: skip


def losses(folder: Path, key: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def weights(folder: Path) -> bytes:
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def paints(folder: Path) -> np.ndarray:
    """What plain diffusers paints into a picture of noise."""
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    mask = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4))
    generator = torch.Generator().manual_seed(0)
    painted = pipeline("a cat", image=image, mask_image=mask, num_inference_steps=2, generator=generator)
    return np.asarray(painted.images[0])


@pytest.mark.parametrize("changes", [{"crops_per_picture": 3}, {"aspect_ratio_buckets": True}], ids=str)
def test_from_the_cache_and_without_it_to_the_last_bit(train, tmp_path, changes):
    """Masked pictures are encoded in every step, whole ones once: the two would be of other crops or scales."""
    cached = train(output_dir=str(tmp_path / "cached"), **changes)
    anew = train(output_dir=str(tmp_path / "anew"), cache_latents=False, **changes)
    assert len(losses(cached)) == 4 and len(losses(cached, "held_out_loss")) == 3
    for key in ("loss", "held_out_loss"):
        assert losses(cached, key) == losses(anew, key)
    assert weights(cached) == weights(anew)


def test_the_finished_folder_is_one_that_diffusers_inpaints_with(train, settings):
    """The folder would load as text to image, whose UNet takes four channels; or VAE and words have been trained."""
    source = settings["pretrained_model_name_or_path"]
    run = train()
    assert json.loads((run / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    painted = paints(run)
    assert painted.shape == (16, 16, 3) and painted.std() > 0
    config, new = UNet2DConditionModel.load_config(run / "unet"), load_unet(str(run)).conv_in.weight
    assert (config["in_channels"], config["out_channels"]) == (9, 4)
    assert new[:, 4:].abs().amax((0, 2, 3)).min() > 0  # each of the new inputs is used
    before, after = load_frozen(source), load_frozen(str(run))
    assert fingerprint(before.vae) == fingerprint(after.vae)
    assert fingerprint(before.text_encoder) == fingerprint(after.text_encoder)
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == (
        Path(source) / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    card = (run / "README.md").read_text()
    assert "- inpainting" in card and "--task inpaint" in card
    for way in (
        "from latentdiff import LatentDiffInpaintPipeline",
        "from diffusers import StableDiffusionInpaintPipeline",
        'custom_pipeline="inpaint", trust_remote_code=True',
    ):
        assert card.count(way) == 1
    assert card.count("image=picture, mask_image=mask") == 3
    assert [path.name for path in sorted((run / "validation").iterdir())] == ["step-0000002.png", "step-0000004.png"]


def test_it_starts_from_what_the_pretrained_model_draws(train, tmp_path):
    """Widening its input would cost what the model has learnt."""
    inpaints = train(output_dir=str(tmp_path / "inpaint"), max_train_steps=1)
    draws = train(output_dir=str(tmp_path / "draws"), max_train_steps=1, task="text2img")
    first, same = (losses(run, "held_out_loss")[0] for run in (inpaints, draws))
    assert first == pytest.approx(same, rel=1e-5)


def test_a_resume_is_exact_to_the_last_bit(train, tmp_path):
    """The masks after a resume would be others, or the UNet not be wide enough for what was saved."""
    whole = train(output_dir=str(tmp_path / "whole"), checkpointing_steps=2)
    train(output_dir=str(tmp_path / "half"), checkpointing_steps=2, max_train_steps=2)
    half = train(output_dir=str(tmp_path / "half"), checkpointing_steps=2, resume_from_checkpoint="latest")
    assert losses(half) == losses(whole) and weights(half) == weights(whole)


def test_two_micro_batches_of_four_are_one_of_eight(train, tmp_path):
    """Accumulation, a trained text encoder and gradient checkpointing would each train on other masks."""
    one = train(output_dir=str(tmp_path / "one"), train_text_encoder=True)
    two = train(
        output_dir=str(tmp_path / "two"),
        train_text_encoder=True,
        gradient_checkpointing=True,
        train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    for a, b in zip(load_unet(str(one)).parameters(), load_unet(str(two)).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def networks(settings: dict, **changes):
    reset_accelerate()
    return load_networks(TrainConfig(**{**settings, **changes}))


def test_an_inpainting_model_goes_on_as_it_is(train, settings, tmp_path):
    """Its inputs would be widened once more, or set to zero; and adapters are enough where they are there."""
    run = train(max_train_steps=1)
    _, unet, _ = networks(settings, pretrained_model_name_or_path=str(run))
    assert fingerprint(unet) == fingerprint(load_unet(str(run)))
    adapted = train(
        pretrained_model_name_or_path=str(run), output_dir=str(tmp_path / "lora"), lora_rank=2, max_train_steps=2
    )
    assert load_file(adapted / "pytorch_lora_weights.safetensors")
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(run)
    pipeline.load_lora_weights(adapted)


def test_emoji_from_new_weights(train):
    """`--unet PRESET` would build a UNet that takes the noisy latents alone."""
    changes = {"train_data_dir": None, "held_out_fraction": 0.0, "random_flip": False, "unet": "tiny"}
    run = train(resolution=64, max_train_samples=1, max_train_steps=1, **changes)
    assert list(losses(run)) == [1] and list(losses(run, "held_out_loss")) == [0, 1]
    assert UNet2DConditionModel.load_config(run / "unet")["in_channels"] == 9


def test_what_cannot_be_trained_is_refused(settings, train, tiny_pipeline_folder, tmp_path):
    """A model would train on inputs that it was not made for, or adapters without the inputs that inpainting needs."""
    with pytest.raises(ConfigError, match=r"lora_rank: task 'inpaint' .* UNet of 4 channels lacks"):
        networks(settings, lora_rank=2)
    run = train(max_train_steps=1)
    with pytest.raises(ConfigError, match="takes 9 channels .* goes on with --task inpaint"):
        networks(settings, pretrained_model_name_or_path=str(run), task="text2img")
    pipeline = LatentDiffPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=5)
    pipeline.save_pretrained(tmp_path / "five")
    with pytest.raises(ConfigError, match="takes 5 channels .* give 9"):
        networks(settings, pretrained_model_name_or_path=str(tmp_path / "five"))
