"""Buckets keep the area, and the order of their steps shows every picture equally often."""

import numpy as np
import pytest

from latentdiff.data.buckets import BucketOrder, bucket_sizes
from latentdiff.utils.randomness import data_order


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 16), (256, 64), (512, 64), (512, 8), (768, 64), (1024, 64)])
def test_sizes(resolution, multiple):
    """A UNet cannot halve other sides; a larger area needs memory that a square does not; and no shape is one-sided."""
    sizes = bucket_sizes(resolution, multiple)
    assert sizes.count((resolution, resolution)) == 1 and len(set(sizes)) == len(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes) and len(sizes) >= 3
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert abs(width * height / resolution**2 - 1) <= 0.1 and 0.5 <= width / height <= 2


def test_sizes_of_stable_diffusion():
    """Worked out by hand from 512 * 512 = 262,144 and multiples of 64: 384 x 683, 448 x 585."""
    assert set(bucket_sizes(512, 64)) == {(512, 512), (384, 704), (704, 384), (448, 576), (576, 448)}


def test_one_bucket_is_the_usual_order():
    """Runs without buckets would see another order than `data_order`'s."""
    order = BucketOrder([np.arange(100, 110)], batch=4, seed=3)
    for step in range(20):
        assert order.rows(step) == (100 + data_order(3, 4 * step, 4, 10)).tolist()


BUCKETS = [np.arange(0, 37), np.arange(37, 50), np.arange(50, 53)]


@pytest.mark.parametrize("batch", [1, 4, 8, 60])
def test_every_row_is_seen_equally_often(batch):
    """Pictures of a rare shape would be left out, or be learnt by heart."""
    order = BucketOrder(BUCKETS, batch, seed=0)
    assert order.epoch_length == 53
    steps = -(-53 * 40 // batch)  # about 40 epochs
    seen = np.zeros(53, int)
    for step in range(steps):
        rows = order.rows(step)
        assert len(rows) == batch and len({sum(row >= b[0] for b in BUCKETS) for row in rows}) == 1
        seen += np.bincount(rows, minlength=53)
    for bucket in BUCKETS:
        assert seen[bucket].max() - seen[bucket].min() <= 1  # permutations, one after the other
        # In a share of an epoch each bucket is ahead or behind by a batch, which is batch / N_b of a pass.
        assert abs(seen[bucket].mean() - steps * batch / 53) <= 1 + 2 * batch / len(bucket)


def test_buckets_take_turns_in_a_drawn_order():
    """All pictures of a shape would come in a row."""
    order = BucketOrder(BUCKETS, 1, seed=0)
    first, second = ([order.rows(53 * epoch + i)[0] for i in range(53)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(53)) and first != second
    turns = [int(row >= 37) + int(row >= 50) for row in first]
    assert sum(a != b for a, b in zip(turns, turns[1:], strict=False)) > 10
    assert first != [BucketOrder(BUCKETS, 1, seed=1).rows(i)[0] for i in range(53)]


def test_any_step_in_any_order():
    """A resumed run would see other pictures."""
    forwards, backwards = BucketOrder(BUCKETS, 8, seed=0), BucketOrder(BUCKETS, 8, seed=0)
    wanted = [forwards.rows(step) for step in range(60)]
    assert [backwards.rows(step) for step in reversed(range(60))] == wanted[::-1]


def test_a_batch_larger_than_all_the_data():
    order = BucketOrder([np.arange(3), np.arange(3, 5)], 8, seed=0)
    seen = np.bincount([row for step in range(50) for row in order.rows(step)], minlength=5)
    assert seen[:3].max() - seen[:3].min() <= 1 and abs(seen[0] - seen[4]) <= 16
