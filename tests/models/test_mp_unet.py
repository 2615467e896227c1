"""The magnitude-preserving UNet: its magnitudes, its size, its terms, its call, its saving and travelling."""

import json

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hub_server import USER
from latentdiff import (
    DDIMScheduler,
    LatentDiffImg2ImgPipeline,
    LatentDiffInpaintPipeline,
    LatentDiffInterpolatePipeline,
    LatentDiffInversionPipeline,
    LatentDiffPipeline,
    MPUNet2DConditionModel,
)
from latentdiff.diffusion.noise_schedule import predict_x0_and_epsilon
from latentdiff.models.loading import load_unet, unet_class
from latentdiff.models.mp_layers import (
    FourierFeatures,
    MPConv2d,
    MPLinear,
    filter_norms,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
)
from latentdiff.models.mp_unet import MPAttention, MPBlock, Preconditioning
from latentdiff.models.unet import UNET_PRESETS, build_unet, widen_input
from stranger import MASK, PICTURE, stranger_draws
from tiny import tiny_components

TOY = {
    "_class_name": "MPUNet2DConditionModel",
    "block_out_channels": [8, 16],
    "attention_levels": [True, False],
    "attention_head_dim": 4,
}


def toy(seed: int = 0, **changes) -> MPUNet2DConditionModel:
    """A network of toy size that does something: its gains are not zero."""
    arguments = {name: value for name, value in TOY.items() if not name.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = MPUNet2DConditionModel(**{**arguments, "sample_size": 4, "cross_attention_dim": 16, **changes})
    return open_gains(unet).eval()


def open_gains(unet: MPUNet2DConditionModel) -> MPUNet2DConditionModel:
    for name, parameter in unet.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 0.5)
    return unet


def pipeline(unet: MPUNet2DConditionModel) -> LatentDiffPipeline:
    pipe = LatentDiffPipeline(**{**tiny_components(), "unet": unet})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return pipe("a cat", num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0)).images


def inputs(batch: int = 2, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, channels, 4, 4, generator=generator)
    return (
        latents,
        torch.randint(0, 1000, (batch,), generator=generator),
        torch.randn(batch, 8, 16, generator=generator),
    )


def magnitude(x: torch.Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def relative_norms(unet: torch.nn.Module) -> torch.Tensor:
    """Of each filter, as it acts at the stored weights: norm over the root of the fan-in."""
    layers = [layer for layer in unet.modules() if isinstance(layer, MPLinear | MPConv2d)]
    return torch.cat([filter_norms(one.weight.detach()).flatten() / one.weight[0].numel() ** 0.5 for one in layers])


# ---- magnitudes -----------------------------------------------------------------------------------------------------


def test_operations_keep_magnitudes():
    """Else every block would be larger or smaller than the one before it."""
    a, b = torch.randn(8, 48, 16, 16), torch.randn(8, 96, 16, 16)
    assert magnitude(mp_silu(a)) == pytest.approx(1, abs=0.02)
    assert magnitude(mp_sum(a, torch.randn_like(a), 0.3)) == pytest.approx(1, abs=0.02)
    joined = mp_cat(a, b)
    assert magnitude(joined) == pytest.approx(1, abs=0.02)
    halves = [part.square().sum().item() for part in joined.split([48, 96], dim=1)]
    assert halves[0] == pytest.approx(halves[1], rel=0.02)
    torch.testing.assert_close(pixel_norm(5 * a).square().mean(dim=1), torch.ones(8, 16, 16))
    assert magnitude(MPConv2d(48, 32, 3)(a)) == pytest.approx(1, abs=0.1)
    assert magnitude(MPLinear(48, 512)(torch.randn(512, 48))) == pytest.approx(1, abs=0.05)
    for channels in (8, 16, 64):
        features = FourierFeatures(channels)(torch.linspace(-1.5, 1.5, 500))
        assert magnitude(features) == pytest.approx(1, abs=0.05)
        assert features.square().mean(dim=1).sqrt().sub(1).abs().max() < 0.5


def test_activations_at_initialisation_are_one_in_every_block():
    """Else the network's layers do not start alike, which is what it is for; zeros around a 4x4 grid among the causes.

    Few channels leave something to chance: what two branches have in common.
    """
    found: dict[str, list[float]] = {}
    for seed in range(4):
        unet = build_unet("mp-tiny", latent_channels=4, sample_size=16, cross_attention_dim=192, seed=seed)
        for name, block in unet.named_modules():
            if isinstance(block, MPBlock | MPAttention):
                block.register_forward_hook(
                    lambda _, __, output, name=name: found.setdefault(name, []).append(magnitude(output))
                )
        generator = torch.Generator().manual_seed(seed)
        latents, text = (torch.randn(8, *shape, generator=generator) for shape in ((4, 16, 16), (20, 192)))
        with torch.no_grad():
            unet(latents, torch.arange(0, 1000, 125), text)
    assert len(found) == 15 + 2 * 4  # blocks, and two attentions in four of them
    magnitudes = torch.tensor(list(found.values()))
    assert (magnitudes - 1).abs().max() < 0.15, found
    assert (magnitudes.mean(dim=1) - 1).abs().max() < 0.1, found


def test_the_decoder_stays_at_one_when_filters_agree():
    """Else it grows in training: residual branches come to say what they are added to, and what agrees adds up."""
    unet, found = toy(), []
    for layer in unet.modules():
        if isinstance(layer, MPConv2d):
            torch.nn.init.constant_(layer.weight, 1.0)
    for block in [*unet.middle, *unet.decoder]:
        block.register_forward_hook(lambda _, __, output: found.append(magnitude(output)))
    with torch.no_grad():
        unet(*inputs())
    assert len(found) == 7 and all(value == pytest.approx(1, abs=1e-3) for value in found)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_zeros_around_a_grid_take_no_magnitude(size):
    """Else every convolution of a small grid makes activations smaller: by half where two by two are left."""
    generator = torch.Generator().manual_seed(0)
    x, conv = torch.randn(256, 32, size, size, generator=generator), MPConv2d(32, 64, 3)
    torch.nn.init.normal_(conv.weight, generator=generator)
    assert magnitude(conv(x)) == pytest.approx(1, abs=0.05)


def test_a_filter_acts_at_unit_norm_and_its_gradient_only_turns_it():
    """Else averaged weights, which are shorter, would compute smaller activations; or Adam sees what is undone."""
    for layer, x in ((MPLinear(6, 5), torch.randn(7, 6)), (MPConv2d(6, 5, 3), torch.randn(2, 6, 4, 4))):
        before = layer(x)
        before.square().sum().backward()
        along = (layer.weight.grad * layer.weight).flatten(1).sum(1)
        assert along.abs().max() < 1e-3 * layer.weight.grad.abs().max()
        with torch.no_grad():
            layer.weight *= 0.7
        torch.testing.assert_close(layer(x), before)


def test_gradients_reach_every_parameter():
    """Else something is built and never used."""
    unet = toy(learned_uncertainty=True).train()
    output = unet(*inputs())
    (output.sample.square().sum() + output.log_variance.sum()).backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# ---- its size -------------------------------------------------------------------------------------------------------


def operations(unet: torch.nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, 4, 16, 16), torch.tensor([1]), torch.zeros(1, 20, 192))
    return counter.get_total_flops()


def test_presets_compare_at_equal_compute():
    """Else the ablation compares a large network with a small one."""
    shared = {"latent_channels": 4, "sample_size": 16, "cross_attention_dim": 192, "seed": 0}
    counted = {name: operations(build_unet(name, **shared)) for name in UNET_PRESETS}
    assert counted["mp"] == pytest.approx(counted["emoji64"], rel=0.03)
    assert counted["mp-tiny"] == pytest.approx(counted["tiny"], rel=0.03)
    sizes = {name: sum(p.numel() for p in build_unet(name, **shared).parameters()) for name in ("tiny", "mp-mini")}
    assert sizes["mp-mini"] == pytest.approx(sizes["tiny"] / 5, rel=0.03)


# ---- EDM's terms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_three_prediction_types_say_the_same_of_x_0(sigma_data):
    """Else a scheduler would take the network's output for what it is not."""
    latents, timesteps, text = inputs(8)
    outputs = {}
    for kind in ("sample", "epsilon", "v_prediction"):
        unet = toy(prediction_type=kind, sigma_data=sigma_data)
        with torch.no_grad():
            output = unet(latents, timesteps, text).sample
        abar = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
        outputs[kind], _ = predict_x0_and_epsilon(abar, output, latents, timesteps, kind)
    torch.testing.assert_close(outputs["epsilon"], outputs["sample"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs["v_prediction"], outputs["sample"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_preconditioning_is_edms(sigma_data):
    """Else the network is trained on other scales than arXiv 2206.00364 says (table 1)."""
    sigma = torch.tensor([0.01, 0.3, 1.0, 20.0])[:, None]
    x, answer = torch.randn(4, 5), torch.randn(4, 5)
    root = (sigma**2 + sigma_data**2).sqrt()
    denoised = sigma_data**2 / root**2 * x + sigma * sigma_data / root * answer
    scales, x_t = Preconditioning(sigma, sigma_data), x / (1 + sigma**2).sqrt()
    torch.testing.assert_close(scales.of_input * x_t, x / root)
    torch.testing.assert_close(scales.output("sample", x_t, answer), denoised, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scales.output("epsilon", x_t, answer), (x - denoised) / sigma, rtol=1e-3, atol=1e-4)
    if sigma_data == 1:
        torch.testing.assert_close(scales.output("v_prediction", x_t, answer), -answer)


def test_all_noise_has_a_finite_answer():
    """Else zero terminal SNR, where sigma is infinite, ends in NaN at the first step."""
    unet = toy(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    latents, _, text = inputs()
    with torch.no_grad():
        output = unet(latents, torch.tensor([999, 998]), text).sample
    assert output.isfinite().all()


# ---- its call -------------------------------------------------------------------------------------------------------


def test_arguments_without_use_are_refused_and_none_is_taken():
    """Else a control net, or the guidance weight as an input, would be silently ignored."""
    latents, timesteps, text = inputs()
    unet = toy()
    with torch.no_grad():
        plain = unet(latents, timesteps, encoder_hidden_states=text, added_cond_kwargs=None, return_dict=False)[0]
        assert torch.equal(plain, unet(latents, timesteps, text, None, None).sample)
        assert unet(latents, 5, text).sample.shape == unet(latents, torch.tensor(5.5), text).sample.shape
        for name in ("timestep_cond", "mid_block_additional_residual", "class_labels"):
            with pytest.raises(ValueError, match=name):
                unet(latents, timesteps, text, **{name: torch.zeros(2)})


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"attention_levels": (True,)}, "attention_levels has 1"),
        ({"block_out_channels": (8, 17), "attention_head_dim": 5}, "17 channels"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
    ],
)
def test_what_cannot_be_built_is_named(changes, named):
    """Else a config.json with a mistake fails in the middle of a forward."""
    with pytest.raises(ValueError, match=named):
        toy(**changes)


@pytest.mark.parametrize("kind", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDPM"])
def test_every_scheduler_runs_on_it(kind):
    """Else samplers that stand between whole timesteps, or scale their input, meet a network that knows only DDIM."""
    pipe = pipeline(toy())
    pipe.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(pipe.scheduler.config)
    assert draw(pipe).isfinite().all()


def test_a_scheduler_that_means_other_noise_is_refused():
    """Else pictures are drawn by a network that takes one noise level for another."""
    unet = toy()
    for changes in ({"prediction_type": "v_prediction"}, {"beta_end": 0.02}, {"rescale_betas_zero_snr": True}):
        pipe = pipeline(unet)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
        with pytest.raises(ValueError, match=next(iter(changes))):
            draw(pipe)
    with pytest.raises(ValueError, match="beta_end"):
        pipeline(tiny_components()["unet"])("a cat", guide_unet=toy(beta_end=0.02), num_inference_steps=2)


def test_other_pipelines_run_on_it():
    """Else only text to image does."""
    pipe = pipeline(toy())
    shared = {"num_inference_steps": 2, "output_type": "pt"}
    calls = {
        LatentDiffPipeline: {"guide_unet": toy(1)},
        LatentDiffImg2ImgPipeline: {"image": PICTURE},
        LatentDiffInpaintPipeline: {"image": PICTURE, "mask_image": MASK},
        LatentDiffInterpolatePipeline: {"seeds": [0, 1], "num_frames": 3},
        LatentDiffInversionPipeline: {"image": PICTURE, "source_prompt": "a dog"},
    }
    for kind, arguments in calls.items():
        other = kind.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        assert other("a cat", **shared, **arguments).images.isfinite().all(), kind


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_precision_draws_about_the_same(dtype, tolerance):
    """Else noise levels or frequencies are rounded with the weights, or something overflows."""
    whole, pipe = draw(pipeline(toy())), pipeline(toy()).to(dtype=dtype)
    assert (draw(pipe).float() - whole).abs().max() < tolerance


def test_gradient_checkpointing_changes_nothing():
    """Else the saved memory is paid for with other gradients, or nothing is saved."""
    gradients = []
    for checkpointed in (False, True):
        unet = toy().train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
            calls, real = [], unet._gradient_checkpointing_func
            unet._gradient_checkpointing_func = lambda *args, real=real, calls=calls: calls.append(1) or real(*args)
        unet(*inputs()).sample.square().sum().backward()
        gradients.append([p.grad for p in unet.parameters()])
    assert len(calls) == len(unet.encoder) + len(unet.middle) + len(unet.decoder)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_widened_input_changes_nothing_until_it_is_trained():
    """Else inpainting starts from a damaged model, or a filter no longer has unit norm."""
    unet, (latents, timesteps, text) = toy(), inputs()
    with torch.no_grad():
        before = unet(latents, timesteps, text).sample
        widen_input(unet, 9)
        after = unet(torch.cat([latents, torch.randn(2, 5, 4, 4)], dim=1), timesteps, text).sample
    torch.testing.assert_close(after, before)
    assert unet.config.in_channels == 9 and (relative_norms(unet) - 1).abs().max() < 1e-5


# ---- saving and travelling ------------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_and_travels(tmp_path):
    """Else it loads only where it was made; or somebody's code runs without their consent."""
    pipe = pipeline(toy())
    picture = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == ["mp_unet", "MPUNet2DConditionModel"]
    again = LatentDiffPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is MPUNet2DConditionModel and torch.equal(draw(again), picture)
    assert type(load_unet(str(tmp_path))) is unet_class(tmp_path / "unet") is MPUNet2DConditionModel
    assert torch.equal(stranger_draws(str(tmp_path), "save again"), picture)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)


def test_a_pushed_pipeline_loads_over_http(hub, tmp_path):
    """Else what the Hub leaves out of a download, such as a file that the network's code imports, is missing there."""
    pipe = pipeline(toy())
    picture = draw(pipe)
    pipe.save_pretrained(tmp_path / "mp", push_to_hub=True, repo_id=f"{USER}/mp")
    assert torch.equal(stranger_draws(f"{USER}/mp"), picture)
    here = LatentDiffPipeline.from_pretrained(f"{USER}/mp", cache_dir=tmp_path / "cache")
    here.set_progress_bar_config(disable=True)
    assert type(here.unet) is MPUNet2DConditionModel and torch.equal(draw(here), picture)
