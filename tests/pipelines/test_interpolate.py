"""Interpolation: stations are the plain pipeline's pictures, what lies between is between, in any batch."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hub_server import USER
from latentdiff import DDIMScheduler, DDPMScheduler, LatentDiffInterpolatePipeline, LatentDiffPipeline
from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.pipelines.interpolate import lerp, path_of, slerp
from stranger import CALLS, stranger_draws
from tiny import tiny_components

# Of diffusers' own schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 4
SHAPE = (1, 4, 4, 4)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return quiet(LatentDiffInterpolatePipeline(**tiny_components()))


@pytest.fixture
def plain():
    return quiet(LatentDiffPipeline(**tiny_components()))


def draw(pipe, prompts=("a cat", "a red dog"), seeds=(3, 4), num_frames=5, **kwargs) -> torch.Tensor:
    prompts, seeds = (list(one) if isinstance(one, tuple) else one for one in (prompts, seeds))
    defaults = {"num_inference_steps": STEPS, "output_type": "pt", "guidance_scale": 4.0}
    return pipe(prompts, seeds, num_frames, **{**defaults, **kwargs}).images


def draw_one(pipe, prompt: str, seed: int, **kwargs) -> torch.Tensor:
    defaults = {"num_inference_steps": STEPS, "output_type": "pt", "guidance_scale": 4.0}
    return pipe(prompt, seeds=[seed], **{**defaults, **kwargs}).images[0]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-4)


# ---- between two tensors --------------------------------------------------------------------------------------------


def test_slerp_goes_along_the_circle():
    """Else it is not Shoemake's arc: at t the angle to the start is t Omega, and the length stays."""
    start, end = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.5, 3**0.5 / 2, 0.0]])  # 60 degrees apart
    for t in (0.25, 0.5, 0.9):
        x = slerp(start, end, torch.tensor([t]))[0]
        angle = torch.tensor(t * torch.pi / 3)
        torch.testing.assert_close(x, torch.stack([angle.cos(), angle.sin(), torch.tensor(0.0)]))


def test_slerp_keeps_the_length_of_noise_and_lerp_does_not():
    """Else the network is given noise of less than unit variance, which it draws as blur."""
    a, b, half = noise(0, 8, 4, 16, 16), noise(1, 8, 4, 16, 16), torch.full((8,), 0.5)
    assert slerp(a, b, half).std().item() == pytest.approx(1.0, abs=0.02)
    assert lerp(a, b, half).std().item() == pytest.approx(0.5**0.5, abs=0.02)


@pytest.mark.parametrize("mix", [slerp, lerp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_are_exact_and_parallel_tensors_no_exception(mix, dtype):
    """Else stations are other pictures than the plain pipeline's, or equal noise gives 0 / 0."""
    a, b = noise(0, 2, 4, 8, 8).to(dtype), noise(1, 2, 4, 8, 8).to(dtype)
    assert torch.equal(mix(a, b, torch.zeros(2)), a) and torch.equal(mix(a, b, torch.ones(2)), b)
    assert mix(a, b, torch.tensor([0.0, 1.0])).dtype == dtype
    torch.testing.assert_close(mix(a, a, torch.full((2,), 0.3)), a)
    torch.testing.assert_close(mix(a, 2 * a, torch.full((2,), 0.5)), 1.5 * a)
    assert torch.isfinite(mix(a, -a, torch.full((2,), 0.5))).all()


# ---- the path -------------------------------------------------------------------------------------------------------


def stations_at(num_stations: int, num_frames: int, loop: bool) -> list[int]:
    path = path_of(num_stations, num_frames, loop)
    return [i for i in range(num_frames) if path.weight[i] == 0]


@pytest.mark.parametrize(
    ("stations", "frames", "loop", "at"),
    [
        (2, 5, False, [0, 4]),
        (3, 9, False, [0, 4, 8]),
        (3, 8, False, [0, 4, 7]),  # 3.5 is rounded to even
        (4, 4, False, [0, 1, 2, 3]),
        (2, 6, True, [0, 3]),
        (3, 8, True, [0, 3, 5]),
        (3, 3, True, [0, 1, 2]),
    ],
)
def test_every_station_is_a_frame(stations, frames, loop, at):
    """Else a film of three prompts never shows the second one as it is, or a loop shows the first frame twice."""
    path = path_of(stations, frames, loop)
    assert stations_at(stations, frames, loop) == at
    assert path.start[at].tolist() == list(range(stations))
    assert len(path.weight) == frames and ((path.weight >= 0) & (path.weight < 1)).all()
    at_start = path.start + path.weight  # where on the way a frame is, in stations
    assert (at_start.diff() > 0).all() and at_start.diff().max() <= 2 * at_start.diff().min()
    assert torch.equal(path.end[at], (path.start[at] + 1) % stations) or not loop


# ---- the same pictures as the plain pipeline ------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_stations_are_the_plain_pipelines_pictures(pipe, plain, scheduler, eta):
    """Else a film does not start at the picture whose prompt and seed were chosen for it."""
    for one in (pipe, plain):
        one.scheduler = scheduler.from_config(one.scheduler.config)
    prompts, seeds = ["a cat", "a red dog", "red"], [3, 4, 5]
    frames = draw(pipe, prompts, seeds, 7, eta=eta, batch_size=3)
    for frame, prompt, seed in zip(frames[[0, 3, 6]], prompts, seeds, strict=True):
        assert close(frame, draw_one(plain, prompt, seed, eta=eta))
    between = torch.stack([frames[1], frames[2], frames[4]])
    assert all(not close(one, frames[i]) for one in between for i in (0, 3, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_stations_is_bit_identical(pipe, plain, dtype):
    """Else a station is drawn from nearly the same noise, which a stochastic sampler makes another picture of."""
    first = {}

    def keep(name):
        def at_start(unet, args):
            first.setdefault(name, args[0].clone())

        return at_start

    for one, name in ((pipe, "path"), (plain, "plain")):
        one.to(dtype)
        one.unet.register_forward_pre_hook(keep(name))
    draw(pipe, batch_size=8, guidance_scale=1.0)
    plain("a cat", seeds=[3, 4], num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent")
    assert first["path"].dtype == dtype and len(first["path"]) == 5
    assert torch.equal(first["path"][[0, 4]], first["plain"])
    expected = slerp(*first["plain"].chunk(2), torch.tensor([0.5]))
    assert torch.equal(first["path"][2:3], expected)


def test_between_the_stations_prompts_are_mixed_on_a_line(pipe, plain):
    """Else the path leads through other prompts, or what guidance leads away from stays behind."""
    negatives = ["do", "ca"]
    ends, others = plain.encode_prompt(["a cat", "a red dog"], "cpu", 1, True, negatives)
    frames = draw(pipe, seeds=3, negative_prompt=negatives)
    by_hand = plain(
        prompt_embeds=ends.mean(dim=0, keepdim=True),
        negative_prompt_embeds=others.mean(dim=0, keepdim=True),
        seeds=[3],
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        output_type="pt",
    ).images[0]
    assert close(frames[2], by_hand)


def test_one_prompt_with_several_seeds_and_one_seed_with_several_prompts(pipe, plain):
    """Else half of what makes a station cannot be held still."""
    frames = draw(pipe, "a cat", [3, 4], 3)
    assert close(frames[2], draw_one(plain, "a cat", 4))
    frames = draw(pipe, ["a cat", "a red dog"], 3, 3)
    assert close(frames[2], draw_one(plain, "a red dog", 3))


def test_a_loop_leads_back(pipe):
    """Else the film jumps where it begins anew: here the way back is the way there."""
    frames = draw(pipe, loop=True, num_frames=8)
    torch.testing.assert_close(frames[5:], frames[1:4].flip(0), rtol=0, atol=1e-4)
    assert not close(frames[7], frames[0])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_batch_size_changes_no_frame(pipe, scheduler):
    """Else memory decides what is drawn: noise within the steps, or a multistep sampler's past, crosses batches."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]) // 2))
    whole = draw(pipe, batch_size=5)
    sizes.clear()
    assert close(draw(pipe, batch_size=2), whole)
    assert set(sizes) == {1, 2}


def test_latents_in_place_of_drawn_noise(pipe, plain):
    """Else pictures that were inverted cannot be stations."""
    ends = torch.cat([noise(8), noise(9)])
    frames = draw(pipe, "a cat", 0, 3, latents=ends)
    assert close(frames[2], draw_one(plain, "a cat", 0, latents=ends[1:]))
    assert close(frames[1], draw_one(plain, "a cat", 0, latents=slerp(ends[:1], ends[1:], torch.tensor([0.5]))))


def test_prompt_embeds_in_place_of_prompts(pipe):
    """Else a pipeline without a text encoder cannot interpolate."""
    embeds, negative = pipe.encode_prompt(["a cat", "a red dog"], "cpu", 1, True)
    expected = draw(pipe)
    pipe.text_encoder = pipe.tokenizer = None
    assert close(draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative), expected)


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_options_are_those_of_text_to_image(pipe, plain):
    """Else an option is taken and has no effect."""
    worse = tiny_components(seed=1)["unet"]
    plainly = draw(pipe)
    for options in (
        {"guidance_rescale": 0.7},
        {"guidance_interval": (0.2, 3.0)},
        {"guide_unet": worse},
        {"guidance_scale": lambda sigma: 6.0 if sigma > 1 else 1.0},
        {"clip_skip": 1},
        {"height": 20, "width": 24},
    ):
        frames = draw(pipe, **options)
        assert close(frames[0], draw_one(plain, "a cat", 3, **options)), options
        assert frames.shape != plainly.shape or not close(frames[2], plainly[2]), options


def test_clip_guidance_leads_to_what_lies_between_the_texts(pipe):
    """Else all frames are led to the first prompt, and the last is another picture than the plain pipeline's."""
    asked = []

    class Clip:
        """Stands for `ClipGuidance`, which has its own tests."""

        def to(self, device):
            return self

        def embed_text(self, prompts, device):
            return torch.tensor([[1.0, 0.0] if text == "a cat" else [0.0, 1.0] for text in prompts])

        def guide(self, predict, x_t, alpha_cumprod, prediction_type, decode, text):
            asked.append(text)
            return predict(x_t)

    assert hasattr(ClipGuidance, "embed_text") and hasattr(ClipGuidance, "guide")
    draw(pipe, num_frames=3, clip_guidance=Clip())
    half = 0.5**0.5
    torch.testing.assert_close(asked[0], torch.tensor([[1.0, 0.0], [half, half], [0.0, 1.0]]))


# ---- calls ----------------------------------------------------------------------------------------------------------


def test_output_types_and_tuple(pipe):
    """Else frames come in another form than pictures do elsewhere."""
    pictures = draw(pipe, output_type="pil", batch_size=2)
    assert len(pictures) == 5 and {picture.size for picture in pictures} == {(16, 16)}
    assert draw(pipe, output_type="np", batch_size=2).shape == (5, 16, 16, 3)
    assert draw(pipe, batch_size=2).shape == (5, 3, 16, 16)
    latents = draw(pipe, output_type="latent", batch_size=2)
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert close((pixels / 2 + 0.5).clamp(0, 1), draw(pipe))
    images, flagged = pipe(["a cat", "a dog"], num_frames=2, num_inference_steps=1, return_dict=False)
    assert len(images) == 2 and flagged is None


def test_callback_sees_every_batch_and_what_it_changes_ends_with_it(pipe):
    """Else steps are counted on, or a callback that ends guidance in the first batch ends it in all."""
    seen = []

    def watch(p, step, timestep, tensors):
        seen.append((step, len(tensors["latents"])))
        return tensors

    whole = draw(pipe, batch_size=2, callback_on_step_end=watch)
    assert seen == [(step, count) for count in (2, 2, 1) for step in range(STEPS)]

    def cut_off(p, step, timestep, tensors):
        p._guidance_scale = 0.0
        return tensors

    cut = draw(pipe, batch_size=2, callback_on_step_end=cut_off)
    assert close(cut, draw(pipe, batch_size=5, callback_on_step_end=cut_off)) and not close(cut[4], whole[4])


def test_interrupt_gives_the_frames_so_far(pipe):
    """Else Stop ends one batch of many, throws away what was drawn, or stops later calls as well."""
    batches = []

    def stop(p, step, timestep, tensors):
        batches.append(step)
        p._interrupt = len(batches) == STEPS + 2  # in the second batch
        return tensors

    frames = draw(pipe, batch_size=2, callback_on_step_end=stop)
    assert len(frames) == 4 and len(batches) == STEPS + 2
    assert close(frames[:2], draw(pipe)[:2]) and not pipe.interrupt


def test_safety_checker_sees_every_frame():
    """Else frames of later batches are not filtered, or flags are those of one batch."""

    class Checker(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images, clip_input):
            return torch.zeros_like(images), [True] * len(images)

    class Extractor:
        def __call__(self, pictures, return_tensors):
            pixels = torch.stack([torch.tensor(np.asarray(picture)) for picture in pictures])
            return type("Features", (), {"pixel_values": pixels})

    pipe = LatentDiffInterpolatePipeline(**tiny_components(), safety_checker=Checker(), feature_extractor=Extractor())
    output = quiet(pipe)(["a cat", "a dog"], num_frames=5, num_inference_steps=1, batch_size=2, output_type="pt")
    assert output.nsfw_content_detected == [True] * 5 and output.images.abs().max() == 0


BAD_CALLS = [
    ({"prompts": "a cat", "seeds": 3}, "nothing between one prompt with one seed"),
    ({"prompts": ["a cat", "a dog"], "seeds": [1, 2, 3]}, "prompts: 2 of them for 3 stations: pass 1 or 3"),
    ({"prompts": ["a cat"] * 3, "seeds": [1, 2]}, "seeds: 2 of them for 3 stations"),
    ({"latents": torch.zeros(3, 4, 4, 4)}, "prompts: 2 of them for 3 stations"),
    ({"latents": torch.zeros(2, 4, 5, 4), "height": 16, "width": 16}, "but this call draws"),
    ({"seeds": []}, "seeds: 0 of them"),
    ({"prompts": []}, "prompt is an empty list"),
    ({"prompts": ["a", 3]}, "must be a text or a list of texts"),
    ({"num_frames": 1}, "num_frames=1: it must be 2 or more"),
    ({"num_frames": 2.5}, "num_frames=2.5"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
    ({"height": 18}, "height=18.*multiples of 4"),
    ({"output_type": "gif"}, "output_type='gif'"),
    ({"guidance_interval": (3.0, 1.0)}, "guidance_interval"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message[:40] for _, message in BAD_CALLS])
def test_bad_arguments_are_named(pipe, call, message):
    """Else a user meets an IndexError from between two stations."""
    with pytest.raises(ValueError, match=message) as caught:
        draw(pipe, **call)
    assert "\n" not in str(caught.value)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_made_of_other_pipelines_and_saved_as_stable_diffusion(pipe, plain, tmp_path):
    """Else weights have to be loaded twice, or what was saved is another pipeline."""
    expected = draw(pipe)
    assert close(draw(quiet(LatentDiffInterpolatePipeline.from_pipe(plain))), expected)
    stable = StableDiffusionPipeline(
        **{**tiny_components(), "scheduler": diffusers.DDIMScheduler.from_config(plain.scheduler.config)},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert close(draw(quiet(LatentDiffInterpolatePipeline.from_pipe(stable))), expected)
    pipe.save_pretrained(tmp_path)
    assert close(draw(quiet(LatentDiffInterpolatePipeline.from_pretrained(tmp_path))), expected)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_a_stranger_draws_the_same(hub, pipe, tmp_path):
    """Else it loads only where latentdiff is installed, or from a folder and not from the Hub."""
    _, arguments = CALLS["interpolate"]
    expected = pipe("a cat", num_inference_steps=4, output_type="pt", **arguments).images
    pipe.save_pretrained(tmp_path / "saved")
    drawn = stranger_draws(str(tmp_path / "saved"), "save again", "interpolate")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    pipe.push_to_hub(f"{USER}/interpolate")
    drawn = stranger_draws(f"{USER}/interpolate", pipeline="interpolate")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
