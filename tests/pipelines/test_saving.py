"""Saved folders read back as what was saved: by other releases, in shards, over another model, with LoRA in them."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel

import latentdiff
from latentdiff import LatentDiffPipeline
from latentdiff.models.loading import load_frozen, load_unet
from latentdiff.models.parts import fingerprint
from latentdiff.utils.weight_files import only_variant, write_earlier_names
from tests.pipelines.test_text2img import draw, quiet
from tiny import tiny_components

FORMS = {
    "whole": {},
    "sharded": {"max_shard_size": "20KB"},
    "pickled": {"safe_serialization": False},
    "fp16": {"variant": "fp16"},
    "sharded fp16": {"variant": "fp16", "max_shard_size": "20KB"},
    "bf16": {"variant": "bf16"},
}
# `fingerprint` of the shipped text encoder, as it was before its weights had these names.
TEXT_ENCODER = "55cdea48706adb63c87532477b1a3360de613051a47835f598d640736b142a5d"
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "checkpoints").glob("*"))


@pytest.fixture
def pipe():
    return quiet(LatentDiffPipeline(**tiny_components()))


def names_in(folder: Path) -> set[str]:
    """Of all weights in a model's folder."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def assert_read_by_earlier_releases(text_encoder: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Weights by the names of transformers before 5.6, and the files that transformers 4 reads a tokenizer from."""
    names = names_in(text_encoder)
    network = CLIPTextModel(CLIPTextModel.config_class.from_pretrained(text_encoder))
    assert names == {f"text_model.{name}" for name in network.state_dict()}
    for path in text_encoder.glob("*.index.json"):
        assert set(json.loads(path.read_text())["weight_map"]) == names
    earlier = tmp_path / "tokenizer of transformers 4"
    earlier.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, earlier)
    text = "A cat, a RED dog ... Größe"
    now, then = (CLIPTokenizer.from_pretrained(folder)(text).input_ids for folder in (tokenizer, earlier))
    assert now == then and len(now) > 5


@pytest.mark.parametrize("form", ["whole", "sharded", "sharded fp16"])
def test_a_saved_folder_is_read_by_earlier_releases(pipe, tmp_path, form):
    """transformers before 5.6 would go on with a text encoder of random weights, and draw something else."""
    pipe.save_pretrained(tmp_path / "saved", **FORMS[form])
    assert_read_by_earlier_releases(tmp_path / "saved/text_encoder", tmp_path / "saved/tokenizer", tmp_path)
    variant = FORMS[form].get("variant")
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", variant=variant)
    assert torch.equal(draw(quiet(plain)), draw(pipe))


@pytest.mark.parametrize(
    "folder", [folder for folder in SHIPPED if folder.name != "emoji64-guide"], ids=lambda f: f.name
)
def test_what_is_shipped_is_read_by_earlier_releases(folder, tmp_path):
    """As above; the weights are those that the UNets were trained with."""
    if folder.name != "emoji64-clip":
        assert_read_by_earlier_releases(folder / "text_encoder", folder / "tokenizer", tmp_path)
        assert fingerprint(CLIPTextModel.from_pretrained(folder / "text_encoder")) == TEXT_ENCODER
    else:
        assert (folder / "merges.txt").read_bytes() == (folder.parent / "emoji64/tokenizer/merges.txt").read_bytes()
        assert (folder / "vocab.json").read_bytes() == (folder.parent / "emoji64/tokenizer/vocab.json").read_bytes()


def test_other_models_have_the_earlier_names_too(tmp_path):
    """A safety checker of random weights lets through what it should not."""
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPVisionConfig(**tower, image_size=8, patch_size=8)
    network = CLIPVisionModel(config)
    network.save_pretrained(tmp_path / "vision")
    write_earlier_names(tmp_path / "vision")
    assert names_in(tmp_path / "vision") == {f"vision_model.{name}" for name in network.state_dict()}
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=config.to_dict()))
    checker.save_pretrained(tmp_path / "checker")
    for _ in range(2):
        write_earlier_names(tmp_path / "checker")
    assert "vision_model.vision_model.embeddings.class_embedding" in names_in(tmp_path / "checker")
    assert {"visual_projection.weight", "concept_embeds"} <= names_in(tmp_path / "checker")
    again = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "checker")
    assert fingerprint(again) == fingerprint(checker)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("whole", "sharded"), ("sharded", "whole"), ("whole", "pickled"), ("pickled", "whole"), ("sharded", "pickled"),
        ("fp16", "sharded fp16"), ("sharded fp16", "fp16"), ("sharded", "fp16"), ("bf16", "whole"),
    ],
)  # fmt: skip
def test_a_model_saved_over_another_one_is_read_back(pipe, tmp_path, before, after):
    """An index, shards or whole weights of the former one would be read in its place."""
    LatentDiffPipeline(**tiny_components(seed=1)).save_pretrained(tmp_path, **FORMS[before])
    (tmp_path / "tokenizer" / "added_tokens.json").write_text('{"<former>": 521}')
    variants = {FORMS[form].get("variant") for form in (before, after)}
    pipe.save_pretrained(tmp_path, **FORMS[after])
    again = LatentDiffPipeline.from_pretrained(tmp_path, variant=FORMS[after].get("variant"))
    for name in ("unet", "vae", "text_encoder"):
        assert fingerprint(getattr(again, name)) == fingerprint(getattr(pipe, name)), name
    assert again.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    assert not (tmp_path / "tokenizer" / "added_tokens.json").exists() and not [*tmp_path.glob(".*")]
    files = [path.name for path in (tmp_path / "unet").iterdir()]
    assert {variant for variant in ("fp16", "bf16") if any(variant in file for file in files)} == variants - {None}


def test_a_folder_keeps_its_model_where_saving_fails(pipe, tmp_path, monkeypatch):
    """A full disk would take the former model, too."""
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(pipe.vae), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        LatentDiffPipeline(**tiny_components(seed=1)).save_pretrained(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["fp16", "sharded fp16", "bf16", "sharded"])
def test_the_only_weights_of_a_folder_are_found(pipe, tmp_path, form):
    """Most published models have an fp16 variant, large ones shards; a mirror may hold nothing else."""
    pipe.save_pretrained(tmp_path, **FORMS[form])
    assert torch.equal(draw(quiet(LatentDiffPipeline.from_pretrained(tmp_path))), draw(pipe))
    frozen, unet = load_frozen(str(tmp_path)), load_unet(str(tmp_path))
    for name, network in (("vae", frozen.vae), ("text_encoder", frozen.text_encoder), ("unet", unet)):
        assert fingerprint(network) == fingerprint(getattr(pipe, name)), name


def test_which_variant_has_to_be_named(tmp_path):
    """Of several none is the one; one part without plain weights is enough."""
    (tmp_path / "model_index.json").write_text('{"unet": ["a", "b"], "vae": ["a", "b"], "_class_name": "X"}')
    assert only_variant(tmp_path) is None and only_variant(tmp_path / "nowhere") is None
    for part in ("unet", "vae", "cache"):
        (tmp_path / part).mkdir()
    (tmp_path / "cache" / "model.bf16.safetensors").touch()  # no part of it
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    (tmp_path / "vae" / "diffusion_pytorch_model-00001-of-00002.fp16.safetensors").touch()
    (tmp_path / "unet" / "diffusion_pytorch_model.non_ema.bin").touch()
    assert (
        only_variant(tmp_path) == "fp16" == only_variant(tmp_path / "vae") and only_variant(tmp_path / "unet") is None
    )
    (tmp_path / "vae" / "diffusion_pytorch_model.bf16.bin").touch()
    assert only_variant(tmp_path) is None


@pytest.mark.parametrize(
    ("networks", "state"),
    [("unet", "on"), *(("unet text_encoder", state) for state in ("on", "scaled", "fused", "off"))],
)
def test_with_lora_it_is_saved_as_it_draws(pipe, tmp_path, networks, state):
    """Names that adapters change would be read back as random weights."""
    peft = pytest.importorskip("peft")
    layers, source = {}, tiny_components()
    for name in networks.split():
        targets = ["to_q", "to_v"] if name == "unet" else ["q_proj", "v_proj"]
        source[name].add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets))
        state_dict = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(source[name]))
        layers[f"{name}_lora_layers"] = state_dict
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", **layers)
    without = draw(pipe)
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="mine")
    if state == "scaled":
        pipe.set_adapters("mine", 0.5)
    elif state == "fused":
        pipe.fuse_lora()
    elif state == "off":
        pipe.disable_lora()
        pipe.text_encoder.disable_adapters()
    drawn = draw(pipe)
    assert torch.equal(drawn, without) == (state == "off")
    pipe.save_pretrained(tmp_path / "saved")
    again = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(draw(again), drawn, rtol=0, atol=1e-5)
    assert torch.equal(draw(pipe), drawn)  # and this one has its adapters still


def test_weights_have_the_mode_of_the_other_files(pipe, tmp_path):
    """safetensors writes for the owner alone: nobody else on the machine could load the folder."""
    pipe.save_pretrained(tmp_path)
    assert {path.stat().st_mode for path in tmp_path.rglob("*.safetensors")} == {
        (tmp_path / "model_index.json").stat().st_mode
    }


TASKS = {"Text2Image": "", "Image2Image": "Img2Img", "Inpainting": "Inpaint"}


@pytest.mark.parametrize(("task", "kind"), [("Text2Image", "Inpaint"), ("Image2Image", ""), ("Inpainting", "Img2Img")])
def test_auto_pipelines_know_ours(task, kind):
    """diffusers' usual way from one task to another would end in an error; and it stays ours, with our scheduler."""
    auto = getattr(diffusers, f"AutoPipelineFor{task}")
    ours = getattr(latentdiff, f"LatentDiff{kind}Pipeline")(**tiny_components())
    made = auto.from_pipe(ours)
    assert type(made) is getattr(latentdiff, f"LatentDiff{TASKS[task]}Pipeline")
    assert made.unet is ours.unet and type(made.scheduler) is latentdiff.DDIMScheduler
    theirs = auto.from_pipe(diffusers.StableDiffusionPipeline.from_pipe(ours))
    assert type(theirs) is getattr(diffusers, f"StableDiffusion{TASKS[task]}Pipeline")
    assert type(type(made).from_pipe(theirs)) is type(made)
