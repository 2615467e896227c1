"""What is suggested for a mistyped name, among all the settings of a run and all flags of drawing."""

from dataclasses import fields

import pytest

from latentdiff import cli
from latentdiff.config.drawing import Generate
from latentdiff.config.train import TrainConfig
from latentdiff.utils.suggestions import likely, perhaps

SETTINGS = [field.name for field in fields(TrainConfig)]
DRAWING = [f"--{field.name.replace('_', '-')}" for field in fields(Generate)]


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("lerning_rate", SETTINGS, ["learning_rate"]),
        ("--lr", SETTINGS, ["learning_rate"]),
        ("batch-size", SETTINGS, ["train_batch_size"]),
        ("epochs", SETTINGS, ["num_train_epochs"]),
        ("steps", SETTINGS, ["max_train_steps"]),
        ("precision", SETTINGS, ["mixed_precision"]),
        ("resume", SETTINGS, ["resume_from_checkpoint"]),
        ("grad_accum", SETTINGS, ["gradient_accumulation_steps"]),
        ("batchsize", SETTINGS, ["train_batch_size"]),
        ("gpu", SETTINGS, []),
        ("n", SETTINGS, []),
        ("--prompt", DRAWING, ["--prompts"]),
        ("--cfg", DRAWING, ["--guidance-scale"]),
        ("--steps", DRAWING, ["--num-inference-steps"]),
        ("--lr", DRAWING, []),
        ("generat", cli.NAMES, ["generate"]),
        ("gen", cli.NAMES, ["generate"]),
    ],
)
def test_what_is_suggested(word, known, meant):
    """Somebody would be sent to another flag, or to none where one is meant."""
    assert likely(word, known) == meant


def test_no_more_than_three_and_nothing_for_nothing():
    assert len(likely("adam", SETTINGS)) == 3 and " or " in perhaps("adam", SETTINGS)
    assert perhaps("gpu", SETTINGS) == "" and perhaps("", SETTINGS) == ""
