"""The text-to-image pipeline: Stable Diffusion's pictures to the last bit, and its guidance."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentdiff import LatentDiffPipeline
from latentdiff.diffusion.guidance import guide
from latentdiff.diffusion.unet_inputs import guidance_embedding
from tiny import tiny_components

STEPS = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt="a cat", **kwargs) -> torch.Tensor:
    """Pictures (B, 3, H, W), with seed 0 and few steps unless told otherwise."""
    defaults = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "pt"}
    return pipe(prompt, **{**defaults, **kwargs}).images


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_pipeline_folder):
    return quiet(LatentDiffPipeline.from_pretrained(tiny_pipeline_folder))


@pytest.fixture
def plain(tiny_pipeline_folder):
    return quiet(StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder))


@pytest.fixture
def warnings_logged(caplog, monkeypatch):
    """The messages that the pipeline logs, wherever diffusers' loggers would send them."""
    from latentdiff.pipelines import latent_pipeline, portable_saving, prompt_embedding

    for module in (latent_pipeline, portable_saving, prompt_embedding):
        monkeypatch.setattr(module, "logger", logging.getLogger("test.pipeline"))
    return lambda: [record.getMessage() for record in caplog.records if record.name == "test.pipeline"]


# ---- the same picture as Stable Diffusion ---------------------------------------------------------------------------

SAME_CALLS = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "eta": {"eta": 0.7},
    "negative": {"negative_prompt": "red dog"},
    "many": {"num_images_per_prompt": 2, "prompt": ["a cat", "a dog"], "negative_prompt": ["red", "do"]},
    "generators": {"num_images_per_prompt": 2, "generator": "list", "eta": 1.0},
    "rescale": {"guidance_rescale": 0.6},
    "size": {"height": 24, "width": 16},
    "cut prompt": {"prompt": "a cat and a red dog and a cat"},
    "pil": {"output_type": "pil"},
    "np": {"output_type": "np"},
    "latent": {"output_type": "latent"},
}


@pytest.mark.parametrize("call", SAME_CALLS.values(), ids=SAME_CALLS.keys())
def test_draws_what_stable_diffusion_draws(pipe, plain, call):
    """Else a folder means one thing to users of latentdiff and another to everyone else."""

    def run(pipeline):
        kwargs = dict(call)
        if kwargs.get("generator") == "list":
            kwargs["generator"] = [seeded(1), seeded(2)]
        return [np.asarray(image) for image in draw(pipeline, **kwargs)]

    ours, theirs = run(pipe), run(plain)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.std(ours[0].astype(np.float64)) > 0.01  # a blank picture would equal another


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' own schedulers
@pytest.mark.parametrize(
    "name", ["Euler", "DPMSolverMultistep", "UniPCMultistep", "PNDM", "LMS", "DDPM", "HeunDiscrete"]
)
def test_other_schedulers_draw_what_they_draw_in_stable_diffusion(pipe, plain, name):
    """Else `generator`, `eta` or the scaling of the model's input reaches `step` wrongly for one of them."""
    if name == "LMS":
        pytest.importorskip("scipy")
    full = {"Euler": "EulerDiscreteScheduler", "LMS": "LMSDiscreteScheduler"}.get(name, f"{name}Scheduler")
    for pipeline in (pipe, plain):
        pipeline.scheduler = getattr(diffusers, full).from_config(pipeline.scheduler.config)
    ours = draw(pipe)
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, draw(plain))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler])
def test_settings_that_stable_diffusion_forces_are_forced_here_too(scheduler, warnings_logged):
    """Else a scheduler at its defaults starts one timestep off, or clips latents at 1, in one pipeline only."""
    components = tiny_components()
    components["scheduler"] = scheduler()
    ours = draw(quiet(LatentDiffPipeline(**components)), guidance_scale=3.0)
    assert any("steps_offset" in m or "clip_sample" in m for m in warnings_logged())
    components["scheduler"] = scheduler()
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    assert torch.equal(ours, draw(quiet(StableDiffusionPipeline(**components, **extra)), guidance_scale=3.0))


def test_guidance_as_an_input_of_the_unet(tiny_pipeline_folder):
    """Else a UNet distilled with guidance as an input gets no or another embedding, or pays for a second pass."""
    unet = diffusers.UNet2DConditionModel.from_config(
        diffusers.UNet2DConditionModel.load_config(tiny_pipeline_folder / "unet"), time_cond_proj_dim=9
    ).eval()
    ours, theirs = (
        quiet(cls.from_pretrained(tiny_pipeline_folder, unet=unet))
        for cls in (LatentDiffPipeline, StableDiffusionPipeline)
    )
    picture = draw(ours, guidance_scale=4.0)
    assert torch.equal(picture, draw(theirs, guidance_scale=4.0))
    assert not torch.equal(picture, draw(ours, guidance_scale=8.0))
    w = torch.tensor([0.5, 6.5])
    assert torch.equal(guidance_embedding(w, 9), theirs.get_guidance_scale_embedding(w, 9))


def test_ip_adapter_conditions_as_in_stable_diffusion(pipe, plain):
    """Else pictures conditioned on an image that the loader accepts come out without it, or with the halves swapped."""
    tokens, width, clip_width = 4, 16, 12
    attention = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    sizes = [pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in attention]
    make = lambda *shape: 0.3 * torch.randn(shape, generator=seeded(3))  # noqa: E731
    adapter = {f"{2 * i + 1}.to_{k}_ip.weight": make(size, width) for i, size in enumerate(sizes) for k in "kv"}
    projection = {"proj.weight": make(tokens * width, clip_width), "proj.bias": make(tokens * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    embeds = make(2, 1, clip_width)  # no image, then the image
    pictures = []
    for pipeline in (pipe, plain):
        pipeline.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
        pictures.append(draw(pipeline, ip_adapter_image_embeds=[embeds]))
    assert torch.equal(*pictures)
    assert not torch.equal(pictures[0], draw(pipe, ip_adapter_image_embeds=[embeds.flip(0)]))


def test_lora_strength_as_in_stable_diffusion(pipe, plain):
    """Else "scale" reaches the UNet's LoRA layers only, or stays in the text encoder after the call."""
    peft = pytest.importorskip("peft")
    without = draw(pipe)
    for pipeline in (pipe, plain):
        pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        layers = [*pipeline.unet.named_parameters(), *pipeline.text_encoder.named_parameters()]
        for index, layer in enumerate(layer for name, layer in layers if "lora_" in name):
            layer.data = torch.randn(layer.shape, generator=seeded(index))
    full = draw(pipe)
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(half, draw(plain, cross_attention_kwargs={"scale": 0.5}))
    assert torch.equal(full, draw(pipe)) and torch.equal(full, draw(plain))
    torch.testing.assert_close(draw(pipe, cross_attention_kwargs={"scale": 0.0}), without)
    assert not torch.allclose(half, full) and not torch.allclose(half, without)


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_formula_against_two_calls(pipe):
    """Else the batched call mixes up its halves: e_u + w (e_c - e_u), here from two separate network calls."""
    prompt, negative = pipe.encode_prompt("a cat", "cpu", 1, True, "red")
    latents = torch.randn(1, 4, 4, 4, generator=seeded())
    pipe.scheduler.set_timesteps(STEPS)
    x = latents
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            cond, uncond = (pipe.unet(x, t, embeds).sample for embeds in (prompt, negative))
            x = pipe.scheduler.step(uncond + 5.0 * (cond - uncond), t, x).prev_sample
    drawn = draw(pipe, guidance_scale=5.0, negative_prompt="red", latents=latents, output_type="latent")
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0])
def test_no_guidance_means_no_unconditional_pass(pipe, guidance_scale):
    """Else guidance 1, which changes nothing, costs twice the time."""
    batches = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    latents = torch.randn(1, 4, 4, 4, generator=seeded())
    drawn = draw(pipe, guidance_scale=guidance_scale, latents=latents, output_type="latent")
    assert batches == [1] * STEPS
    prompt, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            latents = pipe.scheduler.step(pipe.unet(latents, t, prompt).sample, t, latents).prev_sample
    assert torch.equal(drawn, latents)


def test_rescaled_guidance_has_the_deviation_of_the_conditional_branch():
    """Else rescaling (arXiv 2305.08891, eq. 14-16) does not undo overexposure."""
    uncond, cond = torch.randn(2, 3, 4, 8, 8, generator=seeded())
    deviation = lambda x: x.flatten(1).std(dim=1)  # noqa: E731
    torch.testing.assert_close(deviation(guide(uncond, cond, 7.5, 1.0)), deviation(cond))
    assert torch.equal(guide(uncond, cond, 7.5, 0.0), uncond + 7.5 * (cond - uncond))
    half = 0.5 * guide(uncond, cond, 7.5, 1.0) + 0.5 * guide(uncond, cond, 7.5)
    torch.testing.assert_close(guide(uncond, cond, 7.5, 0.5), half)
