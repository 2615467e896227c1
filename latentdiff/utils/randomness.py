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


def generator(seed: int | str, stream: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for (seed, stream, counters); different words or counters give independent streams.

    Args:
        seed: the run's seed.
        stream: what is drawn, e.g. "noise".
        counters: usually the optimizer step; the epoch for the order of the data.
        device: where it will draw. CPU and CUDA draw different numbers from the same seed.
    """
    return torch.Generator(device).manual_seed(_digest(seed, stream, *counters) >> 1)


def data_order(
    seed: int, first_sample: int, count: int, dataset_size: int, shuffle_buffer: int | None = None, bucket: int = 0
) -> torch.Tensor:
    """Which rows of the data the global samples first_sample .. first_sample + count - 1 are.

    Every epoch is a permutation of its own; a batch runs over the end of an epoch into the next one, so that every row
    is seen equally often and the position inside an epoch follows from the sample's index alone.

    With a shuffle buffer the rows of an epoch are cut into windows of that many consecutive rows. The windows come in a
    drawn order and the rows of each in a drawn order, so a disk reads within one window at a time. The cuts are drawn
    too, so that rows do not keep the same company; the first and the last window may be shorter. A buffer that holds
    all rows is the same as none.

    Args:
        bucket: rows that are ordered on their own, apart from those of other buckets.

    Returns:
        (count,) int64 row numbers.
    """
    seed = f"{seed}, bucket {bucket}" if bucket else seed
    samples = torch.arange(first_sample, first_sample + count)
    epochs = samples // dataset_size
    rows = torch.empty(count, dtype=torch.int64)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        places = samples[inside] - epoch * dataset_size
        if shuffle_buffer is None or shuffle_buffer >= dataset_size:
            rows[inside] = _permutations(bucket)(dataset_size, seed, "order", epoch)[places].long()
        else:
            rows[inside] = _order_in_windows(seed, epoch, places, dataset_size, shuffle_buffer, bucket)
    return rows


def _order_in_windows(
    seed: int | str, epoch: int, places: torch.Tensor, size: int, length: int, bucket: int
) -> torch.Tensor:
    """The rows at some places of an epoch; only the windows that they fall into are drawn."""
    first_rows, first_places = _windows(seed, epoch, size, length)
    windows = torch.searchsorted(first_places, places, right=True) - 1
    rows = torch.empty_like(places)
    for window in windows.unique().tolist():
        inside = windows == window
        begin, end = first_places[window : window + 2].tolist()
        order = _permutations(bucket)(end - begin, seed, "order in window", epoch, window)
        rows[inside] = first_rows[window] + order[places[inside] - begin].long()
    return rows


@lru_cache(maxsize=64)
def _windows(seed: int | str, epoch: int, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows as they come in an epoch: of each the first row (W,), and the first place with the end (W + 1,)."""
    draw = generator(seed, "windows", epoch)
    cuts = torch.arange(int(torch.randint(1, length + 1, (), generator=draw)), size, length)
    edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([size])])
    order = torch.randperm(len(edges) - 1, generator=draw)
    return edges[order], torch.cat([edges[:1], edges.diff()[order].cumsum(0)])


@cache
def _permutations(bucket: int) -> Callable[..., torch.Tensor]:
    """Draws permutations as int32; of each bucket two are kept, since a batch may run over the end of an epoch."""
    return lru_cache(maxsize=2)(
        lambda size, *words: torch.randperm(size, generator=generator(*words), dtype=torch.int32)
    )
