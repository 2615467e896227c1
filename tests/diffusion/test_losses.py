"""The denoising loss and its weights, against closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler as PeerScheduler

from latentdiff.diffusion.losses import denoising_loss, min_snr_weight, training_target
from latentdiff.diffusion.noise_schedule import PREDICTION_TYPES, predict_x0_and_epsilon


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


def drawn(count: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, count, 4, 2, 2, generator=generator)
    return latents, noise, torch.tensor([0, 100, 500, 900, 999])[:count]


def test_targets_are_diffusers():
    """The network would learn something else than the scheduler takes its output for."""
    latents, noise, timesteps = drawn()
    peer = PeerScheduler()
    wanted = {"epsilon": noise, "sample": latents, "v_prediction": peer.get_velocity(latents, noise, timesteps)}
    for kind in PREDICTION_TYPES:
        target = training_target(kind, latents, noise, peer.alphas_cumprod, timesteps)
        torch.testing.assert_close(target, wanted[kind])
        # and what the schedulers make of it is the picture
        x_t = peer.add_noise(latents, noise, timesteps)
        x_0, epsilon = predict_x0_and_epsilon(peer.alphas_cumprod, target, x_t, timesteps, kind)
        torch.testing.assert_close(epsilon, noise, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(x_0, latents, rtol=1e-3, atol=2e-4)


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match="prediction_type is 'x'"):
        training_target("x", *drawn()[:2], torch.ones(1), torch.zeros(5, dtype=torch.int64))


def test_min_snr_weight_is_the_papers():
    """arXiv 2303.09556, section 3.4, for the three predictions."""
    alphas_cumprod = torch.tensor([0.99, 0.9, 0.5, 0.1])
    snr = alphas_cumprod / (1 - alphas_cumprod)
    least = torch.minimum(snr, torch.tensor(5.0))
    for kind, expected in (("epsilon", least / snr), ("v_prediction", least / (snr + 1)), ("sample", least)):
        torch.testing.assert_close(min_snr_weight(alphas_cumprod, torch.arange(4), 5.0, kind), expected)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_min_snr_weighs_errors_of_the_picture_alike_in_every_prediction(kind):
    """The same wrong picture at the same timestep would cost more in one prediction than in another."""
    latents, noise, timesteps = drawn()
    peer, gamma = PeerScheduler(), 0.5
    abar = peer.alphas_cumprod.double()  # so that dividing by the little signal at T loses no digits
    signal = abar[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - signal**2).sqrt()
    wrong = latents.double() + 0.1
    its_noise = (signal * latents + sigma * noise - signal * wrong) / sigma  # the same x_t
    output = training_target(kind, wrong, its_noise, abar, timesteps)
    target = training_target(kind, latents.double(), noise.double(), abar, timesteps)
    loss = (output - target).square().mean(dim=(1, 2, 3)) * min_snr_weight(abar, timesteps, gamma, kind)
    snr = abar[timesteps] / (1 - abar[timesteps])
    torch.testing.assert_close(loss, 0.01 * snr.clamp(max=gamma), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_is_finite_without_signal(gamma):
    for kind, expected in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        assert min_snr_weight(torch.tensor([0.5, 0.0]), torch.tensor([1]), gamma, kind).tolist() == [expected]
