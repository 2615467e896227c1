"""Tensors on disk under the digest of what they follow from, shared by processes, runs and data sets.

A store is a folder of safetensors shards. A shard holds entries of one shape with their keys, appears whole or not at
all, is never changed, and is named by the SHA-256 of its own bytes. So nothing can be stale, runs that write at the
same time do not meet, a killed one has lost at most the shard it was at, and damage is found.
"""

import hashlib
import json
import logging
import math
import mmap
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save
from tqdm.auto import tqdm

from ..utils.errors import RunStopped
from ..utils.files import file_sha256, write_whole
from ..utils.system import advise

logger = logging.getLogger(__name__)

KEY_BYTES = 16
SHARD_BYTES = 2**26
SHARD_SECONDS = 60.0  # what a killed run loses at most
# Everything is encoded in batches of exactly this many, the last one filled up: floating-point sums may differ with the
# size of a batch, and an entry must come out the same to the last bit with whatever else it is encoded.
ENCODE_BATCH = 16
_FORMAT = "1"
_NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8}

Encode = Callable[[Sequence[int]], dict[str, torch.Tensor]]


def key_of(*parts: bytes | str) -> bytes:
    """The key of what follows from `parts` and from nothing else."""
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "big") + part)  # so that no two lists of parts read the same
    return digest.digest()[:KEY_BYTES]


def as_keys(keys: Iterable[bytes], count: int = -1) -> np.ndarray:
    """Keys as an array, (N,) of 16 bytes each; where their count is known, no more memory is taken meanwhile."""
    return np.fromiter(keys, f"S{KEY_BYTES}", count)


class EntryStore:
    """The entries of one kind.

    Args:
        folder: is made where it is not there. Its name should say what all its entries follow from.

    Raises:
        RunStopped: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._shards: dict[str, _Shard] = {}
        self._starts = np.zeros(1, np.int64)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._remove_damaged()
        PartialState().wait_for_everyone()
        self._map_new_shards()

    def fill(self, keys: np.ndarray, encode: Encode, description: str, kinds: np.ndarray | None = None) -> np.ndarray:
        """Encode what is not in the store yet, all processes together, and say where every entry is.

        Args:
            keys: (N,) as `as_keys` gives them, the same on every process.
            encode: numbers among the N, of one kind -> tensors of that many rows.
            description: of the progress bar.
            kinds: (N,) whole numbers; entries of different shapes must be of different kinds.

        Returns:
            (N,) positions for `read`.

        Raises:
            RunStopped: a shard cannot be written; what was written before is kept.
        """
        state = PartialState()
        shares = [(state.process_index, state.num_processes)]
        # Where machines do not share the folder, each has to encode what others did.
        shares += [(state.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))] * 2
        for process, processes in shares:
            positions = self._find(keys)
            missing = _first_of_each(keys, np.flatnonzero(positions < 0))
            if not sum(gather_object([len(missing)])):
                return positions.astype(np.int32)
            # By the key, not by the place in the list: another run may fill the store too, so lists may differ.
            last_bytes = np.frombuffer(keys[missing].tobytes(), np.uint8).reshape(-1, KEY_BYTES)[:, -4:].copy()
            mine = missing[last_bytes.view(np.uint32).ravel() % processes == process]
            self._encode(keys, mine, encode, description, kinds)
            state.wait_for_everyone()
            self._map_new_shards()
        raise RunStopped(f"{self._folder} does not hold what was just written into it")

    def read(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        """Copies of the entries at these positions, stacked; they must be of one shape."""
        positions = np.asarray(positions)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        shards = list(self._shards.values())
        out: dict[str, np.ndarray] = {}
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            for name, rows in shards[number].rows(positions[places] - self._starts[number]).items():
                whole = out.setdefault(name, np.empty((len(positions), *rows.shape[1:]), rows.dtype))
                whole[places] = rows
        return {name: torch.from_numpy(array) for name, array in out.items()}

    def bytes_of(self, positions: np.ndarray) -> int:
        """What the entries at these positions, each counted once, take on the disk."""
        numbers = np.searchsorted(self._starts, np.unique(positions), side="right") - 1
        counts = np.bincount(numbers, minlength=len(self._shards))
        return sum(int(n) * shard.entry_bytes for n, shard in zip(counts, self._shards.values(), strict=True))

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Positions, -1 where there is no entry."""
        if not self._shards:
            return np.full(len(keys), -1)
        stored = np.concatenate([shard.keys() for shard in self._shards.values()])
        order = np.argsort(stored, kind="stable")
        places = np.minimum(np.searchsorted(stored, keys, sorter=order), len(stored) - 1)
        found = order[places]
        return np.where(stored[found] == keys, found, -1)

    def _encode(self, keys: np.ndarray, mine: np.ndarray, encode: Encode, description: str, kinds) -> None:
        kinds = np.zeros(len(keys), np.int8) if kinds is None else kinds
        silent = not (len(mine) and PartialState().is_local_main_process)
        with tqdm(total=len(mine), desc=description, unit="entry", disable=silent) as bar:
            for kind in np.unique(kinds[mine]):
                waiting, since = [], time.monotonic()
                of_kind = mine[kinds[mine] == kind]
                for start in range(0, len(of_kind), ENCODE_BATCH):
                    batch = of_kind[start : start + ENCODE_BATCH]
                    waiting.append((keys[batch], encode(batch.tolist())))
                    bar.update(len(batch))
                    size = len(waiting) * sum(tensor.nbytes for tensor in waiting[0][1].values())
                    full = size >= SHARD_BYTES or time.monotonic() - since > SHARD_SECONDS
                    if full or start + ENCODE_BATCH >= len(of_kind):
                        self._write(waiting)
                        waiting, since = [], time.monotonic()

    def _write(self, pieces: list[tuple[np.ndarray, dict[str, torch.Tensor]]]) -> None:
        tensors = {name: torch.cat([piece[name] for _, piece in pieces]).contiguous() for name in pieces[0][1]}
        keys = np.concatenate([keys for keys, _ in pieces])
        tensors["keys"] = torch.from_numpy(np.frombuffer(keys.tobytes(), np.uint8).reshape(-1, KEY_BYTES).copy())
        shard = save(tensors, metadata={"format": _FORMAT})
        name = f"{hashlib.sha256(shard).hexdigest()}.safetensors"
        with _writing(self._folder):
            write_whole(self._folder / name, shard, aside=self._folder / f".{uuid.uuid4().hex}")

    def _remove_damaged(self) -> None:
        """The processes of a machine share the work, which reads every byte."""
        state, processes = PartialState(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        mine = sorted(self._folder.glob("*.safetensors"))[state.local_process_index :: processes]
        for path in tqdm(
            mine, desc="verifying the cache", unit="shard", delay=2, disable=not state.is_local_main_process
        ):
            try:
                whole = file_sha256(path) == path.stem
            except FileNotFoundError:  # another run found it damaged
                continue
            if not whole:
                logger.warning("%s is damaged: what it held is encoded again", path)
                with _writing(self._folder):
                    path.unlink(missing_ok=True)
        for left in self._folder.glob(".*"):  # what a killed run was writing
            with suppress(FileNotFoundError):  # another run has just finished it
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()

    def _map_new_shards(self) -> None:
        for path in sorted(self._folder.glob("*.safetensors")):
            if path.name not in self._shards:
                self._shards[path.name] = _Shard(path)
        self._starts = np.cumsum([0, *(shard.count for shard in self._shards.values())])[:-1]


def _first_of_each(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Of these places among `keys` the first of each different key, in order."""
    _, first = np.unique(keys[places], return_index=True)
    return places[np.sort(first)]


class _Shard:
    """A safetensors file as a memory map that keeps no page of it in the process's own memory.

    The map outlives the file's name, so a folder that is removed does not end the runs that read it.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        advise(self._map, "RANDOM")  # else each entry would bring in its neighbours, too
        # https://huggingface.co/docs/safetensors: 8 bytes of the header's length, the header as JSON, the numbers
        start = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8:start])
        self._tensors = {
            name: (_NUMPY[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        self.count = self._tensors["keys"][1][0]
        self.entry_bytes = (len(self._map) - start) // self.count

    def keys(self) -> np.ndarray:
        """All of them, (n,)."""
        return self._copy("keys", np.arange(self.count)).view(f"S{KEY_BYTES}").ravel()

    def rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of these rows of all tensors but the keys."""
        return {name: self._copy(name, rows) for name in self._tensors if name != "keys"}

    def _copy(self, name: str, rows: np.ndarray) -> np.ndarray:
        dtype, shape, offset = self._tensors[name]
        whole = np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)
        row_bytes = whole.nbytes // len(whole)
        runs = [(0, len(whole))] if len(rows) == len(whole) else [(row, 1) for row in rows.tolist()]
        for row, count in runs:  # asked for together, so that the disk need not be waited for page by page
            start = offset + row * row_bytes
            page = start - start % mmap.PAGESIZE
            advise(self._map, "WILLNEED", page, start + count * row_bytes - page)
        copy = whole[rows]
        advise(self._map, "DONTNEED")  # the pages stay in the system's cache, not in this process's memory
        return copy


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunStopped(
            f"cache_dir: {str(folder)!r} cannot be written ({error.strerror}); what it holds already is kept"
        ) from error
