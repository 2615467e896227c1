"""Power-function averages in a run: what is tracked, its snapshots, and going on from a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentdiff.config.train import TrainConfig
from latentdiff.diffusion.posthoc_ema import SNAPSHOTS, gamma_of, list_snapshots, snapshot_path
from latentdiff.objectives import denoising
from latentdiff.training.ema import PowerEMA, PowerEMAs, check_same_ema, make_ema
from latentdiff.utils.errors import ConfigError
from tests.end_to_end.test_train_text2img import weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's
WIDTHS = (0.05, 0.1)


def snapshots(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / SNAPSHOTS).iterdir()}


def test_a_power_average_is_the_weighted_sum_of_the_paper():
    """The width would be another one than it is called, or the initial weights would stay in it."""
    module, sigma_rel = torch.nn.Linear(3, 2), 0.1
    ema, history = PowerEMA(module, sigma_rel), []
    for step in range(1, 201):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        history.append(module.weight.detach().double())
        ema.update(module, step)
    # The integral of the profile between i - 1 and i.
    edges = (np.arange(201) / 200) ** (gamma_of(sigma_rel) + 1)
    expected = sum(weight * value for weight, value in zip(np.diff(edges), history, strict=True))
    torch.testing.assert_close(ema.parameters[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_what_draws_has_the_first_width_and_own_weights_come_back():
    """Validation would show another average than the finished model has, or training go on from it."""
    module = torch.nn.Linear(2, 2)
    emas = PowerEMAs(module, WIDTHS)
    for step in range(1, 6):
        with torch.no_grad():
            module.weight.fill_(step)
        emas.update(module, step)
    own = module.weight.detach().clone()
    with emas.swapped_into(module):
        assert torch.equal(module.weight, emas.widths[0].parameters[0])
        assert not torch.equal(module.weight, emas.widths[1].parameters[0])
    assert torch.equal(module.weight, own)
    emas.copy_to(module)
    assert torch.equal(module.weight, emas.widths[0].parameters[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ema_sigma_rel": (0.3,)}, "ema_sigma_rel: 0.3 must lie above 0"),
        ({"ema_sigma_rel": (0.0,)}, "ema_sigma_rel: 0.0 must lie above 0"),
        ({"ema_sigma_rel": (0.05, 0.05)}, "ema_sigma_rel: names a width twice"),
        ({"ema_sigma_rel": (0.05,), "ema_decay": 0.99}, "ema_decay: 0.99 has no effect"),
        ({"ema_sigma_rel": (0.05,), "use_ema": False}, "ema_sigma_rel: .*no-use_ema"),
        ({"ema_sigma_rel": (0.05,), "lora_rank": 4, "unet": "pretrained"}, "ema_sigma_rel: .*lora_rank"),
        ({"ema_snapshot_steps": 5}, "ema_snapshot_steps: has no effect"),
        ({"ema_sigma_rel": (0.05,), "ema_snapshot_steps": 0}, "ema_snapshot_steps: 0 is below 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, named):
    """An option would be taken and not used, or fail after an hour."""
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**changes)


def test_every_width_that_the_settings_take_there_is():
    """A run would be refused after its data is encoded: the settings' limit stands there once more, as a number."""
    ema = make_ema(TrainConfig(ema_sigma_rel=(1e-4, 0.2886)), torch.nn.Linear(1, 1))
    assert [width.sigma_rel for width in ema.widths] == [1e-4, 0.2886]


def test_a_checkpoint_of_other_averages_is_refused():
    """A plain average would be gone on with as one of a width, and nobody would see it."""
    with pytest.raises(ConfigError, match="ema_sigma_rel: 0.05 0.1 cannot go on from a checkpoint with none"):
        check_same_ema(TrainConfig(ema_sigma_rel=WIDTHS), {"optimizer": "adamw"})
    with pytest.raises(ConfigError, match="ema_sigma_rel: none cannot .* with 0.05 0.1"):
        check_same_ema(TrainConfig(), {"ema_sigma_rel": list(WIDTHS)})
    check_same_ema(TrainConfig(ema_sigma_rel=WIDTHS), {"ema_sigma_rel": list(WIDTHS)})
    check_same_ema(TrainConfig(ema_sigma_rel=WIDTHS), {})  # a new run


def test_a_run_keeps_every_width_and_is_saved_with_the_first(train):
    """Snapshots would be of other weights than were tracked, or the finished model have another width."""
    run = train(ema_sigma_rel=WIDTHS, ema_snapshot_steps=3, checkpointing_steps=4)
    found = list_snapshots(run / SNAPSHOTS)
    assert [(s.network, s.step, s.sigma_rel) for s in found] == [
        ("unet", step, sigma_rel)
        for step in (3, 4)
        for sigma_rel in WIDTHS  # each third step and the last one
    ]
    assert found[0].config == json.loads((run / "unet" / "config.json").read_text())
    for sigma_rel, folder in ((0.05, run / "checkpoint-4" / "unet_ema"), (0.1, run / "checkpoint-4" / "unet_ema_0.1")):
        kept = load_file(snapshot_path(run / SNAPSHOTS, "unet", 4, sigma_rel))
        (file,) = folder.glob("*.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in load_file(file).items())
    assert weights(run) == weights(run, "checkpoint-4/unet_ema") != weights(run, "checkpoint-4/unet_ema_0.1")
    assert weights(run) != weights(run, "checkpoint-4/unet")


def test_the_text_encoder_has_snapshots_where_it_is_trained(train):
    """Half of an average would be made afterwards, and put beside the text encoder of another one."""
    run = train(ema_sigma_rel=WIDTHS, train_text_encoder=True, max_train_steps=2)
    assert len(list_snapshots(run / SNAPSHOTS, "text_encoder")) == len(list_snapshots(run / SNAPSHOTS, "unet")) == 4
    kept = load_file(snapshot_path(run / SNAPSHOTS, "text_encoder", 2, 0.05))
    (file,) = (run / "text_encoder").glob("*.safetensors")
    saved = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    assert saved.keys() == kept.keys() and all(torch.equal(kept[name], tensor) for name, tensor in saved.items())


def test_a_killed_run_goes_on_to_the_last_bit(script, train, tmp_path, monkeypatch):
    """An average would start anew, or snapshots of what a killed run did after its checkpoint be taken for its own."""
    changes = {"ema_sigma_rel": WIDTHS, "ema_snapshot_steps": 1, "checkpointing_steps": 2}
    whole = train(output_dir=str(tmp_path / "whole"), **changes)
    real, calls = denoising.training_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) > 3:  # in step 4, after the checkpoint at 2 and a snapshot at 3
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(denoising, "training_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(output_dir=str(tmp_path / "killed"), **changes)
    monkeypatch.undo()
    stale = snapshot_path(tmp_path / "killed" / SNAPSHOTS, "unet", 3, 0.05)
    stale.write_bytes(snapshot_path(whole / SNAPSHOTS, "unet", 1, 0.05).read_bytes())
    stale.with_name(".tmp-" + stale.name).write_bytes(b"half of one")
    later = snapshot_path(stale.parent, "unet", 9, 0.05)
    later.write_bytes(b"of a longer run that was here before")
    resumed = train(output_dir=str(tmp_path / "killed"), resume_from_checkpoint="latest", **changes)
    assert snapshots(resumed) == snapshots(whole) and len(snapshots(whole)) == 8
    for part in ("unet", "checkpoint-4/unet_ema", "checkpoint-4/unet_ema_0.1", "checkpoint-2/unet_ema_0.1"):
        assert weights(resumed, part) == weights(whole, part), part


def test_a_new_run_starts_without_the_snapshots_of_an_earlier_one(train):
    """Averages of two runs would be combined."""
    run = train(ema_sigma_rel=WIDTHS, ema_snapshot_steps=1)
    train(ema_sigma_rel=(0.08,), ema_snapshot_steps=2, max_train_steps=2)
    assert [(s.step, s.sigma_rel) for s in list_snapshots(run / SNAPSHOTS)] == [(2, 0.08)]


def test_tracking_changes_nothing_else(train, tmp_path):
    """The run itself would hang on what is averaged beside it."""
    plain = train(output_dir=str(tmp_path / "plain"), checkpointing_steps=4)
    tracked = train(output_dir=str(tmp_path / "tracked"), checkpointing_steps=4, ema_sigma_rel=WIDTHS)
    assert weights(plain, "checkpoint-4/unet") == weights(tracked, "checkpoint-4/unet")


def test_snapshots_are_in_fp32_whatever_the_model_is_saved_in(train):
    """Half precision would show in widths that are sums with large coefficients of both signs."""
    run = train(ema_sigma_rel=(0.05,), max_train_steps=1, save_dtype="fp16")
    (path,) = (run / SNAPSHOTS).iterdir()
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
