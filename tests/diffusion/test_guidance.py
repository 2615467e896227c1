"""Caption dropout and the formula and reach of guidance."""

import math

import pytest
import torch

from latentdiff.data.batches import dropped_captions
from latentdiff.diffusion.guidance import check_guidance_interval, guidance_weight, guide


def test_dropout_rate():
    """100,000 draws at 0.1: the share lies within five standard deviations, 0.0047, of 0.1."""
    dropped = torch.cat([dropped_captions(0, step, 100, 0.1) for step in range(1000)])
    assert abs(dropped.float().mean() - 0.1) < 5 * (0.1 * 0.9 / 100_000) ** 0.5


def test_dropout_is_drawn_anew_at_each_step():
    """The same tenth would stay without captions for the whole run."""
    draws = torch.stack([dropped_captions(0, step, 64, 0.1) for step in range(300)])
    assert draws.any(dim=0).all() and not draws.all(dim=0).any()


def test_no_dropout_and_full_dropout():
    assert not dropped_captions(0, 0, 100, 0.0).any()
    assert dropped_captions(0, 0, 100, 1.0).all()


def test_guidance_one_is_the_conditional_branch():
    unconditional, conditional = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional)
    torch.testing.assert_close(guide(unconditional, conditional, 0.0), unconditional)


def test_weight_is_one_outside_the_interval():
    """Else guidance goes on where it was switched off, or its ends belong to the wrong side."""
    interval = (0.5, 2.0)
    assert [guidance_weight(3.0, sigma, interval) for sigma in (0.1, 0.5, 0.51, 2.0, 2.01, math.inf)] == [
        1,
        1,
        3,
        3,
        1,
        1,
    ]
    assert guidance_weight(3.0, math.inf, (0.5, math.inf)) == 3.0
    assert guidance_weight(lambda sigma: 1 + sigma, 2.0) == 3.0
    assert guidance_weight(lambda sigma: 1 + sigma, 2.0, (3.0, 4.0)) == 1.0


@pytest.mark.parametrize("interval", [(2.0, 0.5), (-1.0, 1.0), (1.0, 1.0), (1.0,), (0.1, 0.2, 0.3)])
def test_an_interval_that_holds_nothing_is_refused(interval):
    """Else guidance is silently off."""
    with pytest.raises(ValueError, match="sigma_lo < sigma_hi"):
        check_guidance_interval(interval)
