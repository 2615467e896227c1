"""Two processes on the CPU (DDP over gloo) train what one process trains, save one folder and resume exactly."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import kill_stress
from forked import Forked

STEPS = 30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    return kill_stress.make_inputs(tmp_path_factory.mktemp("inputs"))


def start(
    inputs,
    output: Path,
    processes: int,
    *,
    script=(kill_stress.SCRIPT,),
    words=("--validation_prompts",),
    env=(),
    forked=True,
    **changes,
) -> Forked | subprocess.Popen:
    """The script as users launch it on several processes of one machine.

    GPUs and DeepSpeed may be set up by an import: their processes cannot be forked.
    """
    model, pictures = inputs
    settings = {
        "pretrained_model_name_or_path": model, "train_data_dir": pictures, "unet": "pretrained",
        "output_dir": output, "cache_dir": output.parent / "cache", "max_train_steps": STEPS,
        "train_batch_size": 8 // processes, "learning_rate": 1e-4, "lr_warmup_steps": 3, "logging_steps": 1,
        "checkpointing_steps": 15, "validation_steps": 15, "held_out_fraction": 0.1, "report_to": "none", **changes,
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value)) if word != "True"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    command = [*(launch if processes > 1 else []), *script, *flags, "--random_flip", *words]
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **dict(env)}
    if forked:
        return Forked(command, env=env)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], env=env, **pipes)


def run(inputs, output: Path, processes: int, **changes) -> Path:
    process = start(inputs, output, processes, **changes)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    return output


def log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "pictures_per_second"} for line in lines]


def weights(folder: Path) -> list[bytes]:
    parts = ("unet", f"checkpoint-{STEPS}/unet", f"checkpoint-{STEPS}/unet_ema")
    return [(folder / part / "diffusion_pytorch_model.safetensors").read_bytes() for part in parts]


@pytest.fixture(scope="module")
def two(inputs, tmp_path_factory) -> Path:
    return run(inputs, tmp_path_factory.mktemp("two") / "run", processes=2)


def test_two_processes_train_what_one_trains(inputs, two, tmp_path):
    """The same noise on every process, or gradients that are summed where they should be averaged."""
    for name, settings in (
        ("1 x 8", {}),
        ("1 x 4 x 2", {"train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ):
        one = log(run(inputs, tmp_path / name, processes=1, **settings))
        assert len(one) == len(log(two)) == STEPS + 3
        for ours, theirs in zip(log(two), one, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name


def test_two_processes_train_both_networks_as_one_does(inputs, tmp_path):
    """The gradients of the text encoder would stay with the process that computed them, or arrive twice."""
    joint = {"train_text_encoder": True, "max_train_steps": 10, "checkpointing_steps": 10, "validation_steps": 5}
    two = run(inputs, tmp_path / "2 x 4", processes=2, **joint)
    for name, settings in (
        ("1 x 8", {}),
        ("1 x 4 x 2", {"train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ):
        one = log(run(inputs, tmp_path / name, processes=1, **joint, **settings))
        assert len(one) == len(log(two)) == 10 + 3
        for ours, theirs in zip(log(two), one, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
    resumed = run(inputs, tmp_path / "2 x 4", processes=2, **joint, resume_from_checkpoint="latest")
    assert log(resumed) == log(two)
    before, after = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (inputs[0], two))
    assert all(torch.isfinite(t).all() and not torch.equal(t, before[name]) for name, t in after.items())


def test_the_folder_loads_in_diffusers(two):
    pipeline = StableDiffusionPipeline.from_pretrained(two)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=1).images[0].size == (16, 16)


def test_a_stopped_pair_resumes_to_the_last_bit(inputs, two, tmp_path):
    """One of the two would stop at another step than the other and wait for it for ever; or a resume differ."""
    process = start(inputs, tmp_path / "stopped", processes=2)
    started = time.monotonic()
    while not (tmp_path / "stopped" / "log.jsonl").exists() or len(log(tmp_path / "stopped")) < 5:
        assert process.poll() is None and time.monotonic() - started < 120
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    newest = max(int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "stopped").glob("checkpoint-*"))
    assert newest < STEPS and newest % 10 == 0  # where the two ask each other
    resumed = run(inputs, tmp_path / "stopped", processes=2, resume_from_checkpoint="latest")
    assert log(resumed) == log(two) and weights(resumed) == weights(two)
