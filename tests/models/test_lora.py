"""Adapters are what peft and diffusers take them for, and are all that is trained and saved."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from latentdiff import LatentDiffPipeline
from latentdiff.models.lora import TARGETS, add_lora, has_lora, load_lora, save_lora
from latentdiff.training.ema import EMA
from tiny import tiny_components


def adapted(rank: int = 2, alpha: float = 6.0, seed: int = 0) -> UNet2DConditionModel:
    """With adapters whose B is not zero any more."""
    unet = tiny_components()["unet"]
    add_lora(unet, rank, alpha, seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return unet


def answer(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = unet.config.sample_size
    noisy = torch.randn(1, unet.config.in_channels, size, size, generator=generator)
    hidden = torch.randn(1, 8, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(noisy, torch.tensor([500]), hidden).sample


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained():
    plain, unet = tiny_components()["unet"], tiny_components()["unet"]
    assert not has_lora(unet)
    before = torch.random.get_rng_state()
    add_lora(unet, 2, 2, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert has_lora(unet) and torch.equal(answer(plain), answer(unet))
    trained = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and any(f".{t}." in name for t in TARGETS) for name in trained)
    assert len(EMA(unet, 0.9).parameters) == len(trained)
    again, other = tiny_components()["unet"], tiny_components()["unet"]
    add_lora(again, 2, 2, seed=3)
    add_lora(other, 2, 2, seed=4)
    first, same, differs = ([p for n, p in u.named_parameters() if "lora_A" in n] for u in (unet, again, other))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, differs, strict=True))


def test_the_file_is_the_one_diffusers_loads_with_its_strength(tmp_path):
    """alpha is what many tools lose: the adapters would act with another strength than in training."""
    unet = adapted(rank=2, alpha=6.0)
    save_lora(unet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    for kind in (StableDiffusionPipeline, LatentDiffPipeline):
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = kind(**{**tiny_components(), **absent})
        assert not torch.allclose(answer(pipeline.unet), answer(unet), atol=1e-3)
        pipeline.load_lora_weights(tmp_path)
        torch.testing.assert_close(answer(pipeline.unet), answer(unet))


def test_it_is_read_back_to_the_last_bit(tmp_path):
    unet, fresh = adapted(), tiny_components()["unet"]
    save_lora(unet, tmp_path)
    add_lora(fresh, 2, 6.0, seed=9)
    load_lora(fresh, tmp_path)
    for (name, a), (_, b) in zip(unet.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    other = tiny_components()["unet"]
    add_lora(other, 3, 6.0, seed=9)
    with pytest.raises(RuntimeError):
        load_lora(other, tmp_path)


def test_in_half_precision(tmp_path):
    save_lora(adapted(), tmp_path, torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "pytorch_lora_weights.safetensors").values()} == {torch.float16}
