"""Tars of captioned pictures, as people have them and as an enemy would make them."""

import io
import json
import os
import random
import shutil
import tarfile
import tracemalloc

import pytest
from PIL import Image

from latentdiff.data.tars import Tars, tar_files
from latentdiff.utils.errors import ConfigError


def picture(number: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(file, kind)
    return file.getvalue()


def info(name: str, size: int = 0, **fields) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = size
    for field, value in fields.items():
        setattr(header, field, value)
    return header


def shard(path, members, **how):
    """A tar of (name or TarInfo, content) in this order."""
    with tarfile.open(path, "w", **how) as tar:
        for name, content in members:
            header = info(name, len(content)) if isinstance(name, str) else name
            tar.addfile(header, io.BytesIO(content))
    return path


def sample(key: str, caption: str = "fine", number: int = 0):
    return [(f"{key}.png", picture(number)), (f"{key}.txt", caption.encode())]


def rows(*paths, column: str = "text") -> dict[str, tuple[list[str], str | None]]:
    return {row.name: (row.captions, row.problem) for row in Tars(paths, column).rows()}


def raw(name: bytes, content: bytes = b"", size: int | None = None, kind: bytes = b"0") -> bytes:
    """A member with a true checksum, whatever it claims."""
    claimed = len(content) if size is None else size
    number = b"%011o\0" % claimed if claimed >= 0 else claimed.to_bytes(12, "big", signed=True)
    header = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + number + b"0" * 11 + b"\0")
    header += b" " * 8 + kind + b"\0" * 100 + b"ustar\x0000" + b"\0" * 247
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + b"\0" * (-len(content) % 512)


END = bytes(1024)
FINE = raw(b"fine.png", picture()) + raw(b"fine.txt", b"fine")


# -------------------------------------------------------------------------------------------------- as people have them


def test_captions_of_each_kind(tmp_path):
    """Who has a shard of another trainer would have to write it anew. A line is a caption; a .json comes first."""
    path = shard(
        tmp_path / "a.tar",
        [
            ("1.jpg", picture(kind="JPEG")), ("1.txt", "\ufeffa cat\r\n\r\n a pet ".encode()),
            ("2.PNG", picture()), ("2.caption", "собака\n狗".encode("utf-16")),
            ("3.json", json.dumps({"text": ["כלב", "", None, "🐕"], "url": "x"}).encode()), ("3.webp", picture()),
            (info(".", type=tarfile.DIRTYPE), b""), (info("in.1", type=tarfile.DIRTYPE), b""),
            ("in.1/4.json", b'{"text": "listed"}'), ("in.1/4.png", picture()), ("in.1/4.txt", b"beside"),
            ("./5.cls", b"7"), ("./5.json", b'{"width": 8}'), ("./5.png", picture()), ("./5.txt", b"beside"),
            ("__about__/6.json", b"no sample"), ("README", b"no sample"),
        ],
    )  # fmt: skip
    assert rows(path) == {
        "a.tar/1.jpg": (["a cat", " a pet "], None),
        "a.tar/2.PNG": (["собака", "狗"], None),
        "a.tar/3.webp": (["כלב", "🐕"], None),
        "a.tar/in.1/4.png": (["listed"], None),
        "a.tar/5.png": (["beside"], None),
    }
    assert rows(path, column="url")["a.tar/3.webp"] == (["x"], None)


def test_any_picture_at_any_time(tmp_path, later):
    """Training draws pictures in any order, after a resume in another process: a place survives JSON."""
    paths = [
        shard(tmp_path / f"{s}.tar", [m for i in range(5) for m in sample(f"{i}", number=5 * s + i)]) for s in range(3)
    ]
    found = list(Tars(paths, "text").rows())
    assert [row.name for row in found] == [f"{s}.tar/{i}.png" for s in range(3) for i in range(5)]
    assert len({row.stamp for row in found}) == 15
    places = json.loads(json.dumps([row.place for row in found]))
    again = Tars(paths, "text")
    for number in (11, 0, 14, 7, 7):
        assert again.open(places[number]).getvalue() == picture(number)


def by_datasets(path):
    import datasets

    found = datasets.load_dataset("webdataset", data_files={"train": [str(path)]}, split="train", streaming=True)
    return [(s["__key__"], s["txt"]) for s in found]


def by_webdataset(path):
    wds = pytest.importorskip("webdataset")
    return [(s["__key__"], s["txt"].decode()) for s in wds.WebDataset(str(path), shardshuffle=False)]


@pytest.mark.parametrize("peer", [by_datasets, by_webdataset])
def test_samples_are_those_of_other_readers(tmp_path, peer):
    """A shard would be other samples here than where it was made."""
    members = []
    for number, key in enumerate(["000", "001", "in/001", "in.v1/00-2", "in.v1/003", "in.v1/003_a"]):
        members += [(f"{key}.{extension}", picture()) for extension in ("seg.png", "PNG", "bin")]
        members += [("README", b"no sample"), (f"{key}.txt", b"%d" % number)]
    path = shard(tmp_path / "a.tar", members)
    ours = [
        (row.name.removeprefix("a.tar/").removesuffix(".PNG"), *row.captions) for row in Tars([path], "text").rows()
    ]
    assert ours == peer(path) and len(ours) == 6


def test_what_macos_adds_is_no_sample(tmp_path):
    """Each `._` twin would come between a picture and its caption, and every sample would be lost."""
    path = shard(
        tmp_path / "a.tar",
        [
            (f"{folder}{name}", content)
            for name, content in sample("1")
            for folder in ("in/._", "in/", "__MACOSX/in/._")
        ],
    )
    assert rows(path) == {"a.tar/in/1.png": (["fine"], None)}


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/0", "in/.hidden/0", "in/__MACOSX/0", "@eaDir/0", "./.git/0", "in/@eaDir/1"]
)
def test_what_systems_and_programs_leave_is_no_sample(tmp_path, name):
    """An old state of a picture would be trained."""
    path = shard(tmp_path / "a.tar", [*sample("./in/1"), *sample(name, "old"), *sample("2")])
    assert list(rows(path)) == ["a.tar/in/1.png", "a.tar/2.png"]
    shutil.copy(path, tmp_path / "._a.tar")
    assert tar_files(tmp_path) == [path]


@pytest.mark.parametrize("how", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_any_script(tmp_path, how):
    name = "папка/" + "長" * 300
    assert rows(shard(tmp_path / "a.tar", sample(name), format=how)) == {f"a.tar/{name}.png": (["fine"], None)}


def test_a_name_that_is_no_text(tmp_path):
    """It could be neither hashed nor printed, and the run would end there."""
    path = tmp_path / "a.tar"
    path.write_bytes(raw(b"\xff\xfe.png", picture()) + raw(b"\xff\xfe.txt", b"fine") + END)
    ((name, found),) = rows(path).items()
    assert name == r"a.tar/\xff\xfe.png" and found == (["fine"], None)


def test_which_files_are_tars(tmp_path):
    for name in ("b.tar", "a.tar", "a.tar.idx", "c.tar.gz", "d.tgz", "e.png"):
        (tmp_path / name).touch()
    (tmp_path / "f.tar").mkdir()
    assert [path.name for path in tar_files(tmp_path)] == ["a.tar", "b.tar", "c.tar.gz", "d.tgz"]


# ---------------------------------------------------------------------------------------------- samples with a problem


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jxl": b"x", "txt": b"x"}, ".jxl is no kind of picture that is read here"),
        ({"txt": b"x"}, "no picture; the members of a sample stand together"),
        ({"v2.png": picture(), "txt": b"x"}, "no picture"),
        ({"picture": picture(), "txt": b"x"}, "no picture"),
        ({"png": picture()}, "caption is missing; the members of a sample stand together"),
        ({"png": picture(), "txt": b" \n \n"}, "caption is missing"),
        ({"png": picture(), "json": b'{"caption": "x", "url": 7}'}, "no 'text' (caption_column), but 'caption', 'u"),
        ({"png": picture(), "json": b'{"text": 7}'}, "caption is missing"),
        ({"png": picture(), "jpg": picture(), "txt": b"x"}, "two of a kind"),
        ({"png": picture(), "PNG": picture(), "txt": b"x"}, "two of a kind"),
        ({"png": picture(), "txt": b"x", "TXT": b"x"}, "two of a kind"),
        ({"png": picture(), "txt": b"x", "json": b"{not json"}, ".json cannot be read"),
        ({"png": picture(), "json": b'{"text": "caf\xe9"}'}, ".json cannot be read (it is not text in UTF-8 (at byte"),
        ({"png": picture(), "txt": "ein Käse".encode("cp1252")}, ".txt cannot be read (it is not text in UTF-8"),
        ({"png": picture(), "txt": b"x", "json": b"[" * 100_000}, ".json cannot be read"),
        ({"png": picture(), "txt": b"x", "json": b'{"text": ' + b"9" * 10_000 + b"}"}, ".json cannot be read"),
        ({"png": picture(), "txt": b"x", "json": b'["a cat"]'}, "no JSON object"),
        ({"png": picture(), "txt": b"x" * (2**20 + 1)}, "1.txt has 1048577 bytes, more than 1048576"),
        ({"png": picture(), "json": b" " * (2**20 + 1)}, "1.json has 1048577 bytes, more than 1048576"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_sample_is_named_and_the_others_are_read(tmp_path, members, reason):
    members = [(f"1.{extension}", content) for extension, content in members.items()]
    found = rows(shard(tmp_path / "a.tar", [*sample("0"), *members, *sample("2")]))
    assert found.pop("a.tar/0.png") == found.pop("a.tar/2.png") == (["fine"], None)
    ((name, (_, problem)),) = found.items()
    assert name.startswith("a.tar/1") and reason in problem


def test_a_sample_in_pieces_is_named_and_one_given_twice_is_two(tmp_path):
    """A picture would get its neighbour's caption. Twice the same key is two samples, as for the webdataset library."""
    pieces = [("1.png", picture()), ("2.png", picture()), ("1.txt", b"one"), ("2.txt", b"two")]
    found = list(Tars([shard(tmp_path / "a.tar", pieces)], "text").rows())
    assert len(found) == 4 and all("stand together" in row.problem for row in found)
    twice = Tars([shard(tmp_path / "b.tar", [*sample("1", "old", 1), *sample("2"), *sample("1", "new", 2)])], "text")
    found = [row for row in twice.rows() if row.name == "b.tar/1.png"]
    assert [(row.captions, twice.open(row.place).getvalue()) for row in found] == [
        (["old"], picture(1)), (["new"], picture(2))
    ]  # fmt: skip


SECRET = "/etc/passwd"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (info("/1.png"), "leads out"),
        (info("../1.png"), "leads out"),
        (info("in/../../1.png"), "leads out"),
        (info("in/.."), "leads out"),
        (info("1.png", type=tarfile.SYMTYPE, linkname=SECRET), "1.png is a link"),
        (info("1.png", type=tarfile.SYMTYPE, linkname="0.png"), "1.png is a link"),
        (info("1.png", type=tarfile.LNKTYPE, linkname="../" + SECRET), "1.png is a link"),
        (info("1.png", type=tarfile.LNKTYPE, linkname="0.png"), "1.png is a link"),
        (info("1.txt", type=tarfile.SYMTYPE, linkname=SECRET), "1.txt is a link"),
        (info("1.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "no ordinary file"),
        (info("1.png", type=tarfile.BLKTYPE), "no ordinary file"),
        (info("1.txt", type=tarfile.FIFOTYPE), "no ordinary file"),
        (info("1.png", type=tarfile.GNUTYPE_SPARSE), "no ordinary file"),
        (info("1.png", pax_headers={"GNU.sparse.size": "4096", "GNU.sparse.map": "0,0"}), "no ordinary file"),
        (info("1.png", type=b"Z"), "no ordinary file"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}-{value.type.decode()}",
)
def test_what_is_no_file_inside_is_refused(tmp_path, header, reason):
    """A shard from the net would read the files and devices of whoever trains on it."""
    source = Tars([shard(tmp_path / "a.tar", [*sample("0"), (header, b""), *sample("2")])], "text")
    found = list(source.rows())
    (bad,) = [row for row in found if row.problem]
    assert reason in bad.problem and bad.name.startswith("a.tar/") and bad.place is None
    assert [source.open(row.place).getvalue() for row in found if not row.problem] == [picture()] * 2


def test_a_picture_of_gigabytes_is_refused(tmp_path):
    """Each would be read into memory as a whole. The file is sparse: the disk holds none of it."""
    path, size = tmp_path / "a.tar", 2**30 + 512
    with open(path, "wb") as file:
        file.write(raw(b"1.png", size=size))
        file.seek(size, os.SEEK_CUR)
        file.write(raw(b"1.txt", b"big") + FINE + END)
    assert rows(path) == {
        "a.tar/1.png": (["big"], f"1.png has {size} bytes, more than {2**30}"), "a.tar/fine.png": (["fine"], None)
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- tars with a problem


def test_a_tar_cut_off_anywhere(tmp_path):
    """A broken download would end the run, or give half a picture, or lose its end in silence."""
    whole = shard(tmp_path / "a.tar", [m for i in range(3) for m in sample(f"{i}", f"number {i}", i)]).read_bytes()
    ends = [2048 * i + 1536 + len(b"number 0") for i in range(3)]
    assert all(len(picture(i)) <= 512 for i in range(3)), "a picture is one block, else `ends` is wrong"
    for cut in [*range(1, 3 * 2048, 61), 512, 1024, 2048, 4096, 6144]:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        source = Tars([path], "text")
        found = list(source.rows())
        good = [row for row in found if not row.problem]
        assert [row.captions for row in good] == [[f"number {i}"] for i in range(3) if ends[i] <= cut]
        assert [source.open(row.place).getvalue() for row in good] == [picture(i) for i in range(len(good))]
        assert found[-1].name == "cut.tar" and found[-1].problem


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no tar (empty file)"),
        (b"half a header", "no tar (truncated header)"),
        (picture() * 20, "no tar ("),
        (b"\x1f\x8b" + bytes(range(256)) * 4, "it is compressed; unpack it to a plain .tar first"),
        (END, "no samples"),
        (raw(b"README.", b"about") + END, "no samples"),
        (FINE, "no end mark at byte 2048"),
        (FINE + b"x" * 512 + FINE + END, "no header at byte 2048"),
        (FINE + END + FINE + END, "more after the end mark at byte 2048: two tars in one?"),
        (FINE + raw(b"1.png", b"x" * 512, size=-512) + END, "negative"),
        (FINE + raw(b"1.png", size=-2560) + END, "negative"),
        (FINE + raw(b"1.png", size=-1) + END, "negative"),
        (FINE + raw(b"1.png", size=-2560, kind=b"S") + END, "negative"),
        (FINE + raw(b"x", b"15 size=-99999\n", kind=b"x") + raw(b"1.png") + END, "negative"),
        (FINE + raw(b"x", b"20 size=" + b"9" * 11 + b"\n", kind=b"x") + raw(b"1.png") + END, "unexpected end of data"),
        (FINE + raw(b"1.png", size=8**11 - 1), "unexpected end of data"),
        (FINE + raw(b"x", size=8**11 - 1, kind=b"x"), "header of more than 16384 bytes"),
        (FINE + raw(b"x", size=8**11 - 1, kind=b"L"), "header of more than 16384 bytes"),
        (FINE + raw(b"x", size=8**11 - 1, kind=b"g"), "header of more than 16384 bytes"),
        (FINE + raw(b"x", b"2 " * 50_000 + b"=", kind=b"x"), "header of more than 16384 bytes"),
        (FINE + raw(b"long", b"name", kind=b"L") * 10_000 + END, "header of more than 16384 bytes"),
        (FINE + raw(b"x", b"22 GNU.sparse.size=x\n", kind=b"x") + raw(b"1.png") + END, "it is not read beyond byte"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_tar_is_named_and_what_comes_before_is_used(tmp_path, content, reason):
    """One bad shard of a thousand would end the run, hang it, take all memory, or be lost in silence."""
    (tmp_path / "a.tar").write_bytes(content)
    found = rows(tmp_path / "a.tar", shard(tmp_path / "b.tar", sample("1")))
    assert found.pop("b.tar/1.png") == (["fine"], None)
    assert reason in found.pop("a.tar")[1]
    assert found.pop("a.tar/fine.png", None) == ((["fine"], None) if content.startswith(FINE) else None)
    assert all("cut off" in problem for _, problem in found.values())


def test_headers_for_all_that_follow_are_not_kept(tmp_path):
    """tarfile gathers global headers, so a tar of nothing else would end up in memory as a whole."""
    tell = [b"10015 %08d=" % i + b"x" * 9999 + b"\n" for i in range(400)]
    (tmp_path / "a.tar").write_bytes(b"".join(raw(b"g", record, kind=b"g") + raw(b"1.x") for record in tell) + END)
    tracemalloc.start()
    assert len(rows(tmp_path / "a.tar")) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # of 4,000,000


@pytest.mark.parametrize("size", [2**13, 2**14 - 2**11, 2**15, 2**16])
def test_the_memory_for_a_header_is_bounded(tmp_path, size):
    """tarfile may keep a pax header many times over: with 64 KiB of it an enemy would fill a gigabyte."""
    path = tmp_path / "a.tar"
    path.write_bytes(raw(b"x", b"2 " * (size // 2) + b"=", kind=b"x") + FINE + END)
    tracemalloc.start()
    found = rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 1 and peak < 2**26


def test_any_flipped_byte_ends_nothing(tmp_path):
    """A damaged disk, or an enemy with patience."""
    whole = shard(tmp_path / "a.tar", [m for i in range(4) for m in sample("лес" * 40 + str(i))]).read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            damaged[draw.randrange(len(whole) - 8000)] = draw.randrange(256)
        path = tmp_path / "a.tar"
        path.write_bytes(damaged)
        source = Tars([path], "text")
        for row in source.rows():
            row.name.encode()
            assert row.problem or len(source.open(row.place).getvalue()) == row.place[2]


def test_a_compressed_tar_is_refused_at_once(tmp_path):
    """Its samples cannot be read at random, so it would be left out or read from its start for each picture."""
    with pytest.raises(ConfigError, match=r"train_data_dir: .*a\.tar\.gz.*unpack it to a plain \.tar"):
        Tars([shard(tmp_path / "b.tar", []), tmp_path / "a.tar.gz"], "text")


def test_two_tars_of_one_name(tmp_path):
    """A place names its tar: the picture would be read from the other one."""
    with pytest.raises(ConfigError, match="train_data_dir: two tars have the same name"):
        Tars([tmp_path / "x" / "a.tar", tmp_path / "y" / "a.tar"], "text")


def test_a_tar_that_changes_after_it_was_listed(tmp_path, later):
    """The bytes at the old place would be trained on as another picture, or a piece of one."""
    path = shard(tmp_path / "a.tar", sample("1", number=1))
    (row,) = Tars([path], "text").rows()
    before = path.stat()
    shard(path, sample("1", "other", number=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"'a.tar' has changed"):
        Tars([path], "text").open(row.place)
    (again,) = Tars([path], "text").rows()
    assert again.stamp != row.stamp
    for place in (row.place, [*again.place[:2], 2**20, *again.place[3:]]):
        with pytest.raises(ValueError, match=r"'a.tar' has changed"):
            Tars([path], "text").open(place)
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        Tars([path], "text").open(row.place)
    with pytest.raises(ValueError, match=r"no tar 'b.tar'"):
        Tars([path], "text").open(["b.tar", *row.place[1:]])
    assert rows(path) == {"a.tar": ([], "it cannot be read (No such file or directory)")}


def test_memory_does_not_grow_with_the_samples(tmp_path):
    """tarfile keeps every header: a set of millions would fill the memory before the first step."""

    def peak(count: int) -> int:
        path = shard(tmp_path / f"{count}.tar", [m for i in range(count) for m in sample(f"{i:06}")])
        one_key = shard(tmp_path / f"one{count}.tar", [(f"1.{i}", b"") for i in range(count)])
        tracemalloc.start()
        assert sum(1 for _ in Tars([path, one_key], "text").rows()) == count + 1
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(2000) < peak(200) + 20_000
