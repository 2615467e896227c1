"""The consistency scheduler against diffusers' LCMScheduler, algorithm 1 written out, and the formulas."""

import diffusers
import pytest
import torch

from latentdiff import (
    ConsistencyScheduler,
    LatentDiffImg2ImgPipeline,
    LatentDiffInpaintPipeline,
    LatentDiffInterpolatePipeline,
    LatentDiffPipeline,
)
from latentdiff.diffusion.scheduling_consistency import boundary_scalings
from latentdiff.models.unet import add_guidance_input
from stranger import stranger_draws
from tiny import tiny_components

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pipeline(takes_guidance: bool = False) -> LatentDiffPipeline:
    components = tiny_components()
    components["scheduler"] = diffusers.LCMScheduler.from_config(components["scheduler"].config)
    if takes_guidance:
        add_guidance_input(components["unet"])
        torch.nn.init.normal_(components["unet"].time_embedding.cond_proj.weight, generator=seeded(5))
    pipe = LatentDiffPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- against diffusers ----------------------------------------------------------------------------------------------


def test_timesteps_are_diffusers():
    """Else the model is asked at timesteps that it was not distilled at."""
    for original in (50, 30, 8):
        ours = ConsistencyScheduler(original_inference_steps=original)
        theirs = diffusers.LCMScheduler(original_inference_steps=original)
        for count in range(1, original + 1):
            ours.set_timesteps(count)
            theirs.set_timesteps(count)
            assert torch.equal(ours.timesteps, theirs.timesteps)
            for strength in (0.2, 0.5, 0.9):
                if count <= int(original * strength):
                    ours.set_timesteps(count, strength=strength)
                    theirs.set_timesteps(count, strength=strength)
                    assert torch.equal(ours.timesteps, theirs.timesteps)
    ours.set_timesteps(timesteps=[999, 499])
    assert ours.timesteps.tolist() == [999, 499]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("changes", [{}, {"clip_sample": True}, {"thresholding": True}, {"timestep_scaling": 0.01}])
def test_steps_are_diffusers_to_the_last_bit(kind, changes, tmp_path):
    """Else a picture changes with the library that draws it. Each loads the other's scheduler_config.json."""
    diffusers.LCMScheduler(prediction_type=kind, **SCHEDULE, **changes).save_pretrained(tmp_path / "theirs")
    ours = ConsistencyScheduler.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.LCMScheduler.from_pretrained(tmp_path / "ours")
    for count in (1, 2, 4):
        x = y = torch.randn(2, 4, 4, 4, generator=seeded(0))
        draws = [[seeded(1), seeded(2)] for _ in range(2)] if count == 4 else [seeded(1), seeded(1)]
        ours.set_timesteps(count)
        theirs.set_timesteps(count)
        for t in ours.timesteps:
            one = ours.step(torch.sin(3 * x + t), t, x, generator=draws[0])
            other = theirs.step(torch.sin(3 * y + t), t, y, generator=draws[1])
            assert torch.equal(one.denoised, other.denoised)
            x, y = one.prev_sample, other.prev_sample
        assert torch.equal(x, y) and torch.equal(x, one.denoised)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Else the strongest noise, which multiplies errors by 15, rounds the picture away."""
    whole, half = ConsistencyScheduler(), ConsistencyScheduler()
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=seeded(0)).to(dtype)
    for scheduler in (whole, half):
        scheduler.set_timesteps(1)
    wanted = whole.step(output.float(), 999, sample.float()).prev_sample
    found = half.step(output, 999, sample).prev_sample
    assert found.dtype == dtype and torch.equal(found, wanted.to(dtype))


@pytest.mark.parametrize("takes_guidance", [False, True])
def test_a_saved_folder_draws_the_same_everywhere(takes_guidance, tmp_path):
    """Else few steps are to be had with one library alone."""
    pipe = pipeline(takes_guidance)
    assert type(pipe.scheduler) is ConsistencyScheduler
    pipe.save_pretrained(tmp_path)
    options = {"num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "pt"}
    saved = pipe("a cat", generator=seeded(0), **options).images
    peers = [diffusers.StableDiffusionPipeline]
    if takes_guidance:
        peers.append(diffusers.LatentConsistencyModelPipeline)
        other = pipe("a cat", generator=seeded(0), **{**options, "guidance_scale": 2.0}).images
        assert (other - saved).abs().max() > 1e-3
    pictures = []
    for kind in (LatentDiffPipeline, *peers):
        again = kind.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        pictures.append(again("a cat", generator=seeded(0), **options).images)
    torch.testing.assert_close(pictures[0], saved, rtol=0, atol=1e-5)
    assert all(torch.equal(pictures[0], theirs) for theirs in pictures[1:])


def test_a_stranger_draws_with_it(tmp_path):
    """Else the code that goes along with the weights lacks the scheduler."""
    pipeline().save_pretrained(tmp_path)
    pipe = LatentDiffPipeline.from_pretrained(tmp_path)  # weights at other addresses may give other last bits
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe("a cat", num_inference_steps=4, output_type="pt", generator=seeded(0)).images
    assert torch.equal(stranger_draws(str(tmp_path), "save again"), wanted)


# ---- against the papers ---------------------------------------------------------------------------------------------


def test_boundary_scalings_are_the_formula():
    """Else f(x, 0) is not x, and a model of another library is read wrongly."""
    t = torch.tensor([0, 1, 19, 999])
    c_skip, c_out = boundary_scalings(t)
    scaled = 10.0 * t.double()
    torch.testing.assert_close(c_skip.double(), 0.25 / (scaled**2 + 0.25), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_out.double(), scaled / (scaled**2 + 0.25) ** 0.5, rtol=1e-6, atol=0)
    assert (c_skip[0], c_out[0]) == (1, 0)


def test_it_draws_gaussian_data_in_any_number_of_steps():
    """Else the noise of a step is not that of its timestep. Under the true consistency function of Gaussian data every
    number of steps draws that Gaussian: its deviation within four standard errors."""
    mean, deviation, count = 0.7, 0.4, 20_000
    scheduler = ConsistencyScheduler(prediction_type="sample", **SCHEDULE)
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        abar = scheduler.alphas_cumprod
        start = abar[scheduler.timesteps[0]]
        generator = seeded(steps)
        x = start**0.5 * mean + (start * deviation**2 + 1 - start) ** 0.5 * torch.randn(count, 1, generator=generator)
        for t in scheduler.timesteps:
            spread = (abar[t] * deviation**2 + 1 - abar[t]) ** 0.5
            answer = mean + deviation * (x - abar[t] ** 0.5 * mean) / spread
            x = scheduler.step(answer, t, x, generator=generator).prev_sample
        assert abs(x.mean() - mean) < 4 * deviation / count**0.5
        assert abs(x.std() - deviation) < 4 * deviation / (2 * count) ** 0.5


def f(pipe: LatentDiffPipeline, x: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
    """The consistency function, written out: epsilon prediction at timesteps where c_skip is 0 and c_out 1."""
    abar = pipe.scheduler.alphas_cumprod[t]
    with torch.no_grad():
        return (x - (1 - abar) ** 0.5 * pipe.unet(x, torch.tensor(t), text).sample) / abar**0.5


def noised(pipe: LatentDiffPipeline, x_0: torch.Tensor, t: int, noise: torch.Tensor) -> torch.Tensor:
    abar = pipe.scheduler.alphas_cumprod[t]
    return abar**0.5 * x_0 + (1 - abar) ** 0.5 * noise


def told(pipe: LatentDiffPipeline) -> torch.Tensor:
    return pipe.encode_prompt("a cat", "cpu", 1, False)[0]


def edited(kind: type, **options) -> tuple[LatentDiffPipeline, torch.Tensor]:
    """The latents of an edit without guidance, and the pipeline."""
    pipe = kind.from_pipe(pipeline())
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe("a cat", generator=seeded(0), guidance_scale=1.0, output_type="latent", **options).images


@pytest.mark.parametrize(("steps", "strength", "first"), [(1, 0.3, 299), (2, 0.5, 499), (4, 0.05, 39), (4, 1.0, 999)])
def test_strokes_to_a_picture(steps, strength, first):
    """Algorithm 4 of arXiv 2303.01469 without a mask: strokes noised to t_1, then multistep sampling from there.

    Else a strength means little in a few steps, of which a share is taken: one step would always start from t = 999."""
    strokes = torch.randn(1, 4, 4, 4, generator=seeded(4))
    pipe, found = edited(LatentDiffImg2ImgPipeline, image=strokes, num_inference_steps=steps, strength=strength)
    timesteps, text, draws, x = pipe.scheduler.timesteps.tolist(), told(pipe), seeded(0), strokes
    assert timesteps[0] == first and len(timesteps) == min(steps, int(50 * strength)) == pipe.num_timesteps
    for t in timesteps:
        x = f(pipe, noised(pipe, x, t, torch.randn(1, 4, 4, 4, generator=draws)), t, text)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_image_to_image_is_diffusers(tmp_path):
    """Else the same strength means something else in diffusers' own pipeline for such models."""
    pipe = pipeline(takes_guidance=True)
    pipe.save_pretrained(tmp_path)
    picture = torch.rand(1, 3, 16, 16, generator=seeded(1))
    options = {"image": picture, "strength": 0.4, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt"}
    pictures = []
    for kind in (LatentDiffImg2ImgPipeline, diffusers.LatentConsistencyModelImg2ImgPipeline):
        pipe = kind.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe("a cat", generator=seeded(0), **options).images)
    assert torch.equal(*pictures)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_inpainting_without_training(steps):
    """Algorithm 4 of arXiv 2303.01469, A being the latents themselves: from the picture with nothing under the mask,
    each answer with the picture put back outside the mask is noised as one for the next step.

    Else what is painted first does not see what is there, or then sees it under noise that the answer knows."""
    picture, mask = torch.randn(1, 4, 4, 4, generator=seeded(4)), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    omega, draws = mask[..., ::4, ::4], seeded(0)

    def draw() -> torch.Tensor:
        return torch.randn(1, 4, 4, 4, generator=draws)

    pipe, found = edited(LatentDiffInpaintPipeline, image=picture, mask_image=mask, num_inference_steps=steps)
    text, noise, x = told(pipe), draw(), picture * (1 - omega)
    for t in pipe.scheduler.timesteps.tolist():
        x = f(pipe, noised(pipe, x, t, noise), t, text)
        x = picture * (1 - omega) + x * omega
        noise = draw() * omega + draw() * (1 - omega)  # the same law as one draw, in the pipeline's order
    assert torch.equal(found * (1 - omega), picture * (1 - omega))
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_interpolation_leads_from_picture_to_picture():
    """Else a film between two noises ends with other pictures than those that they are drawn to, or jumps where the
    noise of the steps goes over to the next seed's."""
    pipe = pipeline()
    film = LatentDiffInterpolatePipeline.from_pipe(pipe)
    film.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    frames = film(["a cat", "a cat"], seeds=[0, 1], num_frames=101, batch_size=101, **options).images
    ends = [pipe("a cat", seeds=[seed], **options).images[0] for seed in (0, 1)]
    torch.testing.assert_close(frames[0], ends[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frames[-1], ends[1], rtol=1e-4, atol=1e-4)
    moves = (frames[1:] - frames[:-1]).flatten(1).norm(dim=1)
    assert moves.max() < 0.2 * (ends[1] - ends[0]).norm()


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    """Else a model is asked at timesteps that it knows nothing of."""
    scheduler = ConsistencyScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(torch.zeros(1, 4, 2, 2), 999, torch.zeros(1, 4, 2, 2))
    for count in (0, 51):
        with pytest.raises(ValueError, match=f"num_inference_steps is {count}; it must lie in 1 … 50"):
            scheduler.set_timesteps(count)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep is 1000; it must lie in 0 … 999"):
        scheduler.step(torch.zeros(1, 4, 2, 2), 1000, torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="generator and variance_noise were both given"):
        scheduler.step(torch.zeros(1), 999, torch.zeros(1), seeded(0), variance_noise=torch.zeros(1))
    for strength, given in (
        (0, {"num_inference_steps": 2}),
        (1.1, {"num_inference_steps": 2}),
        (0.5, {"timesteps": [9]}),
    ):
        with pytest.raises(ValueError, match=f"strength is {strength}; it must lie above 0"):
            scheduler.set_timesteps(**given, strength=strength)
    with pytest.raises(ValueError, match="original_inference_steps is 1001"):
        ConsistencyScheduler(original_inference_steps=1001)
    with pytest.raises(ValueError, match="prediction_type"):
        ConsistencyScheduler(prediction_type="noise")
    with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
        scheduler.set_timesteps(4, timesteps=[999])
