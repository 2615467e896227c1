"""The text-to-image pipeline: Stable Diffusion's pictures to the last bit, and what it promises beyond that."""

import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentdiff import DDIMScheduler, DDPMScheduler, LatentDiffPipeline
from latentdiff.diffusion.guidance import guide
from latentdiff.diffusion.unet_inputs import guidance_embedding
from latentdiff.pipelines.portable_saving import adopt_scheduler
from stranger import stranger_draws
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


# ---- loading and saving ---------------------------------------------------------------------------------------------


def test_saved_index_names_diffusers_only(tiny_pipeline_folder):
    """Else the folder loads only where latentdiff is already imported."""
    index = json.loads((tiny_pipeline_folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["safety_checker"] == index["feature_extractor"] == index["image_encoder"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert "latentdiff" not in json.dumps(index)
    scheduler = json.loads((tiny_pipeline_folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["steps_offset"], scheduler["clip_sample"]) == (1, False)


def test_every_way_of_loading_draws_the_same(pipe, tiny_pipeline_folder):
    """Else the code that travels with the weights, or the index, is not what it says."""
    expected = draw(pipe)
    assert type(pipe.scheduler) is DDIMScheduler
    generic = quiet(diffusers.DiffusionPipeline.from_pretrained(tiny_pipeline_folder))
    assert type(generic) is StableDiffusionPipeline
    assert torch.equal(draw(generic), expected)
    assert torch.equal(stranger_draws(str(tiny_pipeline_folder), "save again"), expected)


def test_round_trip_keeps_picture_scheduler_and_settings(pipe, tmp_path):
    """Else a saved pipeline is another pipeline: DDPM comes back as DDIM, or one of its settings is lost."""
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_large")
    pipe.save_pretrained(tmp_path / "ddpm")
    again = quiet(LatentDiffPipeline.from_pretrained(tmp_path / "ddpm"))
    assert type(again.scheduler) is DDPMScheduler
    assert again.scheduler.config.variance_type == "fixed_large"
    assert torch.equal(draw(again), draw(pipe))
    assert str(tmp_path) not in (tmp_path / "ddpm" / "model_index.json").read_text()
    again.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "model_index.json").read_text()


def test_other_schedulers_survive_saving(pipe, tmp_path):
    """Else the index calls every scheduler DDIM."""
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    again = LatentDiffPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.EulerDiscreteScheduler


def test_schedulers_are_adopted_once():
    """Else a scheduler of ours, or one of another kind, is rebuilt and loses its identity for no reason."""
    settings = {"clip_sample": False, "steps_offset": 1}
    ours = DDIMScheduler(**settings)
    assert adopt_scheduler(ours) is ours
    euler = diffusers.EulerDiscreteScheduler(steps_offset=1)
    assert adopt_scheduler(euler) is euler
    adopted = adopt_scheduler(diffusers.DDPMScheduler(**settings, prediction_type="v_prediction"))
    assert type(adopted) is DDPMScheduler
    assert adopted.config.prediction_type == "v_prediction"


def test_none_components_and_single_file(tiny_pipeline_folder, pipe, tmp_path):
    """Else text encoders cannot be left out to save memory, nor `from_single_file` take parts that are at hand."""
    embeds, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    bare = quiet(LatentDiffPipeline.from_pretrained(tiny_pipeline_folder, text_encoder=None, tokenizer=None))
    assert torch.equal(draw(bare, None, prompt_embeds=embeds, negative_prompt_embeds=negative), draw(pipe))
    with pytest.raises(ValueError, match="no text_encoder"):
        draw(bare)
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        draw(bare, None, prompt_embeds=embeds)
    assert LatentDiffPipeline(None, None, None, None, None).vae_scale_factor == 8

    torch.save({"nothing": torch.zeros(1)}, tmp_path / "model.ckpt")
    parts = {name: getattr(pipe, name) for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}
    single = LatentDiffPipeline.from_single_file(
        str(tmp_path / "model.ckpt"), config=str(tiny_pipeline_folder), local_files_only=True, **parts
    )
    assert torch.equal(draw(quiet(single)), draw(pipe))


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
    with pytest.raises(ValueError, match="pass height and width"):
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


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, diffusers.UniPCMultistepScheduler])
def test_half_precision_on_a_gpu(tiny_pipeline_folder, scheduler):
    """Else a dtype or a device is mixed up somewhere between the text encoder and the VAE."""
    pipe = quiet(LatentDiffPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.float16).to("cuda"))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    half = draw(pipe, latents=noise)
    assert half.device.type == "cuda" and half.dtype == torch.float16 and torch.isfinite(half).all()
    full = quiet(LatentDiffPipeline.from_pretrained(tiny_pipeline_folder).to("cuda"))
    full.scheduler = scheduler.from_config(full.scheduler.config)
    torch.testing.assert_close(half.float(), draw(full, latents=noise), rtol=0, atol=0.05)
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(draw(pipe, latents=noise), half)


def test_from_pipe_keeps_the_precision(tiny_pipeline_folder):
    """Else another pipeline on the same components silently makes all of them, its own and the first one's, fp32."""
    plain = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    plain.vae.float()  # as many keep it
    ours = quiet(LatentDiffPipeline.from_pipe(plain))
    assert (ours.unet.dtype, ours.vae.dtype) == (torch.bfloat16, torch.float32)
    assert ours.unet is plain.unet and plain.unet.dtype == torch.bfloat16
    assert torch.isfinite(draw(ours)).all()
    other = tiny_components(seed=1)["unet"]
    assert LatentDiffPipeline.from_pipe(ours, unet=other).unet is other
    assert LatentDiffPipeline.from_pipe(ours, dtype=torch.float32).unet.dtype == torch.float32
    diffusers.StableDiffusionImg2ImgPipeline.from_pipe(plain)
    assert plain.unet.dtype == torch.float32  # theirs: the docstring's claim is out of date where this fails


def test_half_precision_types_follow_the_text_encoder(tiny_pipeline_folder):
    """Else full-precision noise meets half-precision weights and the first convolution refuses it."""
    pipe = quiet(LatentDiffPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16))
    assert draw(pipe, output_type="latent").dtype == torch.bfloat16
    given = torch.randn(1, 4, 4, 4, generator=seeded())
    assert draw(pipe, latents=given, output_type="latent").dtype == torch.bfloat16


# ---- compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regional", [False, True])
def test_compiled_networks_draw_the_same(pipe, tmp_path, regional):
    """Else `compile` changes pictures, is never called upon, or puts other names into what is saved."""
    compiled = []

    def backend(graph, inputs):  # runs what torch captured, so that no compiler is needed
        compiled.append(graph)
        return graph.forward

    expected = draw(pipe)
    pipe.compile(regional, backend=backend)
    torch.testing.assert_close(draw(pipe), expected)
    assert compiled
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(quiet(StableDiffusionPipeline.from_pretrained(tmp_path))), expected)
    torch.compiler.reset()
