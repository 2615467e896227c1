"""Entries come back to the last bit; damage is found; processes, runs and killed runs never harm each other."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentdiff.data import entry_store
from latentdiff.data.entry_store import EntryStore, as_keys, key_of
from latentdiff.utils.errors import RunStopped


def keys(numbers) -> np.ndarray:
    return as_keys(key_of(str(number)) for number in numbers)


def value(number: int, width: int = 3) -> torch.Tensor:
    return torch.arange(2 * width, dtype=torch.float32).view(2, width) + number / 7


class Encoder:
    """Encodes number n as `value(n)` and keeps what it was asked for."""

    def __init__(self, numbers, width: int = 3):
        self.numbers, self.width, self.asked = list(numbers), width, []

    def __call__(self, places):
        numbers = [self.numbers[place] for place in places]
        self.asked += numbers
        entries = torch.stack([value(number, self.width) for number in numbers])
        return {"mean": entries, "std": -entries}


def fill(folder: Path, numbers, **options) -> tuple[EntryStore, np.ndarray, list[int]]:
    store, encoder = EntryStore(folder), Encoder(numbers)
    positions = store.fill(keys(numbers), encoder, "encoding", **options)
    return store, positions, encoder.asked


def check(store: EntryStore, positions: np.ndarray, numbers) -> None:
    read = store.read(positions)
    wanted = torch.stack([value(number) for number in numbers])
    assert torch.equal(read["mean"], wanted) and torch.equal(read["std"], -wanted) and read["mean"].is_contiguous()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def small_shards(monkeypatch):
    """A shard for every batch of 16."""
    monkeypatch.setattr(entry_store, "SHARD_BYTES", 1)


def test_keys_tell_lists_of_parts_apart():
    """Two things would share an entry."""
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), (b"a", "b\0c"), ("a\0", "bc")]
    assert len({key_of(*each) for each in parts}) == len(parts)
    assert key_of("ä") == key_of("ä".encode()) and len(key_of("\udcff")) == 16


def test_entries_come_back_in_any_order(tmp_path, small_shards):
    """A row past the first shard would be read from the wrong place."""
    store, positions, asked = fill(tmp_path, range(50))
    assert sorted(asked) == list(range(50)) and len(shards(tmp_path)) == 4 and positions.dtype == np.int32
    check(store, positions, range(50))
    order = [49, 0, 17, 17, 16, 15, 33, 0]
    check(store, positions[order], order)
    for path in shards(tmp_path):
        assert set(load_file(path)) == {"keys", "mean", "std"}  # plain safetensors, for anybody


def test_keys_that_end_in_zeros(tmp_path):
    """numpy takes zeros at the end of a string for padding."""
    store, encoder = EntryStore(tmp_path), Encoder(range(3))
    awkward = as_keys([b"\1" + bytes(15), b"\1\1" + bytes(14), bytes(16)])
    positions = store.fill(awkward, encoder, "encoding")
    check(store, positions, range(3))
    again = EntryStore(tmp_path)
    check(again, again.fill(awkward, None, "encoding"), range(3))


def test_only_what_is_missing_is_encoded_and_each_only_once(tmp_path):
    """One new picture would encode the whole set again, or the same caption as often as it is said."""
    assert sorted(fill(tmp_path, [1, 2, 3, 2, 1])[2]) == [1, 2, 3]
    store, positions, asked = fill(tmp_path, [3, 4, 2, 4])
    assert asked == [4]
    check(store, positions, [3, 4, 2, 4])
    assert fill(tmp_path, [4, 1, 2])[2] == [] and len(shards(tmp_path)) == 2


def test_entries_of_several_shapes(tmp_path):
    """Pictures of two sizes cannot stand in one tensor."""
    store = EntryStore(tmp_path)

    def encode(places):
        (width,) = {place % 3 + 1 for place in places}
        return {"mean": torch.stack([value(place, width) for place in places])}

    numbers = range(20)
    positions = store.fill(keys(numbers), encode, "encoding", kinds=np.array([n % 3 for n in numbers]))
    for number in numbers:
        (entry,) = store.read(positions[[number]])["mean"]
        assert torch.equal(entry, value(number, number % 3 + 1))
    # 7 of width 1, 7 of width 2 and 6 of width 3, each of 2 rows of 4 bytes and a key of 16
    assert store.bytes_of(positions) == 7 * (8 + 16) + 7 * (16 + 16) + 6 * (24 + 16)


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty"])
def test_a_damaged_shard_is_found_and_made_anew(tmp_path, small_shards, caplog, damage):
    """Wrong latents would be trained on without a word."""
    fill(tmp_path, range(40))
    damaged = shards(tmp_path)[1]
    lost = load_file(damaged)["mean"]
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes({"a byte": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[damage])
    store, positions, asked = fill(tmp_path, range(40))
    assert len(asked) == len(lost) and str(damaged) in caplog.text
    check(store, positions, range(40))
    assert all(path.stem == __import__("hashlib").sha256(path.read_bytes()).hexdigest() for path in shards(tmp_path))


def test_a_killed_run_has_lost_one_shard_at_most(tmp_path, small_shards):
    """Hours of encoding would be lost with the last minute."""

    class Killed(BaseException):
        pass

    def dies(places):
        if places[0] >= 32:
            raise Killed
        return Encoder(range(50))(places)

    with pytest.raises(Killed):
        EntryStore(tmp_path).fill(keys(range(50)), dies, "encoding")
    assert sorted(fill(tmp_path, range(50))[2]) == list(range(32, 50))


def test_what_a_killed_run_was_writing_is_no_entry(tmp_path):
    """Half a shard would be read; and such files would pile up."""
    fill(tmp_path, range(3))
    left = tmp_path / ".half"
    left.write_bytes(shards(tmp_path)[0].read_bytes()[:50])
    check(*fill(tmp_path, range(3))[:2], range(3))
    assert left.exists()  # it may be another run's, of this minute
    os.utime(left, (1, 1))
    EntryStore(tmp_path)
    assert not left.exists()


@pytest.fixture
def processes(monkeypatch):
    """Calls a function in three threads that take themselves for processes of one run, on one or on three machines."""
    here, counts, barrier = threading.local(), [0] * 3, threading.Barrier(3, timeout=30)

    def gather(mine):
        (counts[here.process],) = mine
        barrier.wait()
        everyone = list(counts)
        barrier.wait()
        return everyone

    def state():
        return SimpleNamespace(
            process_index=here.process, num_processes=3, local_process_index=here.local,
            is_local_main_process=here.local == 0, wait_for_everyone=barrier.wait,
        )  # fmt: skip

    def call(function, one_machine: bool) -> list:
        results = [None] * 3

        def run(process):
            here.process, here.local = process, process if one_machine else 0
            results[process] = function(process)

        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3" if one_machine else "1")
        threads = [threading.Thread(target=run, args=(process,)) for process in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    monkeypatch.setattr(entry_store, "gather_object", gather)
    monkeypatch.setattr(entry_store, "PartialState", state)
    return call


def test_processes_share_the_work(tmp_path, processes):
    """Each of eight processes would encode everything, or some entries would be nobody's."""
    filled = processes(lambda process: fill(tmp_path, range(100)), one_machine=True)
    assert sorted(number for _, _, asked in filled for number in asked) == list(range(100))
    for store, positions, asked in filled:
        assert 10 < len(asked) < 60  # 33 expected, deviation 4.7
        check(store, positions, range(100))


def test_machines_that_do_not_share_a_folder_encode_all_of_it_each(tmp_path, processes):
    """A machine would wait for entries that were written to another's disk."""
    filled = processes(lambda process: fill(tmp_path / str(process), range(60)), one_machine=False)
    for store, positions, asked in filled:
        assert sorted(asked) == list(range(60))
        check(store, positions, range(60))


def test_two_runs_fill_one_store_at_the_same_time(tmp_path, small_shards):
    """They would overwrite or read each other's half-written shards."""
    failures, done = [], []

    def run(numbers):
        try:
            store, positions, _ = fill(tmp_path, numbers)
            check(store, positions, numbers)
            done.append(1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(list(range(k, 200 + k)),)) for k in (0, 50, 100, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(done) == 4


def test_what_another_run_has_just_finished_writing_is_no_fault(tmp_path):
    """A run would end because a file that it saw was given its final name before it looked at it."""
    (tmp_path / ".half-written").symlink_to("moved")  # seen, and not there any more
    store, positions, _ = fill(tmp_path, range(4))
    check(store, positions, range(4))


def test_reading_goes_on_when_the_folder_is_removed(tmp_path):
    """Somebody clears the cache while a run of days reads it."""
    import shutil

    store, positions, _ = fill(tmp_path / "store", range(40))
    shutil.rmtree(tmp_path / "store")
    check(store, positions, range(40))


def test_memory_does_not_hold_what_was_read(tmp_path):
    """The whole cache would end up in every process's memory, one page after the other."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    store = EntryStore(tmp_path)
    count, each = 256, 2**18  # 64 MiB
    entries = lambda places: {"mean": torch.full((len(places), each // 4), 1.0)}  # noqa: E731
    positions = store.fill(keys(range(count)), entries, "encoding")
    store.read(positions[:8])
    before = resident()
    for start in range(0, count, 8):
        store.read(positions[start : start + 8])
    assert resident() - before < 8 * 2**20


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """A full disk would end the run with a traceback, or leave half a shard that looks whole."""
    store, positions, _ = fill(tmp_path / "store", range(5))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunStopped, match=r"store' cannot be written \(No space left on device\); what it holds"):
        fill(tmp_path / "store", range(9))
    assert len(list((tmp_path / "store").iterdir())) == 1
    monkeypatch.undo()
    assert sorted(fill(tmp_path / "store", range(9))[2]) == [5, 6, 7, 8]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunStopped, match="cache_dir: .* cannot be written"):
        EntryStore(tmp_path / "file" / "store")
