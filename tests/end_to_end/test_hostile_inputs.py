"""A model whose files are damaged is refused in one line that names the part, wherever it is loaded.

The table is in `hostile.py`; what is asked of each of its lines is the same.
"""

import json
import shutil
import signal
from contextlib import contextmanager

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from hostile import NO_JSON, NO_WEIGHTS, Damage, damages
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from latentdiff import ConsistencyScheduler, DDIMScheduler, LatentDiffPipeline
from latentdiff.config.train import TrainConfig
from latentdiff.inference import loading
from latentdiff.models.lora import add_lora, save_lora
from latentdiff.training import setup
from latentdiff.utils.errors import ConfigError
from tiny import tiny_tokenizer

DAMAGES = list(damages())
LORA = "pytorch_lora_weights.safetensors"
SECONDS = 20  # after which something is waited for that never comes


@contextmanager
def no_waiting():
    def give_up(*_):
        raise TimeoutError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def draw(folder):
    loading.load_networks(str(folder), "cpu")


def train(folder):
    config = TrainConfig(unet="pretrained", pretrained_model_name_or_path=str(folder), train_data_dir=str(folder))
    setup.load_networks(config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pipeline that is loaded in no time: each network has as few layers as it can."""
    tokenizer = tiny_tokenizer()
    one = {"layers_per_block": 1, "norm_num_groups": 2}
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, sample_size=8, **one)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        cross_attention_dim=16,
        **one,
    )
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_encoder = CLIPTextModel(CLIPTextConfig(**words, **size))
    folder = tmp_path_factory.mktemp("whole") / "pipeline"
    LatentDiffPipeline(vae, text_encoder, tokenizer, unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [draw, train])
def test_what_is_whole_is_loaded(load, whole):
    """Else it is no wonder that what is damaged is not."""
    load(whole)


@pytest.mark.parametrize("load", [draw, train])
def test_every_damaged_file_is_named_in_one_line(load, whole, tmp_path):
    """A traceback of a library's would say nothing of which file it is; random numbers in the place of a tensor that is
    missing would be trained, and drawn with."""
    assert tried(DAMAGES, whole, tmp_path / "pipeline", load) > 300


def tried(table, whole, folder, load) -> int:
    """How many lines of a table were tried, of which each has to be refused in one line."""
    failed = []
    for damage in table:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.py"))
        damage.spoil(folder / damage.file)
        try:
            with no_waiting():
                load(folder)
            failed.append(f"{damage.name}: was loaded")
        except ConfigError as error:
            said = str(error).replace(str(folder), "FOLDER")
            if damage.part not in said or not said.isprintable():
                failed.append(f"{damage.name}: {said}")
        except Exception as error:
            failed.append(f"{damage.name}: {error!r}")
    print(f"{len(table)} tried, {len(table) - len(failed)} handled")
    assert not failed, "\n".join(failed)
    return len(table)


@pytest.fixture(scope="module")
def clip(whole, tmp_path_factory):
    """A CLIP, with the same words."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    CLIPModel(
        CLIPConfig(text_config=size | words, vision_config=size | {"image_size": 8, "patch_size": 4})
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    return folder


@pytest.mark.parametrize("what", ["guide unet", "clip", "lora"])
def test_what_is_drawn_with_beside(what, whole, clip, tmp_path):
    """What guides a checkpoint, or is put on it, is as likely to be damaged as itself."""
    pipeline = loading.load_pipeline(str(whole), "cpu")
    if what == "guide unet":
        source, weights, said = whole / "unet", "diffusion_pytorch_model.safetensors", "--guide-unet FOLDER: no UNet"
        settings = "config.json"

        def load(folder):
            loading._load_guide_unet(folder, pipeline)
    elif what == "clip":
        source, weights, said, settings = clip, "model.safetensors", "--clip FOLDER: no CLIP", "config.json"

        def load(folder):
            loading.load_clip(folder, pipeline)
    else:
        source, weights, said, settings = tmp_path / "lora", LORA, "--lora FOLDER: ", "scheduler_config.json"
        add_lora(pipeline.unet, rank=2, alpha=2, seed=0)
        save_lora(pipeline.unet, source)
        ConsistencyScheduler().save_pretrained(source)

        def load(folder):
            loading._load_lora(folder, loading.load_pipeline(str(whole), "cpu"))

    load(source)
    # A LoRA may lack any layer; what of its tensors is odd is for its own tests.
    ways = {name: spoil for name, spoil in NO_WEIGHTS.items() if what != "lora" or "tensor" not in name}
    ways = {name: spoil for name, spoil in ways.items() if what != "lora" or "missing" not in name}
    table = [Damage(name, said, weights, spoil) for name, spoil in ways.items()]
    table += [Damage(name, said, settings, spoil) for name, spoil in NO_JSON.items()]
    assert tried(table, source, tmp_path / "damaged", load) > 20


@pytest.mark.parametrize(
    ("kind", "parts", "said"),
    [
        ("StableDiffusionXLPipeline", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "has a text_encoder_2"),
        (
            "StableDiffusionXLImg2ImgPipeline",  # the refiner
            {"text_encoder": [None, None], "tokenizer_2": ["transformers", "CLIPTokenizer"]},
            "has a tokenizer_2",
        ),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "SD3Transformer2DModel"]}, "has a transformer"),
        ("DDPMPipeline", {"vae": [None, None]}, "has no vae"),
        ("StableDiffusionControlNetPipeline", {"controlnet": ["diffusers", "ControlNetModel"]}, "has a controlnet"),
    ],
)
@pytest.mark.parametrize("load", [draw, train])
def test_other_pipelines_are_refused_by_name(kind, parts, said, load, whole, tmp_path):
    """SDXL's ended in a traceback, or was trained without half of its text."""
    folder = shutil.copytree(whole, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text()) | parts | {"_class_name": kind}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"a {kind} and {said}; what is taken has Stable Diffusion's parts"):
        load(folder)
