"""The loss is EDM's, blind to where a structure lies, and of the atoms alone."""

from types import SimpleNamespace

import pytest
import torch

from latentdiff import DDPMScheduler
from latentdiff.diffusion.noise_schedule import velocity
from latentdiff.molecules.batches import MoleculeBatch
from latentdiff.molecules.denoiser import centred
from latentdiff.molecules.geometry import random_rotations
from latentdiff.molecules.losses import denoising_loss
from latentdiff.molecules.noise import betas

SCHEDULER = DDPMScheduler(trained_betas=betas(1000, -1.2, 1.5), prediction_type="v_prediction", clip_sample=False)


@pytest.fixture
def batch() -> MoleculeBatch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 5, 4])[:, None]
    places, noise = (torch.randn(3, 7, 3, generator=generator) for _ in range(2))
    shown = mask[..., None].float()
    places = centred(places, shown, shown.sum(dim=1, keepdim=True))
    return MoleculeBatch(SimpleNamespace(mask=mask), places, noise, torch.tensor([200, 600, 990]))


def answers(batch: MoleculeBatch, denoised: torch.Tensor):
    """A network that says so of x_0: v = (sqrt(abar) x_t - x_0) / sqrt(1 - abar)."""

    def network(noisy, timesteps, graph):
        abar = SCHEDULER.alphas_cumprod[timesteps][:, None, None]
        return SimpleNamespace(sample=(abar.sqrt() * noisy - denoised) / (1 - abar).sqrt())

    return network


def test_the_truth_costs_nothing_wherever_it_lies(batch):
    """A molecule in another orientation is the same molecule."""
    for denoised in (batch.places, batch.places @ random_rotations(3, torch.Generator().manual_seed(1)) + 2):
        loss = denoising_loss(answers(batch, denoised), SCHEDULER, batch)
        assert loss.shape == (3,) and loss.max() < 1e-6


def test_the_mirror_image_costs(batch):
    assert denoising_loss(answers(batch, -batch.places), SCHEDULER, batch).min() > 0.01


def test_the_weight_is_edms(batch):
    """(sigma^2 + 1) / sigma^2 on the mean squared error of an error that no rotation makes up for: all is too large."""
    loss = denoising_loss(answers(batch, 1.1 * batch.places), SCHEDULER, batch)
    abar = SCHEDULER.alphas_cumprod[batch.timesteps]
    sigma_squared = (1 - abar) / abar
    atoms = batch.graph.mask.sum(dim=1)
    error = (0.1 * batch.places).square().sum(dim=(1, 2)) / (3 * atoms)
    torch.testing.assert_close(loss, (sigma_squared + 1) / sigma_squared * error, rtol=1e-3, atol=1e-6)


def test_without_a_turn_it_is_the_error_of_v(batch):
    """The project's denoising loss in another form, where the answer is so near that nothing is to be turned."""
    mask = batch.graph.mask[..., None].float()
    noise = centred(batch.noise, mask, mask.sum(dim=1, keepdim=True))
    v = velocity(SCHEDULER.alphas_cumprod, batch.places, noise, batch.timesteps)
    network = answers(batch, 1.001 * batch.places)
    noisy = SCHEDULER.add_noise(batch.places, noise, batch.timesteps)
    error = ((network(noisy, batch.timesteps, None).sample - v) * mask).square().sum(dim=(1, 2))
    loss = denoising_loss(network, SCHEDULER, batch)
    torch.testing.assert_close(loss, error / (3 * batch.graph.mask.sum(dim=1)), rtol=2e-2, atol=1e-9)


def test_what_is_no_atom_does_not_count(batch):
    denoised = torch.where(batch.graph.mask[..., None], batch.places, 1e3)
    assert denoising_loss(answers(batch, denoised), SCHEDULER, batch).max() < 1e-6
