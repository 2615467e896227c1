"""The magnitude-preserving UNet trains, resumes and takes adapters; what only it can be trained with."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentdiff import (
    LatentDiffPipeline,
    MPUNet2DConditionModel,
)
from latentdiff.config.train import TrainConfig
from latentdiff.data.batches import Batch
from latentdiff.diffusion.noise_schedule import add_noise, predict_x0_and_epsilon
from latentdiff.models.mp_layers import (
    filter_norms,
)
from latentdiff.models.unet import build_unet
from latentdiff.objectives.denoising import training_loss
from latentdiff.training.optimizers import ForcedWeightNorm
from latentdiff.training.setup import learning_rate_at, load_networks
from latentdiff.utils.errors import ConfigError
from tests.models.test_mp_unet import TOY, draw, inputs, pipeline, relative_norms, toy
from tiny import tiny_components


@pytest.fixture
def mp_settings(settings, tmp_path) -> dict:
    (tmp_path / "toy.json").write_text(json.dumps(TOY))
    new = {"unet": str(tmp_path / "toy.json"), "prediction_type": "v_prediction", "lr_scheduler": "inverse_sqrt"}
    return {**settings, **new, "learning_rate": 1e-2, "lr_decay_start_steps": 2, "checkpointing_steps": 2}


def trained(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]


def test_a_run_keeps_unit_norms_and_goes_on_to_the_last_bit(train, mp_settings, tmp_path, script, monkeypatch):
    """Else the learning rate does not decide how fast filters turn; or a resume starts something again."""
    norms, real = [], ForcedWeightNorm.restore
    monkeypatch.setattr(
        ForcedWeightNorm,
        "restore",
        lambda self: (real(self), norms.extend(filter_norms(w).flatten() / w[0].numel() ** 0.5 for w in self._weights)),
    )
    whole = train(**{**mp_settings, "output_dir": str(tmp_path / "whole")})
    assert (torch.cat(norms) - 1).abs().max() < 1e-5 and len(norms) > 4 * 50
    train(**{**mp_settings, "output_dir": str(tmp_path / "half"), "max_train_steps": 2})
    half = train(**{**mp_settings, "output_dir": str(tmp_path / "half"), "resume_from_checkpoint": "latest"})
    assert losses(half) == losses(whole)
    for part in ("unet", "checkpoint-4/unet", "checkpoint-4/unet_ema"):
        one, other = trained(whole, part), trained(half, part)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), part
    saved = MPUNet2DConditionModel.from_pretrained(whole / "checkpoint-4" / "unet")
    assert (relative_norms(saved) - 1).abs().max() < 1e-5 and saved.config.prediction_type == "v_prediction"
    assert draw_folder(whole).isfinite().all()


def draw_folder(folder: Path) -> torch.Tensor:
    pipe = LatentDiffPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return draw(pipe)


def test_lora_trains_on_it_and_loads(train, mp_settings, tmp_path):
    """Else adapters do not find its attention, change what is frozen, or the finished file has other names."""
    base = train(**mp_settings)
    lora = {**mp_settings, "pretrained_model_name_or_path": str(base), "unet": "pretrained", "prediction_type": None}
    folder = train(**{**lora, "lora_rank": 2, "output_dir": str(tmp_path / "lora")})
    pipe = LatentDiffPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    before = draw(pipe)
    pipe.load_lora_weights(folder)
    after = draw(pipe)
    assert not torch.equal(before, after)
    pipe.set_adapters(pipe.get_active_adapters(), 0.0)
    torch.testing.assert_close(draw(pipe), before)
    with pytest.raises(ValueError, match="cannot be fused"):
        pipe.fuse_lora()


@pytest.mark.parametrize(
    "changes",
    [
        {"learned_uncertainty": True},
        {"task": "inpaint", "held_out_fraction": 0.3, "validation_inference_steps": 1},
        {"train_text_encoder": True, "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "rescale_betas_zero_snr": True, "save_dtype": "fp16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_ways_to_train_it(train, mp_settings, changes):
    """Else one of them fails, or makes a model that does not load."""
    folder = train(**{**mp_settings, **changes, "max_train_steps": 2})
    assert all(math.isfinite(loss) for loss in losses(folder))
    assert type(LatentDiffPipeline.from_pretrained(folder).unet) is MPUNet2DConditionModel


def test_the_learned_uncertainty_weighs_the_loss():
    """Else training divides by something else than it learns: loss / exp(u) + u (arXiv 2312.02696, eq. 21)."""
    (latents, timesteps, text), noise = inputs(4), torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    unet, plain = toy(learned_uncertainty=True), toy()
    plain.load_state_dict(unet.state_dict(), strict=False)
    scheduler, batch = tiny_components()["scheduler"], Batch(latents, noise, timesteps, text, None)
    with torch.no_grad():
        weighed, error = (training_loss(one, scheduler, batch, TrainConfig()) for one in (unet, plain))
        u = unet(latents, timesteps, text).log_variance
    assert u.shape == (4,) and u.abs().min() > 1e-3
    torch.testing.assert_close(weighed, error / u.exp() + u)


def test_a_pretrained_one_follows_the_runs_schedule(tmp_path):
    """Else going on with another prediction type trains the network on what it does not put out."""
    pipeline(toy()).save_pretrained(tmp_path / "model")
    config = TrainConfig(
        unet="pretrained", pretrained_model_name_or_path=str(tmp_path / "model"), prediction_type="v_prediction"
    )
    _, unet, scheduler = load_networks(config)
    latents, timesteps, text = inputs()
    noisy = add_noise(scheduler.alphas_cumprod, latents, torch.randn_like(latents), timesteps)
    with torch.no_grad():
        v, epsilon = unet(noisy, timesteps, text).sample, toy()(noisy, timesteps, text).sample
    found = predict_x0_and_epsilon(scheduler.alphas_cumprod, v, noisy, timesteps, "v_prediction")[1]
    torch.testing.assert_close(found, epsilon, rtol=1e-4, atol=1e-5)


def test_inverse_square_root():
    """a / sqrt(max(t / t_ref, 1)) with t counted from 1, times the warm-up (arXiv 2312.02696, section 2)."""
    config = TrainConfig(lr_scheduler="inverse_sqrt", learning_rate=2.0, lr_warmup_steps=4, lr_decay_start_steps=16)
    rate = learning_rate_at(config, 100)
    assert [rate(step) for step in (0, 3, 15, 63)] == pytest.approx([0.5, 2, 2, 1])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"lr_decay_start_steps": 5}, "lr_decay_start_steps: has no effect"),
        ({"lr_scheduler": "inverse_sqrt", "lr_decay_start_steps": 0}, "lr_decay_start_steps: 0"),
        ({"learned_uncertainty": True, "unet": "pretrained"}, "learned_uncertainty: is for new"),
        ({"learned_uncertainty": True, "unet": "mp", "snr_gamma": 5.0}, "snr_gamma: 5.0 contradicts"),
        ({"force_weight_norm": True, "unet": "pretrained", "lora_rank": 2}, "force_weight_norm: has no effect"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, named):
    """Else an option is taken and not used."""
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**changes)


def test_uncertainty_of_a_plain_unet_is_refused():
    """Else it is asked for and not trained."""
    with pytest.raises(ConfigError, match="learned_uncertainty"):
        build_unet("tiny", latent_channels=4, sample_size=16, cross_attention_dim=16, seed=0, learned_uncertainty=True)


def test_forced_weight_norm_of_a_plain_unet(train, settings, tmp_path):
    """Else filters of the plain UNet get longer, or a resume measures their lengths anew."""
    changes = {"force_weight_norm": True, "checkpointing_steps": 2}
    start = tiny_components()["unet"]
    whole = train(output_dir=str(tmp_path / "whole"), **changes)
    train(output_dir=str(tmp_path / "half"), **{**changes, "max_train_steps": 2})
    half = train(output_dir=str(tmp_path / "half"), resume_from_checkpoint="latest", **changes)
    one, other = (trained(folder, "checkpoint-4/unet") for folder in (whole, half))
    assert all(torch.equal(one[name], other[name]) for name in one)
    free = trained(train(output_dir=str(tmp_path / "free"), checkpointing_steps=2), "checkpoint-4/unet")

    def lengthened(weights: dict[str, torch.Tensor]) -> float:
        names = [name for name, p in start.named_parameters() if p.ndim > 1 and not name.startswith("conv_out")]
        ratios = [filter_norms(weights[name]) / filter_norms(start.get_parameter(name).detach()) for name in names]
        return max((ratio - 1).abs().max().item() for ratio in ratios)

    assert lengthened(one) < 1e-5 < 1e-3 < lengthened(free)
