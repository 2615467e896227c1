"""Guidance within the sampling loop: where it acts, what it leads away from, and noise that belongs to one picture."""

import math

import diffusers
import pytest
import torch

from latentdiff import DDIMScheduler, DDPMScheduler, LatentDiffPipeline
from latentdiff.diffusion.noise_schedule import noise_level
from tiny import tiny_components

STEPS = 6


@pytest.fixture
def pipe():
    pipe = LatentDiffPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def worse():
    """Another UNet, for autoguidance."""
    return tiny_components(seed=1)["unet"]


def draw(pipe, prompt="a cat", **kwargs) -> torch.Tensor:
    return pipe(prompt, **{"num_inference_steps": STEPS, "seeds": [0], "output_type": "pt", **kwargs}).images


def batches_of(unet) -> list[int]:
    """How many pictures each pass of the UNet from now on is of."""
    batches = []
    unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    return batches


def levels(pipe) -> list[float]:
    pipe.scheduler.set_timesteps(STEPS)
    abar = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    return ((1 - abar) / abar).sqrt().tolist()


# ---- the interval ---------------------------------------------------------------------------------------------------


def test_noise_level_is_that_of_the_schedule():
    """Else an interval in sigma is another one than the paper's."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    euler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert noise_level(scheduler.alphas_cumprod, 999) == pytest.approx(14.6146, abs=1e-3)  # Stable Diffusion's largest
    euler.set_timesteps(7)
    ours = [noise_level(euler.alphas_cumprod, t) for t in euler.timesteps.tolist()]
    assert ours == pytest.approx(euler.sigmas[:-1].tolist(), rel=1e-4)
    zero = DDIMScheduler(rescale_betas_zero_snr=True)
    assert noise_level(zero.alphas_cumprod, 999) == math.inf


def test_outside_the_interval_there_is_no_unconditional_pass(pipe):
    """Else the interval costs as much as guidance everywhere, or its ends are off by a step."""
    sigmas, batches = levels(pipe), batches_of(pipe.unet)
    picture = draw(pipe, guidance_interval=(sigmas[4], sigmas[1]))
    assert batches == [1, 2, 2, 2, 1, 1]
    assert torch.equal(draw(pipe, guidance_interval=(0.0, math.inf)), draw(pipe))
    assert not torch.equal(picture, draw(pipe))
    nowhere = draw(pipe, guidance_interval=(1e6, 1e7))
    torch.testing.assert_close(nowhere, draw(pipe, guidance_scale=1.0))


@pytest.mark.parametrize("name", ["Euler", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"])
def test_the_interval_means_the_same_to_every_scheduler(pipe, name):
    """Else it is read off timesteps that mean other noise levels elsewhere."""
    full = {"Euler": "EulerDiscreteScheduler"}.get(name, f"{name}Scheduler")
    pipe.scheduler = getattr(diffusers, full).from_config(pipe.scheduler.config)
    batches = batches_of(pipe.unet)
    draw(pipe, guidance_interval=(0.5, 3.0))
    sigmas = [noise_level(pipe.scheduler.alphas_cumprod, t) for t in pipe.scheduler.timesteps.tolist()]
    assert batches == [2 if 0.5 < sigma <= 3.0 else 1 for sigma in sigmas] and len(set(batches)) == 2


def test_a_scale_that_follows_the_noise_level(pipe):
    """Else a guidance schedule is taken and the first value used throughout."""
    asked = []

    def scale(sigma: float) -> float:
        asked.append(sigma)
        return 5.0 if sigma > 1.0 else 1.0

    sigmas, batches = levels(pipe), batches_of(pipe.unet)
    scheduled = draw(pipe, guidance_scale=scale)
    assert asked == pytest.approx(sigmas) and batches == [2 if s > 1.0 else 1 for s in sigmas]
    assert torch.equal(scheduled, draw(pipe, guidance_scale=5.0, guidance_interval=(1.0, math.inf)))


def test_ip_adapters_go_on_outside_the_interval(pipe):
    """Else the unguided steps get both halves of the picture's features, and fail or mix them up."""
    attention = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    sizes = [pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in attention]
    normal = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(3))  # noqa: E731
    adapter = {f"{2 * i + 1}.to_{k}_ip.weight": normal(n, 16) for i, n in enumerate(sizes) for k in "kv"}
    projection = {"proj.weight": normal(64, 12), "proj.bias": normal(64)}
    projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
    embeds = {"ip_adapter_image_embeds": [normal(2, 1, 12)]}
    alone = {"ip_adapter_image_embeds": [embeds["ip_adapter_image_embeds"][0][1:]]}
    nowhere = draw(pipe, guidance_interval=(1e6, 1e7), **embeds)
    torch.testing.assert_close(nowhere, draw(pipe, guidance_scale=1.0, **alone))


# ---- autoguidance ---------------------------------------------------------------------------------------------------


def test_autoguidance_leads_away_from_the_worse_networks_answer(pipe, worse):
    """Else it is not e_bad + w (e_good - e_bad) under one and the same prompt (arXiv 2406.02507, eq. 1)."""
    embeds, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    latents = x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            good, bad = (unet(x, t, embeds).sample for unet in (pipe.unet, worse))
            x = pipe.scheduler.step(bad + 2.0 * (good - bad), t, x).prev_sample
    drawn = draw(pipe, guidance_scale=2.0, guide_unet=worse, latents=latents, seeds=None, output_type="latent")
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)
    assert draw(pipe, guidance_scale=2.0).shape == (1, 3, 16, 16)  # and the next call is guided as ever
    assert pipe.do_classifier_free_guidance


def test_autoguidance_by_the_same_network_changes_nothing(pipe):
    """Else it sees another input or prompt than the network it guides."""
    own = draw(pipe, guidance_scale=3.0, guide_unet=pipe.unet)
    torch.testing.assert_close(own, draw(pipe, guidance_scale=1.0))


def test_autoguidance_keeps_to_the_interval(pipe, worse):
    """Else the second network runs where it has no say."""
    sigmas, batches = levels(pipe), batches_of(worse)
    draw(pipe, guide_unet=worse, guidance_interval=(sigmas[3], sigmas[1]))
    assert batches == [1, 1]


# ---- noise that belongs to a picture --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_a_seed_is_a_picture(pipe, scheduler):
    """Else a picture depends on the batch it was drawn in, and cannot be drawn again from its seed."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seeds = [3, 1, 4, 15, 9, 2, 6, 5]
    noise = {}

    def keep(p, i, t, tensors):
        noise.setdefault(len(tensors["latents"]), []).append(tensors["latents"])
        return {}

    together = draw(pipe, seeds=seeds, eta=1.0, callback_on_step_end=keep)
    alone = draw(pipe, seeds=[5], eta=1.0, callback_on_step_end=keep)
    torch.testing.assert_close(together[7:], alone, rtol=0, atol=1e-4)
    assert len(together) == 8 and not torch.allclose(together[0], together[7], atol=1e-2)
    first, first_alone = (
        pipe.prepare_latents(n, 4, 16, 16, torch.float32, torch.device("cpu"), pipe._generators(s, None, 1, 1)[0])
        for n, s in ((8, seeds), (1, [5]))
    )
    assert torch.equal(first[7:], first_alone)


def test_the_noise_of_every_step_is_the_pictures_own(pipe):
    """Else stochastic steps draw from a stream that the whole batch shares: here the network has no say."""
    pipe.unet.forward = lambda x, t, **kwargs: (torch.zeros_like(x),)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    together = draw(pipe, seeds=[8, 5, 7], output_type="latent")
    assert torch.equal(together[1:2], draw(pipe, seeds=[5], output_type="latent"))


def test_seeds_and_prompts(pipe):
    """Else seeds are dealt out to the wrong pictures."""
    both = draw(pipe, ["a cat", "a dog"], seeds=[1, 2, 3, 4], num_images_per_prompt=2)
    torch.testing.assert_close(both[2:3], draw(pipe, "a dog", seeds=[3]), rtol=0, atol=1e-4)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(draw(pipe, "a dog", seeds=None, generator=generator), draw(pipe, "a dog", seeds=[3]))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seeds": []}, "0 seeds for 0 pictures"),
        ({"seeds": [1, 2, 3], "prompt": ["a", "b"]}, "3 seeds for 2 pictures"),
        ({"seeds": [1], "generator": torch.Generator()}, "seeds or generator, not both"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval=\\(2.0, 1.0\\)"),
        ({"guide_unet": "worse", "negative_prompt": "red"}, "leave out the negative prompt"),
        ({"guide_unet": "nine"}, "takes 9 channels and the pipeline's own UNet 4"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_guidance_is_named(pipe, worse, call, message):
    """Else an option is accepted that does nothing."""
    if call.get("guide_unet") == "worse":
        call = {**call, "guide_unet": worse}
    if call.get("guide_unet") == "nine":
        nine = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
        call = {**call, "guide_unet": nine}
    with pytest.raises(ValueError, match=message):
        draw(pipe, **{"prompt": "a cat", **call})


def test_a_unet_that_takes_guidance_as_an_input_refuses_what_it_cannot_do(pipe, worse):
    """Else an interval is accepted by a distilled UNet, whose guidance is always on."""
    pipe.unet.register_to_config(time_cond_proj_dim=9)
    for options in ({"guidance_interval": (0.1, 1.0)}, {"guide_unet": worse}, {"guidance_scale": lambda sigma: 2.0}):
        with pytest.raises(ValueError, match="takes the guidance weight as an input"):
            draw(pipe, **options)


def test_a_scheduler_without_noise_levels_is_named(pipe):
    """Else an AttributeError comes out of the middle of the loop."""
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        draw(pipe, guidance_interval=(0.1, 1.0))
