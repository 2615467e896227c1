"""Randomness as a function of (seed, step, global sample index)."""

import pytest
import torch

from latentdiff.utils import randomness


def test_streams_repeat_and_differ():
    """A resumed run would draw other noise, or two kinds of draws would be the same numbers."""

    def draw(*words):
        return torch.randn(4, generator=randomness.generator(*words))

    assert torch.equal(draw(0, "noise", 3), draw(0, "noise", 3))
    others = [draw(1, "noise", 3), draw(0, "posterior", 3), draw(0, "noise", 4), draw(0, "noise", 3, 0)]
    assert all(not torch.equal(draw(0, "noise", 3), other) for other in others)


def test_seed_zero_is_a_seed():
    assert not torch.equal(
        torch.randn(4, generator=randomness.generator(0, "noise", 0)),
        torch.randn(4, generator=randomness.generator(1, "noise", 0)),
    )


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    randomness.data_order(0, 0, 10, 7)
    torch.randn(3, generator=randomness.generator(0, "noise"))
    assert torch.equal(before, torch.get_rng_state())


def test_every_epoch_shows_every_row_once():
    """Rows would be seen unequally often, or in the same order in every epoch."""
    order = randomness.data_order(0, 0, 30, 10).view(3, 10)
    assert all(row.sort().values.tolist() == list(range(10)) for row in order)
    assert not torch.equal(order[0], order[1])


def test_order_does_not_depend_on_how_it_is_cut():
    """A resume in the middle of an epoch, or another batch size, would see other rows."""
    whole = randomness.data_order(5, 0, 60, 13)
    pieces = torch.cat([randomness.data_order(5, first, 7, 13) for first in range(0, 56, 7)])
    assert torch.equal(whole[:56], pieces)


@pytest.mark.parametrize("buffer", [None, 10, 11])
def test_without_a_buffer_an_epoch_is_one_permutation(buffer):
    """A run begun before there was a buffer would go on with other pictures. One that holds all rows is none."""
    expected = [torch.randperm(10, generator=randomness.generator(4, "order", epoch)) for epoch in range(3)]
    assert torch.equal(randomness.data_order(4, 0, 30, 10, buffer), torch.cat(expected))


SIZES_AND_BUFFERS = [(103, 10), (100, 10), (7, 6), (2, 1), (50, 1)]


@pytest.mark.parametrize(("size", "buffer"), SIZES_AND_BUFFERS)
def test_every_row_once_with_a_buffer(size, buffer):
    """Rows would be lost or repeated at the short windows of both ends."""
    order = randomness.data_order(0, 0, 4 * size, size, buffer).view(4, size)
    assert all(row.sort().values.tolist() == list(range(size)) for row in order)


@pytest.mark.parametrize(("size", "buffer"), SIZES_AND_BUFFERS)
def test_a_window_is_read_as_a_whole_before_the_next(size, buffer):
    """A slow disk would seek through all tars for each batch."""
    for epoch in range(4):
        order = randomness.data_order(0, epoch * size, size, size, buffer)
        time = order.argsort()  # when each row is read

        cuts = [[time[:first], *time[first:].split(buffer)] for first in range(1, buffer + 1)]
        assert any(all(int(t.max() - t.min()) == len(t) - 1 for t in windows) for windows in cuts)


def test_windows_rows_and_cuts_are_drawn():
    """Rows would keep their neighbours or their order in every epoch, or in every run."""
    size, buffer = 1000, 100
    orders = [randomness.data_order(seed, epoch * size, size, size, buffer) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for i, one in enumerate(orders):
        assert not any(torch.equal(one, other) for other in orders[:i])
        assert (one.diff() > 0).float().mean() == pytest.approx(0.5, abs=0.06), "rows of a window come in a drawn order"
    starts = [randomness._windows(0, epoch, size, buffer)[0] for epoch in range(20)]
    assert len({int(s[s > 0].min()) for s in starts}) > 10, "the cuts move"
    assert len({int(s[0]) // buffer for s in starts}) > 5, "the windows move"


def test_order_with_a_buffer_does_not_depend_on_how_it_is_cut():
    """A resume in the middle of a window, or another batch size, would see other rows."""
    whole = randomness.data_order(5, 0, 60, 13, 4)
    pieces = torch.cat([randomness.data_order(5, first, 7, 13, 4) for first in range(0, 56, 7)])
    assert torch.equal(whole[:56], pieces)


def test_a_step_far_into_much_data_is_cheap():
    """Drawing all of 400 million rows for each epoch would take gigabytes and half a minute."""
    size, buffer = 400_000_000, 10_000
    rows = randomness.data_order(0, 3 * size - 8, 16, size, buffer)
    assert len(rows.unique()) > 8 and rows.max() < size
    assert sum(t.nbytes for t in randomness._windows(0, 2, size, buffer)) < 2**20


def test_fraction_is_fixed():
    """The held-out split would move: it is SHA-256 of the words, read as a number."""
    import hashlib

    expected = int(hashlib.sha256(b"held out|a").hexdigest()[:16], 16) / 2**64
    assert randomness.fraction("held out", "a") == expected
