"""An output folder is of one run and of one process: what `latest` means, what is refused, what is kept until when."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latentdiff.config.presets import read_config
from latentdiff.training.run_folder import LOCK, RUN
from latentdiff.utils.errors import ConfigError
from latentdiff.utils.weight_files import remove_pipeline

SHORT = {"checkpointing_steps": 2, "validation_steps": 2, "validation_prompts": ("a cat",)}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def run_of(folder: Path) -> str:
    return json.loads((folder / RUN).read_text())["run"]


def test_the_latest_checkpoint_is_that_of_the_run_that_the_folder_is_of(train, capsys):
    """A run that was to go on would take the longer one that stood there before, and train nothing without a word."""
    folder = train(**SHORT, max_train_steps=6)
    first = run_of(folder)
    train(**SHORT, max_train_steps=3, seed=7, checkpoints_total_limit=None)
    assert run_of(folder) != first and checkpoints(folder) == ["checkpoint-2"]
    capsys.readouterr()
    train(**SHORT, max_train_steps=4, seed=7, resume_from_checkpoint="latest")
    assert f"going on from {folder / 'checkpoint-2'}" in "".join(capsys.readouterr())
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    saved = json.loads((folder / "checkpoint-4" / "state.json").read_text())["extra"]
    assert saved["run"] == run_of(folder)


def test_a_new_run_where_another_one_is_has_to_be_asked_for(train, script, settings, monkeypatch):
    """Days of training would be written over by a command that was given twice."""
    folder = train(**SHORT, max_train_steps=2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    with pytest.raises(ConfigError, match="holds another run: --resume_from_checkpoint latest goes on"):
        train(**SHORT, max_train_steps=2, seed=7, overwrite_output_dir=False)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def test_nothing_is_lost_before_the_new_run_has_a_checkpoint(train, monkeypatch):
    """A new run that fails in its first minutes would have taken the old one with it."""
    folder = train(**SHORT, max_train_steps=4, ema_sigma_rel=(0.05,), ema_snapshot_steps=2)
    snapshots = sorted(path.name for path in (folder / "ema_snapshots").iterdir())
    log = (folder / "log.jsonl").read_text()
    train_loss = "latentdiff.objectives.denoising.training_loss"

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_loss, fails)
        train(**SHORT, max_train_steps=4, seed=7)
    assert checkpoints(folder) == ["checkpoint-2", "checkpoint-4"] and (folder / "model_index.json").exists()
    assert sorted(path.name for path in (folder / "ema_snapshots").iterdir()) == snapshots
    assert (folder / "log-earlier.jsonl").read_text() == log

    train(**SHORT, max_train_steps=3, seed=7)
    assert checkpoints(folder) == ["checkpoint-2"] and not (folder / "log-earlier.jsonl").exists()
    assert not (folder / "ema_snapshots").exists() or not list((folder / "ema_snapshots").iterdir())
    pictures = sorted(path.name for path in (folder / "validation").iterdir())
    assert pictures == ["step-0000002.png", "step-0000003.png"]


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_at_a_time_are_refused_and_a_dead_one_is_not_in_the_way(train, settings):
    """Two runs would write over each other's checkpoints; and a killed one would have to be cleared away by hand."""
    folder = Path(settings["output_dir"])
    folder.mkdir()
    command = [sys.executable, "-c", HOLDER, str(folder / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another run is writing to"):
            train(max_train_steps=1)
        other.kill()
    train(max_train_steps=1)


@pytest.mark.parametrize("changes", [{"prediction_type": "sample", "lora_rank": 2}, {"resolution": 17}])
def test_a_refused_start_leaves_no_settings(train, settings, changes):
    """The mistake would stand in the folder's settings, and whoever starts from them would be refused again."""
    with pytest.raises(ConfigError):
        train(**changes)
    assert not (Path(settings["output_dir"]) / "train_config.yaml").exists()


def test_an_empty_configuration_is_refused(tmp_path):
    """It would silently train the embedded emoji from scratch."""
    (tmp_path / "run.yaml").write_text("\n")
    with pytest.raises(ConfigError, match="run.yaml' is empty"):
        read_config(str(tmp_path / "run.yaml"))


def test_what_a_killed_run_was_writing_is_removed(train, tmp_path):
    """Its process is gone, and nobody else would know whose it is."""
    folder = train(**SHORT, max_train_steps=2)
    (folder / ".train_config.yaml.123456").write_text("half of")
    (folder / ".mode.123456").touch()
    (folder / ".saving-abcdef").mkdir()
    (folder / ".saving-abcdef" / "model_index.json").touch()
    (folder / ".tmp-old-checkpoint-1").mkdir()
    (folder / ".gitattributes").touch()
    train(**SHORT, max_train_steps=2, resume_from_checkpoint="latest")
    assert sorted(path.name for path in folder.glob(".*")) == [".gitattributes", LOCK]


def test_adapters_are_not_left_beside_another_model(train):
    """A push would take both, and whoever loads the folder would draw with the other one."""
    folder = train(**SHORT, max_train_steps=2)
    assert (folder / "model_index.json").is_file()
    train(**SHORT, max_train_steps=2, lora_rank=2)
    assert (folder / "pytorch_lora_weights.safetensors").is_file() and (folder / "checkpoint-2").is_dir()
    assert not [name for name in ("model_index.json", "unet", "vae", "text_encoder") if (folder / name).exists()]


def test_adapters_do_not_cost_the_model_that_they_are_for(train, tiny_pipeline_folder, tmp_path):
    """Who saves them beside it would lose it."""
    model = shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    before = {path: path.read_bytes() for path in model.rglob("*.safetensors")}
    train(**SHORT, max_train_steps=2, lora_rank=2, pretrained_model_name_or_path=str(model), output_dir=str(model))
    assert (model / "pytorch_lora_weights.safetensors").is_file() and (model / "model_index.json").is_file()
    assert len(before) == 3 and all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("index", ['{"../kept": ["a", "B"], "unet": ["c", "D"]}', "[1", "[]", "{}"])
def test_a_pipeline_is_removed_within_its_folder(tmp_path, index):
    """The index may be a stranger's: no name in it leads out, and a damaged one ends nothing."""
    (tmp_path / "kept").mkdir()
    folder = tmp_path / "model"
    for part in ("unet", "mine"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(index)
    remove_pipeline(folder)
    assert (tmp_path / "kept").is_dir() and (folder / "mine").is_dir()
    assert not (folder / "model_index.json").exists() and (folder / "unet").exists() == ("unet" not in index)
