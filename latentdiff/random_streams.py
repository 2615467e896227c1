"""Randomness as a function of (seed, step, global sample index): nothing here or elsewhere uses the global generator.

Each kind of draw has a stream of its own, named by a word. At a step the stream is drawn for the whole global batch and
every process takes its rows, so the numbers do not depend on how many processes or micro-batches share the step.
"""

import hashlib
from functools import lru_cache

import torch


def _digest(*words) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, words)).encode()).digest()[:8], "big")


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


def data_order(seed: int, first_sample: int, count: int, dataset_size: int) -> torch.Tensor:
    """Which rows of the data the global samples first_sample .. first_sample + count - 1 are.

    Every epoch is a permutation of its own; a batch runs over the end of an epoch into the next one, so that every row
    is seen equally often and the position inside an epoch follows from the sample's index alone.

    Returns:
        (count,) int64 row numbers.
    """
    samples = torch.arange(first_sample, first_sample + count)
    epochs = samples // dataset_size
    rows = torch.empty(count, dtype=torch.int64)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        rows[inside] = _permutation(seed, epoch, dataset_size)[samples[inside] - epoch * dataset_size]
    return rows


@lru_cache(maxsize=2)  # a batch may run over the end of an epoch
def _permutation(seed: int, epoch: int, size: int) -> torch.Tensor:
    return torch.randperm(size, generator=generator(seed, "order", epoch))
