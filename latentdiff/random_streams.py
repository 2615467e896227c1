"""Randomness as a function of (seed, step, global sample index): nothing here or elsewhere uses the global generator.

Each kind of draw has a stream of its own, named by a word. At a step the stream is drawn for the whole global batch and
every process takes its rows, so the numbers do not depend on how many processes or micro-batches share the step.
"""

import hashlib
from collections.abc import Callable
from functools import cache, lru_cache

import torch


def _digest(*words) -> int:
    said = "|".join(map(str, words)).encode("utf-8", "surrogatepass")  # a file's name need not be text
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "big")


def fraction(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone, the same on every machine and in every version."""
    return _digest(*words) / 2**64


def generator(seed: int, stream: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for (seed, stream, counters); different words or counters give independent streams.

    Args:
        seed: the run's seed.
        stream: what is drawn, e.g. "noise".
        counters: usually the optimizer step; the epoch for the order of the data.
        device: where it will draw. CPU and CUDA draw different numbers from the same seed.
    """
    return torch.Generator(device).manual_seed(_digest(seed, stream, *counters) >> 1)


def data_order(seed: int, first_sample: int, count: int, dataset_size: int, bucket: int = 0) -> torch.Tensor:
    """Which rows of the data the global samples first_sample .. first_sample + count - 1 are.

    Every epoch is a permutation of its own; a batch runs over the end of an epoch into the next one, so that every row
    is seen equally often and the position inside an epoch follows from the sample's index alone.

    Args:
        bucket: rows that are ordered on their own, apart from those of other buckets.

    Returns:
        (count,) int64 row numbers.
    """
    samples = torch.arange(first_sample, first_sample + count)
    epochs = samples // dataset_size
    rows = torch.empty(count, dtype=torch.int64)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        permutation = _permutations(bucket)(seed, epoch, dataset_size)
        rows[inside] = permutation[samples[inside] - epoch * dataset_size].long()
    return rows


@cache
def _permutations(bucket: int) -> Callable[[int, int, int], torch.Tensor]:
    """Of a bucket the permutation of an epoch; two are kept, since a batch may run over the end of an epoch."""

    @lru_cache(maxsize=2)
    def permutation(seed: int, epoch: int, size: int) -> torch.Tensor:
        counters = (epoch, bucket) if bucket else (epoch,)
        return torch.randperm(size, generator=generator(seed, "order", *counters)).int()

    return permutation
