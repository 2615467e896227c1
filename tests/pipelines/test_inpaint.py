"""Inpainting, by blending and by a UNet that sees the mask: Stable Diffusion's pictures to the last bit where they are
right, and right where they are not."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

import latentdiff
from hub_server import USER
from latentdiff import LatentDiffImg2ImgPipeline, LatentDiffInpaintPipeline, LatentDiffPipeline
from latentdiff.pipelines.inpaint import feather
from stranger import CALLS, stranger_draws
from tiny import tiny_components

STEPS = 4
pytestmark = [
    # Of diffusers' own pipelines and schedulers.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0, width: int = 48, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def box(left: int, top: int, right: int, bottom: int, width: int = 48, height: int = 40) -> Image.Image:
    """A mask that is white inside of the box."""
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return Image.fromarray(mask)


def halves() -> list[torch.Tensor]:
    """Two masks of 16 x 16 pixels: the left half, the right half."""
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    return [left, 1 - left]


def draw(pipe, prompt="a cat", image=None, mask_image=None, **kwargs):
    """Pictures (B, 3, H, W) with seed 0 unless told otherwise."""
    image = picture() if image is None else image
    mask_image = box(20, 10, 44, 30) if mask_image is None else mask_image
    defaults = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "pt"}
    return pipe(prompt, image, mask_image, **{**defaults, **kwargs}).images


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(tiny_pipeline_folder, tmp_path_factory):
    """By the UNet's channels: one that takes latents alone, and one that was made to inpaint."""
    folder = tmp_path_factory.mktemp("inpaint") / "nine"
    parts = tiny_components()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts["unet"] = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9).eval()
    LatentDiffInpaintPipeline(**parts).save_pretrained(folder)
    return {4: tiny_pipeline_folder, 9: folder}


@pytest.fixture(params=[4, 9], ids=["blending", "nine channels"])
def both(request, folders):
    """Our pipeline and Stable Diffusion's on the same weights."""
    classes = (LatentDiffInpaintPipeline, StableDiffusionInpaintPipeline)
    return [quiet(pipeline.from_pretrained(folders[request.param])) for pipeline in classes]


@pytest.fixture
def blending(folders):
    return quiet(LatentDiffInpaintPipeline.from_pretrained(folders[4]))


@pytest.fixture
def plain(folders):
    return quiet(StableDiffusionInpaintPipeline.from_pretrained(folders[4]))


@pytest.fixture
def nine(folders):
    return quiet(LatentDiffInpaintPipeline.from_pretrained(folders[9]))


# ---- the same picture as Stable Diffusion ---------------------------------------------------------------------------

SAME_CALLS = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "eta": {"eta": 0.7},
    "half way": {"strength": 0.5, "eta": 0.7},
    "several of one": {"num_images_per_prompt": 2},
    "a mask for each": {
        "prompt": ["a cat", "a dog"],
        "image": [picture(1), picture(2)],
        "mask_image": [box(0, 0, 24, 40), box(24, 0, 48, 40)],
    },
    "a list of generators": {"generator": [3], "eta": 1.0},
    "no generator": {"generator": None},
    "size": {"height": 24, "width": 32},
    "tensors": {"image": torch.rand(1, 3, 16, 16, generator=seeded(1)), "mask_image": torch.ones(16, 16).tril()},
    "arrays": {
        "image": np.random.default_rng(0).random((1, 20, 20, 3), dtype=np.float32),
        "mask_image": np.tri(20, dtype=np.float32),
    },
    "noise of one's own": {"latents": torch.randn(1, 4, 4, 4, generator=seeded(5))},
    "cut out": {"padding_mask_crop": 4, "output_type": "pil"},
    "cut out, half way": {"padding_mask_crop": 0, "strength": 0.5, "output_type": "pil"},
}


@pytest.mark.parametrize("call", SAME_CALLS.values(), ids=SAME_CALLS.keys())
def test_draws_what_stable_diffusion_draws(both, call):
    """Else a folder means one thing to users of latentdiff and another to everyone else."""

    def run(pipeline):
        torch.manual_seed(7)
        kwargs = dict(call)
        if isinstance(kwargs.get("generator"), list):
            kwargs["generator"] = [seeded(seed) for seed in kwargs["generator"]]
        return [np.asarray(image) for image in draw(pipeline, **kwargs)]

    ours, theirs = map(run, both)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.std(ours[0].astype(np.float64)) > 0.01  # a blank picture would equal another


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize(
    "name", ["DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"]
)
def test_other_schedulers_draw_what_they_draw_in_stable_diffusion(both, name, strength):
    """Else what is known is put back at another noise level than the scheduler has reached."""
    for pipeline, library in zip(both, (latentdiff, diffusers), strict=True):
        full = f"{name}Scheduler"
        scheduler = getattr(library, full, None) or getattr(diffusers, full)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    ours, theirs = (draw(pipeline, strength=strength) for pipeline in both)
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, theirs)


def test_masked_latents_as_stable_diffusion_takes_them(folders):
    """Else latents of the masked picture that a user keeps are encoded again, or go to the wrong channels."""
    ours, theirs = (
        quiet(cls.from_pretrained(folders[9])) for cls in (LatentDiffInpaintPipeline, StableDiffusionInpaintPipeline)
    )
    masked = torch.randn(1, 4, 4, 4, generator=seeded(8))
    seen = []
    ours.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    call = {"masked_image_latents": masked, "mask_image": halves()[0]}
    assert torch.equal(draw(ours, **call), draw(theirs, **call))
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4)
    assert torch.equal(seen[0][:, 4], mask.expand(2, 4, 4)) and torch.equal(seen[0][:, 5:], masked.expand(2, 4, 4, 4))


# ---- blending -------------------------------------------------------------------------------------------------------


def test_what_is_known_is_at_every_noise_level_the_noised_picture(blending):
    """Else the known part drifts: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise after each step, x_0 at the end."""
    x_0, noise = (torch.randn(1, 4, 4, 4, generator=seeded(seed)) for seed in (1, 2))
    seen = []
    call = {"image": x_0, "mask_image": halves()[0], "latents": noise, "output_type": "latent"}
    drawn = draw(blending, **call, callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"]))
    abar = blending.scheduler.alphas_cumprod[blending.scheduler.timesteps]
    for latents, level in zip(seen, abar[1:], strict=False):
        known = level**0.5 * x_0 + (1 - level) ** 0.5 * noise
        torch.testing.assert_close(latents[..., 2:], known[..., 2:])
        assert not torch.allclose(latents[..., :2], known[..., :2], atol=1e-2)
    assert torch.equal(drawn[..., 2:], x_0[..., 2:]) and not torch.allclose(drawn[..., :2], x_0[..., :2], atol=1e-2)


def test_feathering_falls_evenly_to_nothing():
    """Else the rim is wider or narrower than was asked for, or eats into the mask."""
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 4, 4] = 1
    distance = torch.maximum((torch.arange(9) - 4).abs()[:, None], (torch.arange(9) - 4).abs()[None])
    torch.testing.assert_close(feather(mask, 3)[0, 0], (1 - distance / 4).clamp(min=0))
    assert torch.equal(feather(mask, 0), mask)


def test_a_soft_mask_frees_its_rim_step_by_step(blending):
    """Else the rim is an average of two noises: less of it than the network expects, so that it comes out blurred."""
    x_0, noise = (torch.randn(1, 4, 4, 8, generator=seeded(seed)) for seed in (1, 2))
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., :8] = 1
    seen = []
    call = {"image": x_0, "mask_image": mask, "latents": noise, "output_type": "latent", "mask_blur": 15}
    drawn = draw(blending, **call, callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"]))
    abar = blending.scheduler.alphas_cumprod[blending.scheduler.timesteps]
    values = [1, 1, 15 / 16, 11 / 16, 7 / 16, 3 / 16, 0, 0]  # the highest of a latent's four columns of pixels
    for step, latents in enumerate(seen[:-1]):
        known = abar[step + 1] ** 0.5 * x_0 + (1 - abar[step + 1]) ** 0.5 * noise
        is_known = [torch.allclose(latents[..., c], known[..., c], atol=1e-5) for c in range(8)]
        assert is_known == [value <= 1 - (step + 1) / STEPS for value in values]
    assert [torch.equal(drawn[..., c], x_0[..., c]) for c in range(8)] == [value == 0 for value in values]


def test_a_soft_mask_of_diffusers_is_hard_again(blending, plain):
    """Else `mask_blur` would have nothing to do: a blurred mask is made black and white before it is used."""
    blurred = plain.mask_processor.blur(box(20, 10, 44, 30), blur_factor=4)
    hard = blurred.point(lambda value: 255 * (value >= 128))
    assert torch.equal(draw(plain, mask_image=blurred), draw(plain, mask_image=hard))
    assert torch.equal(draw(blending, mask_image=blurred), draw(blending, mask_image=hard))
    assert not torch.equal(draw(blending, mask_blur=6), draw(blending))


@pytest.mark.parametrize("mask_blur", [0, 3])
def test_unmasked_pixels_are_kept(both, mask_blur):
    """Else the VAE's small changes spread over the whole picture, though only a part was to be painted."""
    ours, _ = both
    image, mask = picture(width=16, height=16), box(4, 4, 12, 12, width=16, height=16)
    kept = draw(ours, image=image, mask_image=mask, keep_unmasked=True, mask_blur=mask_blur, output_type="pil")[0]
    far = np.asarray(box(4 - mask_blur, 4 - mask_blur, 12 + mask_blur, 12 + mask_blur, width=16, height=16)) == 0
    assert np.array_equal(np.asarray(kept)[far], np.asarray(image)[far])
    assert not np.array_equal(np.asarray(kept)[~far], np.asarray(image)[~far])
    if not mask_blur:
        drawn = draw(ours, image=image, mask_image=mask, output_type="pil")[0]
        assert np.array_equal(np.asarray(kept)[~far], np.asarray(drawn)[~far])
        assert not np.array_equal(np.asarray(drawn)[far], np.asarray(image)[far])


def test_a_part_is_put_back_into_its_picture(both):
    """Else what was drawn large covers more than the mask and its rim, or the picture loses its size."""
    ours, _ = both
    image = picture(width=80, height=60)
    mask = box(30, 20, 50, 40, width=80, height=60)
    drawn = draw(ours, image=image, mask_image=mask, padding_mask_crop=8, mask_blur=4, output_type="pil")[0]
    assert drawn.size == (80, 60)
    changed = (np.asarray(drawn) != np.asarray(image)).any(axis=2)
    assert not changed[np.asarray(box(26, 16, 54, 44, width=80, height=60)) == 0].any()
    assert changed[20:40, 30:50].mean() > 0.9


# ---- where Stable Diffusion's pipeline goes wrong -------------------------------------------------------------------


def test_every_prompt_meets_its_own_mask(blending, plain):
    """Else the second picture of the first prompt gets the second prompt's mask, as in Stable Diffusion's pipeline."""
    call = {"mask_image": halves(), "num_images_per_prompt": 2, "output_type": "latent"}
    ours = draw(blending, ["a cat", "a dog"], **call)
    assert torch.equal(ours[0][..., 2:], ours[1][..., 2:])  # one picture is known to both, on the right
    assert torch.equal(ours[2][..., :2], ours[3][..., :2])
    theirs = draw(plain, ["a cat", "a dog"], **call)
    assert torch.equal(theirs[0][..., 2:], theirs[2][..., 2:])  # of two prompts
    assert not torch.equal(theirs[0][..., 2:], theirs[1][..., 2:])


def test_given_noise_is_added_to_the_picture(both):
    """Else `latents` and `strength` together start from noise at a level where the network expects a picture."""
    ours, theirs = both
    noise, black = torch.randn(1, 4, 4, 4, generator=seeded(2)), Image.new("RGB", (16, 16))
    starts = []
    for pipeline in both:
        hook = pipeline.unet.register_forward_pre_hook(lambda module, args: starts.append(args[0][:1, :4]))
        draw(pipeline, image=black, latents=noise, strength=0.5, num_inference_steps=2)
        hook.remove()
    abar = ours.scheduler.alphas_cumprod[ours.scheduler.timesteps[-1]]
    posterior = ours.vae.encode(ours.image_processor.preprocess(black)).latent_dist
    drawn = posterior.mean + posterior.std * torch.randn(1, 4, 4, 4, generator=seeded())
    expected = abar**0.5 * drawn * ours.vae.config.scaling_factor + (1 - abar) ** 0.5 * noise
    torch.testing.assert_close(starts[0], expected)
    assert torch.equal(starts[1], noise)  # Stable Diffusion's forgets the picture


def test_a_mask_too_thin_for_the_latents_is_said(blending, plain):
    """Else nothing is painted, without a word: of four pixels the mask's upper left one counts."""
    line = torch.zeros(1, 1, 16, 16)
    line[..., 6, :] = 1
    image = torch.rand(1, 3, 16, 16, generator=seeded(1))
    nothing = draw(plain, image=image, mask_image=torch.zeros_like(line))
    assert torch.equal(draw(plain, image=image, mask_image=line), nothing)
    with pytest.raises(ValueError, match="thinner than the 4 pixels of a latent"):
        draw(blending, image=image, mask_image=line)
    assert not torch.equal(draw(blending, image=image, mask_image=line, mask_blur=1), nothing)


def test_latents_and_truth_values_are_taken(blending, plain):
    """Else a picture cannot be given as latents, nor a mask as what a comparison returns."""
    latents, mask = torch.randn(1, 4, 4, 4, generator=seeded(1)), halves()[0]
    assert draw(blending, image=latents, mask_image=mask).shape == (1, 3, 16, 16)
    with pytest.raises(RuntimeError):
        draw(plain, image=latents, mask_image=mask)
    expected = draw(blending, mask_image=mask)
    for same in (mask > 0.5, (mask > 0.5).numpy(), [mask > 0.5], mask.numpy()):
        assert torch.equal(draw(blending, mask_image=same), expected)
    with pytest.raises(RuntimeError):
        draw(plain, mask_image=mask > 0.5)


def test_transparent_pictures_lie_on_white(both):
    """Else colour and opacity are taken for latents: an error about shapes in Stable Diffusion's pipeline."""
    ours, theirs = both
    transparent = picture().copy()
    transparent.putalpha(0)
    assert torch.equal(draw(ours, image=transparent), draw(ours, image=Image.new("RGB", (48, 40), "white")))
    with pytest.raises(RuntimeError):
        draw(theirs, image=transparent)


# ---- seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_seed_draws_the_same_alone_and_in_a_batch(both, strength):
    """Else a picture cannot be drawn again without its neighbours, as in Stable Diffusion's pipeline."""
    ours, theirs = both
    ours.scheduler = latentdiff.DDPMScheduler.from_config(ours.scheduler.config)
    call = {"strength": strength, "generator": None}
    together = draw(ours, seeds=[5, 6, 7], **call)
    for seed, one in zip([5, 6, 7], together, strict=True):
        torch.testing.assert_close(draw(ours, seeds=[seed], **call)[0], one, rtol=0, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    generators = [seeded(5), seeded(6)]
    crossed = draw(theirs, num_images_per_prompt=2, generator=generators, strength=strength)[1]
    assert not torch.allclose(crossed, draw(theirs, generator=seeded(6), strength=strength)[0], atol=1e-3)


# ---- loading and saving ---------------------------------------------------------------------------------------------


def test_pipelines_change_into_one_another(blending, plain, folders):
    """Else editing loads the weights a second time, or another scheduler comes with them."""
    expected = draw(blending)
    for source in (LatentDiffPipeline.from_pretrained(folders[4]), plain):
        ours = quiet(LatentDiffInpaintPipeline.from_pipe(source))
        assert ours.unet is source.unet and torch.equal(draw(ours), expected)
    assert torch.equal(draw(quiet(StableDiffusionInpaintPipeline.from_pipe(blending))), expected)
    assert type(LatentDiffImg2ImgPipeline.from_pipe(blending)) is LatentDiffImg2ImgPipeline


def test_saved_and_loaded_by_everyone(hub, blending, nine, folders):
    """Else a UNet for inpainting is saved as one that draws from words alone, or a stranger cannot use it."""
    _, arguments = CALLS["inpaint"]
    assert type(diffusers.DiffusionPipeline.from_pretrained(folders[4])) is diffusers.StableDiffusionPipeline
    assert torch.equal(stranger_draws(str(folders[4]), pipeline="inpaint"), draw(blending, **arguments))
    assert type(diffusers.DiffusionPipeline.from_pretrained(folders[9])) is StableDiffusionInpaintPipeline
    nine.push_to_hub(f"{USER}/inpaint")
    assert torch.equal(stranger_draws(f"{USER}/inpaint", "save again", "inpaint"), draw(nine, **arguments))


# ---- errors ---------------------------------------------------------------------------------------------------------

LATENTS = torch.zeros(1, 4, 4, 4)
BAD_CALLS = [
    ({"mask_image": []}, "mask_image: pass a picture"),
    ({"mask_image": torch.zeros(1, 3, 16, 16)}, "mask_image: a mask has one channel, not 3"),
    ({"mask_image": halves(), "image": [picture(1), picture(2), picture(3)]}, "2 masks for 3 pictures: pass 1 or 3"),
    ({"mask_image": halves()}, "mask_image: 2 of them for 1 prompts and 1 pictures: pass 1"),
    ({"mask_blur": -1}, "mask_blur=-1"),
    ({"mask_blur": 1.5}, "mask_blur=1.5"),
    ({"strength": 0}, "strength=0"),
    ({"height": 18}, "height=18.*multiples of 4"),
    ({"latents": torch.zeros(1, 4, 4, 5), "height": 16, "width": 16}, r"\(1, 4, 4, 5\), but this call draws"),
    ({"image": LATENTS, "height": 24}, r"image: latents of shape \(1, 4, 4, 4\).*\(4, 6, 4\)"),
    ({"image": LATENTS, "keep_unmasked": True}, "keep_unmasked needs the picture's pixels"),
    ({"keep_unmasked": True, "output_type": "latent"}, "output_type must be pil, np or pt"),
    ({"masked_image_latents": LATENTS}, "takes latents alone"),
    ({"padding_mask_crop": 4}, "padding_mask_crop works on one PIL image"),
    ({"padding_mask_crop": 4, "image": np.zeros((1, 16, 16, 3)), "output_type": "pil"}, "works on one PIL image"),
    ({"padding_mask_crop": -4, "output_type": "pil"}, "padding_mask_crop=-4"),
    ({"padding_mask_crop": 4, "output_type": "pil", "mask_image": box(0, 0, 0, 0)}, "the mask has no white"),
    ({"padding_mask_crop": 4, "output_type": "pil", "mask_image": box(0, 0, 9, 9, width=32)}, r"\(48, 40\), not \(32,"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message[:30] for _, message in BAD_CALLS])
def test_bad_arguments_are_named(blending, call, message):
    """Else a user meets a shape error from deep inside the network."""
    with pytest.raises(ValueError, match=message):
        draw(blending, **call)


def test_bad_arguments_for_nine_channels_are_named(nine):
    """Else a soft mask is accepted and has no effect, or latents meet pixels."""
    for call, message in (
        ({"mask_blur": 2}, "trained with hard masks.*keep_unmasked=True"),
        ({"image": LATENTS}, "needs masked_image_latents too"),
        ({"masked_image_latents": LATENTS[:, :3]}, r"masked_image_latents: latents of shape \(1, 3, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(nine, **call)


def test_other_unets_and_no_picture_are_refused(folders, blending):
    """Else a UNet of another kind fails at its first convolution."""
    config = diffusers.UNet2DConditionModel.load_config(folders[4] / "unet")
    unet = diffusers.UNet2DConditionModel.from_config(config, in_channels=8)
    pipeline = LatentDiffInpaintPipeline.from_pretrained(folders[4], unet=unet)
    with pytest.raises(ValueError, match=r"takes 8 channels.*4 \(the latents\) or 9 \(the latents, a mask"):
        draw(pipeline)
    with pytest.raises(ValueError, match="image: pass a picture"):
        blending("a cat", mask_image=box(0, 0, 9, 9))
    with pytest.raises(ValueError, match="mask_image: pass a picture"):
        blending("a cat", image=picture())
