"""What the page does: drawing, previews, stopping, one drawing at a time; and what it refuses."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from latentdiff import ConsistencyScheduler, LatentDiffPipeline
from latentdiff.config.drawing import Redraw
from latentdiff.inference import session
from latentdiff.inference.loading import SCHEDULERS, load_networks
from latentdiff.inference.recipe import save_png
from latentdiff.inference.redraw import redraw
from latentdiff.inference.session import Drawing, Settings, Stopped, Studio, Usual, open_picture
from latentdiff.models.unet import add_guidance_input
from latentdiff.pipelines.guided_sampling import GuidedSampling
from latentdiff.pipelines.inpaint import LatentDiffInpaintPipeline
from latentdiff.utils.films import strip
from tiny import tiny_components

CAT = Settings(prompt="a cat", seed=3, num_inference_steps=20)


@pytest.fixture
def tiny(tiny_pipeline_folder):
    opened = Studio(load_networks(str(tiny_pipeline_folder), "cpu"))
    yield opened
    opened.close()


@pytest.fixture
def unet_calls(tiny):
    """The timesteps at which the UNet is asked."""
    calls = []
    tiny.networks.pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(int(args[1])))
    return calls


def never() -> threading.Event:
    return threading.Event()


def pixels(drawing: Drawing) -> np.ndarray:
    return np.asarray(drawing.images[0])


@pytest.fixture
def gradient(tmp_path) -> Path:
    """A picture, wider than what is drawn."""
    Image.linear_gradient("L").convert("RGB").resize((40, 20)).save(tmp_path / "gradient.png")
    return tmp_path / "gradient.png"


@pytest.fixture
def upper_half(tmp_path) -> Path:
    """A mask for it, white in its upper half."""
    mask = Image.new("L", (40, 20))
    mask.paste(255, (0, 0, 40, 10))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


# Drawing


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_draws_what_the_pipeline_draws(tiny, scheduler):
    """Else the page would draw another picture than its recipe says, or show nothing while it draws."""
    settings = Settings(prompt="a cat", negative_prompt="red", seed=3, num_inference_steps=20, scheduler=scheduler)
    *previews, drawing = tiny.text_to_image(settings, never())

    assert [(event.step, event.steps, event.image.size) for event in previews] == [
        (step, 20, (16, 16)) for step in range(2, 20, 2)
    ]
    alone = LatentDiffPipeline(**tiny_components())
    settings = {name: value for name, value in alone.scheduler.config.items() if not name.startswith("_")}
    alone.scheduler = SCHEDULERS[scheduler].from_config(settings)
    expected = alone(
        "a cat",
        negative_prompt="red",
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    np.testing.assert_array_equal(pixels(drawing), np.asarray(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_previews_are_of_what_diffusers_predicts(name, prediction_type):
    """Else a preview would show noise, or wrong colours, with some schedulers."""
    config = {"beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": prediction_type}
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(10)
    pipeline = GuidedSampling()
    pipeline.scheduler = scheduler
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 3, 3, generator=draw) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.randn(2, 4, 3, 3, generator=draw)
        scheduler.scale_model_input(sample, t)
        x0 = pipeline._predicted_x0(output, t, sample)
        step = scheduler.step(output, t, sample)
        expected = step.pred_original_sample if "pred_original_sample" in step else scheduler.model_outputs[-1]
        torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-4 * float(sample.abs().max()))
        sample = step.prev_sample


def test_a_consistency_model_is_known_as_one(tiny):
    """Else the page begins with fifty steps of DDIM, and does not draw while somebody types."""
    assert tiny.usual_settings() == Usual("ddim", 50, 4.0, False)
    pipeline = tiny.networks.pipeline
    pipeline.scheduler = ConsistencyScheduler.from_config(pipeline.scheduler.config)
    assert tiny.usual_settings() == Usual("lcm", 4, 1.0, True)
    add_guidance_input(pipeline.unet)
    assert tiny.usual_settings() == Usual("lcm", 4, 4.0, True)


def test_without_previews_the_picture_is_the_same(tiny):
    """Else what is drawn while somebody types waits for pictures that nobody sees."""
    *shown, drawing = tiny.text_to_image(CAT, never())
    assert shown
    [alone] = tiny.text_to_image(CAT, never(), previews=False)
    np.testing.assert_array_equal(pixels(alone), pixels(drawing))


def test_a_new_seed_each_time_and_the_recipe_says_which(tiny):
    """Else "new seed" would draw the same picture again, or one that nobody could draw again."""
    any_seed = Settings(prompt="a cat", num_inference_steps=2)
    first, second = (list(tiny.text_to_image(any_seed, never()))[-1] for _ in range(2))
    assert first.recipe.seed != second.recipe.seed
    again = Settings(prompt="a cat", num_inference_steps=2, seed=first.recipe.seed)
    np.testing.assert_array_equal(pixels(list(tiny.text_to_image(again, never()))[-1]), pixels(first))


def test_what_is_cut_from_a_prompt_is_said(tiny):
    """Else somebody would wonder why the end of a prompt does nothing; or be told of another's prompt."""
    long = Settings(prompt="a cat a dog a red dog", seed=0, num_inference_steps=1)
    drawing = list(tiny.text_to_image(long, never()))[-1]
    assert len(drawing.notes) == 1 and "8 tokens" in drawing.notes[0] and "cut" in drawing.notes[0]
    assert list(tiny.text_to_image(CAT, never()))[-1].notes == ()


def test_image_to_image_keeps_more_at_less_strength(tiny, unet_calls, gradient):
    """Else strength would do nothing, or the picture not be the start."""
    whole = list(tiny.text_to_image(CAT, never()))[-1]
    unet_calls.clear()
    drawings = [list(tiny.image_to_image(CAT, never(), gradient, strength))[-1] for strength in (0.1, 0.5, 1.0)]
    assert len(unet_calls) == 2 + 10 + 20
    assert len({pixels(drawing).tobytes() for drawing in [whole, *drawings]}) == 4
    assert [drawing.recipe.strength for drawing in drawings] == [0.1, 0.5, 1.0]


def test_inpainting_leaves_the_rest_alone(tiny, gradient, upper_half):
    """Else what was not painted over would change, or what was painted over would not."""
    original = np.asarray(Image.open(gradient).crop((10, 0, 30, 20)).resize((16, 16), Image.Resampling.LANCZOS))
    *_, drawing = tiny.inpaint(CAT, never(), gradient, upper_half, 1.0)
    change = np.abs(pixels(drawing).astype(int) - original).max(axis=-1)
    assert change[10:].max() <= 1  # 8 rows are painted, and the edge is soft
    assert change[:7].mean() > 10


@pytest.mark.parametrize(("new_noise", "loop"), [(False, False), (True, True)])
def test_a_film_leads_from_picture_to_picture(tiny, new_noise, loop):
    """Else its ends would not be the pictures that the prompts give, or its preview count steps of one batch alone."""
    *previews, film = tiny.interpolate(CAT, never(), "a red dog", 9, new_noise, loop)
    assert [(event.step, event.steps) for event in previews] == [(step, 60) for step in range(6, 60, 6)]
    assert len(film.images) == 9
    dog = Settings(prompt="a red dog", seed=3 + new_noise, num_inference_steps=20)
    stations = (CAT, film.images[0]), (dog, film.images[4 if loop else 8])
    for settings, frame in stations:
        alone = pixels(list(tiny.text_to_image(settings, never()))[-1])
        assert np.abs(np.asarray(frame).astype(int) - alone).max() <= 1  # sums are rounded otherwise in a batch


def test_a_recipe_names_what_it_was_drawn_from(tiny, gradient, upper_half):
    """Else nobody could draw an edit again: the pictures it needs would be unknown."""
    *_, drawing = tiny.inpaint(CAT, never(), gradient, upper_half, 0.5)
    recipe = drawing.recipe
    assert recipe.image.sha256 == hashlib.sha256(gradient.read_bytes()).hexdigest()
    assert recipe.mask.sha256 == hashlib.sha256(upper_half.read_bytes()).hexdigest()
    assert (recipe.width, recipe.height, recipe.checkpoint) == (16, 16, tiny.networks.checkpoint)


@pytest.mark.parametrize("kind", ["text2img", "img2img", "inpaint", "interpolate"])
def test_redraw_draws_the_same(tiny, tiny_pipeline_folder, kind, gradient, upper_half, tmp_path, capsys):
    """Else the recipe under a picture would not be what it was drawn by."""
    files = {"img2img": {"image": gradient}, "inpaint": {"image": gradient, "mask": upper_half}}.get(kind, {})
    progress = {
        "text2img": lambda: tiny.text_to_image(CAT, never()),
        "img2img": lambda: tiny.image_to_image(CAT, never(), gradient, 0.6),
        "inpaint": lambda: tiny.inpaint(CAT, never(), gradient, upper_half, 0.8),
        "interpolate": lambda: tiny.interpolate(CAT, never(), "a dog", 5),
    }[kind]()
    *_, drawing = progress
    image = strip(drawing.images, drawing.recipe.columns) if kind == "interpolate" else drawing.images[0]
    save_png(image, tmp_path / "drawn.png", drawing.recipe)
    redraw(Redraw(picture=tmp_path / "drawn.png", checkpoint=str(tiny_pipeline_folder), device="cpu", **files))
    assert "pixel for pixel" in capsys.readouterr().out


def test_inpainting_has_a_checkpoint_of_its_own(tiny_pipeline_folder, tmp_path, gradient, upper_half):
    """Else --inpaint-checkpoint would do nothing, or the other tabs would draw with it."""
    components = tiny_components(seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        components["unet"] = UNet2DConditionModel.from_config({**components["unet"].config, "in_channels": 9})
    LatentDiffInpaintPipeline(**components).save_pretrained(tmp_path / "inpaint")
    both = Studio(load_networks(str(tiny_pipeline_folder), "cpu"), load_networks(str(tmp_path / "inpaint"), "cpu"))
    *_, painted = both.inpaint(CAT, never(), gradient, upper_half, 1.0)
    *_, drawn = both.text_to_image(CAT, never())
    both.close()
    assert painted.recipe.checkpoint == both.inpainting.checkpoint != drawn.recipe.checkpoint


# Stopping, and one at a time


def test_stop_ends_the_loop_at_once(tiny, unet_calls):
    """Else "Stop" would leave the machine drawing for nobody."""
    stop = threading.Event()
    events = []
    for event in tiny.text_to_image(Settings(prompt="a cat", num_inference_steps=1000), stop):
        events.append(event)
        stop.set()
    assert isinstance(events[-1], Stopped) and events[-1].steps == 1000
    assert len(unet_calls) == events[-1].step < 200


def test_stop_while_waiting_draws_nothing(tiny, unet_calls):
    """Else a drawing that was called off in the queue would still be drawn."""
    stop = threading.Event()
    stop.set()
    assert list(tiny.text_to_image(CAT, stop)) == [Stopped(0, 20)]
    assert unet_calls == []


def test_nobody_looking_stops_the_loop(tiny, unet_calls):
    """Else a closed tab would hold up everybody else."""
    looking = tiny.text_to_image(Settings(prompt="a cat", num_inference_steps=1000), never())
    next(looking)
    looking.close()
    assert isinstance(list(tiny.text_to_image(CAT, never()))[-1], Drawing)
    assert len(unet_calls) < 500


def test_closing_stops_the_loop(tiny, unet_calls):
    """Else Ctrl-C would wait for a long drawing."""
    looking = tiny.text_to_image(Settings(prompt="a cat", num_inference_steps=1000), never())
    next(looking)
    tiny.close()
    assert isinstance(list(looking)[-1], Stopped)


def test_two_at_once_do_not_mix(tiny):
    """Else one session's picture would have another's scheduler, seed or prompt."""
    wanted = [
        Settings(prompt="a cat", seed=1, num_inference_steps=12, scheduler="dpm++"),
        Settings(prompt="a dog", seed=2, num_inference_steps=7, scheduler="ddpm"),
        Settings(prompt="red", seed=3, num_inference_steps=9, scheduler="euler"),
    ]
    alone = [list(tiny.text_to_image(settings, never())) for settings in wanted]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda settings: list(tiny.text_to_image(settings, never())), wanted))
    for one, other in zip(alone, together, strict=True):
        assert one[:-1] == other[:-1]
        assert one[-1].recipe == other[-1].recipe
        np.testing.assert_array_equal(pixels(one[-1]), pixels(other[-1]))


def test_a_fault_reaches_whoever_asked_and_the_next_drawing_is_drawn(tiny, monkeypatch):
    """Else a fault would hang a page for ever, or the server for everybody."""
    monkeypatch.setattr(tiny.networks.pipeline.vae, "decode", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(tiny.text_to_image(CAT, never()))
    monkeypatch.undo()
    assert isinstance(list(tiny.text_to_image(CAT, never()))[-1], Drawing)


# What is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "a" * 2001}, "prompt has 2001 characters"),
        ({"negative_prompt": "a" * 2001}, "negative_prompt has 2001 characters"),
        ({"seed": -1}, r"seed is -1; it must lie in 0 … 4294967294"),
        ({"num_inference_steps": 0}, r"steps is 0; it must lie in 1 … 1000"),
        ({"num_inference_steps": None}, r"steps is None"),
        ({"guidance_scale": float("nan")}, r"guidance scale is nan"),
        ({"scheduler": "LMS"}, r"scheduler is 'LMS'; it must be one of ddim, ddpm, euler"),
    ],
)
def test_settings_out_of_range_are_named(changed, message):
    """Else a request that did not come from the page could tie up the server, or show a traceback."""
    with pytest.raises(ValueError, match=message):
        Settings(**{"prompt": "a cat", **changed})


def test_what_a_drawing_lacks_is_named(tiny, gradient, tmp_path):
    """Else nothing, or an error from deep inside, would come of them."""
    with pytest.raises(ValueError, match="strength is 0; it must lie in"):
        tiny.image_to_image(CAT, never(), gradient, 0)
    with pytest.raises(ValueError, match="frames is 61; it must lie in 3 … 60"):
        tiny.interpolate(CAT, never(), "a dog", 61)
    with pytest.raises(ValueError, match="the prompt is empty"):
        tiny.interpolate(CAT, never(), "", 9)
    Image.new("L", (40, 20)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="nothing is painted"):
        tiny.inpaint(CAT, never(), gradient, tmp_path / "black.png", 1.0)


def test_a_picture_with_too_many_pixels_is_refused_unread(tmp_path, monkeypatch):
    """Else a small file could fill the memory: 5000 x 4000 pixels of one shade are a PNG of 3 kB."""
    Image.new("1", (5000, 4000)).save(tmp_path / "big.png")
    monkeypatch.setattr(session, "upright_rgb", lambda image: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="5000 x 4000 pixels; it may have 16 million"):
        open_picture(tmp_path / "big.png")


def test_a_bomb_is_named(tmp_path, monkeypatch):
    """Else Pillow's talk of attacks would answer whoever uploads a very large scan."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    Image.new("1", (5000, 4000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="too many pixels; it may have 16 million"):
        open_picture(tmp_path / "huge.png")


@pytest.mark.parametrize("content", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b""])
def test_what_is_no_picture_is_refused(tmp_path, content):
    """Else Pillow's own words, or a program that it starts, would answer."""
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(ValueError, match="not a picture that can be read"):
        open_picture(tmp_path / "picture.png")


def test_an_upload_is_upright_and_on_white(tmp_path):
    """Else a photograph would lie on its side, and what is transparent be black."""
    Image.new("RGBA", (4, 2)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=turned)
    assert open_picture(tmp_path / "turned.jpg").size == (2, 4)
