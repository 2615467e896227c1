"""Folders and tables of captioned pictures, as people have them and as an enemy would make them."""

import json

import pytest
from PIL import Image

from latentdiff.config.train import TrainConfig
from latentdiff.data.folder import Folder
from latentdiff.data.pictures import open_source
from latentdiff.data.sources import Table
from latentdiff.utils.errors import ConfigError


def pictures(folder, *names: str):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "PNG")
    return folder


def rows(source) -> dict[str, tuple[list[str], str | None]]:
    return {row.name: (row.captions, row.problem) for row in source.rows()}


def test_a_text_file_beside_each_picture(tmp_path):
    """Who comes from another trainer would have to write metadata first. A line is a caption."""
    pictures(tmp_path, "a.png", "b.jpg", "in/c.png")
    (tmp_path / "a.txt").write_text("a cat\n\n a pet \n", encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("собака\r\n", encoding="utf-8")
    assert rows(Folder(tmp_path, "text")) == {
        "a.png": (["a cat", " a pet "], None), "b.jpg": (["собака"], None), "in/c.png": ([], None)
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_captions_in_any_encoding_that_says_its_name(tmp_path, suffix, encoding):
    """What Windows' programs write would be trained as garbage, or as two captions where it has U+2028."""
    pictures(tmp_path, "a.png")
    said = "ein Käse, \u2028猫"
    texts = {"txt": f"{said}\r\n", "csv": f'file_name,text\r\na.png,"{said}"\r\n'}
    texts["jsonl"] = json.dumps({"file_name": "a.png", "text": said}, ensure_ascii=False)
    (tmp_path / ("a.txt" if suffix == "txt" else f"metadata.{suffix}")).write_bytes(texts[suffix].encode(encoding))
    assert rows(Folder(tmp_path, "text")) == {"a.png": ([said], None)}


@pytest.mark.parametrize("encoding", ["cp1252", "shift-jis", "gbk"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_captions_in_an_encoding_that_cannot_be_told_are_refused(tmp_path, suffix, encoding):
    """The picture would be trained under marks of replacement."""
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "b.txt").write_text("fine")
    said = {"cp1252": "café", "shift-jis": "猫が座る", "gbk": "一只狗在跑"}[encoding]
    texts = {"txt": said, "csv": f"text,file_name\n{said},a.png\nfine,b.png"}
    texts["jsonl"] = f'{{"file_name": "a.png", "text": "{said}"}}\n'
    name = "a.txt" if suffix == "txt" else f"metadata.{suffix}"
    (tmp_path / name).write_bytes(texts[suffix].encode(encoding))
    found = rows(Folder(tmp_path, "text"))
    assert found.pop("b.png") == (["fine"], None)
    captions, problem = found.pop("a.png")
    assert not captions and problem.startswith(name) and "it is not text in UTF-8 (at byte" in problem and not found


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_metadata_that_is_no_text_at_all(tmp_path, suffix):
    """It would end in a traceback, or be read as no captions."""
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "b.txt").write_text("fine")
    for content in (b"\xff\xfe\x00\xd8a\0", "file_name,text\na.png,x".encode("utf-16-le")):
        (tmp_path / f"metadata.{suffix}").write_bytes(content)
        problems = [p for name, (_, p) in rows(Folder(tmp_path, "text")).items() if name.startswith("metadata.")]
        assert problems and all("it is not text" in problem for problem in problems)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_metadata_of_both_kinds_in_every_folder(tmp_path, suffix):
    """Names are relative to the metadata beside them; the other column is not the caption."""
    for folder in (tmp_path, tmp_path / "in"):
        pictures(folder, "a.png", "b c.png")
        records = [
            {"file_name": name, "text": f'{folder.name}: {name}, said "so"', "n": "1"} for name in ("a.png", "b c.png")
        ]
        lines = [json.dumps(record) for record in records]
        if suffix == "csv":
            lines = [
                "file_name,text,n",
                *(f'{r["file_name"]},"{r["text"].replace(chr(34), chr(34) * 2)}",1' for r in records),
            ]
        (folder / f"metadata.{suffix}").write_text("\n".join(lines), encoding="utf-8-sig")
    found = rows(Folder(tmp_path, "text"))
    assert found["in/b c.png"] == (['in: b c.png, said "so"'], None)
    assert len(found) == 4 and all(captions and not problem for captions, problem in found.values())


def test_several_captions(tmp_path):
    """A list, and a second line for the same picture: none would be lost."""
    pictures(tmp_path, "a.png")
    lines = [
        {"file_name": "a.png", "text": ["one", "two", "", None, 3, "\ud800 four"]},
        {"file_name": "./a.png", "text": "three"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert rows(Folder(tmp_path, "text")) == {"a.png": (["one", "two", "? four", "three"], None)}


def test_metadata_comes_before_text_files_and_leaves_none_out(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("beside")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "listed"}))
    assert rows(Folder(tmp_path, "text")) == {"a.png": (["listed"], None), "b.png": (["beside"], None)}


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "in/../../secret.png", "a\0.png", "..", "in/.."])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    """A data set from the net would read the files of whoever trains on it."""
    pictures(tmp_path, "secret.png", "data/a.png", "data/in/b.png")
    lines = [{"file_name": "a.png", "text": "fine"}, {"file_name": name, "text": "a secret"}]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = Folder(tmp_path / "data", "text")
    (problem,) = [problem for row, (_, problem) in rows(source).items() if problem]
    assert problem == "it leads out of the data folder"
    usable = [row for row in source.rows() if not row.problem]
    assert len(usable) == 2  # the two pictures, one of them without a caption
    assert all(source.open(row.place).resolve().is_relative_to(tmp_path / "data") for row in usable)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("17", "no JSON object"),
        ('"a text"', "no JSON object"),
        ("{}", "no file_name"),
        ('{"file_name": 5, "text": "x"}', "no file_name"),
        ('{"file_name": "gone.png", "text": "x"}', "no such file"),
        (json.dumps({"file_name": "n" * 5000, "text": "x"}), "no such file"),
    ],
    ids=lambda value: value[:20],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, reason):
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(f'{line}\n{{"file_name": "a.png", "text": "fine"}}\n')
    found = rows(Folder(tmp_path, "text"))
    assert found.pop("a.png") == (["fine"], None)
    ((name, (_, problem)),) = found.items()
    assert reason in problem and ("line 1" in name or "gone.png" in name)


def test_a_bad_csv_line_is_named(tmp_path):
    """The csv module gives up at a field of 131,072 characters."""
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,{'x' * 200_000}\nb.png,fine\n")
    found = rows(Folder(tmp_path, "text"))
    assert found["b.png"] == (["fine"], None) and found["a.png"] == ([], None)
    (problem,) = [problem for name, (_, problem) in found.items() if name.startswith("metadata.csv, line")]
    assert "no CSV" in problem


def test_which_source_it_is(tmp_path):
    """A path given as a data set would be read by other rules than the same folder."""
    import datasets

    pictures(tmp_path / "folder", "a.png")
    (tmp_path / "folder" / "a.txt").write_text("a cat")
    for name in ("train_data_dir", "dataset_name"):
        assert isinstance(open_source(TrainConfig(**{name: str(tmp_path / "folder")})), Folder)
    (tmp_path / "table").mkdir()
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "folder" / "a.png")], "text": [["a cat", ""]]})
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "table" / "data.parquet")
    for name in ("train_data_dir", "dataset_name"):
        source = open_source(TrainConfig(**{name: str(tmp_path / "table")}))
        assert isinstance(source, Table) and [c for c, _ in rows(source).values()] == [["a cat"]]
        assert Image.open(source.open(0)).size == (8, 8)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ConfigError, match="train_data_dir: .* cannot be read"):
        open_source(TrainConfig(train_data_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="train_data_dir: no captions"):
        rows(open_source(TrainConfig(train_data_dir=str(pictures(tmp_path / "p", "a.png")))))


def test_a_table_that_names_files_elsewhere(tmp_path):
    """A data set from the net would read the pictures of whoever trains on it. What a row brings with it is its own."""
    import datasets
    import pyarrow.parquet

    pictures(tmp_path, "secret.png")
    (tmp_path / "set").mkdir()
    images = [
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": str(tmp_path / "set" / ".." / "secret.png")},
        {"bytes": (tmp_path / "secret.png").read_bytes(), "path": "/its/own.png"},
    ]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": images, "text": ["a", "b", "c"]}, features=features)
    pyarrow.parquet.write_table(table.data.table, tmp_path / "set" / "data.parquet")
    found = list(Table(TrainConfig(dataset_name=str(tmp_path / "set"))).rows())
    assert [row.problem for row in found] == ["it leads out of the data folder"] * 2 + [None]


def test_a_table_that_changed_is_told_apart(tmp_path):
    """Pictures of the earlier table would stand under the captions of the new one."""
    import datasets

    stamps = []
    for shade in (1, 2):
        table = datasets.Dataset.from_dict(
            {"image": [Image.new("RGB", (8, 8), (shade, 0, 0))], "text": ["a"]},
            features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
        )
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "set" / "data.parquet")
        config = TrainConfig(dataset_name=str(tmp_path / "set"))
        (row,), (again,) = Table(config).rows(), Table(config).rows()
        assert row.stamp == again.stamp and Image.open(Table(config).open(0)).getpixel((0, 0)) == (shade, 0, 0)
        stamps.append(row.stamp)
    assert stamps[0] != stamps[1]
