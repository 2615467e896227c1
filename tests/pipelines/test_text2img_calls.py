"""What a call of the text-to-image pipeline takes, calls back and refuses."""

# ruff: noqa: F401, F811 - the fixtures of another file

import diffusers
import numpy as np
import pytest
import torch

from latentdiff import LatentDiffPipeline
from tests.pipelines.test_text2img import STEPS, draw, pipe, plain, quiet, seeded, warnings_logged
from tiny import tiny_components

# ---- noise, latents, prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_list_of_generators_equals_each_alone(pipe, eta):
    """Else a picture depends on its neighbours in the batch and cannot be drawn again from its seed."""
    together = draw(pipe, ["a cat", "a dog"], generator=[seeded(5), seeded(6)], eta=eta)
    for picture, prompt, seed in zip(together, ["a cat", "a dog"], [5, 6], strict=True):
        alone = draw(pipe, prompt, generator=seeded(seed), eta=eta)[0]
        torch.testing.assert_close(picture, alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_latents_in_and_out(pipe):
    """Else latents cannot be kept and decoded later, or noise of one's own is not what is used."""
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    latents = draw(pipe, latents=noise, output_type="latent")
    assert latents.shape == noise.shape
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert torch.equal((pixels / 2 + 0.5).clamp(0, 1), draw(pipe, latents=noise))
    assert torch.equal(draw(pipe, latents=noise), draw(pipe))  # the generator draws this very noise
    assert draw(pipe, latents=torch.zeros(1, 4, 6, 4)).shape == (1, 3, 24, 16)  # their size is the picture's


def test_sizes_and_output_types(pipe):
    """Else the default size is Stable Diffusion's 8 x sample_size whatever the VAE, or a type has another range."""
    assert draw(pipe).shape == (1, 3, 16, 16)
    assert draw(pipe, height=20).shape == (1, 3, 20, 16)
    arrays = draw(pipe, output_type="np")
    assert arrays.shape == (1, 16, 16, 3) and arrays.min() >= 0 and arrays.max() <= 1
    assert draw(pipe, output_type="pil")[0].size == (16, 16)
    images, flagged = pipe("a cat", num_inference_steps=1, return_dict=False)
    assert len(images) == 1 and flagged is None
    pipe.unet.register_to_config(sample_size=(4, 6))
    assert draw(pipe).shape == (1, 3, 16, 24)


def test_encode_prompt_shapes_and_order(pipe):
    """Else pictures of one prompt do not lie side by side, and captions go to the wrong pictures."""
    prompt, negative = pipe.encode_prompt(["a cat", "a dog"], "cpu", 2, True, "red")
    assert prompt.shape == negative.shape == (4, 8, 16)
    assert torch.equal(prompt[0], prompt[1]) and torch.equal(prompt[2], prompt[3])
    assert not torch.equal(prompt[1], prompt[2])
    assert torch.equal(negative, negative[:1].expand_as(negative))  # one negative prompt serves all
    alone, none = pipe.encode_prompt("a dog", "cpu", 1, False)
    torch.testing.assert_close(alone[0], prompt[2])
    assert none is None


def test_clip_skip_takes_an_inner_layer(pipe):
    """Else clip_skip is accepted and does nothing, or fails since transformers moved the final norm."""
    skipped, _ = pipe.encode_prompt("a cat", "cpu", 1, False, clip_skip=1)
    tokens = pipe.tokenizer("a cat", padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        norm = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm
        assert torch.equal(skipped, norm(hidden))
    assert not torch.equal(draw(pipe, clip_skip=1), draw(pipe))


def test_prompt_embeds_in_place_of_prompts(pipe):
    """Else weighted or cached prompt embeddings draw something else than their prompt."""
    prompt, negative = pipe.encode_prompt("a cat", "cpu", 1, True, "red")
    expected = draw(pipe, negative_prompt="red")
    assert torch.equal(draw(pipe, None, prompt_embeds=prompt, negative_prompt_embeds=negative), expected)
    assert torch.equal(draw(pipe, None, prompt_embeds=prompt, negative_prompt="red"), expected)


def test_cut_text_is_logged(pipe, warnings_logged):
    """Else the end of a long prompt is silently without effect."""
    draw(pipe, ["a cat", "a cat a cat a red dog"])
    (message,) = warnings_logged()
    assert message.endswith(": 'dog'") and "'a cat a cat a red dog'" in message


def test_negative_prompt_without_guidance_is_logged(pipe, warnings_logged):
    """Else a negative prompt is accepted and does nothing."""
    draw(pipe, negative_prompt="red", guidance_scale=1.0)
    (message,) = warnings_logged()
    assert "guidance_scale=1.0" in message
    draw(pipe, negative_prompt="red")
    assert len(warnings_logged()) == 1


def test_textual_inversion_of_several_vectors(pipe):
    """Else a learned token of two vectors counts as one."""
    pipe.load_textual_inversion(torch.randn(2, 16, generator=seeded()), token="<toy>")
    with_both, _ = pipe.encode_prompt("<toy>", "cpu", 1, False)
    by_hand, _ = pipe.encode_prompt("<toy> <toy>_1", "cpu", 1, False)
    assert pipe.maybe_convert_prompt("<toy>", pipe.tokenizer) == "<toy> <toy>_1"
    assert torch.isfinite(with_both).all() and with_both.shape == by_hand.shape


def test_custom_timesteps(pipe):
    """Else a list of timesteps is accepted and others are visited."""
    visited = []
    draw(pipe, timesteps=[900, 500, 20], callback_on_step_end=lambda p, i, t, k: visited.append(int(t)))
    assert visited == [900, 500, 20] and pipe.num_timesteps == 3


# ---- callbacks ------------------------------------------------------------------------------------------------------


def test_callback_sees_and_changes_the_state(pipe):
    """Else inpainting-like uses, which overwrite latents between steps, do nothing."""
    seen = []

    def zero_at_the_end(p, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        if step == STEPS - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    kwargs = {"callback_on_step_end": zero_at_the_end, "callback_on_step_end_tensor_inputs": names}
    assert draw(pipe, output_type="latent", **kwargs).abs().max() == 0
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert seen[0][2] == sorted(names)


def test_callback_changes_either_prompt(pipe):
    """Else a new negative prompt is taken from the callback and never used."""
    _, red = pipe.encode_prompt("a cat", "cpu", 1, True, "red")

    def swap(p, step, timestep, tensors):
        return {"negative_prompt_embeds": red}

    def swap_both_halves(p, step, timestep, tensors):
        return {"prompt_embeds": torch.cat([red, tensors["prompt_embeds"][1:]])}

    one = draw(pipe, callback_on_step_end=swap)
    names = ["prompt_embeds"]
    other = draw(pipe, callback_on_step_end=swap_both_halves, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(one, other)
    assert not torch.equal(one, draw(pipe))


def test_interrupt_stops_and_the_next_call_starts_afresh(pipe):
    """Else a Stop button does not stop, or stops every later call as well."""
    steps = []

    def stop(p, step, timestep, tensors):
        steps.append(step)
        p._interrupt = step == 1
        return tensors

    assert torch.isfinite(draw(pipe, callback_on_step_end=stop)).all()
    assert steps == [0, 1] and pipe.interrupt
    assert draw(pipe).shape == (1, 3, 16, 16) and not pipe.interrupt


def test_guidance_can_end_within_a_call(pipe, plain):
    """Else diffusers' own callback that cuts guidance off after some steps fails."""
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    batches = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    ours = draw(pipe, callback_on_step_end=cutoff)
    assert batches == [2, 2, 2, 1]
    assert torch.equal(ours, draw(plain, callback_on_step_end=cutoff))


# ---- errors ---------------------------------------------------------------------------------------------------------

EMBEDS = torch.zeros(1, 8, 16)
BAD_CALLS = [
    ({"height": 18}, "height=18.*multiples of 4"),
    ({"width": -16}, "width=-16.*multiples of 4"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": None}, "pass prompt or prompt_embeds"),
    ({"prompt": 3}, "prompt must be a text or a list of texts, not 3"),
    ({"prompt": ["a", 3]}, "prompt must be a text or a list"),
    ({"prompt_embeds": EMBEDS}, "pass prompt or prompt_embeds, not both"),
    ({"negative_prompt": "x", "negative_prompt_embeds": EMBEDS}, "negative_prompt or negative_prompt_embeds, not both"),
    ({"negative_prompt": ["x", "y"]}, "2 negative prompts for 1 prompts"),
    ({"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, :4]}, "differ in shape"),
    ({"output_type": "jpeg"}, "output_type='jpeg'.*pil, np, pt, latent"),
    (
        {"latents": torch.zeros(1, 4, 5, 4), "height": 16, "width": 16},
        r"\(1, 4, 5, 4\), but this call draws \(1, 4, 4, 4\)",
    ),
    ({"latents": torch.zeros(2, 4, 4, 4)}, r"\(2, 4, 4, 4\), but this call draws \(1, 4, 4, 4\)"),
    ({"generator": [seeded(), seeded()]}, "2 generators for 1 pictures"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
    ({"clip_skip": 9}, "clip_skip=9.*3 layers"),
    ({"timesteps": [5, 1], "sigmas": [1.0]}, "timesteps or sigmas, not both"),
    ({"sigmas": [1.0, 0.5]}, "DDIMScheduler takes no sigmas"),
    ({"callback_on_step_end_tensor_inputs": ["unet"]}, "unet.*latents, prompt_embeds"),
    ({"ip_adapter_image": EMBEDS, "ip_adapter_image_embeds": [EMBEDS]}, "ip_adapter_image_embeds, not both"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message[:40] for _, message in BAD_CALLS])
def test_bad_arguments_are_named(pipe, call, message):
    """Else a user meets a shape error from deep inside the network."""
    with pytest.raises(ValueError, match=message):
        draw(pipe, **{"prompt": "a cat", **call})


def test_size_has_to_be_known(pipe):
    """Else a UNet without a sample size fails with a TypeError about NoneType."""
    pipe.unet.register_to_config(sample_size=None)
    pipe.vae.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="give height and width"):
        draw(pipe)
    assert draw(pipe, height=16, width=16).shape == (1, 3, 16, 16)


def test_safety_checker_is_asked_and_needs_its_extractor(tiny_pipeline_folder):
    """Else a checker that a user adds does not see the pictures."""

    class Checker(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, images, clip_input):
            return torch.zeros_like(images), [True] * len(images)

    class Extractor:
        def __call__(self, pictures, return_tensors):
            pixels = torch.stack([torch.tensor(np.asarray(picture)) for picture in pictures])
            return type("Features", (), {"pixel_values": pixels})

    components = tiny_components()
    with pytest.raises(ValueError, match="needs a feature_extractor"):
        LatentDiffPipeline(**components, safety_checker=Checker())
    pipe = quiet(LatentDiffPipeline(**components, safety_checker=Checker(), feature_extractor=Extractor()))
    output = pipe("a cat", num_inference_steps=1, output_type="pt")
    assert output.nsfw_content_detected == [True] and output.images.abs().max() == 0
