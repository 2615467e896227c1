"""The text-to-image pipeline saved, loaded, in other precisions and compiled: it stays the same pipeline."""

# ruff: noqa: F401, F811 - the fixtures of another file

import json

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentdiff import DDIMScheduler, DDPMScheduler, LatentDiffPipeline
from latentdiff.pipelines.portable_saving import adopt_scheduler
from stranger import stranger_draws
from tests.pipelines.test_text2img import draw, pipe, quiet, seeded
from tiny import tiny_components

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
