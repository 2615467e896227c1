"""Image to image: Stable Diffusion's pictures to the last bit where they are right, and right where they are not."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

import latentdiff
from hub_server import USER
from latentdiff import LatentDiffImg2ImgPipeline, LatentDiffPipeline
from stranger import CALLS, stranger_draws
from tiny import tiny_components

STEPS = 5
pytestmark = [
    # Of diffusers' own pipelines and schedulers.
    pytest.mark.filterwarnings("ignore:You have passed .* text prompts:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw(pipe, prompt="a cat", image=None, **kwargs) -> torch.Tensor:
    """Pictures (B, 3, H, W) with seed 0 unless told otherwise."""
    defaults = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "pt"}
    return pipe(prompt, picture() if image is None else image, **{**defaults, **kwargs}).images


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_pipeline_folder):
    return quiet(LatentDiffImg2ImgPipeline.from_pretrained(tiny_pipeline_folder))


@pytest.fixture
def plain(tiny_pipeline_folder):
    return quiet(StableDiffusionImg2ImgPipeline.from_pretrained(tiny_pipeline_folder))


# ---- the same picture as Stable Diffusion ---------------------------------------------------------------------------

SAME_CALLS = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "eta": {"eta": 0.7},
    "all the way": {"strength": 1.0},
    "half a step more": {"strength": 0.5},  # 2.5 steps are 2 in either
    "negative": {"negative_prompt": "red dog"},
    "several of one": {"num_images_per_prompt": 2},
    "a picture for each": {"prompt": ["a cat", "a dog"], "image": [picture(1), picture(2)]},
    "generators": {"num_images_per_prompt": 2, "generator": [1, 2], "eta": 1.0},
    "no generator": {"generator": None},
    "tensors": {"image": torch.rand(1, 3, 16, 16, generator=seeded(1))},
    "arrays": {"image": np.random.default_rng(0).random((1, 16, 20, 3), dtype=np.float32)},
    "odd size": {"image": picture(3, width=27, height=18)},
    "latents": {"image": torch.randn(1, 4, 4, 6, generator=seeded(1))},
}


@pytest.mark.parametrize("call", SAME_CALLS.values(), ids=SAME_CALLS.keys())
def test_draws_what_stable_diffusion_draws(pipe, plain, call):
    """Else a folder means one thing to users of latentdiff and another to everyone else."""

    def run(pipeline):
        torch.manual_seed(7)
        kwargs = dict(call)
        if isinstance(kwargs.get("generator"), list):
            kwargs["generator"] = [seeded(seed) for seed in kwargs["generator"]]
        return draw(pipeline, **kwargs)

    ours, theirs = run(pipe), run(plain)
    assert torch.equal(ours, theirs)
    assert ours.std() > 0.01  # a blank picture would equal another


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(
    "name", ["DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"]
)
def test_other_schedulers_draw_what_they_draw_in_stable_diffusion(pipe, plain, name, strength):
    """Else a scheduler does not learn that it begins in the middle, or noise is added for another timestep."""
    for pipeline, library in ((pipe, latentdiff), (plain, diffusers)):
        full = f"{name}Scheduler"
        scheduler = getattr(library, full, None) or getattr(diffusers, full)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    ours = draw(pipe, strength=strength)
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, draw(plain, strength=strength))


# ---- what it does with the picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_starts_from_the_noised_picture_and_takes_the_last_steps(pipe, strength):
    """Else it is not SDEdit: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, here by hand, denoised from t on."""
    x_0, noise = (torch.randn(1, 4, 4, 4, generator=seeded(seed)) for seed in (1, 2))
    drawn = draw(pipe, image=x_0, strength=strength, guidance_scale=1.0, generator=seeded(2), output_type="latent")
    prompt, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    pipe.scheduler.set_timesteps(STEPS)
    timesteps = pipe.scheduler.timesteps[STEPS - round(STEPS * strength) :]
    abar = pipe.scheduler.alphas_cumprod[timesteps[0]]
    x = abar**0.5 * x_0 + (1 - abar) ** 0.5 * noise
    with torch.no_grad():
        for t in timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t, prompt).sample, t, x).prev_sample
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-5)
    assert pipe.num_timesteps == len(timesteps)


def test_strength_is_not_cut_by_floating_point(pipe, plain):
    """Else 0.29 of 100 steps are 28, as in Stable Diffusion's pipeline, since 0.29 * 100 is 28.999…"""
    visited = {}
    for pipeline in (pipe, plain):
        steps = visited.setdefault(type(pipeline), [])
        draw(
            pipeline,
            strength=0.29,
            num_inference_steps=100,
            guidance_scale=1.0,
            callback_on_step_end=lambda p, i, t, k, steps=steps: steps.append(int(t)) or k,
        )
    ours, theirs = visited[LatentDiffImg2ImgPipeline], visited[StableDiffusionImg2ImgPipeline]
    assert (len(ours), len(theirs)) == (29, 28) and ours[1:] == theirs


def test_a_little_strength_takes_one_step(pipe, plain):
    """Else a small strength, which leaves no whole step, ends in an error about shapes as in Stable Diffusion's."""
    draw(pipe, strength=0.1)
    assert pipe.num_timesteps == 1
    with pytest.raises(Exception, match=r"(?s).*"):
        draw(plain, strength=0.1)


def test_every_picture_meets_its_own_prompt(pipe, plain):
    """Else the second picture is drawn under the first one's prompt, as Stable Diffusion's pipeline does it."""
    images = torch.randn(2, 4, 4, 4, generator=seeded(1))
    prompts, seeds = ["a cat", "a red dog"], [3, 4, 5, 6]
    call = {"image": images, "num_images_per_prompt": 2}
    alone = [draw(pipe, prompts[i // 2], images[i // 2][None], generator=seeded(seeds[i]))[0] for i in range(4)]
    ours = draw(pipe, prompts, generator=[seeded(seed) for seed in seeds], **call)
    torch.testing.assert_close(ours, torch.stack(alone), rtol=1e-3, atol=1e-4)
    crossed = draw(pipe, prompts[0], images[1][None], generator=seeded(seeds[1]))[0]
    theirs = draw(plain, prompts, generator=[seeded(seed) for seed in seeds], **call)
    torch.testing.assert_close(theirs[1], crossed, rtol=1e-3, atol=1e-4)  # the first prompt, the second picture


def test_transparent_pictures_lie_on_white(pipe, plain):
    """Else four channels of colour and opacity are taken for latents, as Stable Diffusion's pipeline does it."""
    transparent = picture().copy()
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    flat = Image.new("RGBA", transparent.size, "white")
    flat.alpha_composite(transparent)
    assert torch.equal(draw(pipe, image=transparent), draw(pipe, image=flat.convert("RGB")))
    assert draw(pipe, image=transparent).shape == (1, 3, 16, 24)
    assert draw(plain, image=transparent).shape == (1, 3, 64, 96)  # one latent for each pixel
    assert torch.isfinite(draw(pipe, image=picture().convert("L"))).all()


def test_latents_of_any_number_of_channels(tiny_pipeline_folder):
    """Else only latents of four channels are latents."""
    parts = tiny_components()
    vae = diffusers.AutoencoderKL.from_config(parts["vae"].config, latent_channels=6)
    unet = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, in_channels=6, out_channels=6)
    parts |= {"vae": vae.eval(), "unet": unet.eval()}
    latents = torch.randn(1, 6, 4, 4, generator=seeded())
    assert draw(quiet(LatentDiffImg2ImgPipeline(**parts)), image=latents).shape == (1, 3, 16, 16)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with pytest.raises(RuntimeError, match="channels"):
        draw(quiet(StableDiffusionImg2ImgPipeline(**parts, **extra)), image=latents)


def test_share_of_custom_timesteps_with_a_sampler_of_order_two(pipe, plain):
    """Else the steps are counted as network calls and skipped twice over: nothing is left, as in Stable Diffusion's."""
    for pipeline in (pipe, plain):
        pipeline.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    timesteps = [900, 700, 500, 300, 100]
    visited = []
    draw(pipe, timesteps=timesteps, strength=0.4, callback_on_step_end=lambda p, i, t, k: visited.append(int(t)) or k)
    assert sorted(set(visited), reverse=True) == [300, 100]
    with pytest.raises(Exception, match=r"(?s).*"):
        draw(plain, timesteps=timesteps, strength=0.4)


def test_pndm_begins_in_the_middle(pipe, plain):
    """Else the sample lags a step behind the timesteps: PNDM's first step, wherever it begins, takes two calls.

    For latents from N(0, s^2) the network's best answer is known, and with it the path: x_t is a multiple of
    sqrt(abar_t s^2 + 1 - abar_t). Half of 50 steps end as near to it as all of them.
    """
    s = 0.5

    def error(timesteps) -> float:
        std = lambda t: (abar[t] * s**2 + 1 - abar[t]) ** 0.5  # noqa: E731
        x = std(timesteps[0])
        for t in timesteps:
            x = scheduler.step(x * (1 - abar[t]) ** 0.5 / std(t) ** 2, t, x).prev_sample
        return abs(float(x / std(0)) - 1)

    kwargs = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    pipe.scheduler = plain.scheduler = scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, **kwargs)
    abar = scheduler.alphas_cumprod.double()
    whole = error(pipe._set_timesteps(50, "cpu"))
    assert error(pipe._set_timesteps(50, "cpu", strength=0.5)) < 1.1 * whole
    scheduler.set_timesteps(50)
    assert error(plain.get_timesteps(50, 0.5, "cpu")[0]) > 3 * whole
    draw(pipe, strength=0.5)
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=False)
    with pytest.raises(ValueError, match="skip_prk_steps=True"):
        draw(pipe, strength=0.5)


# ---- seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM"])
def test_a_seed_draws_the_same_alone_and_in_a_batch(pipe, scheduler):
    """Else a picture cannot be drawn again without its neighbours."""
    pipe.scheduler = getattr(latentdiff, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    together = draw(pipe, seeds=[5, 6, 7], eta=1.0, generator=None)
    for seed, one in zip([5, 6, 7], together, strict=True):
        torch.testing.assert_close(draw(pipe, seeds=[seed], eta=1.0, generator=None)[0], one, rtol=0, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_noise_of_a_seed_is_bit_identical_at_any_batch_size(pipe, monkeypatch):
    """Else the noise itself depends on the batch, and not only the network's rounding."""
    drawn = []
    normal = LatentDiffImg2ImgPipeline._normal

    def keep(*args):
        drawn.append(normal(*args))
        return drawn[-1]

    monkeypatch.setattr(LatentDiffImg2ImgPipeline, "_normal", staticmethod(keep))
    draw(pipe, seeds=[5, 6, 7], generator=None)
    draw(pipe, seeds=[6], generator=None)
    (posterior, noise), (posterior_alone, noise_alone) = drawn[:2], drawn[2:]
    assert torch.equal(posterior[1], posterior_alone[0]) and torch.equal(noise[1], noise_alone[0])


# ---- loading and saving ---------------------------------------------------------------------------------------------


def test_pipelines_change_into_one_another(pipe, plain, tiny_pipeline_folder):
    """Else editing loads the weights a second time, or another scheduler comes with them."""
    text = LatentDiffPipeline.from_pretrained(tiny_pipeline_folder)
    expected = draw(pipe)
    for source in (text, plain, StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)):
        ours = quiet(LatentDiffImg2ImgPipeline.from_pipe(source))
        assert ours.unet is source.unet and type(ours.scheduler) is latentdiff.DDIMScheduler
        assert torch.equal(draw(ours), expected)
    assert torch.equal(draw(quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))), expected)
    assert type(LatentDiffPipeline.from_pipe(pipe)) is LatentDiffPipeline


def test_saved_and_loaded_by_everyone(hub, pipe, tmp_path):
    """Else what this pipeline saves is not a Stable Diffusion folder, or lacks the code that a stranger needs."""
    pipe.save_pretrained(tmp_path / "saved")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")) is StableDiffusionPipeline
    again = quiet(LatentDiffImg2ImgPipeline.from_pretrained(tmp_path / "saved"))
    assert torch.equal(draw(again), draw(pipe))
    _, arguments = CALLS["img2img"]
    expected = draw(pipe, num_inference_steps=4, **arguments)
    assert torch.equal(stranger_draws(str(tmp_path / "saved"), "save again", "img2img"), expected)
    pipe.push_to_hub(f"{USER}/img2img")
    assert torch.equal(stranger_draws(f"{USER}/img2img", pipeline="img2img"), expected)


# ---- errors ---------------------------------------------------------------------------------------------------------

BAD_CALLS = [
    ({"strength": 0.0}, "strength=0.0"),
    ({"strength": 1.5}, "strength=1.5"),
    ({"image": []}, "image: pass a picture"),
    ({"image": [picture(1), picture(2, width=32)]}, r"\(24, 16\), \(32, 16\).*batch"),
    ({"image": torch.zeros(1, 5, 16, 16)}, "3 channels, not 5"),
    ({"image": [picture(i) for i in range(3)]}, "image: 3 of them for 1 prompts and 1 pictures: pass 1"),
    ({"seeds": [1, 2]}, "seeds or generator, not both"),
    ({"prompt": None}, "pass prompt or prompt_embeds"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message[:30] for _, message in BAD_CALLS])
def test_bad_arguments_are_named(pipe, call, message):
    """Else a user meets a shape error from deep inside the network."""
    with pytest.raises(ValueError, match=message):
        draw(pipe, **call)


def test_no_picture_is_said(pipe):
    with pytest.raises(ValueError, match="image: pass a picture"):
        pipe("a cat")


def test_a_unet_for_inpainting_is_refused(tiny_pipeline_folder):
    """Else nine channels meet a picture's four, deep inside the network."""
    config = diffusers.UNet2DConditionModel.load_config(tiny_pipeline_folder / "unet")
    unet = diffusers.UNet2DConditionModel.from_config(config, in_channels=9)
    for pipeline_class, call in ((LatentDiffImg2ImgPipeline, {"image": picture()}), (LatentDiffPipeline, {})):
        pipeline = pipeline_class.from_pretrained(tiny_pipeline_folder, unet=unet)
        with pytest.raises(ValueError, match=r"takes 9 channels.*4 \(the latents\).*LatentDiffInpaintPipeline"):
            pipeline("a cat", **call)
