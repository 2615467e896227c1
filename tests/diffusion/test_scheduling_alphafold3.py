"""AlphaFold3's sampler is that of its supplement, step for step, and where it adds no noise Euler's method."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from latentdiff.diffusion.scheduling_alphafold3 import AlphaFold3Scheduler

PLAIN = {"gamma_0": 0.0, "step_scale": 1.0}  # then it is the probability flow's ODE, by Euler's method


def sampled(scheduler, network, steps: int, shape=(8, 5, 3), seed: int = 0) -> torch.Tensor:
    """From noise to x_0, as a pipeline would."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
    return x


def test_the_noise_levels_are_those_of_the_supplement():
    """s_i = (160^(1/7) + i/N (4e-4^(1/7) - 160^(1/7)))^7, here in Python's own numbers; the last one is 0."""
    scheduler = AlphaFold3Scheduler()
    scheduler.set_timesteps(20)
    high, low = 160 ** (1 / 7), 4e-4 ** (1 / 7)
    wanted = [(high + i / 20 * (low - high)) ** 7 for i in range(20)] + [0.0]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(wanted), rtol=1e-5, atol=0)
    assert scheduler.timesteps.shape == (20,) and (scheduler.timesteps.diff() <= 0).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_that_of_algorithm_18(prediction_type):
    """Written out once more, in float64, with D of a network that says x_0 = x / 2."""
    scheduler = AlphaFold3Scheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double().tolist()
    generator, again = (torch.Generator().manual_seed(1) for _ in range(2))
    x = x_hat = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2)).double() * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        gamma = 0.8 if sigmas[index + 1] > 1 / 16 else 0.0
        s_hat = sigmas[index] * (1 + gamma)
        seen = scheduler.scale_model_input(x, t)
        torch.testing.assert_close(seen, x / (1 + s_hat**2) ** 0.5, rtol=1e-5, atol=1e-6)
        x_0 = x / 2
        answer = {"sample": x_0, "epsilon": (x - x_0) / s_hat,
                  "v_prediction": (x - (1 + s_hat**2) * x_0) / (s_hat * (1 + s_hat**2) ** 0.5)}  # fmt: skip
        x = scheduler.step(answer[prediction_type], t, x, generator=generator).prev_sample
        x_hat = x_hat + 1.5 * (sigmas[index + 1] - s_hat) * (x_hat - x_hat / 2) / s_hat
        then = 0.8 if index < 9 and sigmas[index + 2] > 1 / 16 else 0.0
        if then and index < 9:
            noise = torch.randn(x.shape, generator=again, dtype=torch.float64)
            x_hat = x_hat + 1.003 * ((1 + then) ** 2 - 1) ** 0.5 * sigmas[index + 1] * noise
        torch.testing.assert_close(x, x_hat, rtol=1e-4, atol=1e-5)


def test_without_noise_and_haste_it_is_diffusers_euler():
    """A peer's ODE solver from the same noise on the same levels."""
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    ours = AlphaFold3Scheduler(**betas, **PLAIN, sigma_max=100.0, sigma_min=0.01)
    ours.set_timesteps(12)
    theirs = EulerDiscreteScheduler(**betas)
    theirs.set_timesteps(12)
    theirs.sigmas, theirs.timesteps = ours.sigmas.clone(), ours.timesteps.clone()
    x = y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 100
    for t in ours.timesteps:
        x = ours.step((ours.scale_model_input(x, t) * 0.9).sin(), t, x).prev_sample
        y = theirs.step((theirs.scale_model_input(y, t) * 0.9).sin(), t, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_of_a_normal_distribution_the_ode_draws_it():
    """x_0 of unit variance: D(x; s) = x / (1 + s^2), for which the network's v is 0 at every level."""
    drawn = sampled(AlphaFold3Scheduler(prediction_type="v_prediction", **PLAIN), lambda x, t: 0 * x, 400, (20000, 1))
    assert drawn.std().item() == pytest.approx(1, abs=0.02)


def test_noise_levels_are_told_as_timesteps():
    """Of the training's schedule: between two timesteps as one between them, beyond the last one as the last."""
    scheduler = AlphaFold3Scheduler()
    scheduler.set_timesteps(30)
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().log()
    for sigma, t in zip(scheduler._noised.tolist(), scheduler.timesteps.tolist(), strict=True):
        below, share = int(t), t - int(t)
        told = levels[below] + share * (levels[min(below + 1, 999)] - levels[below])
        wanted = torch.tensor(sigma).log().clamp(levels[0], levels[-1])
        assert told.item() == pytest.approx(wanted.item(), abs=2e-3)
    assert scheduler.timesteps[0] == 999  # 160 is more than any level of the schedule


def test_the_same_seed_gives_the_same_sample():
    draw = [sampled(AlphaFold3Scheduler(), lambda x, t: x * 0.5, 6, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    scheduler, exact = AlphaFold3Scheduler(**PLAIN), AlphaFold3Scheduler(**PLAIN)
    for one in (scheduler, exact):
        one.set_timesteps(4)
    x, output = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    half = scheduler.step(output, 0, x).prev_sample
    assert half.dtype == dtype and torch.equal(half, exact.step(output.float(), 0, x.float()).prev_sample.to(dtype))


def test_settings_survive_saving(tmp_path):
    AlphaFold3Scheduler(sigma_max=80.0, gamma_0=0.4, trained_betas=[0.1, 0.2]).save_pretrained(tmp_path)
    again = AlphaFold3Scheduler.from_pretrained(tmp_path)
    assert (again.config.sigma_max, again.config.gamma_0, len(again)) == (80.0, 0.4, 1000)
    assert len(again.alphas_cumprod) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AlphaFold3Scheduler(prediction_type="flow"), "prediction_type is 'flow'"),
        (lambda: AlphaFold3Scheduler(sigma_max=1e-4), "sigma_min is 0.0004 and sigma_max 0.0001"),
        (lambda: AlphaFold3Scheduler().set_timesteps(0), "num_inference_steps is 0"),
        (lambda: [s := AlphaFold3Scheduler(), s.set_timesteps(1), s.step(torch.ones(1), 0, torch.ones(1)),
                  s.step(torch.ones(1), 0, torch.ones(1))], "all 1 steps were done"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
