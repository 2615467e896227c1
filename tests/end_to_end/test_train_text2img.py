"""The training script from end to end, at toy size: what it draws, saves, resumes, publishes and refuses."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler as PeerScheduler
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load, load_file
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPMLP

import kill_stress
from hub_server import TOKEN, USER
from latentdiff import LatentDiffPipeline
from latentdiff.config.presets import run_training
from latentdiff.config.train import TrainConfig
from latentdiff.models.loading import load_frozen, load_unet
from latentdiff.models.parts import fingerprint
from latentdiff.training import objectives, push
from latentdiff.training.data import load_data
from latentdiff.training.setup import learning_rate_at, load_networks, optimizer_steps
from latentdiff.training.tasks import validation_pictures
from latentdiff.utils.errors import ConfigError
from latentdiff.utils.hub import PushError
from tests.conftest import _HUB
from tests.data.test_pictures import hostile_folder
from tiny import make_pictures, reset_accelerate

SCRIPT = kill_stress.SCRIPT
pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


def losses(folder: Path, key: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def weights(folder: Path, part: str = "unet") -> bytes:
    (file,) = (folder / part).glob("*.safetensors")
    return file.read_bytes()


def parameters(folder: Path, part: str = "unet") -> list[torch.Tensor]:
    kind = CLIPTextModel if part.rpartition("/")[2].startswith("text_encoder") else UNet2DConditionModel
    return [p.detach() for p in kind.from_pretrained(folder / part).parameters()]


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*checkpoint*")}


def draws(folder: Path) -> np.ndarray:
    """What plain diffusers draws from a finished folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline("a cat", num_inference_steps=2, generator=generator).images[0])


# ---- what is trained ------------------------------------------------------------------------------------------------


def test_from_the_cache_and_without_it_to_the_last_bit(train, settings, tmp_path):
    """Latents of the cache would be scaled twice, be of other crops, or be drawn with other noise."""
    changes = {"random_flip": True, "held_out_fraction": 0.3, "validation_steps": 2, "caption_dropout": 0.3}
    cached = train(output_dir=str(tmp_path / "cached"), **changes)
    again = train(output_dir=str(tmp_path / "again"), **changes)
    anew = train(output_dir=str(tmp_path / "anew"), cache_latents=False, **changes)
    assert len(losses(cached)) == 4 and len(losses(cached, "held_out_loss")) == 3
    for other in (again, anew):
        assert losses(cached) == losses(other)
        assert losses(cached, "held_out_loss") == losses(other, "held_out_loss")
        assert weights(cached) == weights(other)


def test_frozen_parts_are_the_same_before_and_after(train, settings):
    """VAE and text encoder would drift while the UNet is trained on their old results."""
    before = load_frozen(settings["pretrained_model_name_or_path"])
    run = train(validation_prompts=("a cat",), validation_steps=2, validation_inference_steps=1)
    after = load_frozen(str(run))
    assert fingerprint(before.vae) == fingerprint(after.vae)
    assert fingerprint(before.text_encoder) == fingerprint(after.text_encoder)
    assert before.tokenizer(["a cat"]).input_ids == after.tokenizer(["a cat"]).input_ids
    assert fingerprint(load_unet(str(run))) != fingerprint(load_unet(settings["pretrained_model_name_or_path"]))


def batch_of(config: TrainConfig, step: int = 0):
    reset_accelerate()
    parts, unet, scheduler = load_networks(config)
    return load_data(config, Accelerator(), parts, unet, scheduler).batches.at(step)


@pytest.mark.parametrize(
    ("prediction_type", "snr_gamma", "zero_snr"),
    [
        ("epsilon", None, False),
        ("epsilon", 5.0, False),
        ("v_prediction", 5.0, False),
        ("v_prediction", None, True),
        ("sample", None, False),
    ],
)
def test_one_step_is_adamw_on_the_clipped_gradient(train, settings, prediction_type, snr_gamma, zero_snr):
    """Another loss, noise level, clipping, learning rate or optimizer than the settings say."""
    changes = {
        "max_train_steps": 1, "checkpointing_steps": 1, "max_grad_norm": 0.05, "adam_weight_decay": 0.1,
        "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr,
    }  # fmt: skip
    run = train(snr_gamma=snr_gamma, **changes)

    source = settings["pretrained_model_name_or_path"]
    batch = batch_of(TrainConfig(**{**settings, **changes}))
    unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    schedule = PeerScheduler.from_pretrained(source, subfolder="scheduler", rescale_betas_zero_snr=zero_snr)
    before = [p.detach().clone() for p in unet.parameters()]
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    output = unet(noisy, batch.timesteps, encoder_hidden_states=batch.encoder_hidden_states).sample
    velocity = schedule.get_velocity(batch.latents, batch.noise, batch.timesteps)
    target = {"epsilon": batch.noise, "v_prediction": velocity, "sample": batch.latents}[prediction_type]
    per_sample = ((output - target) ** 2).mean(dim=(1, 2, 3))
    if snr_gamma:  # as diffusers' own example weighs the loss
        snr = compute_snr(schedule, batch.timesteps)
        weight = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        per_sample = per_sample * weight / (snr + (prediction_type == "v_prediction"))
    loss = per_sample.mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.05)
    assert norm > 0.05  # else clipping would not be tested
    # Three steps of warm-up: the first has a third of the learning rate. AdamW, Loshchilov & Hutter 2019, algorithm 2:
    rate, beta1, beta2, eps = 1e-3 / 3, 0.9, 0.99, 1e-8
    expected = []
    for old, parameter in zip(before, unet.parameters(), strict=True):
        gradient = torch.zeros_like(old) if parameter.grad is None else parameter.grad
        first, second = (1 - beta1) * gradient / (1 - beta1), (1 - beta2) * gradient**2 / (1 - beta2)
        expected.append(old - rate * 0.1 * old - rate * first / (second.sqrt() + eps))
    assert losses(run)[1] == pytest.approx(loss.item(), rel=1e-5)
    for ours, wanted, gradient in zip(
        parameters(run, "checkpoint-1/unet"), expected, (p.grad for p in unet.parameters()), strict=True
    ):
        # Where the gradient is about eps or less, its sign is rounding; everywhere else the step is exact.
        clear = gradient.abs() > 1e-6
        torch.testing.assert_close(ours[clear], wanted[clear], rtol=1e-5, atol=2e-6)


def test_two_micro_batches_of_four_are_one_of_eight(train, tmp_path):
    """Accumulated gradients would be summed, cut too early, or be of other pictures."""
    one = train(output_dir=str(tmp_path / "one"), adam_epsilon=1e-4)
    two = train(output_dir=str(tmp_path / "two"), train_batch_size=4, gradient_accumulation_steps=2, adam_epsilon=1e-4)
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for a, b in zip(parameters(one), parameters(two), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_the_average_and_the_plain_weights(train, settings, tmp_path):
    """The finished model would hold the other of the two. After one step the average is d w0 + (1 - d) w1."""
    changes = {"max_train_steps": 1, "checkpointing_steps": 1}
    averaged = train(output_dir=str(tmp_path / "ema"), **changes)
    plain = train(output_dir=str(tmp_path / "plain"), use_ema=False, **changes)
    assert weights(plain) == weights(plain, "checkpoint-1/unet") == weights(averaged, "checkpoint-1/unet")
    assert not (plain / "checkpoint-1" / "unet_ema").exists()
    assert weights(averaged) == weights(averaged, "checkpoint-1/unet_ema") != weights(plain)
    decay = 2 / 11  # min(0.999, (1 + step) / (10 + step)) at step 1
    start = list(load_unet(settings["pretrained_model_name_or_path"]).parameters())
    for ours, w0, w1 in zip(parameters(averaged), start, parameters(plain), strict=True):
        torch.testing.assert_close(ours, decay * w0.detach() + (1 - decay) * w1, rtol=1e-5, atol=1e-6)


def test_learning_rate_in_closed_form():
    """The rate would depend on micro-batches, or the first step have none."""

    def rates(name, steps, total=10, warmup=4):
        config = TrainConfig(lr_scheduler=name, learning_rate=2.0, lr_warmup_steps=warmup)
        rate = learning_rate_at(config, total)
        return pytest.approx([rate(step) for step in steps])

    assert rates("constant", (0, 5, 9), warmup=TrainConfig.lr_warmup_steps) == [2, 2, 2]
    assert rates("constant_with_warmup", (0, 1, 3, 4, 9)) == [0.5, 1, 2, 2, 2]
    assert rates("linear", (0, 3, 4, 7, 9)) == [0.5, 2, 2, 1, 2 / 6]
    assert rates("cosine", (0, 3, 4, 7)) == [0.5, 2, 2, 1]
    assert rates("linear", (0, 5), warmup=0) == [2, 1]


def test_epochs_count_optimizer_steps():
    """Two passes over 12 pictures in steps of 8 are three steps."""

    class Batches:
        epoch_length, global_batch = 12, 8

    assert optimizer_steps(TrainConfig(num_train_epochs=2), Batches()) == 3
    assert optimizer_steps(TrainConfig(num_train_epochs=1), Batches()) == 2
    assert optimizer_steps(TrainConfig(max_train_steps=7), Batches()) == 7


def test_what_is_saved_draws_with_the_objective_it_was_trained_with(train):
    """A network that puts out v would be taken for one that puts out noise, or drawing start short of pure noise."""
    run = train(prediction_type="v_prediction", rescale_betas_zero_snr=True, max_train_steps=1)
    scheduler = StableDiffusionPipeline.from_pretrained(run).scheduler
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(7)
    assert scheduler.timesteps[0] == 999
    assert np.isfinite(draws(run)).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "rescale_betas_zero_snr: .*v_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: .*v_prediction"),  # the model's own is epsilon
        ({"rescale_betas_zero_snr": True, "prediction_type": "sample", "snr_gamma": 5.0}, "snr_gamma: "),
    ],
)
def test_objectives_that_contradict_each_other_are_refused(train, changes, named):
    with pytest.raises(ConfigError, match=named):
        train(**changes)


def test_a_run_that_diverges_stops_and_keeps_the_last_checkpoint(script, settings, tmp_path, monkeypatch, capsys):
    """NaN weights would be trained on for days, and saved over the good ones."""
    real, calls = objectives.training_loss, []

    def spoilt(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(objectives, "training_loss", spoilt)
    flags = {**settings, "checkpointing_steps": 2, "max_train_steps": 6}
    TrainConfig(**flags).save(tmp_path / "run.yaml")
    with pytest.raises(SystemExit) as stopped:
        run_training(script.main, ["--config", str(tmp_path / "run.yaml")])
    assert stopped.value.code == 1
    run = Path(settings["output_dir"])
    assert checkpoints(run) == {"checkpoint-2"} and not (run / "model_index.json").exists()
    assert all(torch.isfinite(p).all() for p in parameters(run, "checkpoint-2/unet_ema"))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: step 4: the gradient is not finite") and line.count(".png") == 8


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_checkpoints_are_those_that_diffusers_example_leaves(train, tmp_path):
    """Who comes from diffusers' script would find other folders, or lose checkpoints."""
    run = train(checkpointing_steps=2)
    assert checkpoints(run) == {"checkpoint-2", "checkpoint-4"}
    for name in ("checkpoint-2", "checkpoint-4"):
        unet = UNet2DConditionModel.from_pretrained(run, subfolder=f"{name}/unet")
        assert unet.config.cross_attention_dim == 16
    assert draws(run).shape == (16, 16, 3)

    shutil.rmtree(run / "checkpoint-2")
    first = losses(run)
    train(checkpointing_steps=2, max_train_steps=6, resume_from_checkpoint="checkpoint-4")
    assert checkpoints(run) == {"checkpoint-4", "checkpoint-6"}
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6] and first.items() <= losses(run).items()


def test_a_limit_keeps_the_newest(train):
    run = train(checkpointing_steps=2, max_train_steps=6, checkpoints_total_limit=2)
    assert checkpoints(run) == {"checkpoint-4", "checkpoint-6"}
    train(checkpointing_steps=2, max_train_steps=8, checkpoints_total_limit=2, resume_from_checkpoint="checkpoint-4")
    assert checkpoints(run) == {"checkpoint-6", "checkpoint-8"}


def test_latest(train):
    """A fresh folder would be refused, a half-written checkpoint taken, or a finished run take one more step."""
    run = train(checkpointing_steps=2, resume_from_checkpoint="latest")
    assert list(losses(run)) == [1, 2, 3, 4]
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-9")
    (run / "checkpoint-9" / "state.json").unlink()
    saved, logged = weights(run), losses(run)
    for steps in (4, 3):  # at the end, and past it: nothing is trained, and the model is saved as the checkpoint has it
        train(checkpointing_steps=2, resume_from_checkpoint="latest", max_train_steps=steps)
        assert weights(run) == saved and losses(run) == logged
    assert checkpoints(run) == {"checkpoint-2", "checkpoint-4", "checkpoint-9"}


@pytest.mark.parametrize(
    ("settings_of_it", "needs"),
    [
        ({}, "torch"),
        ({"train_batch_size": 4, "gradient_accumulation_steps": 2}, "torch"),
        ({"optimizer": "adafactor"}, "transformers"),
        ({"optimizer": "adamw_8bit"}, "bitsandbytes"),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "prodigyopt"),
        ({"train_text_encoder": True}, "torch"),
    ],
)
def test_a_killed_run_goes_on_to_the_last_bit(script, train, tmp_path, monkeypatch, settings_of_it, needs):
    """Order of the data, noise, learning rate, optimizer or average would start again at a resume."""
    pytest.importorskip(needs)
    changes = {"checkpointing_steps": 2, "random_flip": True, **settings_of_it}
    accumulation = changes.get("gradient_accumulation_steps", 1)
    whole = train(output_dir=str(tmp_path / "whole"), **changes)

    real, calls = objectives.training_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) > 3 * accumulation:  # in step 4, after the checkpoint at 2
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(objectives, "training_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(output_dir=str(tmp_path / "killed"), **changes)
    monkeypatch.undo()
    resumed = train(output_dir=str(tmp_path / "killed"), resume_from_checkpoint="latest", **changes)
    assert losses(resumed) == losses(whole) and list(losses(whole)) == [1, 2, 3, 4]
    parts = [path.parent.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(parts) == (11 if changes.get("train_text_encoder") else 7)
    for part in parts:
        assert weights(resumed, part) == weights(whole, part), part


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_that_goes_on_to_the_last_bit(
    script, train, tmp_path, monkeypatch, number
):
    """A preempted run would lose what it did since its last checkpoint, or log other losses after the resume."""
    changes = {"logging_steps": 4, "checkpointing_steps": 4}
    whole = train(output_dir=str(tmp_path / "whole"), **changes)

    real, calls = objectives.training_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # in the middle of step 3, between two lines of the log
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(objectives, "training_loss", interrupted)
    with pytest.raises(SystemExit) as left:
        train(output_dir=str(tmp_path / "stopped"), **changes)
    monkeypatch.undo()
    assert left.value.code == 128 + number
    assert checkpoints(tmp_path / "stopped") == {"checkpoint-3"}
    resumed = train(output_dir=str(tmp_path / "stopped"), resume_from_checkpoint="latest", **changes)
    assert losses(resumed) == losses(whole) and list(losses(whole)) == [4]
    for part in ("unet", "checkpoint-4/unet"):
        assert weights(resumed, part) == weights(whole, part), part


def test_kills_at_random_moments_change_nothing(tmp_path):
    """Five SIGKILLs of a real process while it caches, trains, saves or pushes; `tests/kill_stress.py` does fifty."""
    model, pictures = kill_stress.make_inputs(tmp_path)
    same, kills = kill_stress.stress(tmp_path, model, pictures, _HUB, kills=5, kills_per_run=5, seed=1)
    assert same and kills == 5


def test_a_resume_on_smaller_micro_batches_takes_the_same_steps(train, tmp_path):
    """Who runs out of memory halves the batch and doubles the accumulation; steps must not fall apart."""
    changes = {"checkpointing_steps": 1, "adam_epsilon": 1e-4}
    whole = train(output_dir=str(tmp_path / "whole"), **changes)
    split = train(output_dir=str(tmp_path / "split"), max_train_steps=1, **changes)
    train(
        output_dir=str(split),
        train_batch_size=4,
        gradient_accumulation_steps=2,
        resume_from_checkpoint="latest",
        **changes,
    )
    for a, b in zip(parameters(whole), parameters(split), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_validation_changes_nothing_in_the_run(train, tmp_path):
    """Training would go on from the averaged weights, or with other random numbers."""
    without = train(output_dir=str(tmp_path / "without"), checkpointing_steps=4)
    run = train(
        output_dir=str(tmp_path / "with"),
        checkpointing_steps=4,
        validation_prompts=("a cat", "a dog"),
        validation_steps=2,
        validation_inference_steps=1,
        report_to="tensorboard",
    )
    assert sorted(path.name for path in (run / "validation").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    assert Image.open(run / "validation" / "step-0000004.png").width > 2 * 128
    assert list((run / "logs").rglob("events*"))
    assert losses(run) == losses(without)
    assert weights(run, "checkpoint-4/unet") == weights(without, "checkpoint-4/unet")


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
    once = len(calls)
    less = train(output_dir=str(tmp_path / "less"), gradient_checkpointing=True, **changes)
    assert once == 2 * 3 and len(calls) - once == 2 * once  # steps x layers, and each a second time
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


# ---- the finished folder --------------------------------------------------------------------------------------------


def test_saved_in_half_precision_it_loads_in_full(train, tmp_path):
    """A model of half the size would not load by default, or hold other numbers than the rounded ones."""
    full = train(output_dir=str(tmp_path / "full"), max_train_steps=1)
    half = train(output_dir=str(tmp_path / "half"), max_train_steps=1, save_dtype="fp16")
    assert len(weights(half)) < 0.6 * len(weights(full))
    assert draws(half).shape == (16, 16, 3)
    for a, b in zip(parameters(half), parameters(full), strict=True):
        assert torch.equal(a.float(), b.half().float())


def test_pushed_is_the_model_and_not_the_run(hub, train, tiny_pipeline_folder):
    """Gigabytes of optimizer states, and paths of the machine, would be published."""
    run = train(
        push_to_hub=True,
        hub_model_id=f"{USER}/cats",
        hub_private=True,
        checkpointing_steps=2,
        validation_prompts=("a cat",),
        validation_inference_steps=1,
        report_to="tensorboard",
    )
    (run / ".tmp-checkpoint-6").mkdir()
    pushed = set(hub.files(f"{USER}/cats"))
    assert f"{USER}/cats" in hub.private
    assert {"model_index.json", "unet/config.json", "pipeline.py", "README.md", "scheduler/scheduler_config.json"} <= (
        pushed
    )
    assert "validation/step-0000004.png" in pushed
    assert not [path for path in pushed if path.startswith(("checkpoint-", ".tmp-", "logs/"))]
    weights = [*run.glob("*/*.safetensors"), *run.glob("checkpoint-*/*/*.safetensors")]
    assert len(weights) > 3
    assert {oct(path.stat().st_mode & 0o777) for path in weights} == {oct((run / "README.md").stat().st_mode & 0o777)}
    paths = [str(tiny_pipeline_folder).encode(), str(run.parent).encode()]
    for path, content in hub.files(f"{USER}/cats").items():
        assert TOKEN.encode() not in content and not any(place in content for place in paths), path
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    card = hub.files(f"{USER}/cats")["README.md"].decode()
    assert "validation/step-0000004.png" in card and f'from_pretrained("{USER}/cats")' in card


class AtOnce:
    """A thread that does its work when it is started."""

    def __init__(self, target, args, daemon):
        self._work = lambda: target(*args)

    def start(self) -> None:
        self._work()

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        """There is nothing to wait for."""


DISTILLED_LORA = {"lora_rank": 2, "consistency": "distillation", "consistency_guidance": (4.0,)}


@pytest.mark.parametrize("trained", [{}, {"lora_rank": 2}, DISTILLED_LORA, {"train_text_encoder": True}])
def test_checkpoints_are_pushed_while_the_run_goes_on(hub, train, tmp_path, monkeypatch, capsys, trained):
    """A run would wait for the Hub, end when it cannot be reached, or push other weights than the average's."""
    real, steps = push.push_folder, []

    def sometimes(folder, name, **options):
        steps.append(options.get("commit_message"))
        if len(steps) == 1:
            raise PushError("not pushed to x: the Hub is away")
        return real(folder, name, **options)

    monkeypatch.setattr(push, "push_folder", sometimes)
    monkeypatch.setattr(push, "threading", SimpleNamespace(Thread=AtOnce))
    changes, lora_rank = {"checkpointing_steps": 1, "save_dtype": "fp16", **trained}, trained.get("lora_rank")
    plain = train(output_dir=str(tmp_path / "plain"), **changes)
    run = train(output_dir=str(tmp_path / "run"), push_to_hub=True, hub_model_id=f"{USER}/cats", **changes)
    assert steps == ["Step 1", "Step 2", "Step 3"]
    assert "step 1: not pushed to x: the Hub is away" in capsys.readouterr().out
    assert losses(run) == losses(plain) and not (run / ".tmp-push").exists()
    file = "pytorch_lora_weights.safetensors" if lora_rank else "unet/diffusion_pytorch_model.safetensors"
    assert hub.files(f"{USER}/cats")[file] == (run / file).read_bytes()
    # what stood there after step 3, the commit before the last
    *_, third, _ = [files for files in hub.commits.values() if file in files]
    average = load_file(run / "checkpoint-3" / "unet_ema" / Path(file).name)
    pushed = load(third[file])
    half = {name: tensor if lora_rank else tensor.half() for name, tensor in average.items()}
    assert all(torch.equal(pushed[name], half[name]) for name in half) and pushed.keys() == half.keys()
    assert third.get("scheduler_config.json") == (
        (run / "scheduler_config.json").read_bytes() if "consistency" in trained else None
    )
    if not lora_rank:
        for name, content in third.items():
            (tmp_path / "third" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "third" / name).write_bytes(content)
        assert draws(tmp_path / "third").shape == (16, 16, 3)
    if "train_text_encoder" in trained:
        average = load_file(run / "checkpoint-3" / "text_encoder_ema" / "model.safetensors")
        pushed = load(third["text_encoder/model.safetensors"])
        assert all(torch.equal(pushed[name], average[name].half()) for name in average)


def test_a_disk_without_links_is_no_reason_to_end_a_run(tmp_path, monkeypatch):
    """On some file systems a file has only one name; the push would end the training with an OSError."""
    (tmp_path / "weights").write_text("w")

    def refused(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(push.os, "link", refused)
    push._link(str(tmp_path / "weights"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_text() == "w"


def test_a_run_that_may_not_push_says_so_before_it_trains(hub, train, tmp_path, monkeypatch):
    """After days of training the token would turn out to be missing."""
    with pytest.raises(PushError, match="may not write there"):
        train(push_to_hub=True, hub_model_id="somebody-else/cats")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match="HF_TOKEN"):
        train(push_to_hub=True, hub_model_id=f"{USER}/cats")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_saved_settings_start_the_same_run_again(script, train, tmp_path):
    """train_config.yaml would lack something that decides the run."""
    first = train(seed=3, caption_dropout=0.5, random_flip=True)
    reset_accelerate()
    run_training(script.main, ["--config", str(first / "train_config.yaml"), "--output_dir", str(tmp_path / "second")])
    assert losses(first) == losses(tmp_path / "second") and weights(first) == weights(tmp_path / "second")


def test_a_data_set_by_name(train, settings, pictures, tmp_path):
    """`--dataset_name` with a path would train on other pictures than `--train_data_dir` with the same one."""
    by_folder = train(output_dir=str(tmp_path / "folder"))
    by_name = train(output_dir=str(tmp_path / "name"), train_data_dir=None, dataset_name=str(pictures))
    assert losses(by_folder) == losses(by_name)


def test_sixty_hostile_files_train(train, tmp_path):
    """What one file can do to a run: end it, or make its loss not a number."""
    usable, unusable = hostile_folder(tmp_path / "pics")
    run = train(train_data_dir=str(tmp_path / "pics"), max_rejected_fraction=1.0, max_train_steps=-(-len(usable) // 8))
    assert len((run / "rejected.jsonl").read_text(encoding="utf-8").splitlines()) == len(unusable)
    assert all(np.isfinite(loss) for loss in losses(run).values())


def test_one_broken_picture_does_not_end_the_run(train, tmp_path):
    """A long run would die of one bad file, or skip it in silence."""
    folder = make_pictures(tmp_path / "some", 12)
    (folder / "5.png").write_bytes(b"broken")
    run = train(train_data_dir=str(folder), max_rejected_fraction=0.1, max_train_steps=1)
    (line,) = (run / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "5.png" and list(losses(run)) == [1]


def test_emoji_from_new_weights(train):
    """The way without arguments: the embedded pictures and a UNet with new weights."""
    run = train(train_data_dir=None, unet="tiny", resolution=64, max_train_samples=1, max_train_steps=1)
    assert list(losses(run)) == [1] and list(losses(run, "held_out_loss")) == [0, 1]
    card = (run / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "OpenMoji" in card and "Twemoji" in card


# ---- from the command line ------------------------------------------------------------------------------------------


def launch(*command: str, folder: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def flags(settings: dict) -> list[str]:
    said = []
    for name, value in settings.items():
        if value != () and value is not None:
            said += [f"--{name}", str(value)]
    return said


def test_finetuning_from_the_command_line(settings, tmp_path):
    """The command of the README would not work as it stands there."""
    folder = make_pictures(tmp_path / "five", 5)
    settings |= {"train_data_dir": str(folder), "train_batch_size": 2, "max_train_steps": 2}
    command = ["-m", "accelerate.commands.launch", "-q", "--cpu", "--num_processes=1", str(SCRIPT), "--preset=finetune"]
    done = launch(*command, *flags(settings), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert draws(tmp_path / "run").shape == (16, 16, 3)
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_two_processes_take_the_steps_of_one(train, settings, tmp_path):
    """On two GPUs both would train on the same noise, or the run be another one."""
    one = train(output_dir=str(tmp_path / "one"), adam_epsilon=1e-4, max_train_steps=2)
    same = ["--config", str(tmp_path / "one" / "train_config.yaml")]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), *same]
    other = {"train_batch_size": 4, "checkpointing_steps": 2, "output_dir": settings["output_dir"]}
    done = launch(*command, *flags(other), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "run"
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for a, b in zip(parameters(one), parameters(two), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert checkpoints(two) == {"checkpoint-2"}


def test_a_missing_model_is_one_line_in_a_process_of_its_own(settings, tmp_path):
    """The libraries' own messages and tracebacks would bury ours."""
    settings["pretrained_model_name_or_path"] = str(tmp_path / "no-model")
    done = launch(str(SCRIPT), *flags(settings), folder=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: pretrained_model_name_or_path") and "no-model" in line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pretrained_model_name_or_path": "no-such-model"}, "no-such-model"),
        ({"train_data_dir": "no-such-folder"}, "no-such-folder"),
        ({"train_data_dir": "broken"}, "1.png"),
        ({"train_data_dir": "no-caption"}, "1.png: its caption is missing"),
        ({"train_data_dir": "no-metadata"}, "metadata.jsonl"),
        ({"dataset_name": "no-such-set"}, "no-such-set"),
        ({"preset": "emoji65"}, "'emoji64', 'demo', 'finetune'"),
        ({"unet": "emoji65"}, "unet: 'emoji65'"),
        ({"resolution": "20"}, "resolution: 20 is no multiple of 8"),
        ({"output_dir": "file/run"}, "output_dir: 'file/run' cannot be written"),
        ({"cache_dir": "file/cache"}, "cache_dir: 'file/cache' cannot be written"),
        ({"config": "wrong.yaml"}, "wrong.yaml' has no setting named 'lerning_rate'"),
        ({"report_to": "paper"}, "report_to"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "'checkpoint-7'"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line(script, settings, capsys, tmp_path, monkeypatch, wrong, said):
    """A user's mistake would be a traceback, or the line not name what is wrong."""
    monkeypatch.chdir(tmp_path)
    for name in ("broken", "no-caption", "no-metadata"):
        make_pictures(tmp_path / name, 3)
    (tmp_path / "broken" / "1.png").write_bytes(b"broken")
    (tmp_path / "no-metadata" / "metadata.jsonl").unlink()
    metadata = tmp_path / "no-caption" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture 1 of a cat", ""))
    (tmp_path / "file").write_text("")
    (tmp_path / "wrong.yaml").write_text("lerning_rate: 1\n")
    if "dataset_name" in wrong:
        settings["train_data_dir"] = None
    with pytest.raises(SystemExit) as end:
        run_training(script.main, flags({**settings, **wrong}))
    # Progress bars, which are drawn on stderr too, are not messages.
    bars = ("/s]", "Resolving data files")
    printed = [line for line in capsys.readouterr().err.splitlines() if line and not any(bar in line for bar in bars)]
    assert end.value.code == 2
    assert len(printed) == 1 and printed[0].startswith("error: ") and said in printed[0], printed
