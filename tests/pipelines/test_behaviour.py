"""What users of diffusers count on in any pipeline over Stable Diffusion's components, for each of ours."""

import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import (
    ConsistencyScheduler,
    LatentDiffImg2ImgPipeline,
    LatentDiffInpaintPipeline,
    LatentDiffPipeline,
)
from latentdiff.models.latents import decode_latents, sample_latents
from latentdiff.models.unet import add_guidance_input
from tiny import tiny_components

STEPS = 3
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
MASK = Image.fromarray(np.tri(16, dtype=np.uint8) * 255)


@dataclass(frozen=True)
class Subject:
    """A pipeline under test: its class, what it is called with besides the prompt, and its UNet's channels."""

    pipeline_class: type
    arguments: dict[str, Any]
    channels: int = 4

    def build(self, **changes):
        parts = tiny_components()
        if self.channels != 4:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                config = parts["unet"].config
                parts["unet"] = diffusers.UNet2DConditionModel.from_config(config, in_channels=self.channels).eval()
        return quiet(self.pipeline_class(**{**parts, **changes}))


SUBJECTS = {
    "text to image": Subject(LatentDiffPipeline, {}),
    "image to image": Subject(LatentDiffImg2ImgPipeline, {"image": PICTURE, "strength": 1.0}),
    "inpainting by blending": Subject(LatentDiffInpaintPipeline, {"image": PICTURE, "mask_image": MASK}),
    "inpainting with nine channels": Subject(LatentDiffInpaintPipeline, {"image": PICTURE, "mask_image": MASK}, 9),
}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=SUBJECTS.values(), ids=SUBJECTS.keys())
def subject(request) -> Subject:
    return request.param


@pytest.fixture
def pipe(subject):
    return subject.build()


@pytest.fixture
def draw(subject):
    """(pipeline, prompt, arguments) -> pictures (B, 3, H, W) of seed 0."""

    def call(pipe, prompt="a cat", **kwargs) -> torch.Tensor:
        defaults = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "pt", **subject.arguments}
        return pipe(prompt, **{**defaults, **kwargs}).images

    return call


def test_arguments_that_tools_look_for(pipe):
    """Else diffusers' own tools, which read the signature, do not recognise the pipeline."""
    parameters = inspect.signature(pipe.__call__).parameters
    common = {
        "prompt",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
        "num_images_per_prompt",
        "generator",
    }
    common |= {"prompt_embeds", "negative_prompt_embeds", "output_type", "return_dict", "callback_on_step_end"}
    common |= {"callback_on_step_end_tensor_inputs", "cross_attention_kwargs", "clip_skip", "ip_adapter_image", "eta"}
    assert common <= set(parameters)
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())  # a typing error is an error


# ---- callbacks ------------------------------------------------------------------------------------------------------


def test_callback_gets_what_it_asked_for(pipe, draw):
    """Else a callback that diffusers' documentation shows fails with a KeyError, or sees other tensors."""
    for names in (pipe._callback_tensor_inputs, ["latents"], []):
        seen = []
        draw(
            pipe,
            callback_on_step_end=lambda p, i, t, tensors, seen=seen: seen.append((i, sorted(tensors))) or tensors,
            callback_on_step_end_tensor_inputs=names,
        )
        assert seen == [(i, sorted(names)) for i in range(STEPS)]


def test_callback_changes_the_latents(pipe, draw):
    """Else what a callback returns has no effect."""

    def zero_at_the_end(p, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    assert draw(pipe, output_type="latent", callback_on_step_end=zero_at_the_end).abs().sum() == 0


def test_interrupt_ends_the_loop(pipe, draw):
    """Else a Stop button does not stop, or what is returned is not what there was at that moment."""
    seen = []

    def stop(p, step, timestep, tensors):
        seen.append(tensors["latents"])
        p._interrupt = step == 1
        return tensors

    drawn = draw(pipe, output_type="latent", callback_on_step_end=stop)
    assert len(seen) == 2 and torch.equal(drawn, seen[1])
    assert draw(pipe).shape == (1, 3, 16, 16) and not pipe.interrupt


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_single_pictures(pipe, draw):
    """Else a picture depends on what else is drawn with it."""
    prompts = ["a cat", "a red dog", "cat"]
    together = draw(pipe, prompts, negative_prompt=["", "red", "dog"], generator=[seeded(i) for i in range(3)])
    for i, negative in enumerate(["", "red", "dog"]):
        alone = draw(pipe, prompts[i], negative_prompt=negative, generator=seeded(i))[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_for_each_prompt(pipe, draw, count):
    """Else the number of pictures is not prompts x num_images_per_prompt."""
    for prompts in ("a cat", ["a cat", "a dog"]):
        pictures = (1 if isinstance(prompts, str) else 2) * count
        assert len(draw(pipe, prompts, num_images_per_prompt=count)) == pictures


def test_guidance_switches_on_and_off(pipe, draw):
    """Else guidance is always on, or it costs its second pass and changes nothing."""
    batches = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    off, on, more = (draw(pipe, guidance_scale=weight) for weight in (1.0, 4.0, 8.0))
    assert batches == [1] * STEPS + [2] * 2 * STEPS
    assert not torch.equal(off, on) and not torch.equal(on, more)


# ---- in and out -----------------------------------------------------------------------------------------------------


def test_output_types_show_one_picture(pipe, draw):
    """Else a picture is another one in another form."""
    tensor, array, picture = (draw(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    np.testing.assert_array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.asarray(picture[0]), (array[0] * 255).round().astype("uint8"))
    latents = draw(pipe, output_type="latent")
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensor)


def test_tuples(pipe, subject, draw):
    """Else `return_dict=False` returns something else than (pictures, flags)."""
    images, flagged = pipe(
        "a cat",
        num_inference_steps=STEPS,
        generator=seeded(),
        output_type="pt",
        return_dict=False,
        **subject.arguments,
    )
    assert flagged is None and torch.equal(images, draw(pipe))


def test_prompts_are_encoded_apart(pipe, subject, draw):
    """Else prompts cannot be encoded first and the text encoder's memory given back before pictures are drawn."""
    nothing = {"vae": None, "unet": None, "scheduler": None}
    text_only = subject.build(**nothing)
    embeds, negative = text_only.encode_prompt("a cat", torch.device("cpu"), 1, True, "red")
    no_text = subject.build(text_encoder=None, tokenizer=None)
    drawn = draw(no_text, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(drawn, draw(pipe, negative_prompt="red"))


def test_saved_and_loaded_without_optional_parts(pipe, subject, draw, tmp_path):
    """Else a round trip changes the picture, or the parts that are None come back as something."""
    pipe.save_pretrained(tmp_path)
    again = quiet(subject.pipeline_class.from_pretrained(tmp_path))
    for name in pipe._optional_components:
        assert getattr(again, name) is None
    assert torch.equal(draw(again), draw(pipe))


# ---- precision and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, draw, dtype):
    """Else one of the tensors stays in full precision and meets half-precision weights."""
    full = draw(pipe, output_type="latent")
    half = draw(pipe.to(dtype=dtype), output_type="latent")
    assert half.dtype == dtype and {p.dtype for p in pipe.unet.parameters()} == {dtype}
    assert (half.float() - full).norm() < 0.1 * full.norm()
    assert draw(pipe).dtype == dtype and draw(pipe, output_type="np").dtype == np.float32


def test_freeu(pipe, draw):
    """Else FreeU has no effect, or stays on once it is off."""
    plain = draw(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.equal(draw(pipe), plain)
    pipe.disable_freeu()
    assert torch.equal(draw(pipe), plain)


def test_fused_projections(pipe, draw):
    """Else fused projections draw another picture, or cannot be undone."""
    plain = draw(pipe)
    pipe.fuse_qkv_projections()
    fused = [module for module in pipe.unet.modules() if getattr(module, "fused_projections", False)]
    assert fused
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-3, atol=1e-3)
    pipe.unfuse_qkv_projections()
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-3, atol=1e-3)


def test_attention_slicing(pipe, draw):
    """Else what saves memory changes the picture."""
    plain = draw(pipe)
    for size in ("auto", "max", 1):
        pipe.enable_attention_slicing(slice_size=size)
        torch.testing.assert_close(draw(pipe), plain, rtol=1e-3, atol=1e-3)
    pipe.disable_attention_slicing()
    torch.testing.assert_close(draw(pipe), plain, rtol=1e-3, atol=1e-3)


def test_vae_slicing(pipe, draw):
    """Else what saves memory changes the pictures of a batch."""
    prompts = ["a cat", "a dog"]
    plain = draw(pipe, prompts)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(draw(pipe, prompts), plain, rtol=0, atol=1e-4)


def test_vae_tiling(pipe, subject, draw):
    """Else a picture of one tile is not the whole picture, or the tiles of a larger one do not meet."""
    plain = draw(pipe)
    larger = {name: picture.resize((32, 32)) for name, picture in subject.arguments.items() if name == "image"}
    larger |= {} if subject.pipeline_class is LatentDiffImg2ImgPipeline else {"height": 32, "width": 32}
    whole = draw(pipe, **larger)
    pipe.vae.enable_tiling()
    assert torch.equal(draw(pipe), plain)
    tiled = draw(pipe, **larger)
    assert tiled.shape == whole.shape == (1, 3, 32, 32) and not torch.equal(tiled, whole)
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.5


@pytest.mark.parametrize("kind", [ConsistencyScheduler, diffusers.LCMScheduler], ids=["ours", "diffusers"])
@pytest.mark.parametrize("original_steps, takes_guidance, usual", [(8, False, 1.0), (2, False, 1.0), (8, True, 7.5)])
def test_a_consistency_model_is_drawn_with_as_it_wants(subject, kind, original_steps, takes_guidance, usual):
    """Else a call that says nothing is refused for fifty steps, or guides what is guided already."""
    pipe = subject.build()
    if takes_guidance:
        add_guidance_input(pipe.unet)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, original_inference_steps=original_steps)
    said = {"num_inference_steps": min(4, original_steps), "guidance_scale": usual}
    one, other = (
        pipe("a cat", generator=seeded(), output_type="pt", **subject.arguments, **how).images for how in ({}, said)
    )
    assert torch.equal(one, other) and pipe.guidance_scale == usual
    assert pipe.num_timesteps == min(4, original_steps)


def test_any_other_model_is_drawn_with_as_in_diffusers(subject):
    """Else the same line of code draws another picture than there."""
    pipe = subject.build()
    assert pipe.usual_drawing() == (50, 7.5) and pipe.usual_drawing(3, 1.0) == (3, 1.0)
    pipe("a cat", output_type="latent", **subject.arguments)
    assert pipe.num_timesteps == 50 and pipe.guidance_scale == 7.5


def test_a_callback_sees_what_the_picture_becomes():
    """Whoever shows a picture while it grows would show noise; DDIM's last step arrives at just this."""
    pipe, seen = SUBJECTS["text to image"].build(), []
    asked = {"callback_on_step_end": lambda p, i, t, tensors: seen.append(tensors) or {}, "output_type": "latent"}
    names = ["latents", "pred_original_sample"]
    pipe("a cat", num_inference_steps=STEPS, generator=seeded(), callback_on_step_end_tensor_inputs=names, **asked)
    early, *_, last = seen
    torch.testing.assert_close(last["pred_original_sample"], last["latents"], rtol=1e-4, atol=1e-4)
    assert (early["pred_original_sample"] - early["latents"]).abs().mean() > 0.1
    pipe.scheduler = diffusers.EDMEulerScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="leave out pred_original_sample"):
        pipe("a cat", num_inference_steps=STEPS, callback_on_step_end_tensor_inputs=names, **asked)


# ---- pictures in and out --------------------------------------------------------------------------------------------


def test_a_vae_with_a_shift_is_drawn_with_as_it_was_trained_with():
    """diffusers' newer VAEs have a shift: latents trained with it would be decoded without, in other colours."""
    pipe = SUBJECTS["image to image"].build()
    vae, shift = pipe.vae, 0.4
    vae.register_to_config(shift_factor=shift)
    pixels = pipe._pixels(PICTURE)
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
        latents = pipe._encode_pixels(pixels)
        torch.testing.assert_close(latents, (mean - shift) * vae.config.scaling_factor)  # as diffusers' SD3 pipeline
        torch.testing.assert_close(latents, sample_latents(vae.config, mean, mean, torch.zeros_like(mean)))
        decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample
        drawn = pipe._decode(latents, None, "pt")[0] * 2 - 1
        torch.testing.assert_close(drawn, decoded.clamp(-1, 1))
        torch.testing.assert_close(drawn, decode_latents(vae, latents).clamp(-1, 1))


@pytest.mark.parametrize("name", list(SUBJECTS)[1:])
def test_pictures_and_masks_are_turned_as_their_exif_says(name):
    """A photograph would be edited lying on its side, though training turns it, and its mask beside it."""
    subject, turned = SUBJECTS[name], {}
    for argument, image in subject.arguments.items():
        if isinstance(image, Image.Image):  # lying on its side, with a note of it
            turned[argument] = image.transpose(Image.Transpose.ROTATE_90)
            turned[argument].getexif()[0x0112] = 6
    pipe = subject.build()
    call = {"num_inference_steps": STEPS, "output_type": "np", "strength": 0.5}
    upright, lying = (
        pipe("a cat", generator=seeded(), **{**subject.arguments, **images, **call}).images for images in ({}, turned)
    )
    assert np.array_equal(upright, lying)


@pytest.mark.parametrize("name", list(SUBJECTS)[1:])
@pytest.mark.parametrize("kind", ["array", "tensor", "bytes"])
def test_arrays_of_0_to_255_are_refused(name, kind):
    """They would be taken for white, and the picture be washed out without a word."""
    subject = SUBJECTS[name]
    shades = np.asarray(PICTURE).astype(np.float32)
    image = {"array": shades, "tensor": torch.from_numpy(shades).permute(2, 0, 1), "bytes": np.asarray(PICTURE)}[kind]
    with pytest.raises(ValueError, match="image: arrays and tensors must lie in .0, 1.; this one goes up to 255"):
        subject.build()("a cat", **{**subject.arguments, "image": image}, num_inference_steps=1)


@pytest.mark.parametrize("name", list(SUBJECTS)[2:])
def test_a_mask_that_is_black_all_over_is_refused(name):
    """The picture would be drawn in vain, as it was but for what the VAE loses."""
    subject = SUBJECTS[name]
    black = {"mask_image": Image.new("L", MASK.size)}
    with pytest.raises(ValueError, match="mask_image: it is black all over"):
        subject.build()("a cat", **{**subject.arguments, **black}, num_inference_steps=1)


@pytest.mark.parametrize(
    ("part", "said"), [("unet", "the UNet put out inf or nan"), ("vae", "the VAE put out inf or nan of finite latents")]
)
def test_what_is_not_finite_is_no_picture(part, said):
    """A black picture would be saved, and by the next call be there."""
    pipe = SUBJECTS["text to image"].build()
    spoilt = pipe.unet.conv_out if part == "unet" else pipe.vae.decoder.conv_out
    torch.nn.init.constant_(spoilt.bias, float("nan"))
    with pytest.raises(ValueError, match=said):
        pipe("a cat", num_inference_steps=1)
