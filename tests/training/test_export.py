"""What a finished run says of itself and gives away: the command in its model card, the files that are pushed."""

import dataclasses
import json
import os
import shlex

import pytest
from safetensors import SafetensorError

from latentdiff.config.presets import PRESETS, parse_train_config
from latentdiff.config.train import TrainConfig
from latentdiff.pipelines import portable_saving
from latentdiff.training.card import training_command, write_card
from latentdiff.training.export import pushed_files
from latentdiff.utils.errors import RunStopped


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 3, "use_ema": False, "gradient_checkpointing": True, "snr_gamma": 5.0, "validation_prompts": ()},
        {
            "unet": "pretrained",
            "dataset_name": "x/y",
            "lora_rank": 4,
            "validation_prompts": ("a cat", 'it\'s "a" $dog'),
        },
        {"unet": "pretrained", "task": "inpaint"},
        {"ema_sigma_rel": (0.05, 0.1), "ema_snapshot_steps": 50},
        {"unet": "tiny", "pretrained_model_name_or_path": "x/y", "dataset_name": "my data"},
    ],
    ids=str,
)
def test_the_command_starts_the_same_run(settings):
    """Who repeats a published run would train something else."""
    preset = "finetune" if settings.get("unet") == "pretrained" else "emoji64"
    config = TrainConfig(**{**PRESETS[preset], **settings, "output_dir": "/home/me/runs/x", "report_to": "none"})
    launcher, launch, script, *flags = shlex.split(training_command(dataclasses.asdict(config)))
    assert (launcher, launch, script) == ("accelerate", "launch", "train_text2img.py")
    again = parse_train_config([*flags, "--output_dir", config.output_dir, "--report_to", "none"])
    assert again == config


def test_no_paths_of_the_machine(tmp_path):
    config = TrainConfig(
        unet="pretrained", pretrained_model_name_or_path="/home/me/model", train_data_dir=str(tmp_path)
    )
    command = training_command(dataclasses.asdict(config))
    assert "/home" not in command and str(tmp_path) not in command
    assert "--pretrained_model_name_or_path model" in command and f"--train_data_dir {tmp_path.name}" in command


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("where", ["absolute", "relative", "above"])
def test_a_card_names_no_folder_of_the_machine(where, lora_rank, tmp_path, monkeypatch):
    """Where its owner keeps a base model and pictures would stand on the Hub."""
    base, data = tmp_path / "private" / "model", tmp_path / "private" / "pictures"
    base.mkdir(parents=True)
    data.mkdir()
    monkeypatch.chdir(base if where == "above" else tmp_path)
    named = [str(path) if where == "absolute" else os.path.relpath(path) for path in (base, data)]
    config = TrainConfig(
        unet="pretrained",
        pretrained_model_name_or_path=named[0],
        train_data_dir=named[1],
        output_dir=str(tmp_path),
        lora_rank=lora_rank,
    )
    write_card(config)
    card = (tmp_path / "README.md").read_text()
    assert "private" not in card and str(tmp_path) not in card and ".." not in card
    assert "--pretrained_model_name_or_path model" in card and "--train_data_dir pictures" in card


def test_the_model_is_pushed_and_nothing_else(tmp_path):
    """Passwords, logs, captions, caches and pictures that lie in a run's folder would be published."""
    index = {"_class_name": "X", "unet": ["diffusers", "UNet"], "../out": ["a", "b"], "cache": "no part"}
    ours = ["model_index.json", "README.md", "LICENSE", "unet/config.json", "unet/weights.safetensors", "pipeline.py"]
    ours += ["validation/step-2.png", "ema_sweep.md"]
    others = [".env", "nohup.out", "run.log", "secret.txt", "train_config.yaml", "pictures.jsonl", "rejected.jsonl"]
    others += ["cache/unet/a.safetensors", "checkpoint-2/unet/a.safetensors", "logs/a.json", "unet/.git/config.json"]
    others += ["validation/step-1.png", "me.png", "unet/nohup.out", "unet/.a.json", "unet-ema-0.1/config.json"]
    others += [".cache/a.json", "ema_snapshots/a.safetensors", "../out/a.json", "my_script.py"]
    folder = tmp_path / "run"
    for name in (*ours, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("![](validation/step-2.png)")
    assert pushed_files(folder) == sorted(ours)
    assert pushed_files(folder, ema_snapshots=True) == sorted([*ours, "ema_snapshots/a.safetensors"])


def test_a_disk_that_is_full_at_the_end_loses_nothing(train, monkeypatch):
    """Half a model would stand over the one that was there, and days of training end in a traceback."""
    there = train(max_train_steps=2, checkpointing_steps=2)
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file() and path.name != ".lock"}

    def no_room(aside, folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(portable_saving, "move_saved", no_room)
    with pytest.raises(
        RunStopped, match="could not be saved .*--resume_from_checkpoint latest goes on from checkpoint-2"
    ):
        train(max_train_steps=2, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert not list(there.glob(".saving*"))
    assert all(path.read_bytes() == content for path, content in before.items() if path.suffix == ".safetensors")
    monkeypatch.undo()
    train(max_train_steps=2, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert all(path.read_bytes() == content for path, content in before.items() if path.suffix == ".safetensors")
