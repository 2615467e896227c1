"""Aspect-ratio buckets: the sizes that pictures may have, and the pictures of one size that make up each step."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ..utils import randomness

LONGEST = 2.0  # longer side to shorter side
AREA_OFF = 0.1  # by which the area may differ from the square's


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Widths and heights with about the area of the square, sides multiples of `multiple`, the square first.

    Args:
        resolution: side of the square in pixels, itself a multiple.
        multiple: what VAE and UNet together need.
    """
    sizes = []
    for width in range(multiple, resolution + 1, multiple):
        height = round(resolution**2 / width / multiple) * multiple
        area_off = abs(width * height / resolution**2 - 1)
        if area_off <= AREA_OFF and height / width <= LONGEST:
            sizes = [(width, height), (height, width), *sizes]
    return list(dict.fromkeys(sizes))


class BucketOrder:
    """The rows of the data that make up each optimizer step, all of one bucket, as a function of the step alone.

    In each bucket samples go through permutations of its rows, one after the other, so every row is seen equally often.
    By the end of epoch e bucket b, of N_b rows, has had floor(e N_b / B) steps of B samples; in which order an
    epoch's steps go to the buckets is drawn. So one bucket is the usual order, and on any number of processes and
    after any resume a step has the same rows.

    Args:
        buckets: the rows of each, repeats counted; empty ones are left out.
        batch: B, samples per optimizer step on all processes together.
        seed, shuffle_buffer: of the run, as in `data_order`.
    """

    def __init__(self, buckets: Sequence[np.ndarray], batch: int, seed: int, shuffle_buffer: int | None = None):
        self._buckets = [_as_range(rows) for rows in buckets if len(rows)]
        self._batch, self._seed, self._shuffle_buffer = batch, seed, shuffle_buffer
        self.epoch_length = sum(map(len, self._buckets))
        self._steps_of = lru_cache(maxsize=2)(self._draw_steps)

    def rows(self, step: int) -> list[int]:
        """The B rows of optimizer step `step`, counted from 0."""
        most = (step + len(self._buckets) + 1) * self._batch // self.epoch_length + 2
        epoch = bisect_right(range(most), step, key=self._steps_before) - 1
        place = step - self._steps_before(epoch)
        steps = self._steps_of(epoch)
        bucket = steps[place]
        rows = self._buckets[bucket]
        first = epoch * len(rows) // self._batch + int(np.count_nonzero(steps[:place] == bucket))
        order = randomness.data_order(
            self._seed, first * self._batch, self._batch, len(rows), self._shuffle_buffer, int(bucket)
        )
        return (order + rows.start).tolist() if isinstance(rows, range) else rows[order.numpy()].tolist()

    def _steps_before(self, epoch: int) -> int:
        return sum(epoch * len(rows) // self._batch for rows in self._buckets)

    def _draw_steps(self, epoch: int) -> np.ndarray:
        """The bucket of each step of an epoch."""
        counts = [(epoch + 1) * len(rows) // self._batch - epoch * len(rows) // self._batch for rows in self._buckets]
        steps = torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int16), counts))
        order = torch.randperm(len(steps), generator=randomness.generator(self._seed, "buckets", epoch))
        return steps[order].numpy()


def _as_range(rows: np.ndarray) -> np.ndarray | range:
    """Rows that lie one behind the other without the memory they take, four megabytes of a million in each process."""
    alike = range(int(rows[0]), int(rows[0]) + len(rows))
    return alike if np.array_equal(rows, alike) else rows
