"""Averages of weights, against the recurrence written out."""

import pytest
import torch

from latentdiff.training.ema import EMA


def test_average_follows_the_recurrence():
    model = torch.nn.Linear(2, 1, bias=False)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().double().clone()
    for step in range(1, 150):
        with torch.no_grad():
            model.weight.fill_(step / 10)
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step / 10
    torch.testing.assert_close(ema.parameters[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_own_weights_come_back_even_after_an_error():
    """Training would go on from the averaged weights after a validation."""
    model = torch.nn.Linear(3, 3)
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.add_(1)
    own, average = model.weight.detach().clone(), ema.parameters[0]
    with pytest.raises(RuntimeError), ema.swapped_into(model):
        assert torch.equal(model.weight, average)
        raise RuntimeError
    assert torch.equal(model.weight, own)


def test_average_stays_in_float32_for_a_model_in_half_precision():
    """In bf16 a decay of 0.999 would never move the average."""
    model = torch.nn.Linear(2, 2).bfloat16()
    assert all(p.dtype == torch.float32 for p in EMA(model, decay=0.999).parameters)
