"""What a run leaves while it goes on, and that a resume ends as a run that was never interrupted."""

import os
import shutil
import signal

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import kill_stress
from latentdiff.objectives import denoising
from tests.conftest import _HUB
from tests.end_to_end.test_train_text2img import checkpoints, draws, losses, parameters, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


def test_checkpoints_are_those_that_diffusers_example_leaves(train, tmp_path):
    """Who comes from diffusers' script would find other folders, or lose checkpoints."""
    run = train(checkpointing_steps=2)
    assert checkpoints(run) == {"checkpoint-2", "checkpoint-4"}
    for name in ("checkpoint-2", "checkpoint-4"):
        unet = UNet2DConditionModel.from_pretrained(run, subfolder=f"{name}/unet")
        assert unet.config.cross_attention_dim == 16
    assert draws(run).shape == (16, 16, 3)

    shutil.rmtree(run / "checkpoint-2")
    first = losses(run)
    train(checkpointing_steps=2, max_train_steps=6, resume_from_checkpoint="checkpoint-4")
    assert checkpoints(run) == {"checkpoint-4", "checkpoint-6"}
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6] and first.items() <= losses(run).items()


def test_a_limit_keeps_the_newest(train):
    run = train(checkpointing_steps=2, max_train_steps=6, checkpoints_total_limit=2)
    assert checkpoints(run) == {"checkpoint-4", "checkpoint-6"}
    train(checkpointing_steps=2, max_train_steps=8, checkpoints_total_limit=2, resume_from_checkpoint="checkpoint-4")
    assert checkpoints(run) == {"checkpoint-6", "checkpoint-8"}


def test_latest(train):
    """A fresh folder would be refused, a half-written checkpoint taken, or a finished run take one more step."""
    run = train(checkpointing_steps=2, resume_from_checkpoint="latest")
    assert list(losses(run)) == [1, 2, 3, 4]
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-9")
    (run / "checkpoint-9" / "state.json").unlink()
    saved, logged = weights(run), losses(run)
    for steps in (4, 3):  # at the end, and past it: nothing is trained, and the model is saved as the checkpoint has it
        train(checkpointing_steps=2, resume_from_checkpoint="latest", max_train_steps=steps)
        assert weights(run) == saved and losses(run) == logged
    assert checkpoints(run) == {"checkpoint-2", "checkpoint-4", "checkpoint-9"}


@pytest.mark.parametrize(
    ("settings_of_it", "needs"),
    [
        ({}, "torch"),
        ({"train_batch_size": 4, "gradient_accumulation_steps": 2}, "torch"),
        ({"optimizer": "adafactor"}, "transformers"),
        ({"optimizer": "adamw_8bit"}, "bitsandbytes"),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, "prodigyopt"),
        ({"train_text_encoder": True}, "torch"),
    ],
)
def test_a_killed_run_goes_on_to_the_last_bit(script, train, tmp_path, monkeypatch, settings_of_it, needs):
    """Order of the data, noise, learning rate, optimizer or average would start again at a resume."""
    pytest.importorskip(needs)
    changes = {"checkpointing_steps": 2, "random_flip": True, **settings_of_it}
    accumulation = changes.get("gradient_accumulation_steps", 1)
    whole = train(output_dir=str(tmp_path / "whole"), **changes)

    real, calls = denoising.training_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) > 3 * accumulation:  # in step 4, after the checkpoint at 2
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(denoising, "training_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(output_dir=str(tmp_path / "killed"), **changes)
    monkeypatch.undo()
    resumed = train(output_dir=str(tmp_path / "killed"), resume_from_checkpoint="latest", **changes)
    assert losses(resumed) == losses(whole) and list(losses(whole)) == [1, 2, 3, 4]
    parts = [path.parent.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(parts) == (11 if changes.get("train_text_encoder") else 7)
    for part in parts:
        assert weights(resumed, part) == weights(whole, part), part


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_that_goes_on_to_the_last_bit(
    script, train, tmp_path, monkeypatch, number
):
    """A preempted run would lose what it did since its last checkpoint, or log other losses after the resume."""
    changes = {"logging_steps": 4, "checkpointing_steps": 4}
    whole = train(output_dir=str(tmp_path / "whole"), **changes)

    real, calls = denoising.training_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # in the middle of step 3, between two lines of the log
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(denoising, "training_loss", interrupted)
    with pytest.raises(SystemExit) as left:
        train(output_dir=str(tmp_path / "stopped"), **changes)
    monkeypatch.undo()
    assert left.value.code == 128 + number
    assert checkpoints(tmp_path / "stopped") == {"checkpoint-3"}
    resumed = train(output_dir=str(tmp_path / "stopped"), resume_from_checkpoint="latest", **changes)
    assert losses(resumed) == losses(whole) and list(losses(whole)) == [4]
    for part in ("unet", "checkpoint-4/unet"):
        assert weights(resumed, part) == weights(whole, part), part


def test_kills_at_random_moments_change_nothing(tmp_path):
    """Five SIGKILLs of a real process while it caches, trains, saves or pushes; `tests/kill_stress.py` does fifty."""
    model, pictures = kill_stress.make_inputs(tmp_path)
    same, kills = kill_stress.stress(tmp_path, model, pictures, _HUB, kills=5, kills_per_run=5, seed=1)
    assert same and kills == 5


def test_a_resume_on_smaller_micro_batches_takes_the_same_steps(train, tmp_path):
    """Who runs out of memory halves the batch and doubles the accumulation; steps must not fall apart."""
    changes = {"checkpointing_steps": 1, "adam_epsilon": 1e-4}
    whole = train(output_dir=str(tmp_path / "whole"), **changes)
    split = train(output_dir=str(tmp_path / "split"), max_train_steps=1, **changes)
    train(
        output_dir=str(split),
        train_batch_size=4,
        gradient_accumulation_steps=2,
        resume_from_checkpoint="latest",
        **changes,
    )
    for a, b in zip(parameters(whole), parameters(split), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_validation_changes_nothing_in_the_run(train, tmp_path):
    """Training would go on from the averaged weights, or with other random numbers."""
    without = train(output_dir=str(tmp_path / "without"), checkpointing_steps=4)
    run = train(
        output_dir=str(tmp_path / "with"),
        checkpointing_steps=4,
        validation_prompts=("a cat", "a dog"),
        validation_steps=2,
        validation_inference_steps=1,
        report_to="tensorboard",
    )
    assert sorted(path.name for path in (run / "validation").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    assert Image.open(run / "validation" / "step-0000004.png").width > 2 * 128
    assert list((run / "logs").rglob("events*"))
    assert losses(run) == losses(without)
    assert weights(run, "checkpoint-4/unet") == weights(without, "checkpoint-4/unet")
