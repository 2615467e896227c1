"""Building, loading and freezing the networks, against diffusers and transformers."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from latentdiff.models.loading import load_frozen, load_unet
from latentdiff.models.parts import FrozenParts, encode_prompt, fingerprint, freeze
from latentdiff.models.unet import UNET_CLASSES, UNET_PRESETS, build_unet, widen_input
from latentdiff.utils.errors import ConfigError
from tiny import tiny_components


def parts() -> FrozenParts:
    components = tiny_components()
    return FrozenParts(*(components[name] for name in ("vae", "text_encoder", "tokenizer")))


# ---- loading --------------------------------------------------------------------------------------------------------


def test_frozen_is_frozen(tiny_pipeline_folder):
    """VAE and text encoder would drift, or behave otherwise than when they are sampled."""
    loaded = load_frozen(str(tiny_pipeline_folder))
    for module in (loaded.vae, loaded.text_encoder):
        assert not any(child.training for child in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert fingerprint(loaded.vae) == fingerprint(tiny_components()["vae"])
    assert fingerprint(loaded.text_encoder) == fingerprint(tiny_components()["text_encoder"])


def test_a_folder_with_fp16_files_alone_loads_in_fp32(tmp_path):
    """Most published models have an fp16 variant; half-precision weights would not train."""
    from latentdiff import LatentDiffPipeline

    pipeline = LatentDiffPipeline(**tiny_components()).to(dtype=torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert {p.dtype for p in load_unet(str(tmp_path)).parameters()} == {torch.float32}
    loaded = load_frozen(str(tmp_path))
    assert {p.dtype for m in (loaded.vae, loaded.text_encoder) for p in m.parameters()} == {torch.float32}
    for name, parameter in loaded.vae.named_parameters():
        assert torch.equal(parameter, tiny_components()["vae"].get_parameter(name).half().float()), name


@pytest.mark.parametrize("name", ["vae", "text_encoder", "tokenizer", "unet"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_part_that_cannot_be_loaded_is_named(tiny_pipeline_folder, tmp_path, name, damage):
    """The message would not say which of four parts, of which model."""
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    if damage == "missing":
        shutil.rmtree(folder / name)
    else:
        (weights,) = [*folder.glob(f"{name}/*.safetensors"), *folder.glob(f"{name}/tokenizer.json")]
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"no {name} could be loaded from '{folder}'") as refused:
        load_unet(str(folder)) if name == "unet" else load_frozen(str(folder))
    assert len(str(refused.value).splitlines()) == 1


def pickled(folder, name: str, content) -> None:
    """Put pickled weights in the place of a part's safetensors."""
    for path in folder.glob(f"{name}/*.safetensors"):
        path.unlink()
    file = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(content, folder / name / file)


def test_an_old_model_of_pickled_weights_loads_with_a_warning(tiny_pipeline_folder, tmp_path, caplog):
    """Many Stable Diffusion folders of the first years hold nothing else."""
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    for name in ("vae", "text_encoder", "unet"):
        pickled(folder, name, tiny_components()[name].state_dict())
    loaded = load_frozen(str(folder))
    assert fingerprint(loaded.vae) == fingerprint(tiny_components()["vae"])
    assert fingerprint(loaded.text_encoder) == fingerprint(tiny_components()["text_encoder"])
    assert fingerprint(load_unet(str(folder))) == fingerprint(tiny_components()["unet"])
    warned = [record for record in caplog.records if "weights_only=True" in record.message]
    assert len(warned) == len(caplog.records) == 3


class Harmful:
    """What it does when it is unpickled is to leave a file."""

    def __init__(self, trace):
        self._trace = trace

    def __reduce__(self):
        return (open, (str(self._trace), "w"))


@pytest.mark.parametrize("name", ["vae", "text_encoder", "unet"])
def test_a_pickle_that_runs_code_is_refused(tiny_pipeline_folder, tmp_path, monkeypatch, name):
    """A model from the net would run its program on the machine that trains it. Nor may the environment allow it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, trace = shutil.copytree(tiny_pipeline_folder, tmp_path / "model"), tmp_path / "trace"
    pickled(folder, name, {**tiny_components()[name].state_dict(), "more": Harmful(trace)})
    with pytest.raises(ConfigError, match=f"no {name} could be loaded") as refused:
        load_unet(str(folder)) if name == "unet" else load_frozen(str(folder))
    assert not trace.exists() and len(str(refused.value).splitlines()) == 1


def test_no_model_at_all():
    with pytest.raises(ConfigError, match="'/no/such/model'"):
        load_frozen("/no/such/model")


# ---- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", UNET_PRESETS)
def test_presets_fit_what_is_frozen(preset):
    """A preset that diffusers cannot build, or whose output is no noise for its latents."""
    unet = build_unet(preset, latent_channels=4, sample_size=16, cross_attention_dim=192, seed=0)
    assert type(unet) in UNET_CLASSES.values()
    latents, words = torch.zeros(1, 4, 16, 16), torch.zeros(1, 20, 192)
    with torch.no_grad():
        assert unet(latents, torch.tensor([5]), words).sample.shape == latents.shape


def test_a_widened_input_changes_nothing_until_it_is_trained(tmp_path):
    """Inpainting would start from a damaged model, not from what it drew; or not load again with its new width."""
    unet, torch_state = tiny_components()["unet"], torch.get_rng_state()
    latents, words = torch.randn(2, 4, 4, 4), torch.randn(2, 8, 16)
    more, timesteps = torch.randn(2, 5, 4, 4), torch.tensor([3, 900])
    with torch.no_grad():
        before = unet(latents, timesteps, words).sample
        torch.set_rng_state(torch_state)
        widen_input(unet, 9)
        assert torch.equal(torch.get_rng_state(), torch_state)  # nor may it draw from the global generator
        after = unet(torch.cat([latents, more], dim=1), timesteps, words).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    unet.save_pretrained(tmp_path / "unet")
    again = load_unet(str(tmp_path))
    assert again.config.in_channels == 9 and again.config.out_channels == 4
    assert fingerprint(again) == fingerprint(unet) and all(p.requires_grad for p in again.conv_in.parameters())


def small(seed: int) -> UNet2DConditionModel:
    return build_unet("tiny", latent_channels=4, sample_size=4, cross_attention_dim=24, seed=seed)


def test_the_seed_alone_decides_new_weights():
    """Two processes, or a repeated run, would start from other weights; or other draws would shift."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fingerprint(small(0))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert fingerprint(small(0)) == first != fingerprint(small(1))


def test_a_saved_config_builds_the_same_architecture(tmp_path):
    """`--unet path/config.json` would train another network than the one it names."""
    saved = tiny_components()["unet"]
    saved.save_config(tmp_path)
    built = build_unet(str(tmp_path / "config.json"), latent_channels=4, sample_size=8, cross_attention_dim=16, seed=0)
    shapes = {name: tensor.shape for name, tensor in saved.state_dict().items()}
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes
    assert built.config.sample_size == 8  # what VAE and text encoder fix comes from them


@pytest.mark.parametrize("content", [None, "{", json.dumps({"no_such_argument": 1})], ids=["none", "cut", "wrong"])
def test_an_unknown_unet_is_named(tmp_path, content):
    """A typing error in the preset's name, or a wrong file, would show as a traceback."""
    name = "emoji65"
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        name = str(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=f"unet: '{name}'") as refused:
        build_unet(name, latent_channels=4, sample_size=4, cross_attention_dim=16, seed=0)
    assert len(str(refused.value).splitlines()) == 1


# ---- fingerprints and text ------------------------------------------------------------------------------------------


def test_fingerprint_sees_every_bit_and_name():
    """A cache would be taken for that of other weights."""
    module, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other.load_state_dict(module.state_dict())
    assert fingerprint(module) == fingerprint(other)
    with torch.no_grad():
        other.weight[1, 1] = torch.nextafter(other.weight[1, 1], torch.tensor(9.0))
    assert fingerprint(module) != fingerprint(other)
    assert fingerprint(module) != fingerprint(torch.nn.Linear(2, 2).double())
    assert fingerprint(torch.nn.Sequential(module)) != fingerprint(module)
    assert fingerprint(module.half()) != fingerprint(other.bfloat16())


def test_freeze():
    module = freeze(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()))
    assert not module.training and not module[1].training and not module[0].weight.requires_grad


def test_prompts_are_encoded_as_stable_diffusion_encodes_them(tiny_pipeline_folder):
    """The model would be trained under other hidden states than it is sampled with."""
    captions = ["a cat", "", "a very long caption that is cut because it has more than eight tokens", "ein Käse 猫"]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    expected, _ = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
    ours = encode_prompt(load_frozen(str(tiny_pipeline_folder)), captions)
    assert ours.shape == (4, 8, 16) and ours.dtype == torch.float32
    assert torch.equal(ours, expected)


def test_the_attention_mask_is_given_where_an_encoder_asks_for_it():
    """Encoders in the manner of Stable Diffusion 2 would see their padding."""
    plain, masked = parts(), parts()
    masked.text_encoder.config.use_attention_mask = True
    tokens = masked.tokenizer(["cat"], padding="max_length", max_length=8, return_tensors="pt")
    expected = masked.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    assert torch.equal(encode_prompt(masked, ["cat"]), expected.detach())
    assert not torch.equal(encode_prompt(masked, ["cat"])[:, -1], encode_prompt(plain, ["cat"])[:, -1])


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"gradient_checkpointing": True}], ids=str)
def test_compiled_blocks_train_the_same_and_are_saved_the_same(train, tmp_path, changes):
    """Else the option is taken and nothing is compiled, or what it trains cannot be loaded."""
    found = []
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        counters.clear()
        folder = train(**changes, dynamo_backend=backend, output_dir=str(tmp_path / str(backend)))
        assert (counters["stats"]["unique_graphs"] > 1) == (backend is not None)
        file = next(folder.glob("*lora*.safetensors"), folder / "unet" / "diffusion_pytorch_model.safetensors")
        found.append(load_file(file))
    assert found[0].keys() == found[1].keys()
    for name, weights in found[0].items():
        torch.testing.assert_close(found[1][name], weights, rtol=1e-4, atol=1e-5)


def test_an_unknown_backend_of_compilation_is_refused(train):
    with pytest.raises(ConfigError, match="dynamo_backend: 'inductr' is not to be had here; it may be .*inductor"):
        train(dynamo_backend="inductr")
