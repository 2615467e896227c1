"""What lies in people's folders: all that is data is found, what is not is left, and what cannot be used is named."""

import json
import logging
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from latentdiff.config.train import TrainConfig
from latentdiff.data.folder import Folder
from latentdiff.data.pictures import open_source
from latentdiff.data.walk import walk
from latentdiff.utils.errors import ConfigError
from latentdiff.utils.images import open_upright


def captioned(folder, *names: str):
    """Pictures with a caption beside each, which is its name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")
        path.with_suffix(".txt").write_text(name)
    return folder


def rows(folder) -> dict[str, tuple[list[str], str | None]]:
    return {row.name: (row.captions, row.problem) for row in Folder(folder, "text").rows()}


def usable(folder) -> list[str]:
    return [name for name, (captions, problem) in rows(folder).items() if captions and not problem]


# ---- what is data ---------------------------------------------------------------------------------------------------


def test_links_to_folders(tmp_path):
    """Who gathers a data set by links would train on a part of it, or wait for ever at one that leads back."""
    data = captioned(tmp_path / "data", "own/a.png")
    captioned(tmp_path / "elsewhere", "b.png", "in/c.png")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "back").symlink_to(data)
    (data / "own" / "up").symlink_to("..")
    (data / "self").symlink_to("self")
    (data / "again").symlink_to(data / "own")  # under its own name only: no picture counts twice
    (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (data / "gone.txt").write_text("gone")
    assert usable(data) == ["linked/b.png", "linked/in/c.png", "own/a.png"]
    assert "a link that leads nowhere" in rows(data)["gone.png"][1] and len(rows(data)) == 4


def test_two_links_in_each_of_many_folders(tmp_path):
    """There are 2 ** 40 ways to the last one, and an enemy's folder would be walked along each."""
    for number in range(40):
        (tmp_path / f"{number}").mkdir()
        for name in "ab":
            (tmp_path / f"{number}" / name).symlink_to(tmp_path / f"{number + 1}")
    captioned(tmp_path, "40/last.png")
    assert usable(tmp_path) == ["40/last.png"]


CLUTTER = [
    ".ipynb_checkpoints/0-checkpoint.png", "._0.png", "in/._0.png", "__MACOSX/0.png", "@eaDir/0.png", ".hidden.png",
    ".git/0.png", ".Trash-0/0.png", "$RECYCLE.BIN/0.png", "in/.thumbnails/0.png",
]  # fmt: skip


@pytest.mark.parametrize("name", CLUTTER)
def test_what_systems_and_programs_leave_is_no_data(tmp_path, name):
    """An old state of a picture would be trained, a thumbnail, or macOS's note about one stop the run."""
    captioned(tmp_path, "0.png", name)
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert rows(tmp_path) == {"0.png": (["0.png"], None)}


def test_metadata_may_name_what_is_hidden(tmp_path):
    captioned(tmp_path / ".data", "a.png", ".b/c.png")
    (tmp_path / ".data" / "metadata.jsonl").write_text('{"file_name": ".b/c.png", "text": "listed"}')
    assert rows(tmp_path / ".data") == {".b/c.png": (["listed"], None), "a.png": (["a.png"], None)}


@pytest.mark.parametrize("mark", ["train_config.yaml", "log.jsonl", "model_index.json"])
def test_what_a_run_drew_is_no_data(tmp_path, mark, caplog):
    """Validation pictures would be trained on at the next start."""
    captioned(tmp_path, "0.png", "runs/mine/validation/1.png", "runs/2.png")
    (tmp_path / "runs" / "mine" / mark).touch()
    (tmp_path / "runs" / "mine" / "validation" / "metadata.csv").write_text("file_name,text\n1.png,x\n")
    (tmp_path / mark).touch()  # the folder that was asked for is one in any case
    with caplog.at_level(logging.WARNING):
        assert rows(tmp_path) == {"0.png": (["0.png"], None), "runs/2.png": (["runs/2.png"], None)}
    (record,) = caplog.records
    assert f"runs/mine: a run or a model lies there ({mark})" in record.getMessage()


def test_folders_as_deep_as_names_can_be(tmp_path):
    """It would end in a traceback: Python's own walk calls itself for each folder."""
    deep = captioned(tmp_path / "deep", "a.png")
    names = ["f"] * 1100 + ["n" * 250] * 8  # beyond the longest path that the system takes
    here = os.open(deep, os.O_RDONLY)
    try:
        for name in names:
            os.mkdir(name, dir_fd=here)
            above, here = here, os.open(name, os.O_RDONLY, dir_fd=here)
            os.close(above)
        bottom = "f/" * 1100 + "b"
        shutil.copy(deep / "a.png", deep / f"{bottom}.png")
        (deep / f"{bottom}.txt").write_text("b")
        found = [(row.captions, row.problem) for row in Folder(deep, "text").rows()]
        assert found[:2] == [(["a.png"], None), (["b"], None)]
        assert found[2:] == [([], "the folder cannot be read (File name too long)")]
    finally:
        os.close(here)
        subprocess.run(["rm", "-rf", deep], check=True)  # shutil.rmtree calls itself, too


def test_the_order_is_one(tmp_path):
    """`max_train_samples` would take other pictures on another disk."""
    captioned(tmp_path, "b.png", "a/z.png", "a.png", "c/d/e.png", "C.png", "a-b.png")
    assert usable(tmp_path) == ["C.png", "a-b.png", "a.png", "a/z.png", "b.png", "c/d/e.png"]
    assert [entry.name for entry in walk(tmp_path)] == [entry.name for entry in walk(tmp_path)]


# ---- what cannot be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jxl", ".svg", ".psd", ".CR2", ".eps", ".dng"])
@pytest.mark.parametrize("named_by", ["caption", "metadata"])
def test_a_kind_that_is_not_read_is_named(tmp_path, suffix, named_by):
    """Half a folder would vanish without a word."""
    captioned(tmp_path, "0.png")
    (tmp_path / f"photo{suffix}").write_bytes(b"x")
    if named_by == "caption":
        (tmp_path / "photo.txt").write_text("a photo")
    else:
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": f"photo{suffix}", "text": "a photo"}))
    found = rows(tmp_path)
    assert found.pop("0.png") == (["0.png"], None)
    assert found == {f"photo{suffix}": ([], f"{suffix.lower()} is no kind of picture that is read here; save it as PNG,"
                                            " JPEG or WebP")}  # fmt: skip


def test_heic(tmp_path):
    """The pictures of most telephones would be lost, or lie on their side."""
    shades = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF 2.3: to be turned clockwise
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(shades)).save(tmp_path / "a.heic", quality=-1, exif=exif.tobytes())
    (tmp_path / "a.txt").write_text("a cat")
    assert rows(tmp_path) == {"a.heic": (["a cat"], None)}
    shown = np.asarray(open_upright(tmp_path / "a.heic"), dtype=int)
    assert shown.shape == (48, 32, 3) and np.abs(shown - np.rot90(shades, -1)).max() <= 3


def test_heic_without_its_library_says_what_to_install(tmp_path):
    """Nobody would guess which of the libraries for it is asked for."""
    (tmp_path / "a.HEIC").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a cat")
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from pathlib import Path; from latentdiff.data.folder import Folder\n"
        "try: list(Folder(Path(sys.argv[1]), 'text').rows())\n"
        "except Exception as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
    assert "a.HEIC: .heic is read where pillow-heif is installed (pip install 'latentdiff[heic]')" in said


def test_what_a_picture_was_made_of_is_no_loss(tmp_path):
    """Who keeps the layers beside each picture would be told that half of the data cannot be used."""
    captioned(tmp_path, "0.png")
    for name in ("0.psd", "sketch.svg", "0.json"):
        (tmp_path / name).write_bytes(b"x")
    assert rows(tmp_path) == {"0.png": (["0.png"], None)}


def test_only_kinds_that_are_not_read(tmp_path):
    """It would say that no data files were found."""
    (tmp_path / "a.jxl").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(ConfigError, match=r"train_data_dir: no captions in .*: a\.jxl: \.jxl is no kind of picture"):
        list(open_source(TrainConfig(train_data_dir=str(tmp_path))).rows())


# ---- names and metadata ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_disk", "said"),
    [
        ("img/1.png", "img\\1.png"),
        ("img/1.png", ".\\img\\1.png"),
        ("img/1.PNG", "img/1.png"),
        ("img/1.png", "img\\1.PNG"),
        (unicodedata.normalize("NFD", "é/Käse.png"), unicodedata.normalize("NFC", "é/Käse.png")),
        (unicodedata.normalize("NFC", "é/Käse.png"), unicodedata.normalize("NFD", "é/Käse.png")),
        (unicodedata.normalize("NFD", "é/が.JPG"), unicodedata.normalize("NFC", "é\\が.jpg")),
        ("a\\b.png", "a\\b.png"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_as_other_systems_write_them(tmp_path, on_disk, said, kind):
    """A table made on Windows or a Mac would name no picture at all."""
    captioned(tmp_path, on_disk)
    texts = {"csv": f"file_name,text\n{said},listed\n", "jsonl": json.dumps({"file_name": said, "text": "listed"})}
    (tmp_path / f"metadata.{kind}").write_text(texts[kind], encoding="utf-8-sig")
    assert rows(tmp_path) == {on_disk: (["listed"], None)}


def test_a_name_that_means_two_files(tmp_path):
    """One of them would get the caption of the other."""
    nfc, nfd = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    captioned(tmp_path, "a.PNG", "a.Png", nfc, nfd)
    lines = [{"file_name": name, "text": f"listed {name}"} for name in ("a.png", nfc, nfd)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = rows(tmp_path)
    assert found[nfc] == ([f"listed {nfc}"], None) and found[nfd] == ([f"listed {nfd}"], None)
    assert found["metadata.jsonl, line 1: a.png"][1] == "there is no such file, but 'a.PNG', 'a.Png'"


@pytest.mark.parametrize("name", ["..\\secret.png", "in\\..\\..\\secret.png", "\\secret.png"])
def test_backslashes_lead_no_further_than_slashes(tmp_path, name):
    captioned(tmp_path, "secret.png", "data/a.png", "data/in/b.png")
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    (problem,) = [problem for _, problem in rows(tmp_path / "data").values() if problem]
    assert problem == "it leads out of the data folder"


def test_captions_beside_by_other_spellings(tmp_path):
    """On another system's disk every picture would have lost its caption."""
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    for picture, caption in (("A.JPG", "A.TXT"), (f"{nfc}.png", f"{nfd}.txt"), (f"x{nfd}.png", f"x{nfc}.Txt")):
        Image.new("RGB", (8, 8)).save(tmp_path / picture, "PNG")
        (tmp_path / caption).write_text(picture)
    assert rows(tmp_path) == {name: ([name], None) for name in ("A.JPG", f"{nfc}.png", f"x{nfd}.png")}
    (tmp_path / "A.txt").write_text("the usual one")
    assert rows(tmp_path)["A.JPG"] == (["the usual one"], None)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.csv", "image,text\n0.png,a cat\n", "line 2: it has no file_name, but 'image', 'text'"),
        ("METADATA.CSV", "image,text\n0.png,a cat\n", "line 2: it has no file_name, but 'image', 'text'"),
        ("metadata.jsonl", '{"image": "0.png", "text": "x"}', "line 1: it has no file_name, but 'image', 'text'"),
        ("metadata.csv", "file_name|text\n0.png|a cat\n", r"no 'text' in the metadata of .* it has 'file_name\|text'"),
        ("metadata.csv", "0.png,a cat\n", "line 1: no line follows this first one, which names the columns"),
        ("metadata.csv", "", "line 1: no line follows this first one, which names the columns"),
        ("0.txt", " \n", "0.png: 0.txt is empty"),
        ("metadata.csv", "file_name,text\nimages/0.png,a\n", "line 2: images/0.png: there is no such file"),
        ("metadata.csv", "file_name,text\n0.png,\n", "no captions"),
        ("metadata.csv", "ä,b\n".encode("cp1252") * 2, "line 1: it is not text in UTF-8"),
    ],
    ids=str,
)
def test_no_captions_says_why(tmp_path, name, content, reason):
    """The message would send people to write metadata that is already there."""
    captioned(tmp_path, "0.png")
    (tmp_path / "0.txt").unlink()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=reason) as refused:
        rows(tmp_path)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        "file_name;text\n0.png;a cat\n",
        "file_name\ttext\n0.png\ta cat\n",
        "\n\r\nfile_name,text\n0.png,a cat\n",
        " file_name , text\n 0.png ,a cat\n",
        "file_name,text\nFOLDER/0.png,a cat\n",
    ],
)
def test_metadata_that_spreadsheets_and_people_write(tmp_path, content):
    """A spreadsheet that speaks German writes semicolons; no picture had a caption."""
    captioned(tmp_path, "0.png")
    (tmp_path / "0.txt").unlink()
    (tmp_path / "metadata.csv").write_text(content.replace("FOLDER", str(tmp_path)))
    assert rows(tmp_path) == {"0.png": (["a cat"], None)}


def test_metadata_in_parquet(tmp_path):
    """It was left unread without a word."""
    captioned(tmp_path, "0.png", "1.png")
    (tmp_path / "0.txt").unlink()
    table = {"file_name": ["0.png", "2.png"], "text": [["a cat", "a pet"], ["none"]]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "metadata.parquet")
    found = rows(tmp_path)
    assert found["0.png"] == (["a cat", "a pet"], None) and found["1.png"] == (["1.png"], None)
    assert found["metadata.parquet, row 1: 2.png"][1] == "there is no such file"
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ConfigError, match=r"metadata\.parquet' cannot be read"):
        rows(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_captions_that_are_no_files(tmp_path, make):
    """ "Its caption is missing" sends people to look for one that is there."""
    captioned(tmp_path, "0.png", "1.png")
    (tmp_path / "1.txt").unlink()
    make(tmp_path / "1.txt")
    assert rows(tmp_path)["1.png"][1].startswith("its .txt is no file")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_tars_that_are_no_files(tmp_path, make):
    """The run would read a device for ever, or say that the folder is empty."""
    make(tmp_path / "0.tar")
    with pytest.raises(ConfigError, match=r"train_data_dir: .*0\.tar' is no file"):
        open_source(TrainConfig(train_data_dir=str(tmp_path)))


def unreadable(path):
    path.write_text("file_name,text\n")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, unreadable, lambda path: path.symlink_to(path)])
def test_metadata_that_is_no_file(tmp_path, make):
    """The run would wait for ever at a pipe, or end in a traceback."""
    captioned(tmp_path, "0.png")
    make(tmp_path / "metadata.csv")
    with pytest.raises(ConfigError, match=r"train_data_dir: '.*metadata\.csv' cannot be read"):
        rows(tmp_path)


def test_pipes_among_pictures(tmp_path):
    """The run would wait for ever at the first one."""
    captioned(tmp_path, "0.png", "1.png", "2.png")
    for name in ("1.png", "2.txt"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    found = rows(tmp_path)
    assert found["0.png"] == (["0.png"], None) and found["2.png"][0] == []
    assert found["1.png"][1].startswith("it is no file (a pipe")


def test_an_empty_folder(tmp_path):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(ConfigError, match="no captions"):
        rows(tmp_path)
