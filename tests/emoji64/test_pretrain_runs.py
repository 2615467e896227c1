"""The small VAE and text encoder are trained, resumed exactly, and taken by what comes after them."""

# ruff: noqa: F401, F811 - the fixtures of another file

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from transformers import CLIPModel

from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.emoji64 import clip as pretrain_clip
from latentdiff.emoji64 import vae as pretrain_vae
from latentdiff.emoji64.clip import (
    MAX_LENGTH,
    PretrainCLIPConfig,
    build_around,
    load_text_encoder,
    tokenize,
)
from latentdiff.emoji64.vae import PretrainVAEConfig, compose, vae_loss
from latentdiff.models.latents import encode_moments
from latentdiff.models.loading import load_frozen
from latentdiff.models.parts import encode_prompt, fingerprint
from latentdiff.utils.errors import ConfigError
from tests.emoji64.test_pretrain import seeded, toy_set
from tiny import reset_accelerate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


def stop_at(monkeypatch, module, name: str, call: int) -> None:
    """The function raises at its `call`-th call, as a run that is killed."""
    real, calls = getattr(module, name), []

    def stopping(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, name, stopping)


def run(module, config_type, folder, **settings):
    options = {"max_train_steps": 4, "train_batch_size": 8, "learning_rate": 1e-3, "checkpointing_steps": 2}
    reset_accelerate()
    module.main(config_type(output_dir=str(folder), **{**options, **settings}))


def test_both_parts_train_resume_exactly_and_are_what_training_takes(toy_set, tmp_path, monkeypatch):
    """A killed run would give other weights than one that was not; or train_text2img.py could not use the result."""
    for module, config_type, loss in (
        (pretrain_vae, PretrainVAEConfig, "vae_loss"),
        (pretrain_clip, PretrainCLIPConfig, "clip_loss"),
    ):
        settings = {"vocab_size": 600} if module is pretrain_clip else {}
        monkeypatch.setattr(module.emoji, "load", lambda: toy_set)
        run(module, config_type, tmp_path / "straight", **settings)
        stop_at(monkeypatch, module, loss, call=4)
        with pytest.raises(KeyboardInterrupt):
            run(module, config_type, tmp_path / "killed", **settings)
        torch.manual_seed(99)  # nothing may hang on the global generator
        run(module, config_type, tmp_path / "killed", resume_from_checkpoint="latest", **settings)
        monkeypatch.undo()

    straight, resumed = load_frozen(str(tmp_path / "straight")), load_frozen(str(tmp_path / "killed"))
    assert fingerprint(straight.vae) == fingerprint(resumed.vae)
    assert straight.vae.config.scaling_factor == resumed.vae.config.scaling_factor != 0.18215
    assert fingerprint(straight.text_encoder) == fingerprint(resumed.text_encoder)
    clips = [CLIPModel.from_pretrained(tmp_path / name / "clip") for name in ("straight", "killed")]
    assert fingerprint(clips[0]) == fingerprint(clips[1])
    # as all releases of transformers read them
    with safe_open(tmp_path / "straight/text_encoder/model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    assert all((tmp_path / "straight" / name / "merges.txt").is_file() for name in ("tokenizer", "clip"))

    torch.manual_seed(0)
    assert fingerprint(straight.vae) != fingerprint(pretrain_vae.build_vae())
    hidden = encode_prompt(straight, ["a cat", ""])
    assert hidden.shape == (2, MAX_LENGTH, 192)
    with torch.no_grad():  # the text encoder that conditions is the one that was trained
        ids = tokenize(straight.tokenizer, ["a cat"])
        peer = clips[0].text_model(ids).last_hidden_state
    torch.testing.assert_close(hidden[:1, : ids.shape[1]], peer)
    assert type(straight.vae) is AutoencoderKL


def test_a_locked_text_encoder_gets_eyes_and_stays_as_it_is(toy_set, tiny_pipeline_folder, tmp_path, monkeypatch):
    """Prompts would mean something else to the CLIP than to the UNet, a killed run give another CLIP, or the saved one
    not be what CLIP guidance loads.
    """
    monkeypatch.setattr(pretrain_clip.emoji, "load", lambda: toy_set)
    settings = {"text_encoder_of": str(tiny_pipeline_folder)}
    run(pretrain_clip, PretrainCLIPConfig, tmp_path / "straight", **settings)
    with monkeypatch.context() as patched:
        stop_at(patched, pretrain_clip, "locked_text_loss", call=4)
        with pytest.raises(KeyboardInterrupt):
            run(pretrain_clip, PretrainCLIPConfig, tmp_path / "killed", **settings)
    torch.manual_seed(99)  # nothing may hang on the global generator
    run(pretrain_clip, PretrainCLIPConfig, tmp_path / "killed", resume_from_checkpoint="latest", **settings)
    straight, killed = (CLIPModel.from_pretrained(tmp_path / name / "clip") for name in ("straight", "killed"))
    assert fingerprint(straight) == fingerprint(killed)

    text_encoder, _ = load_text_encoder(str(tiny_pipeline_folder))
    assert fingerprint(straight.text_model) == fingerprint(text_encoder)
    assert not (tmp_path / "straight" / "text_encoder").exists()
    torch.manual_seed(0)
    new = build_around(text_encoder)
    for part in ("vision_model", "visual_projection", "text_projection"):
        assert fingerprint(getattr(straight, part)) != fingerprint(getattr(new, part))

    clip = ClipGuidance.from_pretrained(tmp_path / "straight" / "clip", scale=1.0)
    with torch.no_grad():
        pixels = torch.rand(1, 3, 64, 64, generator=seeded()) * 2 - 1
        peer = straight(input_ids=tokenize(clip.tokenizer, ["a cat"]), pixel_values=pixels)
        score = clip.score(pixels, clip.embed_text(["a cat"], "cpu"))
    torch.testing.assert_close(score, peer.logits_per_image[0] / straight.logit_scale.exp())


def test_a_saved_clip_in_half_precision(toy_set, tiny_pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_clip.emoji, "load", lambda: toy_set)
    settings = {"text_encoder_of": str(tiny_pipeline_folder), "save_dtype": "fp16", "max_train_steps": 1}
    run(pretrain_clip, PretrainCLIPConfig, tmp_path, **settings)
    assert CLIPModel.from_pretrained(tmp_path / "clip").dtype == torch.float16


def test_a_text_encoder_that_cannot_be_used_is_an_error_that_names_the_setting(tiny_pipeline_folder, tmp_path):
    with pytest.raises(ConfigError, match=f"text_encoder_of: no text encoder .*{tmp_path}"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "text_encoder").symlink_to(tiny_pipeline_folder / "text_encoder")  # and no tokenizer
    with pytest.raises(ConfigError, match="text_encoder_of: "):
        load_text_encoder(str(tmp_path))
    with pytest.raises(ConfigError, match="vocab_size is 600; with text_encoder_of it must be left out"):
        PretrainCLIPConfig(text_encoder_of=str(tiny_pipeline_folder), vocab_size=600)


def test_a_decoder_trained_further_leaves_the_latents_as_they_are(toy_set, tmp_path, monkeypatch):
    """If the encoder moved, the UNet that was trained on its latents would draw for another decoder."""
    monkeypatch.setattr(pretrain_vae.emoji, "load", lambda: toy_set)
    run(pretrain_vae, PretrainVAEConfig, tmp_path / "first")
    run(pretrain_vae, PretrainVAEConfig, tmp_path / "second", decoder_of=str(tmp_path / "first"), mse_weight=10.0)
    first, second = (AutoencoderKL.from_pretrained(tmp_path / name / "vae") for name in ("first", "second"))
    pixels = compose(torch.from_numpy(toy_set.pictures), seeded())
    before, after = (torch.cat(encode_moments(vae, pixels)) for vae in (first, second))
    assert torch.equal(before, after) and first.config.scaling_factor == second.config.scaling_factor
    for part in ("post_quant_conv", "decoder"):
        assert fingerprint(getattr(first, part)) != fingerprint(getattr(second, part))


def test_a_decoder_of_nothing_is_an_error_that_names_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=f"decoder_of: no vae .*{tmp_path}"):
        pretrain_vae.load_with_frozen_encoder(str(tmp_path))


def test_the_squared_error_counts_by_its_weight():
    """L1 and MSE of a known reconstruction error; a weight without effect would show as no difference."""
    vae = pretrain_vae.build_vae()
    pixels = torch.zeros(2, 3, 64, 64)
    with torch.no_grad():
        plain, weighted = (
            vae_loss(vae, pixels, seeded(), PretrainVAEConfig(mse_weight=weight)) for weight in (0.0, 10.0)
        )
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=seeded())
        squared = vae.decode(latents).sample.square().mean()
    torch.testing.assert_close(weighted - plain, 10 * squared)
