"""AlphaFold3's distribution of noise levels, as timesteps that are drawn evenly."""

import pytest
import torch
from scipy.stats import lognorm

from latentdiff import DDPMScheduler
from latentdiff.molecules.noise import betas, log_sigmas

AF3 = (-1.2, 1.5)


def test_even_timesteps_have_the_papers_levels():
    """ln sigma is normal with mean -1.2 and deviation 1.5: the quantiles of scipy's distribution."""
    levels = log_sigmas(torch.arange(1000), 1000, *AF3).exp()
    wanted = lognorm(s=1.5, scale=torch.tensor(-1.2).exp().item()).ppf((torch.arange(1000).numpy() + 0.5) / 1000)
    torch.testing.assert_close(levels.double(), torch.from_numpy(wanted), rtol=1e-5, atol=0)


def test_the_schedulers_table_says_the_same():
    """What the network is told of a timestep's noise and what a scheduler adds would be two things."""
    scheduler = DDPMScheduler(trained_betas=betas(1000, *AF3), prediction_type="v_prediction", clip_sample=False)
    abar = scheduler.alphas_cumprod
    levels = ((1 - abar) / abar).sqrt()
    # At the first ones float32 has few digits of 1 - abar.
    torch.testing.assert_close(levels, log_sigmas(torch.arange(1000), 1000, *AF3).exp(), rtol=4e-3, atol=0)


def test_levels_between_timesteps_lie_between():
    steps = torch.tensor([10.0, 10.5, 11.0])
    low, middle, high = log_sigmas(steps, 1000, *AF3).tolist()
    assert low < middle < high and middle == pytest.approx((low + high) / 2, abs=1e-3)
