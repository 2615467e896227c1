"""DeepSpeed's ZeRO, stages 1 and 2: two processes that share out the moments train and resume as one that does not."""

import importlib.util
import os
import shutil
import signal
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

import kill_stress
from latentdiff.config.presets import preset
from latentdiff.config.train import TrainConfig
from latentdiff.distributed.deepspeed import zero_plugin
from latentdiff.utils.errors import ConfigError
from tests.training import test_distributed
from tests.training.test_fsdp import ALONE, SETTINGS, STEPS, WORDS, assert_close, assert_same, wait_for

installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
# What `accelerate launch` sets for use_deepspeed: true, with the number of micro-batches that it says by default.
ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}
ON_CPU = {"ACCELERATE_USE_CPU": "0", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
SCRIPT = (Path(__file__).parents[1].joinpath("deepspeed_on_cpu.py"), kill_stress.SCRIPT)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    return kill_stress.make_inputs(tmp_path_factory.mktemp("inputs"))


def start(inputs, output: Path, stage: int = 2, **changes):
    env = {**ZERO, **ON_CPU, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    two = {"processes": 2, "script": SCRIPT, "env": env, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    two |= {"forked": False}
    return test_distributed.start(inputs, output, **{**two, "words": WORDS, **SETTINGS, **changes})


def run(inputs, output: Path, stage: int = 2, **changes) -> Path:
    process = start(inputs, output, stage, **changes)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    return output


@pytest.fixture(scope="module", params=[1, 2])
def shared(request, inputs, tmp_path_factory) -> tuple[int, Path]:
    """A stage, and a whole run under it."""
    return request.param, run(inputs, tmp_path_factory.mktemp("shared") / "run", request.param)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Path:
    return run(inputs, tmp_path_factory.mktemp("alone") / "run", **ALONE)


@installed
def test_two_that_share_train_what_one_trains(shared, alone):
    """Micro-batches counted by accelerate and by DeepSpeed, clipping twice or not at all, a learning rate that stays
    with a wrapper of the optimizer: training with DeepSpeed would be another training."""
    _, run = shared
    assert_close(run, alone)
    ours, theirs = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "random_states" not in path.name}
        for folder in (run, alone)
    )
    assert ours == theirs
    pipeline = StableDiffusionPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=1).images[0].size == (16, 16)


@installed
def test_a_pair_that_ended_early_resumes_to_the_last_bit(inputs, shared, tmp_path):
    """DeepSpeed steps with weights of its own: it would go on from the initial ones; or a part of a moment would come
    back to the other process.

    First the launcher gets a SIGTERM, as job queues send it; then the processes a SIGKILL, likely while they write.
    """
    stage, whole = shared
    output = tmp_path / "run"
    process = start(inputs, output, stage)
    wait_for(process, lambda: (output / "log.jsonl").exists() and len(test_distributed.log(output)) > 4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert (output / "checkpoint-10").exists() and not (output / f"checkpoint-{STEPS}").exists()

    process = start(inputs, output, stage, resume_from_checkpoint="latest")
    wait_for(process, lambda: (output / ".tmp-checkpoint-12").exists() or (output / "checkpoint-12").exists())
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    process.communicate(timeout=120)
    assert not (output / f"checkpoint-{STEPS}").exists()

    assert_same(run(inputs, output, stage, resume_from_checkpoint="latest"), whole)


@installed
@pytest.mark.parametrize("shared", [2], indirect=True)
@pytest.mark.parametrize("direction", ["begin", "cease"])
def test_a_run_may_begin_or_cease_to_share(inputs, shared, alone, tmp_path, direction):
    """Who gets more GPUs, or loses them, would have to begin again."""
    stage, whole = shared
    before, after = {"begin": (alone, {}), "cease": (whole, ALONE)}[direction]
    shutil.copytree(before, tmp_path / "run")
    assert_close(run(inputs, tmp_path / "run", stage, resume_from_checkpoint="12", **after), alone)


@installed
def test_bf16_is_that_of_other_runs(inputs, tmp_path):
    """DeepSpeed's own keeps weights of 16 bits, which lose what is small in a step, as would their average."""
    ddp = run(inputs, tmp_path / "ddp", mixed_precision="bf16", script=(kill_stress.SCRIPT,), env=())
    assert_close(run(inputs, tmp_path / "zero", mixed_precision="bf16"), ddp)


@installed
def test_a_run_that_diverges_stops(inputs, tmp_path):
    """DeepSpeed leaves out a step whose gradient is not finite, and would do so for ever."""
    process = start(inputs, tmp_path / "run", learning_rate=1e30, lr_warmup_steps=0)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "the gradient is not finite" in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def set_launcher(monkeypatch, **environment) -> None:
    for name, value in {**ZERO, **environment}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "changes", "said"),
    [
        ({}, {"lora_rank": 4}, "lora_rank.*without DeepSpeed"),
        ({}, {"train_text_encoder": True}, "train_text_encoder.*DDP"),
        ({}, {"optimizer": "adafactor", "adam_beta2": TrainConfig.adam_beta2}, "optimizer: 'adafactor'.*'adamw'"),
        ({}, {"mixed_precision": "fp16"}, "mixed_precision: 'fp16'.*FSDP2"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, {}, "deepspeed_config_file.*zero_stage"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero_stage: 3.*1 or 2.*fsdp_version: 2"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {}, "zero_stage: 0.*1 or 2.*DDP"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer_device"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, {}, "offload_param_device"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
            {},
            "gradient_accumulation_steps: 3 .*--gradient_accumulation_steps 1;",
        ),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "gradient_clipping: 0.5 .*--max_grad_norm 1.0;"),
    ],
)
def test_what_cannot_be_shared_right_is_refused(monkeypatch, environment, changes, said):
    """A run would end in a library's traceback, or train something else than was asked for."""
    monkeypatch.setattr("latentdiff.distributed.deepspeed._has_deepspeed", lambda: True)
    set_launcher(monkeypatch, **environment)
    with pytest.raises(ConfigError, match=said) as refused:
        zero_plugin(TrainConfig(**{**preset("finetune"), **changes}))
    assert len(str(refused.value).splitlines()) == 1


def test_a_missing_package_is_named(monkeypatch):
    """Without it accelerate's words for it would come under the name of another setting."""
    monkeypatch.setattr("latentdiff.distributed.deepspeed.is_deepspeed_available", lambda: False)
    set_launcher(monkeypatch)
    with pytest.raises(ConfigError, match="^accelerate's use_deepspeed: .*pip install -U deepspeed$"):
        zero_plugin(TrainConfig())


@installed
def test_cpus_are_refused(monkeypatch, tmp_path, fresh_accelerate):
    """accelerate would leave DeepSpeed out without a word."""
    from latentdiff.training.setup import make_accelerator

    set_launcher(monkeypatch)
    with pytest.raises(ConfigError, match="use_deepspeed: there are no GPUs"):
        make_accelerator(TrainConfig(output_dir=str(tmp_path), report_to="none"))


def test_the_settings_say_how_many_micro_batches_make_a_step(monkeypatch, tmp_path, fresh_accelerate):
    """accelerate would take the number of the launcher's configuration, and step after each of them."""
    from latentdiff.training.setup import make_accelerator

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    config = TrainConfig(output_dir=str(tmp_path), report_to="none", gradient_accumulation_steps=2)
    assert make_accelerator(config).gradient_accumulation_steps == 2
