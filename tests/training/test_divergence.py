"""A run whose gradient is no longer finite stops and names step and pictures; fp16's skipped steps are only counted."""

from types import SimpleNamespace

import pytest
import torch

from latentdiff.training import stopping
from latentdiff.training.stopping import DivergenceWatch
from latentdiff.utils.errors import RunStopped

NAN, FINE = torch.tensor(float("nan")), torch.tensor(1.0)
BATCHES = SimpleNamespace(rows_at=lambda step: [step, 7, 7], name=lambda row: f"{row}.png")


def accelerator(scaler=None) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cpu"), scaler=scaler, optimizer_step_was_skipped=False)


@pytest.mark.parametrize("norm", [NAN, torch.tensor(float("inf"))])
def test_the_first_bad_step_and_its_pictures_are_named(norm):
    watch = DivergenceWatch(accelerator(), BATCHES)
    watch.add(1, FINE)
    with pytest.raises(RunStopped, match=r"step 2: .*not finite.* latest .*Its pictures: 1\.png, 7\.png$"):
        watch.add(2, norm)


def test_a_device_is_not_waited_for_until_something_is_saved():
    """Each step would wait for the device; or of several bad steps the last would be named."""

    class OnDevice(torch.Tensor):
        """Says that it lies on a GPU."""

        device = SimpleNamespace(type="cuda")

    watch = DivergenceWatch(accelerator(), BATCHES)
    watch._first_bad = watch._first_bad.as_subclass(OnDevice)
    for step, norm in ((1, FINE), (2, NAN), (3, FINE), (4, NAN)):
        watch.add(step, norm)
    with pytest.raises(RunStopped, match="step 2:"):
        watch.check()


def test_under_fp16_skipped_steps_are_counted_until_there_are_too_many_in_a_row(monkeypatch):
    monkeypatch.setattr(stopping, "MOST_SKIPPED_IN_A_ROW", 3)
    half = accelerator(scaler=object())
    watch = DivergenceWatch(half, BATCHES)
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        half.optimizer_step_was_skipped = skipped
        watch.add(step, NAN if skipped else FINE)
        watch.check()
    assert watch.measures == {"grad_norm": NAN, "skipped_steps": 4}
    with pytest.raises(RunStopped, match="step 6: 3 steps in a row"):
        watch.add(6, NAN)
