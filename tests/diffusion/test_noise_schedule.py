"""The tables, the conversions and the choice of timesteps, against closed forms, the papers and diffusers' tables."""

import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from latentdiff.diffusion import noise_schedule as ns

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    SD,
    {"beta_schedule": "squaredcos_cap_v2", "beta_start": 1e-4, "beta_end": 0.02},
    {"trained_betas": [0.1, 0.2, 0.4]},
]


def abar_table(zero_snr: bool = False, **schedule) -> torch.Tensor:
    return ns.alphas_cumprod(ns.make_betas(**(schedule or SD), rescale_betas_zero_snr=zero_snr))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- tables ---


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_diffusers_to_the_last_bit(schedule, zero_snr):
    """Else one scheduler_config.json would mean two noises, and a checkpoint would draw two pictures."""
    theirs = diffusers.DDPMScheduler(**schedule, rescale_betas_zero_snr=zero_snr)
    betas = ns.make_betas(**schedule, rescale_betas_zero_snr=zero_snr)
    assert betas.dtype == torch.float32
    assert torch.equal(betas, theirs.betas)
    assert torch.equal(ns.alphas_cumprod(betas), theirs.alphas_cumprod)


def test_linear_schedules_in_closed_form():
    """Else "linear" and "scaled_linear" are mixed up, as CompVis' configs do."""
    linear = ns.make_betas("linear", 1000, 1e-4, 0.02).double()
    scaled = ns.make_betas("scaled_linear", 1000, 0.00085, 0.012).double()
    i = torch.arange(1000, dtype=torch.float64) / 999
    assert torch.allclose(linear, 1e-4 + i * (0.02 - 1e-4), atol=1e-8, rtol=0)
    assert torch.allclose(scaled, (0.00085**0.5 + i * (0.012**0.5 - 0.00085**0.5)) ** 2, atol=1e-8, rtol=0)
    assert torch.allclose(ns.alphas_cumprod(linear.float()).double(), (1 - linear).cumprod(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [10, 1000])
def test_cosine_abar_is_the_papers_formula(steps):
    """Else the square, the offset s = 0.008 or the division by f(0) is missing (arXiv 2102.09672, eq. 17)."""
    abar = ns.alphas_cumprod(ns.make_betas("squaredcos_cap_v2", steps))

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([f((t + 1) / steps) / f(0) for t in range(steps)])
    assert torch.allclose(abar[:-1], expected[:-1], atol=1e-6, rtol=0)  # the last beta is capped, at 0.999
    assert abar[-1] == pytest.approx(expected[-2].item() * 0.001, rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr(schedule):
    """Else the last step still leaks the picture, or the first one changed (arXiv 2305.08891, algorithm 1)."""
    plain, zero = abar_table(**schedule), abar_table(zero_snr=True, **schedule)
    assert zero[-1] == 0
    assert zero[0] == pytest.approx(plain[0].item(), abs=1e-6)
    assert (zero.diff() < 0).all()
    # In between sqrt(abar) is an affine function of what it was.
    slope = (zero[0].sqrt() - zero[-1].sqrt()) / (plain[0].sqrt() - plain[-1].sqrt())
    assert torch.allclose(zero.sqrt(), (plain.sqrt() - plain[-1].sqrt()) * slope, atol=1e-5)
    assert ns.snr(zero, torch.tensor([len(zero) - 1])).item() == 0


def test_snr_is_signal_power_over_noise_power():
    """Else every loss weight that is made from it is wrong."""
    abar, t = abar_table(), torch.tensor([[0, 10], [500, 999]])
    level = abar[t].double()
    assert ns.snr(abar, t).shape == t.shape
    assert torch.allclose(ns.snr(abar, t).double(), level / (1 - level), rtol=1e-4)


# ---- noise in and out ---


def test_add_noise_and_velocity_in_closed_form():
    """Else the network is trained on other noise levels than those it is told."""
    abar, t = abar_table(), torch.tensor([0, 500, 999])
    x_0, noise = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    x_t, v = ns.add_noise(abar, x_0, noise, t), ns.velocity(abar, x_0, noise, t)
    for i, step in enumerate(t.tolist()):
        a = abar[step].item()
        assert torch.allclose(x_t[i], a**0.5 * x_0[i] + (1 - a) ** 0.5 * noise[i], atol=1e-6)
        assert torch.allclose(v[i], a**0.5 * noise[i] - (1 - a) ** 0.5 * x_0[i], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_noise_is_rounded_only_once(dtype):
    """Else 1 - abar is taken in half precision, where early timesteps round to no noise at all."""
    abar, t = abar_table(), torch.tensor([0, 3])
    x_0, noise = normal(2, 4, 8, 8, dtype=dtype), normal(2, 4, 8, 8, seed=1, dtype=dtype)
    exact = ns.add_noise(abar, x_0.double(), noise.double(), t)
    ours = ns.add_noise(abar, x_0, noise, t)
    assert ours.dtype == dtype
    assert torch.equal(ours, exact.to(dtype))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ns.PREDICTION_TYPES)
def test_prediction_inverts_the_forward_process(prediction_type, zero_snr):
    """Else x_0 or epsilon is misread from the model's output, or is not finite where abar = 0."""
    abar, t = abar_table(zero_snr), torch.tensor([0, 1, 500, 998, 999])
    x_0, noise = (normal(5, 2, 4, 4, seed=seed, dtype=torch.float64) for seed in (0, 1))
    x_t = ns.add_noise(abar, x_0, noise, t)
    output = {"epsilon": noise, "sample": x_0, "v_prediction": ns.velocity(abar, x_0, noise, t)}[prediction_type]
    got_x_0, got_noise = ns.predict_x0_and_epsilon(abar, output, x_t, t, prediction_type)
    if zero_snr and prediction_type == "epsilon":
        assert (got_x_0[-1] == 0).all()  # nothing can be known: the mean, not NaN
        got_x_0 = torch.cat([got_x_0[:-1], x_0[-1:]])
    assert torch.allclose(got_x_0, x_0, atol=1e-5)
    assert torch.allclose(got_noise, noise, atol=1e-5)
    one_by_one = [
        ns.predict_x0_and_epsilon(abar, output[i : i + 1], x_t[i : i + 1], step, prediction_type)[1]
        for i, step in enumerate(t.tolist())
    ]
    assert torch.equal(torch.cat(one_by_one), got_noise)


def test_epsilon_at_zero_snr_has_a_finite_gradient():
    """Else one sample at the last timestep would turn a whole batch's gradient into NaN."""
    output = normal(1, 2).requires_grad_()
    ns.predict_x0_and_epsilon(abar_table(True), output, normal(1, 2, seed=1), torch.tensor([999]), "epsilon")[
        0
    ].sum().backward()
    assert (output.grad == 0).all()


def test_dynamic_thresholding_follows_imagen():
    """Else saturated pictures stay saturated, or one picture's range is applied to another."""
    config = SimpleNamespace(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=3.0, clip_sample=True)
    x_0 = normal(3, 2, 5, 5) * torch.tensor([0.1, 1.2, 50.0]).reshape(3, 1, 1, 1)
    bounded = ns.bound_x0(x_0, config)
    s = np.quantile(x_0[1].abs().numpy(), 0.9)
    assert torch.equal(bounded[0], x_0[0])  # within [-1, 1]: s is at least 1
    assert 1 < s < 3
    assert torch.allclose(bounded[1], x_0[1].clamp(-s, s) / s)
    assert torch.allclose(bounded[2], x_0[2].clamp(-3, 3) / 3)  # s is at most sample_max_value


# ---- timesteps ---


@pytest.mark.parametrize("spacing", ns.TIMESTEP_SPACINGS)
def test_every_count_gives_that_many_descending_timesteps(spacing):
    """Else some count of steps runs off the table or takes one step too many (61 of 1000 did, in floating point)."""
    for total in (100, 1000):
        for n in range(1, total + 1):
            steps = ns.spaced_timesteps(n, total, spacing, steps_offset=1)
            assert len(steps) == n
            assert total > steps[0] and steps[-1] >= 0
            assert all(a > b for a, b in zip(steps, steps[1:], strict=False))
            if spacing != "leading":
                assert steps[0] == total - 1


def test_spacings_are_those_of_the_paper():
    """Else sampling starts or ends elsewhere than arXiv 2305.08891, table 2, says."""
    assert ns.spaced_timesteps(10, 1000, "leading") == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert ns.spaced_timesteps(10, 1000, "leading", 1) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert ns.spaced_timesteps(10, 1000, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert ns.spaced_timesteps(10, 1000, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert ns.spaced_timesteps(7, 1000, "trailing") == [999, 856, 713, 570, 428, 285, 142]


@pytest.mark.parametrize("spacing", ns.TIMESTEP_SPACINGS)
def test_timesteps_are_those_of_diffusers(spacing):
    """Else the two libraries walk different noise levels under one config."""
    theirs = diffusers.DDPMScheduler(timestep_spacing=spacing)
    for n in (2, 4, 7, 10, 30, 50, 333, 500, 999, 1000):
        theirs.set_timesteps(n)
        assert ns.spaced_timesteps(n, 1000, spacing) == theirs.timesteps.tolist()


def test_full_count_with_an_offset_stays_on_the_table():
    """Else 1000 steps with Stable Diffusion's steps_offset = 1 ask for timestep 1000, which does not exist."""
    assert ns.spaced_timesteps(1000, 1000, "leading", steps_offset=1) == list(range(999, -1, -1))


# ---- errors ---


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ns.make_betas("sigmoidal"), ["beta_schedule", "sigmoidal", "scaled_linear"]),
        (lambda: ns.make_betas(num_train_timesteps=0), ["num_train_timesteps", "0"]),
        (lambda: ns.make_betas(beta_start=0.1, beta_end=0.01), ["beta_start", "0.1", "beta_end", "0.01"]),
        (lambda: ns.make_betas(trained_betas=[0.1, 1.5]), ["trained_betas", "1.5"]),
        (lambda: ns.rescale_zero_terminal_snr(torch.tensor([0.1])), ["zero terminal SNR", "1"]),
        (lambda: ns.spaced_timesteps(10, 1000, "trialing"), ["timestep_spacing", "trialing", "trailing"]),
        (lambda: ns.spaced_timesteps(0, 1000, "leading"), ["num_inference_steps", "0", "1000"]),
        (lambda: ns.spaced_timesteps(1001, 1000, "leading"), ["num_inference_steps", "1001", "1000"]),
        (
            lambda: ns.predict_x0_and_epsilon(abar_table(), normal(1, 1), normal(1, 1), 5, "noise"),
            ["prediction_type", "noise", "epsilon"],
        ),
        (lambda: ns.look_up_previous(ns.link_timesteps([9, 5, 1]), 10, 10), ["timestep is 10", "0 … 9"]),
    ],
)
def test_errors_name_the_thing(call, words):
    """Else a user reads that something is wrong, not what, nor what it may be."""
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
