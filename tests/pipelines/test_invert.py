"""Inversion: the noise that is found draws the picture again, and edits change what the words change."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from hub_server import USER
from latentdiff import DDIMScheduler, DDPMScheduler, LatentDiffInversionPipeline, LatentDiffPipeline
from stranger import CALLS, stranger_draws
from tiny import tiny_components

STEPS = 5


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gentle_components() -> dict:
    """The tiny parts with a UNet that is no steeper than trained ones, so that iterations close in quickly."""
    components = tiny_components()
    with torch.no_grad():
        components["unet"].conv_out.weight.mul_(0.3)
    return components


@pytest.fixture
def pipe():
    return quiet(LatentDiffInversionPipeline(**gentle_components()))


@pytest.fixture
def plain():
    return quiet(LatentDiffPipeline(**gentle_components()))


def picture(seed: int = 0, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def latents_of(vae, image: Image.Image) -> torch.Tensor:
    """By hand: the posterior's mean, scaled."""
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor


def edit(pipe, prompt="a cat", image=None, source_prompt="a cat", **kwargs) -> torch.Tensor:
    """Latents (B, C, h, w), or another output."""
    defaults = {"num_inference_steps": STEPS, "output_type": "latent", "num_fixed_point_iterations": 6, "strength": 0.8}
    image = picture() if image is None else image
    return pipe(prompt, image, source_prompt, **{**defaults, **kwargs}).images


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ---- noise that draws the picture again -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "negative_prompt": "red"},
        {"guidance_scale": 1.5, "guidance_interval": (0.3, 3.0), "guidance_rescale": 0.5},
        {"guidance_scale": lambda sigma: 1.5 if sigma > 1 else 1.0},
        {"clip_skip": 1},
    ],
    ids=["plain", "guided", "negative", "interval", "schedule", "clip_skip"],
)
@pytest.mark.parametrize("settings", [{}, {"prediction_type": "v_prediction"}, {"set_alpha_to_one": False}])
def test_what_is_inverted_is_drawn_again(pipe, plain, options, settings):
    """Else the noise is another picture's: an option that the drawing heeds is not heeded on the way up."""
    for one in (pipe, plain):
        one.scheduler = DDIMScheduler.from_config(one.scheduler.config, **settings)
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, **options}
    inverted = pipe.invert(picture(), "a cat", num_fixed_point_iterations=8, **options).latents
    drawn = plain("a cat", latents=inverted, output_type="latent", **options).images
    source = latents_of(pipe.vae, picture())
    assert distance(drawn, source) < 2e-3 < 0.3 < distance(inverted, source)


def test_error_falls_with_iterations_and_with_steps(pipe, plain):
    """Else asking the network again costs time for nothing, or without it many steps are as far off as few."""
    source = latents_of(pipe.vae, picture())

    def error(steps: int, iterations: int) -> float:
        inverted = pipe.invert(picture(), "a cat", steps, num_fixed_point_iterations=iterations).latents
        options = {"latents": inverted, "guidance_scale": 1.0, "output_type": "latent"}
        return distance(plain("a cat", num_inference_steps=steps, **options).images, source)

    first, second, third = (error(6, iterations) for iterations in (0, 2, 4))
    assert first > 4 * second > 16 * third
    assert error(48, 0) < first / 3  # of first order: an eighth, once steps are small


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_without_iterations_it_is_diffusers_inversion(pipe, spacing):
    """Else what is called DDIM inversion everywhere is something else here."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    theirs = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    theirs.set_timesteps(20)
    embeds, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    x = latents_of(pipe.vae, picture())
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(pipe.unet(x, t, embeds).sample, t, x).prev_sample
    ours = pipe.invert(picture(), "a cat", 20, num_fixed_point_iterations=0).latents
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def test_how_often_the_network_is_asked(pipe):
    """Else iterations are run and thrown away, or without guidance each asks twice."""
    asked = []
    pipe.unet.register_forward_pre_hook(lambda module, args: asked.append((int(args[1]), len(args[0]))))
    pipe.invert(picture(), "a cat", STEPS, num_fixed_point_iterations=2, strength=0.6)
    up = pipe.scheduler.timesteps.tolist()[2:][::-1]
    assert asked == [(t, 1) for t in up for _ in range(3)]
    asked.clear()
    edit(pipe, ["a cat", "a dog"], num_fixed_point_iterations=1)
    steps = 4  # four fifths of five
    assert [count for _, count in asked] == [1] * 2 * steps + [4] * steps  # one picture goes up once for two edits


def test_strength_leaves_the_rest_of_the_picture(pipe):
    """Else the picture is always taken all the way up, and what goes down starts at another noise level."""
    source, levels = latents_of(pipe.vae, picture()), []
    for strength in (0.2, 0.5, 1.0):
        levels.append(distance(pipe.invert(picture(), "a cat", 10, strength=strength).latents, source))
        assert distance(edit(pipe, strength=strength, num_inference_steps=10, guidance_scale=1.0), source) < 2e-3
    assert levels == sorted(levels)


# ---- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0, 7.5])
def test_the_same_words_bring_the_picture_back_whatever_the_guidance(pipe, guidance_scale):
    """Else an edit changes what the words do not: guidance has to lead away from the source itself."""
    source = latents_of(pipe.vae, picture())
    assert distance(edit(pipe, guidance_scale=guidance_scale), source) < 2e-3
    assert distance(edit(pipe, "a red dog", guidance_scale=guidance_scale), source) > 5e-3


def test_an_edit_is_the_difference_of_the_words_made_larger(pipe):
    """Else guidance is measured from another point: with one step, x changes by w times what the words change."""
    options = {"num_inference_steps": 1, "strength": 1.0, "guidance_scale": 1.0}
    kept = edit(pipe, **options)
    once = edit(pipe, "a red dog", **options) - kept
    options["guidance_scale"] = 3.0
    thrice = edit(pipe, "a red dog", **options) - kept
    assert distance(thrice, 3 * once) < 1e-2 * distance(thrice, once)
    elsewhere = edit(pipe, "a red dog", negative_prompt="", **options) - kept
    assert distance(elsewhere, 3 * once) > 0.3 * distance(thrice, once)


def test_the_way_down_is_text_to_images(pipe, plain):
    """Else an edit is not what the found noise draws under the new words."""
    inverted = pipe.invert(picture(), "a cat", STEPS).latents
    by_hand = plain(
        "a dog",
        latents=inverted,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        negative_prompt="a cat",
        output_type="pt",
    ).images
    edited = edit(pipe, "a dog", strength=1.0, guidance_scale=3.0, output_type="pt", num_fixed_point_iterations=2)
    torch.testing.assert_close(edited, by_hand, rtol=0, atol=1e-4)


def test_guidance_options_have_an_effect(pipe):
    """Else an option is taken and has none."""
    worse = tiny_components(seed=1)["unet"]
    edited = edit(pipe, "a red dog")
    for options in (
        {"guidance_rescale": 0.7},
        {"guidance_interval": (0.2, 1.0)},
        {"guide_unet": worse},
        {"negative_prompt": "red"},
        {"clip_skip": 1},
        {"guidance_scale": lambda sigma: 2.0},
    ):
        assert distance(edit(pipe, "a red dog", **options), edited) > 1e-4, options
    # On the way up nothing of it is heeded.
    assert (
        distance(edit(pipe, guidance_rescale=0.7, guidance_interval=(0.2, 1.0)), latents_of(pipe.vae, picture())) < 2e-3
    )


def test_long_prompts_of_several_lengths(pipe):
    """Else a longer prompt and its source have hidden states of different lengths, and cannot be guided."""
    source = "a cat a cat a cat a cat"
    kept = edit(pipe, source, source_prompt=source, long_prompts=True)
    assert distance(kept, latents_of(pipe.vae, picture())) < 2e-3
    edited = edit(pipe, source, source_prompt="a dog", long_prompts=True)
    assert distance(edited, edit(pipe, source, source_prompt="a dog")) > 1e-4


def test_one_or_one_for_each(pipe):
    """Else pictures meet the words of others."""
    pictures, sources, prompts = [picture(1), picture(2)], ["a cat", "red"], ["a dog", "a red dog"]
    each = edit(pipe, prompts, pictures, sources)
    for i in range(2):
        alone = edit(pipe, prompts[i], pictures[i], sources[i])
        torch.testing.assert_close(each[i : i + 1], alone, rtol=0, atol=1e-4)
    many = edit(pipe, "a dog", pictures, "a cat")
    torch.testing.assert_close(many[1:], edit(pipe, "a dog", pictures[1], "a cat"), rtol=0, atol=1e-4)
    words = edit(pipe, prompts, pictures[0], sources)
    torch.testing.assert_close(words[:1], each[:1], rtol=0, atol=1e-4)


def test_embeddings_and_latents_in_place_of_words_and_pictures(pipe):
    """Else a pipeline without a text encoder cannot edit."""
    expected = edit(pipe, "a dog", negative_prompt="red")
    embeds, _ = pipe.encode_prompt(["a dog", "a cat", "red"], "cpu", 1, False)
    names = ("prompt_embeds", "source_prompt_embeds", "negative_prompt_embeds")
    given = dict(zip(names, embeds.split(1), strict=True))
    image = latents_of(pipe.vae, picture())
    inverted = pipe.invert(image, "a cat", STEPS).latents
    pipe.text_encoder = pipe.tokenizer = None
    torch.testing.assert_close(edit(pipe, None, image, None, **given), expected, rtol=0, atol=1e-4)
    again = pipe.invert(image, None, STEPS, prompt_embeds=embeds[1:2]).latents
    torch.testing.assert_close(again, inverted, rtol=0, atol=1e-4)


# ---- schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDPMScheduler, diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler])
def test_other_schedulers_give_way_to_ddim(pipe, scheduler, caplog, monkeypatch):
    """Else most of the Stable Diffusion folders there are cannot be inverted, or a swap goes unsaid."""
    from latentdiff.pipelines import invert

    monkeypatch.setattr(invert, "logger", logging.getLogger("test.invert"))
    expected = pipe.invert(picture(), "a cat", STEPS).latents
    assert not caplog.records
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(pipe.invert(picture(), "a cat", STEPS).latents, expected)
    (record,) = caplog.records
    assert scheduler.__name__ in record.getMessage() and type(pipe.scheduler) is DDIMScheduler


def test_what_cannot_be_undone_is_refused(pipe):
    """Else thresholding, or a flow that is no DDIM, gives noise of nothing."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=True)
    with pytest.raises(ValueError, match="thresholding=True"):
        edit(pipe)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler cannot be run upwards.*DDIMScheduler"):
        pipe.invert(picture())


# ---- calls ----------------------------------------------------------------------------------------------------------


def test_output_types_and_tuples(pipe):
    """Else edits come in another form than pictures do elsewhere."""
    assert edit(pipe, output_type="pil")[0].size == (16, 16)
    assert edit(pipe, image=picture(width=24), output_type="np").shape == (1, 16, 24, 3)
    latents = edit(pipe, "a dog")
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), edit(pipe, "a dog", output_type="pt"))
    images, flagged = pipe("a dog", picture(), "a cat", num_inference_steps=2, return_dict=False)
    assert len(images) == 1 and flagged is None
    (latents,) = pipe.invert(picture(), num_inference_steps=2, return_dict=False)
    assert latents.shape == (1, 4, 4, 4)


def test_callback_sees_the_way_down_and_interrupt_ends_it(pipe):
    """Else a preview shows the picture dissolve, or a Stop button does not stop, or stops later calls as well."""
    seen = []

    def stop(p, step, timestep, tensors):
        seen.append((step, int(timestep)))
        p._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert edit(pipe, strength=1.0, callback_on_step_end=stop).abs().max() == 0
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()[:2])) and pipe.interrupt
    edit(pipe)
    assert not pipe.interrupt


def test_interrupt_ends_the_way_up(pipe):
    """Else Stop is heard only after half of the work."""
    asked = []

    def stop(module, args):
        asked.append(int(args[1]))
        pipe._interrupt = len(asked) == 2

    handle = pipe.unet.register_forward_pre_hook(stop)
    picture_so_far = edit(pipe, num_fixed_point_iterations=0, output_type="pt")
    assert len(asked) == 2 and torch.isfinite(picture_so_far).all() and pipe.interrupt
    handle.remove()


def test_half_precision_type_is_kept(pipe):
    """Else full-precision latents meet half-precision weights."""
    pipe.to(torch.bfloat16)
    assert edit(pipe).dtype == pipe.invert(picture(), num_inference_steps=2).latents.dtype == torch.bfloat16
    assert distance(edit(pipe).float(), latents_of(gentle_components()["vae"], picture())) < 0.1


EMBEDS = torch.zeros(1, 8, 16)
BAD_CALLS = [
    ({"prompt": None}, "pass prompt or prompt_embeds"),
    ({"source_prompt": 3}, "source_prompt must be a text or a list of texts, not 3"),
    ({"source_prompt_embeds": EMBEDS}, "pass source_prompt or source_prompt_embeds, not both"),
    ({"source_prompt_embeds": EMBEDS, "source_prompt": None}, "prompt_embeds and source_prompt_embeds, not a mix"),
    ({"prompt": None, "prompt_embeds": EMBEDS, "source_prompt": None}, "not a mix"),
    (
        {"prompt": None, "prompt_embeds": EMBEDS, "source_prompt": None, "source_prompt_embeds": EMBEDS[:, :4]},
        "embeddings of several shapes",
    ),
    ({"prompt": ["a", "b"], "source_prompt": ["a", "b", "c"]}, "prompt: 2 of them for 3 pictures: pass 1 or 3"),
    ({"image": [picture(i) for i in range(3)], "prompt": ["a", "b"]}, "prompt: 2 of them for 3 pictures"),
    ({"negative_prompt": ["a", "b"], "prompt": ["a", "b", "c"]}, "negative_prompt: 2 of them for 3"),
    ({"image": []}, "image: pass a picture"),
    ({"num_fixed_point_iterations": -1}, "num_fixed_point_iterations=-1"),
    ({"strength": 0.0}, "strength=0.0"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ({"output_type": "jpeg"}, "output_type='jpeg'"),
    ({"clip_skip": 9}, "clip_skip=9"),
    ({"callback_on_step_end_tensor_inputs": ["unet"]}, "unet.*latents, prompt_embeds"),
    ({"guide_unet": torch.nn.Identity(), "negative_prompt": "x"}, "leave out the negative prompt"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message[:40] for _, message in BAD_CALLS])
def test_bad_arguments_are_named(pipe, call, message):
    """Else a user meets a shape error from deep inside the network, after the picture has gone up."""
    asked = []
    pipe.unet.register_forward_pre_hook(lambda module, args: asked.append(1))
    with pytest.raises(ValueError, match=message) as caught:
        edit(pipe, **call)
    assert "\n" not in str(caught.value) and not asked


# ---- loading --------------------------------------------------------------------------------------------------------


def test_made_of_other_pipelines_and_saved_as_stable_diffusion(pipe, plain, tmp_path):
    """Else weights have to be loaded twice, or what was saved is another pipeline."""
    expected = edit(pipe, "a dog")
    torch.testing.assert_close(
        edit(quiet(LatentDiffInversionPipeline.from_pipe(plain)), "a dog"), expected, rtol=0, atol=1e-4
    )
    stable = StableDiffusionPipeline(
        **{**gentle_components(), "scheduler": diffusers.DDIMScheduler.from_config(plain.scheduler.config)},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    torch.testing.assert_close(
        edit(quiet(LatentDiffInversionPipeline.from_pipe(stable)), "a dog"), expected, rtol=0, atol=1e-4
    )
    pipe.save_pretrained(tmp_path)
    again = quiet(LatentDiffInversionPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(edit(again, "a dog"), expected, rtol=0, atol=1e-4)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_a_stranger_draws_the_same(hub, pipe, tmp_path):
    """Else it loads only where latentdiff is installed, or from a folder and not from the Hub."""
    _, arguments = CALLS["invert"]
    expected = pipe("a cat", num_inference_steps=4, output_type="pt", **arguments).images
    pipe.save_pretrained(tmp_path / "saved")
    drawn = stranger_draws(str(tmp_path / "saved"), "save again", "invert")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    pipe.push_to_hub(f"{USER}/invert")
    drawn = stranger_draws(f"{USER}/invert", pipeline="invert")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
