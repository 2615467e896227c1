"""Models in single files: read as diffusers reads them, with what they say of themselves; anything else is one line."""

import pytest
import torch
import yaml
from diffusers import PNDMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.models.loading import load_frozen, load_schedule, load_unet
from latentdiff.models.parts import fingerprint
from latentdiff.models.single_file import load_single_file
from latentdiff.utils.errors import ConfigError

LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
SDXL = "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"


@pytest.fixture
def file(original_folder):
    return original_folder.with_suffix(".safetensors")


def test_a_training_reads_what_is_in_the_folder(original_folder, file):
    """It would begin from other weights, in half precision, or unfrozen."""
    one, other = (load_frozen(str(path), single_file_config=str(original_folder)) for path in (original_folder, file))
    for name in ("vae", "text_encoder"):
        assert fingerprint(getattr(one, name)) == fingerprint(getattr(other, name))
        assert not any(p.requires_grad for p in getattr(other, name).parameters())
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    unet = load_unet(str(file), single_file_config=str(original_folder))
    assert fingerprint(unet) == fingerprint(load_unet(str(original_folder)))
    schedule = load_schedule(str(file), single_file_config=str(original_folder))
    assert torch.equal(schedule.betas, load_schedule(str(original_folder)).betas)


@pytest.mark.parametrize(
    ("kind", "marks", "header", "beside", "predicts", "zero_snr"),
    [
        (None, (), {}, None, "epsilon", False),
        (None, ("v_pred", "ztsnr"), {}, None, "v_prediction", True),
        (None, (), {"modelspec.prediction_type": "v"}, None, "v_prediction", False),
        (None, (), {}, {"model": {"params": {"parameterization": "v"}}}, "v_prediction", False),
        (None, (), {}, ["of something else"], "epsilon", False),
        (PNDMScheduler, ("v_pred",), {}, {"model": {"params": {}}}, "v_prediction", False),
        (PNDMScheduler, ("v_pred", "ztsnr"), {}, None, "v_prediction", True),
    ],
)
def test_what_a_file_says_of_its_prediction(
    kind, marks, header, beside, predicts, zero_snr, original_folder, file, tmp_path, monkeypatch
):
    """A model that puts out v would be drawn with as if that were noise."""
    if kind is not None:  # that of Stable Diffusion 1.5, which knows no zero terminal SNR
        load = kind.from_pretrained
        monkeypatch.setattr("diffusers.DDIMScheduler.from_pretrained", lambda *args, **options: load(*args, **options))
    weights = load_file(file) | {mark: torch.empty(0) for mark in marks}
    save_file(weights, tmp_path / "a.safetensors", metadata={"format": "pt", **header})
    if beside is not None:
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(beside))
    loaded = load_single_file(tmp_path / "a.safetensors", str(original_folder), parts=("scheduler",))["scheduler"]
    assert loaded.config.prediction_type == predicts and (loaded.alphas_cumprod[-1] < 1e-6) == zero_snr
    assert isinstance(loaded, kind or object) != (zero_snr and kind is not None)
    if zero_snr:
        loaded.set_timesteps(7)
        assert loaded.timesteps[0] == 999


def test_what_is_no_whole_model_is_one_line(original_folder, file, tmp_path):
    """diffusers would end in a traceback, draw with random weights, or ask the network for something else."""
    weights = load_file(file)
    unet = {name: one for name, one in weights.items() if name.startswith("model.")}
    key = "model.diffusion_model.out.2.bias"
    cases = {
        "lora": ({LORA: torch.zeros(2, 2)}, "holds LoRA weights, which --lora takes"),
        "xl": (weights | {SDXL: torch.zeros(2)}, "holds a Stable Diffusion XL model"),
        "unet": (unet, "holds no VAE by Stable Diffusion's original names"),
        "other": ({"a": torch.zeros(1)}, "holds no UNet by Stable Diffusion's original names"),
        "lacking": (
            {name: one for name, one in weights.items() if name != key},
            "lacks weights that the configurations of .*original ask for",
        ),
        "text": (
            {name: one for name, one in weights.items() if not name.endswith("final_layer_norm.bias")},
            "lacks 1 weights of its text_encoder, such as final_layer_norm.bias",
        ),
        "shape": (weights | {key: torch.zeros(3)}, "does not fit the configurations of .*original"),
    }
    for name, (content, said) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        refused(tmp_path / f"{name}.safetensors", str(original_folder), said)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    (tmp_path / "words.safetensors").write_text("no weights")
    (tmp_path / "pickle.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "empty.safetensors").touch()
    for name, said in (
        ("cut.safetensors", "no safetensors file that can be read"),
        ("words.safetensors", "no safetensors file that can be read"),
        ("empty.safetensors", "no safetensors file that can be read"),
        ("pickle.ckpt", "others may run code when they are read, and are refused"),
        ("none.safetensors", "no such file"),
    ):
        refused(tmp_path / name, str(original_folder), said)


def test_configurations_that_are_not_to_be_had_are_one_line(file, tmp_path):
    """Without a network nobody would learn what is missing."""
    refused(
        file, None, "the configurations and the tokenizer of the Stable Diffusion .* folder .* --single-file-config"
    )
    refused(file, "you/mine", "the configurations and the tokenizer of you/mine are not to be had")
    refused(file, str(tmp_path), "holds no model_index.json")
    refused(file, "no/such/folder", "does not fit the configurations of no/such/folder")


def refused(path, config: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as mistake:
        load_single_file(path, config)
    assert "\n" not in str(mistake.value)


def test_the_original_is_whole(file):
    """The cases above would be of a file that is none."""
    with safe_open(file, "pt") as weights:
        assert weights.metadata()["modelspec.architecture"] == "stable-diffusion-v1"
