"""The command in a model card is the run's."""

import dataclasses
import shlex

import pytest

from latentdiff.config.presets import PRESETS, parse_train_config
from latentdiff.config.train import TrainConfig
from latentdiff.training.card import training_command


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
