"""Caption dropout and the guidance formula."""

import pytest
import torch

from latentdiff.guidance import classifier_free_guidance, dropped_captions
from latentdiff.pipelines.text2img import guide


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
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, 1.0), conditional)
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, 0.0), unconditional)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.5, 7.5])
def test_pipelines_copy_of_the_formula_is_the_same(guidance_scale):
    """The pipeline's file travels alone to the Hub, so it has a copy of the formula, which must not drift."""
    unconditional, conditional = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    expected = classifier_free_guidance(unconditional, conditional, guidance_scale)
    assert torch.equal(guide(unconditional, conditional, guidance_scale), expected)
