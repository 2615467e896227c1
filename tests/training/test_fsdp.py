"""FSDP2: two processes that share out the weights train, save and resume as one process that holds them all."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import parse_flag_from_env
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import kill_stress
from latentdiff.config.presets import preset
from latentdiff.config.train import TrainConfig
from latentdiff.diffusion.posthoc_ema import SNAPSHOTS
from latentdiff.distributed.fsdp import sharding_plugin
from latentdiff.utils.errors import ConfigError
from tests.training import test_distributed
from tests.training.test_distributed import log

STEPS = 16
# What `accelerate launch` sets for fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP and its default of
# fsdp_cpu_ram_efficient_loading, under which transformers loads networks on the first process alone.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
PARTS = ("unet", "unet_ema", "unet_ema_0.05")  # of a checkpoint
ON_CPU = (Path(__file__).parents[1].joinpath("fsdp2_on_cpu.py"), kill_stress.SCRIPT)
# Without the cache every process needs its own text encoder, the prompt makes all of them draw, and the gradient's norm
# is above the limit at most steps. Averages of two widths are kept, with snapshots.
SETTINGS = {"max_train_steps": STEPS, "checkpointing_steps": 4, "validation_steps": 8, "validation_inference_steps": 2}
SETTINGS |= {"max_grad_norm": 0.3}
WORDS = ("--no-cache_latents", "--gradient_checkpointing", "--validation_prompts", "a cat")
WORDS += ("--ema_sigma_rel", "0.1", "0.05", "--ema_snapshot_steps", "4")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    return kill_stress.make_inputs(tmp_path_factory.mktemp("inputs"))


def start(inputs, output: Path, **changes):
    sharded = {"processes": 2, "script": ON_CPU, "env": FSDP2, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    return test_distributed.start(inputs, output, **{**sharded, "words": WORDS, **SETTINGS, **changes})


def run(inputs, output: Path, **changes) -> Path:
    process = start(inputs, output, **changes)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    return output


ALONE = {"processes": 1, "script": (kill_stress.SCRIPT,), "env": (), "train_batch_size": 4}


@pytest.fixture(scope="module")
def sharded(inputs, tmp_path_factory) -> Path:
    return run(inputs, tmp_path_factory.mktemp("sharded") / "run")


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Path:
    return run(inputs, tmp_path_factory.mktemp("alone") / "run", **ALONE)


def assert_close(ours: Path, theirs: Path) -> None:
    """Logs within 1e-5, weights within a few of float32's last places, after STEPS of learning rate 1e-4."""
    assert len(log(ours)) == STEPS + 3
    for line, other in zip(log(ours), log(theirs), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    parts = ["unet", *(f"checkpoint-{STEPS}/{part}" for part in PARTS)]
    files = [f"{part}/diffusion_pytorch_model.safetensors" for part in parts]
    files += [path.relative_to(theirs) for path in (theirs / SNAPSHOTS).iterdir()]
    for file in files:
        torch.testing.assert_close(load_file(ours / file), load_file(theirs / file), rtol=0, atol=2e-6)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run ends with: weights, averages and optimizer state of every checkpoint and of the model."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)} {name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted(folder.rglob("optimizer.bin")):
        for number, entries in torch.load(path, weights_only=True)["state"].items():
            found |= {f"{path.relative_to(folder)} {number} {name}": value for name, value in entries.items()}
    return found


def assert_same(ours: Path, theirs: Path) -> None:
    assert log(ours) == log(theirs)
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_that_share_train_what_one_trains(sharded, alone):
    """Gradients summed where they should be averaged or clipped by a part's norm, an average of a part taken for the
    whole, a validation under other weights: training with FSDP2 would be another training."""
    assert_close(sharded, alone)
    pictures = [Image.open(run / "validation" / f"step-{STEPS:07d}.png") for run in (sharded, alone)]
    shades = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int() for picture in pictures]
    assert (shades[0] - shades[1]).abs().max() <= 1


def test_the_folder_is_that_of_a_run_that_shards_nothing(sharded, alone):
    """Nobody could load parts of weights, or a class that only exists while FSDP2 runs."""
    pipeline = StableDiffusionPipeline.from_pretrained(sharded)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=1).images[0].size == (16, 16)
    ours, theirs = (
        {path.relative_to(run).as_posix() for path in run.rglob("*") if "random_states" not in path.name}
        for run in (sharded, alone)
    )
    assert ours == theirs
    for name in ("unet/config.json", f"checkpoint-{STEPS}/unet_ema/config.json", "model_index.json"):
        assert (sharded / name).read_bytes() == (alone / name).read_bytes()


def wait_for(process, there) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)


def test_a_pair_that_ended_early_resumes_to_the_last_bit(inputs, sharded, tmp_path):
    """A part of a weight, an average or a moment would come back to another process, or not at all.

    First the launcher gets a SIGTERM, as job queues send it; then the processes a SIGKILL, likely while they write.
    """
    output = tmp_path / "run"
    process = start(inputs, output)
    wait_for(process, lambda: (output / "log.jsonl").exists() and len(log(output)) > 4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert (output / "checkpoint-10").exists() and not (output / f"checkpoint-{STEPS}").exists()

    process = start(inputs, output, resume_from_checkpoint="latest")
    wait_for(process, lambda: (output / ".tmp-checkpoint-12").exists() or (output / "checkpoint-12").exists())
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    process.communicate(timeout=120)
    assert not (output / f"checkpoint-{STEPS}").exists()

    assert_same(run(inputs, output, resume_from_checkpoint="latest"), sharded)


@pytest.mark.parametrize("direction", ["begin", "cease"])
def test_a_run_may_begin_or_cease_to_share(request, inputs, tmp_path, direction):
    """Who gets more GPUs, or loses them, would have to begin again."""
    before, after = {"begin": ("alone", {}), "cease": ("sharded", ALONE)}[direction]
    shutil.copytree(request.getfixturevalue(before), tmp_path / "run")
    resumed = run(inputs, tmp_path / "run", resume_from_checkpoint="12", **after)
    assert_close(resumed, request.getfixturevalue("alone"))


def test_a_run_that_diverges_stops(inputs, tmp_path):
    """Every process watches the norm of the whole gradient: one would go on alone and wait for the others for ever."""
    process = start(inputs, tmp_path / "run", learning_rate=1e30, lr_warmup_steps=0)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "the gradient is not finite" in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("environment", "changes", "said"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 1 .*set it to 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "TRANSFORMER_BASED_WRAP"),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "TRANSFORMER_BASED_WRAP"),
        ({}, {"lora_rank": 4}, "lora_rank.*DDP"),
        ({}, {"train_text_encoder": True}, "train_text_encoder.*DDP"),
        ({}, {"optimizer": "adafactor", "adam_beta2": TrainConfig.adam_beta2}, "optimizer: 'adafactor'.*'adamw'"),
    ],
)
def test_what_cannot_be_shared_right_is_refused(monkeypatch, environment, changes, said):
    """A run would end in a library's traceback, or train something else than was asked for."""
    for name, value in {**FSDP2, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^(accelerate's )?.*{said}") as refused:
        sharding_plugin(TrainConfig(**{**preset("finetune"), **changes}))
    assert len(str(refused.value).splitlines()) == 1


def test_frozen_networks_are_loaded_on_every_process(monkeypatch):
    """With fsdp_cpu_ram_efficient_loading, accelerate's default, transformers 5.10 fills them with zeros on all but the
    first, whose captions would then all be the same to the UNet. The UNet itself is sent to the others, and may."""
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    plugin = sharding_plugin(TrainConfig())
    assert plugin.cpu_ram_efficient_loading
    assert not parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")


def test_cpus_are_refused(monkeypatch, tmp_path):
    """accelerate would replicate without a word."""
    from latentdiff.training.setup import make_accelerator

    for name, value in {**FSDP2, "ACCELERATE_USE_CPU": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="use_fsdp: there are no GPUs"):
        make_accelerator(TrainConfig(output_dir=str(tmp_path), report_to="none"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_it_trains_saves_and_resumes_on_gpus(inputs, tmp_path, mixed_precision):
    """The parts lie on GPUs there, are cast for the forward and, under fp16, scaled; NCCL gathers them."""
    gpus = {"processes": torch.cuda.device_count(), "script": (kill_stress.SCRIPT,), "train_batch_size": 4}
    gpus |= {"env": {**FSDP2, "ACCELERATE_USE_CPU": "0"}, "mixed_precision": mixed_precision, "forked": False}
    run(inputs, tmp_path / "run", **gpus)
    first = log(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{STEPS}")
    resumed = log(run(inputs, tmp_path / "run", resume_from_checkpoint="10", **gpus))
    assert [line["loss"] for line in resumed if "loss" in line] == pytest.approx(
        [line["loss"] for line in first if "loss" in line], rel=1e-3
    )
    StableDiffusionPipeline.from_pretrained(tmp_path / "run")


def test_inpainting_is_sharded_as_one_process_trains_it(inputs, tmp_path):
    """The widened input would not be shared out, masks differ between processes, or only one of them draw."""
    changes = {"task": "inpaint", "max_train_steps": 4, "checkpointing_steps": 4, "validation_steps": 4}
    words = ("--gradient_checkpointing", "--validation_prompts")
    ours = run(inputs, tmp_path / "sharded", words=words, **changes)
    theirs = run(inputs, tmp_path / "alone", words=words, **{**ALONE, **changes})
    for line, other in zip(log(ours), log(theirs), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    assert (ours / "validation" / "step-0000004.png").exists()
    weights = load_file(ours / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights["conv_in.weight"].shape[1] == 9 and weights["conv_in.weight"][:, 4:].abs().max() > 0


def test_a_magnitude_preserving_unet_is_sharded_as_one_process_trains_it(inputs, tmp_path):
    """Filters would be brought back to the length of a part of them, or a gain, a single number, not be shared out."""
    toy = tmp_path / "toy.json"
    levels = {"block_out_channels": [8, 16], "attention_levels": [True, False], "attention_head_dim": 4}
    toy.write_text(json.dumps({"_class_name": "MPUNet2DConditionModel", **levels}))
    changes = {"unet": toy, "max_train_steps": 4, "checkpointing_steps": 4, "validation_steps": 4}
    words = ("--gradient_checkpointing", "--validation_prompts", "--prediction_type", "v_prediction")
    ours = run(inputs, tmp_path / "sharded", words=words, **changes)
    theirs = run(inputs, tmp_path / "alone", words=words, **{**ALONE, **changes})
    for line, other in zip(log(ours), log(theirs), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    weights = load_file(ours / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in weights.items():
        if weight.ndim > 1:
            lengths = weight.flatten(1).norm(dim=1) / weight[0].numel() ** 0.5
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-5, msg=name)
