"""The held-out curve: the logged loss cut into bins, and errors that mean the same of any network on any schedule."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import DDIMScheduler, LatentDiffPipeline
from latentdiff.data.latent_cache import HiddenStates, Moments
from latentdiff.diffusion.noise_schedule import PREDICTION_TYPES, velocity
from latentdiff.evaluation.held_out_curve import curve_points, held_out_curve, plot_curves, training_schedule
from latentdiff.models.parts import FrozenParts
from latentdiff.training.held_out import HeldOutErrors, HeldOutLoss
from tiny import tiny_components

SCHEDULES = {
    "stable diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "emoji64": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.02},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


class Pictures:
    """Of noise, the second half held out."""

    def __init__(self, count: int = 12):
        self.captions = [[f"picture {row}", "another"] for row in range(count)]
        self.caption_counts = np.full(count, 2)
        self.held_out, self.size_of, self.crops = np.arange(count) >= count // 2, np.zeros(count, np.int8), 1

    def image(self, row: int, crop: int = 0) -> Image.Image:
        return Image.fromarray(np.random.default_rng(row).integers(0, 256, (16, 16, 3), np.uint8))


class Knows:
    """A network that takes x_0 for 0 whatever it sees, and says so in any of the ways to say it."""

    device, dtype, training = torch.device("cpu"), torch.float32, False

    def __init__(self, scheduler):
        self.kind, self.abar = scheduler.config.prediction_type, scheduler.alphas_cumprod

    def eval(self):
        return self

    train = lambda self, mode: self  # noqa: E731

    def __call__(self, noisy, timesteps, text):
        epsilon = noisy / (1 - self.abar[timesteps]).sqrt()[:, None, None, None]
        zero = torch.zeros_like(noisy)
        said = {"epsilon": epsilon, "sample": zero, "v_prediction": velocity(self.abar, zero, epsilon, timesteps)}
        return SimpleNamespace(sample=said[self.kind])


def pipeline_on(schedule: str = "emoji64", prediction_type: str = "epsilon") -> LatentDiffPipeline:
    scheduler = DDIMScheduler(**SCHEDULES[schedule], clip_sample=False, prediction_type=prediction_type, steps_offset=1)
    return LatentDiffPipeline(**tiny_components() | {"scheduler": scheduler})


def curve_of_what_knows(schedule: str, prediction_type: str, count: int = 12):
    pipeline = pipeline_on(schedule, prediction_type)
    parts = SimpleNamespace(**pipeline.components)
    parts.unet = Knows(pipeline.scheduler)
    return held_out_curve(parts, Pictures(count))


def test_the_curve_over_timesteps_is_the_logged_loss_in_parts():
    """The curve would show something else than what training logs."""
    pipeline, pictures = pipeline_on(), Pictures()
    curve = held_out_curve(pipeline, pictures)
    parts = FrozenParts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    logged = HeldOutLoss(
        pictures, Moments(pictures, parts.vae, False, None), HiddenStates(pictures, parts),
        vae_config=pipeline.vae.config, num_train_timesteps=1000,
    )(pipeline.unet, training_schedule(pipeline.scheduler))  # fmt: skip
    assert curve.loss == pytest.approx(logged, rel=1e-6) and curve.pictures == 6
    counts, losses = zip(*((point.count, point.loss) for point in curve.over_timesteps), strict=True)
    assert sum(counts) == 48 and np.average(losses, weights=counts) == pytest.approx(logged, rel=1e-6)
    assert all(point.loss == pytest.approx(point.epsilon) for point in curve.over_timesteps)  # it predicts epsilon


def test_what_a_network_predicts_does_not_matter():
    """epsilon and v networks that believe the same would stand apart in the curve."""
    first, *others = (curve_of_what_knows("emoji64", kind) for kind in PREDICTION_TYPES)
    for curve in others:
        assert curve.epsilon == pytest.approx(first.epsilon, rel=1e-4)
        for ours, theirs in zip(curve.over_log_snr, first.over_log_snr, strict=True):
            assert ours.count == theirs.count
            assert (ours.epsilon, ours.x_0) == pytest.approx((theirs.epsilon, theirs.x_0), rel=1e-3)
    assert others[0].loss != pytest.approx(first.loss, rel=0.1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedule_does_not_matter_at_one_noise_level(schedule):
    """Networks of two schedules would be asked at other noise levels: the one that is asked easy things seems better.

    Who takes x_0 for 0 is wrong by x_0, whatever the level, and in epsilon by the SNR times that."""
    ours, theirs = (curve_of_what_knows(name, "epsilon", count=60) for name in ("emoji64", schedule))
    assert len(ours.over_log_snr) == len(theirs.over_log_snr) == 13
    for one, other in zip(ours.over_log_snr, theirs.over_log_snr, strict=True):
        assert one.x_0 == pytest.approx(other.x_0, rel=0.1)
        assert one.epsilon == pytest.approx(other.epsilon, rel=0.25)  # timesteps lie up to 0.2 off a level
    assert ours.epsilon == pytest.approx(theirs.epsilon, rel=0.1)


def test_levels_that_a_schedule_does_not_reach_are_left_out():
    """Stable Diffusion's ends at a log-SNR of -5.4: its last timestep would stand for levels beyond it."""
    points = curve_of_what_knows("stable diffusion", "epsilon", count=60).over_log_snr
    assert points[0].low == -6 and points[-1].high == 6 and len(points) == 12
    assert points[0].count < 0.6 * points[1].count  # of the bin from -6 to -5 it reaches a third


def test_networks_in_half_precision_are_asked_the_same():
    """A checkpoint that is loaded in half precision could not be measured."""
    full = held_out_curve(pipeline_on(), Pictures())
    half = held_out_curve(pipeline_on().to(torch.bfloat16), Pictures())
    assert half.epsilon == pytest.approx(full.epsilon, rel=0.02) and half.epsilon != full.epsilon


def test_no_held_out_pictures_no_curve():
    pictures = Pictures()
    pictures.held_out[:] = False
    assert held_out_curve(pipeline_on(), pictures) is None


def test_parts_of_the_work_are_the_whole():
    """Processes that share the questions would end with other errors than one alone, or in another order."""
    pipeline, pictures = pipeline_on(), Pictures()
    parts = FrozenParts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    loss = HeldOutLoss(
        pictures, Moments(pictures, parts.vae, False, None), HiddenStates(pictures, parts),
        vae_config=pipeline.vae.config, num_train_timesteps=1000,
    )  # fmt: skip
    scheduler = training_schedule(pipeline.scheduler)
    whole = loss.errors(pipeline.unet, scheduler, batch_size=10)
    shares = [loss.errors(pipeline.unet, scheduler, batch_size=10, share=(i, 3)) for i in range(3)]
    assert list(whole) == [0, 1, 2, 3, 4] and [list(share) for share in shares] == [[0, 3], [1, 4], [2]]
    for share in shares:
        for number, errors in share.items():
            assert all(torch.equal(a, b) for a, b in zip(errors, whole[number], strict=True))


def test_points_are_means_of_bins():
    values = torch.tensor([1.0, 3.0, 10.0, 20.0])
    errors = HeldOutErrors(torch.arange(4), values, 2 * values, values / 2)
    first, last = curve_points(errors, torch.tensor([0.1, 0.9, 2.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert (first.low, first.high, first.count, first.loss, first.epsilon, first.x_0) == (0, 1, 2, 2, 4, 1)
    assert first.epsilon_error == pytest.approx(2.0)  # deviation of 2 and 6 is 2.83; by the root of 2
    assert (last.low, last.high, last.count, last.loss) == (2, 3, 2, 15)


def test_curves_are_drawn(tmp_path):
    curve = curve_of_what_knows("emoji64", "epsilon")
    plot_curves({"one": curve, "other": curve}, tmp_path / "curves.png")
    assert min(Image.open(tmp_path / "curves.png").size) > 300
