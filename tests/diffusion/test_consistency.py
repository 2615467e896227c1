"""The loss of consistency models against closed forms, the papers' formulas and diffusers."""

import math

import diffusers
import pytest
import torch

from latentdiff.diffusion.consistency import (
    consistency_function,
    ddim_step,
    ddim_trajectory,
    discretization_steps,
    guided,
    neighbours,
    pseudo_huber,
)
from latentdiff.diffusion.scheduling_consistency import ConsistencyScheduler, solver_timesteps

SCHEDULER = ConsistencyScheduler()
ABAR = SCHEDULER.alphas_cumprod
MEAN, DEVIATION = 0.7, 0.4  # of Gaussian data, whose probability flow is known


def levels(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and the standard deviation of x_t, shaped to multiply pictures."""
    abar = ABAR[timesteps].reshape(-1, 1, 1, 1)
    return abar.sqrt(), (abar * DEVIATION**2 + 1 - abar).sqrt()


def exact_noise(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The mean of the noise in x_t: what a perfect teacher of Gaussian data puts out."""
    signal, deviation = levels(timesteps)
    return (1 - signal.square()).sqrt() * (x_t - signal * MEAN) / deviation.square()


def exact_end(x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Where the probability flow leads from x_t: it keeps how many deviations x_t lies from the mean."""
    signal, deviation = levels(timesteps)
    return MEAN + DEVIATION * (x_t - signal * MEAN) / deviation


def points(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t of Gaussian data, and uniform timesteps."""
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.randint(1000, (count,), generator=generator)
    signal, deviation = levels(timesteps)
    return signal * MEAN + deviation * torch.randn(count, 4, 2, 2, generator=generator), timesteps


def test_neighbours_are_on_the_grid_that_is_drawn_from():
    """Else the student is trained between timesteps at which it is never asked."""
    peer = diffusers.LCMScheduler()
    peer.set_timesteps(50)
    upper, lower = neighbours(torch.arange(1000), 20)
    assert sorted(set(upper.tolist()), reverse=True) == peer.timesteps.tolist()
    assert (upper >= torch.arange(1000)).all() and set((upper - lower).tolist()) == {20, 19}
    assert lower[upper == 19].unique().tolist() == [0]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_at_the_end_of_a_trajectory_the_answer_is_the_picture(kind):
    """Else what all answers are traced back to is not fixed, and they may all become the same."""
    x, zero = points()[0], torch.zeros(64, dtype=torch.int64)
    answer = consistency_function(lambda x_t, t: torch.randn_like(x_t), ABAR, kind, x, zero)
    assert torch.equal(answer, x)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_teachers_step_is_diffusers_ddim(kind):
    """Else the student follows another trajectory than the one that the teacher draws along."""
    peer = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=kind,
        timestep_spacing="trailing",
    )
    peer.set_timesteps(50)
    x_t, scales = points(1)[0].expand(3, -1, -1, -1), torch.tensor([1.0, 2.0, 7.5])
    for t in (999, 519, 39):
        to = (torch.full((3,), t), torch.full((3,), t - 20))
        with_caption, without = torch.cos(x_t + t), torch.sin(x_t - t)
        teacher = guided(lambda *_: with_caption, lambda *_: without, scales)  # noqa: B023
        found = ddim_step(teacher, ABAR, kind, x_t, *to)
        for i, scale in enumerate(scales.tolist()):
            output = without[i : i + 1] + scale * (with_caption[i : i + 1] - without[i : i + 1])
            wanted = peer.step(output, t, x_t[i : i + 1]).prev_sample
            torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_whole_trajectory_is_what_diffusers_draws(kind):
    """Else the student learns other pictures than the teacher draws, or points that lie on another way to them."""
    peer = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type=kind,
        timestep_spacing="trailing",
    )  # fmt: skip
    peer.set_timesteps(8)
    noise, grid = points(5)[0], solver_timesteps(1000, 8)
    found, end = ddim_trajectory(lambda x, t: torch.sin(2 * x) + t.reshape(-1, 1, 1, 1) / 2000, ABAR, kind, noise, grid)
    x_t = noise
    for place, t in zip(reversed(range(8)), peer.timesteps, strict=True):
        assert t == grid[place]
        torch.testing.assert_close(found[place], x_t, rtol=1e-4, atol=1e-4)
        x_t = peer.step(torch.sin(2 * x_t) + t / 2000, t, x_t).prev_sample
    torch.testing.assert_close(end, x_t, rtol=1e-4, atol=1e-4)  # set_alpha_to_one: without any noise


def test_the_loss_of_the_true_answer_vanishes_as_neighbours_come_closer():
    """Else the loss is at its least for another function than the one that draws pictures. Of Gaussian data that one is
    known; DDIM's error of a step falls with the square of its length, so half the length has a quarter of the loss."""
    found = []
    for steps in (50, 100, 200):
        x_t, timesteps = points(512)
        timesteps, earlier = neighbours(timesteps, 1000 // steps)
        signal, deviation = levels(timesteps)
        x_s = ddim_step(exact_noise, ABAR, "epsilon", x_t, timesteps, earlier)
        answers = [consistency_function(exact_end, ABAR, "sample", *at) for at in ((x_t, timesteps), (x_s, earlier))]
        found.append((answers[0] - answers[1]).square().mean().sqrt().item())
    assert found[0] < 0.02
    assert found[0] / found[1] == pytest.approx(4, rel=0.2) and found[1] / found[2] == pytest.approx(4, rel=0.3)


def test_pseudo_huber_is_the_formula_and_forgives_outliers():
    """Else one picture that the student draws badly decides a batch's gradient."""
    a, b = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    c = 0.00054 * math.sqrt(256)
    squared = (a - b).double().square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(pseudo_huber(a, b).double(), (squared + c * c).sqrt() - c)
    far = (b + 100).requires_grad_()
    pseudo_huber(far, b).sum().backward()
    assert far.grad.flatten(1).norm(dim=1).max() <= 1 + 1e-5
    assert pseudo_huber(a, a).abs().max() == 0


def test_the_number_of_steps_doubles_in_equal_parts_of_the_run():
    """arXiv 2310.14189, section 3.4, with s_0 = 10 and s_1 = 1280: eight parts."""
    found = [discretization_steps(step, 400_000, 10, 1280) for step in range(0, 400_000, 50_000)]
    assert found == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert discretization_steps(399_999, 400_000, 10, 1280) == 1280
    assert [discretization_steps(step, 8, 10, 50) for step in range(8)] == [10, 10, 20, 20, 40, 40, 50, 50]
