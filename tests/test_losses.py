"""The denoising loss and its weights, against closed forms."""

import pytest
import torch

from latentdiff.losses import denoising_loss, min_snr_weight


def test_loss_is_one_mean_square_per_sample():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 4, 2, 2, generator=generator)
    offset = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]
    torch.testing.assert_close(denoising_loss(noise + offset, noise), torch.tensor([0.0, 1.0, 4.0]))


def test_loss_is_summed_in_float32():
    """In half precision 16,384 squares would be rounded to three digits."""
    noise = torch.zeros(1, 4, 64, 64)
    output = torch.full_like(noise, 0.1, dtype=torch.bfloat16)
    assert denoising_loss(output, noise).dtype == torch.float32
    torch.testing.assert_close(denoising_loss(output, noise), output.float().square().mean()[None])


def test_min_snr_weight_is_the_papers():
    """arXiv 2303.09556: min(SNR, gamma) / SNR for epsilon."""
    alphas_cumprod = torch.tensor([0.99, 0.9, 0.5, 0.1])
    snr = alphas_cumprod / (1 - alphas_cumprod)
    expected = torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(min_snr_weight(alphas_cumprod, torch.arange(4), 5.0), expected)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_is_finite_without_signal(gamma):
    weight = min_snr_weight(torch.tensor([0.5, 0.0]), torch.tensor([1]), gamma)
    assert weight.tolist() == [1.0]
