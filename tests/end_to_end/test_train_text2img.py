"""The training script from end to end, at toy size: what is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler as PeerScheduler
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPTextModel

from latentdiff.config.presets import run_training
from latentdiff.config.train import TrainConfig
from latentdiff.models.loading import load_frozen, load_unet
from latentdiff.models.parts import fingerprint
from latentdiff.objectives import denoising
from latentdiff.training.data import load_data
from latentdiff.training.setup import learning_rate_at, load_networks, optimizer_steps
from latentdiff.utils.errors import ConfigError
from tiny import reset_accelerate

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


def test_a_single_file_is_trained_as_its_folder(train, original_folder, tmp_path):
    """Other weights or another schedule would be trained than those in the file."""
    file, changes = original_folder.with_suffix(".safetensors"), {"max_train_steps": 1}
    one = train(pretrained_model_name_or_path=str(original_folder), output_dir=str(tmp_path / "one"), **changes)
    source = {"pretrained_model_name_or_path": str(file), "single_file_config": str(original_folder)}
    two = train(**source, output_dir=str(tmp_path / "two"), **changes)
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for a, b in zip(parameters(one), parameters(two), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    card = (two / "README.md").read_text()
    assert "--pretrained_model_name_or_path original.safetensors" in card and str(original_folder) not in card


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
    real, calls = denoising.training_loss, []

    def spoilt(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(denoising, "training_loss", spoilt)
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
