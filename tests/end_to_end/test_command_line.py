"""The training script as it is started from a shell, and what it says of bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kill_stress import SCRIPT
from latentdiff.config.presets import run_training
from tests.end_to_end.test_train_text2img import checkpoints, draws, losses, parameters
from tiny import make_pictures

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


def launch(*command: str, folder: Path, env: dict[str, str] = os.environ) -> subprocess.CompletedProcess:
    env = {**env, "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def flags(settings: dict) -> list[str]:
    said = []
    for name, value in settings.items():
        if value != () and value is not None:
            said += [f"--{name}", str(value)]
    return said


def test_finetuning_from_the_command_line(settings, tmp_path):
    """The command of the README would not work as it stands there."""
    folder = make_pictures(tmp_path / "five", 5)
    settings |= {"train_data_dir": str(folder), "train_batch_size": 2, "max_train_steps": 2}
    command = ["-m", "accelerate.commands.launch", "-q", "--cpu", "--num_processes=1", str(SCRIPT), "--preset=finetune"]
    done = launch(*command, *flags(settings), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert draws(tmp_path / "run").shape == (16, 16, 3)
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_two_processes_take_the_steps_of_one(train, settings, tmp_path, installed):
    """On two GPUs both would train on the same noise, or the run be another one; or an installed package not train."""
    one = train(output_dir=str(tmp_path / "one"), adam_epsilon=1e-4, max_train_steps=2)
    same = ["--config", str(tmp_path / "one" / "train_config.yaml")]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "latentdiff.train", *same]
    other = {"train_batch_size": 4, "checkpointing_steps": 2, "output_dir": settings["output_dir"]}
    done = launch(*command, *flags(other), folder=tmp_path, env=installed)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "run"
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for a, b in zip(parameters(one), parameters(two), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert checkpoints(two) == {"checkpoint-2"}


def test_a_missing_model_is_one_line_in_a_process_of_its_own(settings, tmp_path):
    """The libraries' own messages and tracebacks would bury ours."""
    settings["pretrained_model_name_or_path"] = str(tmp_path / "no-model")
    done = launch(str(SCRIPT), *flags(settings), folder=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: pretrained_model_name_or_path") and "no-model" in line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pretrained_model_name_or_path": "no-such-model"}, "no-such-model"),
        ({"train_data_dir": "no-such-folder"}, "no-such-folder"),
        ({"train_data_dir": "broken"}, "1.png"),
        ({"train_data_dir": "no-caption"}, "1.png: its caption is missing"),
        ({"train_data_dir": "no-metadata"}, "metadata.jsonl"),
        ({"dataset_name": "no-such-set"}, "no-such-set"),
        ({"preset": "emoji65"}, "'emoji64', 'demo', 'finetune'"),
        ({"unet": "emoji65"}, "unet: 'emoji65'"),
        ({"resolution": "20"}, "resolution: 20 is no multiple of 8"),
        ({"output_dir": "file/run"}, "output_dir: 'file/run' cannot be written"),
        ({"cache_dir": "file/cache"}, "cache_dir: 'file/cache' cannot be written"),
        ({"config": "wrong.yaml"}, "wrong.yaml' has no setting named 'lerning_rate'; perhaps you meant learning_rate"),
        ({"report_to": "paper"}, "report_to"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "'checkpoint-7'"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line(script, settings, capsys, tmp_path, monkeypatch, wrong, said):
    """A user's mistake would be a traceback, or the line not name what is wrong."""
    monkeypatch.chdir(tmp_path)
    for name in ("broken", "no-caption", "no-metadata"):
        make_pictures(tmp_path / name, 3)
    (tmp_path / "broken" / "1.png").write_bytes(b"broken")
    (tmp_path / "no-metadata" / "metadata.jsonl").unlink()
    metadata = tmp_path / "no-caption" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture 1 of a cat", ""))
    (tmp_path / "file").write_text("")
    (tmp_path / "wrong.yaml").write_text("lerning_rate: 1\n")
    if "dataset_name" in wrong:
        settings["train_data_dir"] = None
    with pytest.raises(SystemExit) as end:
        run_training(script.main, flags({**settings, **wrong}))
    # Progress bars, which are drawn on stderr too, are not messages.
    bars = ("/s]", "Resolving data files")
    printed = [line for line in capsys.readouterr().err.splitlines() if line and not any(bar in line for bar in bars)]
    assert end.value.code == 2
    assert len(printed) == 1 and printed[0].startswith("error: ") and said in printed[0], printed
