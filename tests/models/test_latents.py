"""Pixels, raw moments and latents, against diffusers' own VAE and closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from latentdiff.models.latents import (
    decode_latents,
    downsampling_factor,
    encode_moments,
    inpainting_conditions,
    sample_latents,
    to_images,
    to_pixels,
)
from tiny import tiny_components


@pytest.fixture(scope="module")
def vae():
    return tiny_components()["vae"].requires_grad_(False)


def pixels(count: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pictures_to_pixels_and_back_are_the_same_bytes():
    """Every pass through the VAE's input would shift colours."""
    array = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([array, array.T, 255 - array], axis=-1))
    there = to_pixels([image, image])
    assert there.shape == (2, 3, 16, 16) and there.dtype == torch.float32
    assert (there.min(), there.max()) == (-1, 1)
    assert there[0, 0, 0, 5] == pytest.approx(5 / 127.5 - 1) and there[0, 1, 5, 0] == there[0, 0, 0, 5]
    assert all(np.array_equal(np.asarray(back), np.asarray(image)) for back in to_images(there))


def test_pixels_out_of_range_are_clipped():
    """They would wrap around: too bright would become black."""
    (image,) = to_images(torch.tensor([-1.5, 0.0, 1.5]).view(1, 3, 1, 1))
    assert np.asarray(image).tolist() == [[[0, 128, 255]]]  # 127.5 rounds to the even 128


def test_moments_are_those_of_diffusers(vae):
    posterior = vae.encode(pixels()).latent_dist
    mean, std = encode_moments(vae, pixels())
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
    torch.testing.assert_close(std, (posterior.logvar / 2).exp())


def test_drawn_latents_are_mean_plus_std_times_noise_scaled_once(vae):
    """Latents scaled twice, or not at all, train a model that no pipeline can sample."""
    mean, std = encode_moments(vae, pixels())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    latents = sample_latents(vae.config, mean, std, noise)
    assert torch.equal(latents, (mean + std * noise) * 0.7)  # conftest's scaling_factor
    peer = vae.encode(pixels()).latent_dist.sample(torch.Generator().manual_seed(3)) * vae.config.scaling_factor
    torch.testing.assert_close(latents, peer)


def test_shift_factor():
    """A VAE with a shift would be trained unshifted."""
    config = SimpleNamespace(scaling_factor=2.0, shift_factor=0.5)
    drawn = sample_latents(config, torch.tensor([1.0]), torch.tensor([0.1]), torch.tensor([2.0]))
    assert drawn.item() == pytest.approx((1 + 0.2 - 0.5) * 2)


def test_decoding_undoes_the_scaling(vae):
    mean, std = encode_moments(vae, pixels())
    latents = sample_latents(vae.config, mean, std, torch.zeros_like(mean))
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_downsampling_factor_is_what_the_vae_does(vae):
    mean, _ = encode_moments(vae, pixels(1, 32))
    assert downsampling_factor(vae) == 32 // mean.shape[-1] == 4


def test_inpainting_conditions_are_what_diffusers_pipeline_gives_its_unet():
    """What is trained on, of masks, grey, scale, posterior or order, would not be what the model is drawn with."""
    parts = tiny_components()
    pipeline = StableDiffusionInpaintPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    mask = (torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    init = pipeline.image_processor.preprocess(image, height=16, width=24)
    condition = pipeline.mask_processor.preprocess(
        Image.fromarray((mask[0, 0] * 255).byte().numpy()), height=16, width=24
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        theirs = pipeline.prepare_mask_latents(
            condition, init * (condition < 0.5), 1, 16, 24, torch.float32, "cpu", generator, False
        )
    noise = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    ours = inpainting_conditions(parts["vae"], to_pixels([image]), mask, noise)
    assert ours.shape == (1, 5, 4, 6)
    torch.testing.assert_close(ours, torch.cat(theirs, dim=1), rtol=0, atol=1e-6)
