"""Randomness as a function of (seed, step, global sample index)."""

import torch

from latentdiff import random_streams


def test_streams_repeat_and_differ():
    """A resumed run would draw other noise, or two kinds of draws would be the same numbers."""

    def draw(*words):
        return torch.randn(4, generator=random_streams.generator(*words))

    assert torch.equal(draw(0, "noise", 3), draw(0, "noise", 3))
    others = [draw(1, "noise", 3), draw(0, "posterior", 3), draw(0, "noise", 4), draw(0, "noise", 3, 0)]
    assert all(not torch.equal(draw(0, "noise", 3), other) for other in others)


def test_seed_zero_is_a_seed():
    assert not torch.equal(
        torch.randn(4, generator=random_streams.generator(0, "noise", 0)),
        torch.randn(4, generator=random_streams.generator(1, "noise", 0)),
    )


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    random_streams.data_order(0, 0, 10, 7)
    torch.randn(3, generator=random_streams.generator(0, "noise"))
    assert torch.equal(before, torch.get_rng_state())


def test_every_epoch_shows_every_row_once():
    """Rows would be seen unequally often, or in the same order in every epoch."""
    order = random_streams.data_order(0, 0, 30, 10).view(3, 10)
    assert all(row.sort().values.tolist() == list(range(10)) for row in order)
    assert not torch.equal(order[0], order[1])


def test_order_does_not_depend_on_how_it_is_cut():
    """A resume in the middle of an epoch, or another batch size, would see other rows."""
    whole = random_streams.data_order(5, 0, 60, 13)
    pieces = torch.cat([random_streams.data_order(5, first, 7, 13) for first in range(0, 56, 7)])
    assert torch.equal(whole[:56], pieces)


def test_fraction_is_fixed():
    """The held-out split would move: it is SHA-256 of the words, read as a number."""
    import hashlib

    expected = int(hashlib.sha256(b"held out|a").hexdigest()[:16], 16) / 2**64
    assert random_streams.fraction("held out", "a") == expected
