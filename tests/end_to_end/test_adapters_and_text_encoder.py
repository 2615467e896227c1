"""Runs that train adapters, the text encoder too, or with less memory."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler as PeerScheduler
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers.models.clip.modeling_clip import CLIPMLP

from latentdiff import LatentDiffPipeline
from latentdiff.config.train import TrainConfig
from latentdiff.models.loading import load_frozen
from latentdiff.models.parts import fingerprint
from latentdiff.objectives.tasks import validation_pictures
from latentdiff.utils.errors import ConfigError
from tests.end_to_end.test_train_text2img import batch_of, draws, losses, parameters, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


# ---- adapters, and less memory --------------------------------------------------------------------------------------


def test_lora_trains_resumes_and_loads_in_diffusers(train, settings, tmp_path):
    """The adapters would not be what was trained, start afresh at a resume, or the base model be changed or saved."""
    changes = {"lora_rank": 2, "lora_alpha": 4.0, "checkpointing_steps": 2}
    whole = train(output_dir=str(tmp_path / "whole"), **changes)
    file = "pytorch_lora_weights.safetensors"
    assert {p.name for p in whole.iterdir()} >= {file, "README.md"} and not (whole / "model_index.json").exists()
    assert sorted(p.name for p in (whole / "checkpoint-2" / "unet").iterdir()) == [file]

    train(output_dir=str(tmp_path / "half"), **{**changes, "max_train_steps": 2})
    half = train(output_dir=str(tmp_path / "half"), resume_from_checkpoint="latest", **changes)
    for part in ("", "checkpoint-4/unet", "checkpoint-4/unet_ema"):
        one, other = load_file(half / part / file), load_file(whole / part / file)  # the header's order may differ
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(half) == losses(whole)

    pipeline = StableDiffusionPipeline.from_pretrained(settings["pretrained_model_name_or_path"])
    before = {name: p.detach().clone() for name, p in pipeline.unet.named_parameters()}
    pipeline.load_lora_weights(whole)
    after = dict(pipeline.unet.named_parameters())
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in after.items())
    assert all(torch.equal(p, after.get(name, after.get(based(name)))) for name, p in before.items())
    card = (whole / "README.md").read_text()
    assert "load_lora_weights" in card and "- lora" in card


def based(name: str) -> str:
    """What peft calls a weight that it put an adapter on."""
    head, _, tail = name.rpartition(".")
    return f"{head}.base_layer.{tail}"


def test_lora_that_makes_no_sense_is_refused():
    for wrong in ({"unet": "tiny"}, {"prediction_type": "v_prediction"}, {"lora_alpha": -1.0}, {"lora_rank": 0}):
        with pytest.raises(ConfigError, match="lora_"):
            TrainConfig(**{"unet": "pretrained", "lora_rank": 4, **wrong})
    with pytest.raises(ConfigError, match="lora_alpha"):
        TrainConfig(lora_alpha=1.0)


def test_gradient_checkpointing_changes_no_result(script, train, tmp_path, monkeypatch):
    """Activations would be computed anew with other numbers, or the option do nothing."""
    plain = train(output_dir=str(tmp_path / "plain"))
    asked = []
    real = UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        UNet2DConditionModel, "enable_gradient_checkpointing", lambda self: (asked.append(1), real(self))
    )
    less = train(output_dir=str(tmp_path / "less"), gradient_checkpointing=True)
    assert asked and losses(plain) == losses(less) and weights(plain) == weights(less)


# ---- the text encoder too -------------------------------------------------------------------------------------------


def test_one_joint_step_is_adamw_on_both_clipped_gradients(train, settings, tmp_path):
    """The text encoder would learn on other captions, at another rate, clipped alone, or not at all."""
    changes = {"max_train_steps": 1, "checkpointing_steps": 1, "max_grad_norm": 0.05, "caption_dropout": 0.3}
    frozen = train(output_dir=str(tmp_path / "frozen"), **changes)
    run = train(train_text_encoder=True, **changes)
    # The cache encodes 16 captions at a time, a step those of its batch: the sums may differ in their last bits.
    assert losses(run)[1] == pytest.approx(losses(frozen)[1], rel=1e-6)

    source = settings["pretrained_model_name_or_path"]
    batch = batch_of(TrainConfig(**{**settings, **changes, "train_text_encoder": True}))
    tokenizer = load_frozen(source).tokenizer
    assert batch.encoder_hidden_states is None and 0 < batch.captions.count("") < 8
    pipeline = StableDiffusionPipeline.from_pretrained(source)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    tokens = tokenizer(batch.captions, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    noisy = PeerScheduler.from_config(pipeline.scheduler.config).add_noise(batch.latents, batch.noise, batch.timesteps)
    output = unet(noisy, batch.timesteps, encoder_hidden_states=text_encoder(tokens.input_ids)[0]).sample
    loss = ((output - batch.noise) ** 2).mean()
    loss.backward()
    assert losses(run)[1] == pytest.approx(loss.item(), rel=1e-5)
    both = [*unet.parameters(), *text_encoder.parameters()]
    torch.nn.utils.clip_grad_norm_(both, 0.05)
    # Three steps of warm-up: the first has a third of the learning rate.
    torch.optim.AdamW(both, lr=1e-3 / 3, betas=(0.9, 0.99), weight_decay=0.0).step()
    for part, network in (("unet", unet), ("text_encoder", text_encoder)):
        trained = parameters(run, f"checkpoint-1/{part}")
        for ours, wanted in zip(trained, network.parameters(), strict=True):
            # Where the gradient is about eps or less, its sign is rounding; everywhere else the step is exact.
            clear = wanted.grad.abs() > 1e-6
            torch.testing.assert_close(ours[clear], wanted.detach()[clear], rtol=1e-5, atol=2e-6)
    assert weights(run, "checkpoint-1/text_encoder") != weights(Path(source), "text_encoder")


def test_the_trained_text_encoder_is_averaged_measured_drawn_with_and_saved(train, settings, tmp_path):
    """Validation would see the text encoder of the start, or the finished folder hold it, or plain weights."""
    changes = {"held_out_fraction": 0.3, "validation_prompts": ("a cat",), "validation_inference_steps": 2}
    run = train(train_text_encoder=True, checkpointing_steps=4, validation_steps=2, learning_rate=1e-2, **changes)
    assert weights(run, "text_encoder") == weights(run, "checkpoint-4/text_encoder_ema")
    assert weights(run, "text_encoder") != weights(run, "checkpoint-4/text_encoder")
    before = load_frozen(settings["pretrained_model_name_or_path"])
    after = load_frozen(str(run))
    assert fingerprint(before.vae) == fingerprint(after.vae)
    assert fingerprint(before.text_encoder) != fingerprint(after.text_encoder)
    assert np.isfinite(draws(run)).all()

    # A run from the finished folder begins where this one ended: under its averages.
    there = train(output_dir=str(tmp_path / "on"), pretrained_model_name_or_path=str(run), max_train_steps=1, **changes)
    ours, begun = losses(run, "held_out_loss"), losses(there, "held_out_loss")
    assert ours[4] == pytest.approx(begun[0], rel=1e-6) and ours[4] != pytest.approx(ours[0], rel=1e-4)
    pipeline = LatentDiffPipeline.from_pretrained(run)
    drawn = validation_pictures(pipeline, ("a cat",), seed=0, num_inference_steps=2, guidance_scale=4.0)
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(run / "validation" / "step-0000004.png")))


def test_gradient_checkpointing_of_both_changes_no_result(train, tmp_path, monkeypatch):
    """The text encoder would not be asked to, or not do it since it is in eval mode, or with other numbers."""
    calls, real = [], CLIPMLP.forward
    monkeypatch.setattr(CLIPMLP, "forward", lambda *args: (calls.append(1), real(*args))[1])
    changes = {"train_text_encoder": True, "max_train_steps": 2}
    plain = train(output_dir=str(tmp_path / "plain"), **changes)
    layers = 3
    once = len(calls) - layers  # with one call beforehand, which tries the model
    less = train(output_dir=str(tmp_path / "less"), gradient_checkpointing=True, **changes)
    twice = len(calls) - once - 2 * layers
    assert once == 2 * layers and twice == 2 * once  # steps x layers, and each a second time
    for part in ("unet", "text_encoder"):
        assert weights(plain, part) == weights(less, part)
    assert losses(plain) == losses(less)


def test_joint_training_that_makes_no_sense_is_refused(train, settings, tmp_path):
    """Adapters would be saved without the text encoder they were trained with; a dropout drawn from no seed; or a
    trained text encoder be left behind at a resume."""
    with pytest.raises(ConfigError, match="lora_rank: .*train_text_encoder"):
        TrainConfig(unet="pretrained", lora_rank=4, train_text_encoder=True)
    with pytest.raises(ConfigError, match="cache_text: .*train_text_encoder"):
        TrainConfig(cache_text="always", train_text_encoder=True)
    model = shutil.copytree(settings["pretrained_model_name_or_path"], tmp_path / "model")
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    (model / "text_encoder" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(ConfigError, match="train_text_encoder: .*attention_dropout 0.1"):
        train(train_text_encoder=True, pretrained_model_name_or_path=str(model))
    changes = {"max_train_steps": 2, "checkpointing_steps": 2}
    for first, message in ((True, "with --train_text_encoder alone"), (False, "made without")):
        output = str(tmp_path / f"{first}")
        train(output_dir=output, train_text_encoder=first, **changes)
        with pytest.raises(ConfigError, match=f"resume_from_checkpoint: .*{message}"):
            train(output_dir=output, train_text_encoder=not first, resume_from_checkpoint="latest", **changes)
