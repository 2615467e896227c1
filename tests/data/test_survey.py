"""Pictures are looked at once, and again when they change; what is remembered never stands for another file."""

import json
import os
import sqlite3
import time
from pathlib import Path

import pytest
from PIL import Image

from latentdiff.config.train import TrainConfig
from latentdiff.data import survey as module
from latentdiff.data.folder import Folder
from latentdiff.data.pictures import open_source
from latentdiff.data.survey import survey
from latentdiff.utils.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    """Three pictures, old enough to be remembered."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for shade, name in enumerate("abc"):
        Image.new("RGB", (8 + shade, 6), (shade, 0, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    (tmp_path / "run").mkdir()
    return folder


@pytest.fixture
def opened(monkeypatch):
    """The pictures that were opened."""
    names = []
    real = module._look
    monkeypatch.setattr(module, "_look", lambda source, row: (names.append(row.name), real(source, row))[1])
    return names


def look(folder: Path, **settings) -> list[dict]:
    config = TrainConfig(train_data_dir=str(folder), output_dir=str(folder.parent / "run"), **settings)
    survey(config, open_source(config), folder.parent / "cache" / "seen.sqlite")
    return [json.loads(line) for line in (folder.parent / "run" / "pictures.jsonl").read_text().splitlines()]


def test_the_list(folder, later):
    """A run could not be told apart from one on other pictures: the hash is that of the file, not of pixels."""
    import hashlib

    first, second, _ = look(folder)
    assert first == {
        "name": "a.png",
        "captions": ["picture a"],
        "sha256": hashlib.sha256((folder / "a.png").read_bytes()).hexdigest(),
        "size": [8, 6],
        "held_out": False,
        "place": "a.png",
    }
    assert second["size"] == [9, 6]


def test_unchanged_pictures_are_opened_once(folder, opened, later):
    """A start on a million pictures would read all of them again."""
    first = look(folder)
    assert sorted(opened) == ["a.png", "b.png", "c.png"]
    opened.clear()
    (folder / "a.txt").write_text("other words")
    again = look(folder)
    assert not opened and again[0].pop("captions") == ["other words"] and again[1:] == first[1:]


def test_a_changed_picture_is_opened_again(folder, opened, later):
    """Latents of the picture that was there before would be trained on, even where size and time were kept."""
    before = look(folder)
    opened.clear()
    times, size = os.stat(folder / "b.png"), (folder / "b.png").stat().st_size
    Image.new("RGB", (9, 6), (3, 0, 0)).save(folder / "b.png")
    os.utime(folder / "b.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (folder / "b.png").stat().st_size == size and (folder / "b.png").stat().st_mtime_ns == times.st_mtime_ns
    after = look(folder)
    assert opened == ["b.png"] and before[1]["sha256"] != after[1]["sha256"] and before[0] == after[0]


def test_a_file_written_this_moment_is_not_remembered(folder, opened):
    """It could be written once more before the clock moves on, and nobody would see it."""
    look(folder)
    opened.clear()
    look(folder)
    assert len(opened) == 3


def test_what_could_not_be_read_is_looked_at_again(folder, opened, later):
    """A disk that was away for a moment would cost these pictures for ever."""
    (folder / "b.png").rename(folder / "kept")
    (folder / "b.png").mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}))
    real, module_open = Folder.open, []

    def fails(self, place):
        module_open.append(place)
        raise OSError(5, "Input/output error")

    Folder.open = fails
    try:
        with pytest.raises(ConfigError, match="Input/output error"):
            look(folder)
    finally:
        Folder.open = real
    assert [line["name"] for line in look(folder)] == ["a.png", "c.png"]


@pytest.mark.parametrize("damage", ["no database", "a folder", "read-only"])
def test_without_a_memory_everything_is_looked_at(folder, opened, later, damage):
    """A broken file that only saves time would end the run."""
    memory = folder.parent / "cache" / "seen.sqlite"
    memory.parent.mkdir()
    if damage == "no database":
        memory.write_bytes(b"this is no database" * 100)
    elif damage == "a folder":
        memory.mkdir()
    else:
        sqlite3.connect(memory).execute("CREATE TABLE looks_in_srgb (other INT)").connection.commit()
    assert len(look(folder)) == 3 == len(look(folder)) and len(opened) == 6


def test_two_runs_at_the_same_time(folder, later):
    """One would end with "database is locked"."""
    look(folder)
    with sqlite3.connect(folder.parent / "cache" / "seen.sqlite") as other:
        other.execute("BEGIN IMMEDIATE")
        assert len(look(folder)) == 3
        other.rollback()


def test_a_memory_that_stays_locked_is_given_up_once(folder, opened, later, monkeypatch, caplog):
    """Each thousand pictures would wait a minute for it, and then another: hours before a run starts."""
    memory = folder.parent / "cache" / "seen.sqlite"
    memory.parent.mkdir()
    monkeypatch.setattr(module, "_WAIT", 0.2)
    monkeypatch.setattr(module, "_CHUNK", 1)
    real, waits = sqlite3.connect, []

    class Counted(sqlite3.Connection):
        def execute(self, *arguments):
            waits.append(arguments)
            return super().execute(*arguments)

    other = real(memory)
    for lock in ("EXCLUSIVE", "IMMEDIATE"):
        other.execute("CREATE TABLE IF NOT EXISTS other (x INT)")
        other.execute(f"BEGIN {lock}")
        caplog.clear()
        monkeypatch.setattr(sqlite3, "connect", lambda *a, **options: real(*a, factory=Counted, **options))
        started = time.perf_counter()
        assert len(look(folder)) == 3
        other.rollback()
        (record,) = caplog.records
        assert "seen.sqlite" in record.getMessage() and "database is locked" in record.getMessage()
        assert time.perf_counter() - started < 10 and len(waits) == 1
        waits.clear()
    other.close()
    caplog.clear()
    assert len(look(folder)) == 3 and not caplog.records


@pytest.mark.parametrize("how_many", [1, 7])
def test_broken_profiles_are_said_and_not_by_the_thousand(folder, caplog, how_many):
    """A camera that writes them would fill the screen."""
    for number in range(how_many):
        Image.new("RGB", (8, 8)).save(folder / f"odd{number}.png", icc_profile=b"broken")
        (folder / f"odd{number}.txt").write_text("odd")
    look(folder)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == min(how_many, 6) and "odd0.png: its colour profile is ignored" in said[0]
    assert how_many < 6 or said[-1] == "2 more pictures have such a profile"


def test_captions_without_a_picture_stop_nothing_and_are_named(folder, caplog):
    """A note among twenty pictures would stop the run, or a caption whose picture was lost be lost in silence."""
    (folder / "lost.txt").write_text("a lost cat")
    (folder / "README.txt").write_text("about")
    assert len(look(folder, max_train_samples=3)) == 3 == len(look(folder))
    (line,) = (folder.parent / "run" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {"file": "lost.txt", "reason": "there is no picture beside this caption"}
    assert "0 of 3 pictures are left out, and 1 other file; the first is lost.txt" in caplog.text
    assert module.left_out(folder.parent / "run") == [module.Rejected(**json.loads(line))]


def test_a_survey_that_fails_leaves_the_earlier_list(folder, later):
    """A run that goes on meanwhile reads its list."""
    before = look(folder)
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="1 of 3"):
        look(folder)
    kept = (folder.parent / "run" / "pictures.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == before
    assert sorted(path.name for path in (folder.parent / "run").iterdir()) == ["pictures.jsonl", "rejected.jsonl"]


def test_a_name_that_is_no_text(folder, later):
    """Linux allows any bytes in a name: the run would end with a UnicodeEncodeError."""
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "a.png").rename(folder / name)
    (folder / "a.txt").rename(folder / os.fsdecode(b"caf\xe9.txt"))
    lines = look(folder)
    assert {line["name"] for line in lines} == {name, "b.png", "c.png"}
    assert lines == look(folder)


def test_what_is_said_of_a_strangers_file_is_a_line(folder, caplog):
    """An escape sequence in a file's name would reach the terminal, in the warning and in the refusal."""
    (folder / "d\x1b[2Je\n.png").write_text("no picture")
    with caplog.at_level("WARNING"):
        look(folder, max_rejected_fraction=0.5)
    assert "d?[2Je?.png" in caplog.text and "\x1b" not in caplog.text
    with pytest.raises(ConfigError, match=r"d\?\[2Je\?\.png") as mistake:
        look(folder, max_rejected_fraction=0.0)
    assert str(mistake.value).isprintable()
