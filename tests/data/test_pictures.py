"""One's own pictures and the embedded ones as rows with captions; a bad picture is named and ends nothing."""

import hashlib
import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.config.train import TrainConfig
from latentdiff.data import emoji
from latentdiff.data.pictures import EmojiPictures, OwnPictures, open_source
from latentdiff.data.survey import survey
from latentdiff.utils.colours import matrix_profile
from latentdiff.utils.errors import ConfigError

SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of white, red, green, blue


def first_row(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image)[0].tolist()]


# ---- pictures of one's own ------------------------------------------------------------------------------------------


def folder_of(folder, captions: list, size: int = 8):
    """`captions[i]` for picture i.png, each of another shade; None writes no picture's caption."""
    folder.mkdir()
    lines = []
    for i, caption in enumerate(captions):
        Image.new("RGB", (size, size), (i, 2 * i % 256, 255 - i)).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def own(folder, tmp_path, sizes=((8, 8),), **settings) -> OwnPictures:
    return surveyed(TrainConfig(train_data_dir=str(folder), output_dir=str(tmp_path), **settings), sizes)


def surveyed(config: TrainConfig, sizes=((8, 8),)) -> OwnPictures:
    source = open_source(config)
    survey(config, source, Path(config.output_dir) / "seen.sqlite")
    return OwnPictures(config, lambda: source, sizes)


def test_a_folder_with_metadata(tmp_path):
    """Pictures would get another's caption, or be held out without being asked for."""
    pictures = own(folder_of(tmp_path / "pics", ["a cat", "ein Käse", "猫"]), tmp_path)
    assert list(pictures.captions) == [["a cat"], ["ein Käse"], ["猫"]]
    assert pictures.repeats.tolist() == [1, 1, 1] and pictures.held_out.tolist() == [False] * 3
    assert pictures.caption_counts.tolist() == [1, 1, 1] and pictures.captions[2] == ["猫"]
    for row in range(3):
        assert pictures.image(row).size == (8, 8) and first_row(pictures.image(row))[0] == (row, 2 * row, 255 - row)


def test_a_list_of_many_rows(tmp_path):
    """Every row past the first few would be another's."""
    captions = [f"picture {i}" if i % 3 else [f"picture {i}", "a pet"] for i in range(200)]
    pictures = own(folder_of(tmp_path / "pics", captions), tmp_path)
    assert list(pictures.captions) == [pictures.captions[row] for row in range(200)]
    assert [pictures.captions[row][0] for row in (0, 63, 64, 65, 127, 128, 199)] == [
        f"picture {row}" for row in (0, 63, 64, 65, 127, 128, 199)
    ]
    assert pictures.caption_counts.tolist() == [1 if row % 3 else 2 for row in range(200)]
    assert pictures.name(130) == "130.png" and first_row(pictures.image(130))[0] == (130, 4, 125)


def test_one_broken_among_200_is_named_and_the_rest_is_used(tmp_path):
    """One bad file would end the run, or vanish without a word."""
    folder = folder_of(tmp_path / "pics", [f"picture {i}" for i in range(200)])
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:40])
    pictures = own(folder, tmp_path)
    assert len(pictures.captions) == 199 and ["picture 7"] not in pictures.captions
    (line,) = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["file"].endswith("007.png") and "picture" in json.loads(line)["reason"]
    assert pictures.captions[7] == ["picture 8"] and first_row(pictures.image(7))[0] == (8, 16, 247)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b"no picture at all"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read"),
    ],
    ids=["text", "empty", "cut"],
)
def test_too_many_broken_pictures_end_the_run_by_name(tmp_path, damage, reason):
    """A set that is half broken would be trained on its other half."""
    folder = folder_of(tmp_path / "pics", ["a", "b", "c"])
    damage(folder / "001.png")
    with pytest.raises(ConfigError, match="001.png") as refused:
        own(folder, tmp_path)
    assert "1 of 3" in str(refused.value) and "max_rejected_fraction" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 and reason in str(refused.value)
    assert len(own(folder, tmp_path, max_rejected_fraction=0.5).captions) == 2


@pytest.mark.parametrize("caption", [None, "", "  "])
def test_a_missing_caption_is_named(tmp_path, caption):
    """The picture would be trained under no words, or under "None"."""
    folder = folder_of(tmp_path / "pics", ["a", caption, "c"])
    with pytest.raises(ConfigError, match="001.png: its caption is missing"):
        own(folder, tmp_path)


def test_a_missing_picture_is_named(tmp_path):
    """A row of a data set without a picture would end in a traceback."""
    import datasets

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}, None], "text": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ConfigError, match="row 1: it cannot be read as a picture"):
        surveyed(TrainConfig(dataset_name=str(tmp_path / "set"), output_dir=str(tmp_path)))


def test_a_picture_in_other_colours_has_other_latents(tmp_path, caplog, later):
    """Those that an earlier version encoded from the unconverted picture would be found under its bytes."""
    folder = folder_of(tmp_path / "pics", ["a", "b", "c"])
    for name, profile in (("000", matrix_profile(1.8, SRGB)), ("001", matrix_profile(None, SRGB)), ("002", b"broken")):
        Image.new("RGB", (8, 8), (0, 128, 255)).save(folder / f"{name}.png", icc_profile=profile)
    for _ in range(2):  # the second time from memory
        caplog.clear()
        pictures = own(folder, tmp_path)
        assert [pictures.line(row).get("converted") for row in range(3)] == [True, None, None]
        # 255 by sRGB's curve of (128 / 255) ** 1.8 = 0.289: 1.055 * 0.289 ** (1 / 2.4) - 0.055 = 0.574, 146.5
        greens = [first_row(pictures.image(row))[0][1] for row in range(3)]
        assert greens[0] in (146, 147) and greens[1:] == [128, 128]
        for digest, row in zip(pictures.digests(), range(3), strict=True):
            line = pictures.line(row)
            as_before = hashlib.sha256(f"{line['sha256']} 0.000,0.000,8.000,8.000 to (8, 8) lanczos".encode()).digest()
            assert (digest == as_before) == (row > 0)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1 and said[0].startswith("002.png: its colour profile is ignored")


def test_no_stale_list_of_rejected_pictures(tmp_path):
    """The list of an earlier run would be taken for this one's."""
    (tmp_path / "rejected.jsonl").write_text("{}\n")
    own(folder_of(tmp_path / "pics", ["a"]), tmp_path)
    assert not (tmp_path / "rejected.jsonl").exists()


def test_several_captions_and_holes_among_them(tmp_path):
    """An empty caption in a list would be drawn now and then: dropout that nobody asked for."""
    pictures = own(folder_of(tmp_path / "pics", [["a cat", "", "a pet"], ["a dog", None]]), tmp_path)
    assert list(pictures.captions) == [["a cat", "a pet"], ["a dog"]]


@pytest.mark.parametrize("change", ["no metadata", "no folder contents", "other column"])
def test_data_without_captions_says_what_it_has(tmp_path, change):
    """The message would not say whether captions, the column or the pictures are missing."""
    folder = folder_of(tmp_path / "pics", ["a", "b"])
    if change == "no metadata":
        (folder / "metadata.jsonl").unlink()
    if change == "no folder contents":
        shutil.rmtree(folder)
        folder.mkdir()
    with pytest.raises(ConfigError) as refused:
        own(folder, tmp_path, **({"caption_column": "words"} if change == "other column" else {}))
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    if change == "other column":
        assert message.startswith("caption_column") and "'words'" in message and "'text'" in message
    else:
        assert message.startswith("train_data_dir") and "pics" in message
    if change == "no metadata":
        assert "metadata.jsonl" in message and ".txt" in message


def test_a_data_set_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="dataset_name: '/no/such/set'") as refused:
        surveyed(TrainConfig(dataset_name="/no/such/set", output_dir=str(tmp_path)))
    assert len(str(refused.value).splitlines()) == 1


def test_the_held_out_share_does_not_move_with_the_folder(tmp_path):
    """On another machine pictures that were trained on would be measured as if they had been held out."""
    captions = [f"picture {i}" for i in range(60)]
    here = own(folder_of(tmp_path / "here", captions), tmp_path, held_out_fraction=0.3)
    (tmp_path / "far" / "away").mkdir(parents=True)
    there = own(folder_of(tmp_path / "far" / "away" / "pics", captions), tmp_path, held_out_fraction=0.3)
    assert (here.held_out == there.held_out).all()
    # Binomial(60, 0.3) is within 18 +- 4 standard deviations (3.55) but for one set of names in ten thousand.
    assert 18 - 15 < sum(here.held_out) < 18 + 15


def test_nothing_left_to_train_on(tmp_path):
    with pytest.raises(ConfigError, match="no picture is left"):
        own(folder_of(tmp_path / "pics", ["a", "b"]), tmp_path, held_out_fraction=1.0)


def test_max_train_samples(tmp_path):
    assert len(own(folder_of(tmp_path / "pics", list("abcd")), tmp_path, max_train_samples=2).captions) == 2


def hostile_folder(folder) -> tuple[dict[str, tuple[int, int, int]], dict[str, str]]:
    """Pictures as people have them and as an enemy would make them.

    Returns:
        What can be used, with the colour of its top left pixel; and what cannot, with a word of the reason.
    """
    folder.mkdir()
    red, usable, unusable = (220, 30, 40), {}, {}

    def add(name: str, image: Image.Image, kind: str, colour=red, **options) -> None:
        image.save(folder / name, kind, **options)
        usable[name] = colour

    plain = Image.new("RGB", (24, 16), red)
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tiff"),
                         ("WEBP", "webp"), ("PPM", "ppm"), ("TGA", "tga"), ("ICO", "ico"), ("PCX", "pcx")):  # fmt: skip
        add(f"plain.{suffix}", plain, kind)
    add("wrong extension.jpg", plain, "PNG")
    add("UPPER.PNG", plain, "PNG")
    add("no spaces, they said.png", plain, "PNG")
    for name in (
        "猫.png",
        "кошка.png",
        "قطة.png",
        "🐈.png",
        "naïve.png",
        "a'b\"c.png",
        "-rf.png",
        "%s.png",
        "new\nline.png",
    ):
        add(name, plain, "PNG")
    (folder / "sub" / "folder").mkdir(parents=True)
    add("sub/folder/deep.png", plain, "PNG")
    add("rgba.png", Image.new("RGBA", (8, 8), (*red, 0)), "PNG", (255, 255, 255))
    add("la.png", Image.new("LA", (8, 8), (0, 0)), "PNG", (255, 255, 255))
    add("palette.png", plain.quantize(4), "PNG")
    add("grey.png", Image.new("L", (8, 8), 77), "PNG", (77, 77, 77))
    add("one bit.png", Image.new("1", (8, 8), 1), "PNG", (255, 255, 255))
    add("sixteen bits.png", Image.fromarray(np.full((8, 8), 32768, np.uint16)), "PNG", (128, 128, 128))
    add("sixteen bits.tiff", Image.fromarray(np.full((8, 8), 65535, np.uint16)), "TIFF", (255, 255, 255))
    add("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", (255, 255, 255))
    add("cmyk.tiff", Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF", (0, 0, 0))
    add("progressive.jpg", plain, "JPEG", progressive=True)
    add("animated.gif", plain, "GIF", save_all=True, append_images=[Image.new("RGB", (24, 16), (0, 255, 0))])
    add("animated.png", plain, "PNG", save_all=True, append_images=[Image.new("RGB", (24, 16), (0, 255, 0))])
    add("two views.mpo", plain, "MPO", save_all=True, append_images=[plain])  # what telephones call a JPEG
    add("one pixel.png", Image.new("RGB", (1, 1), red), "PNG")
    add("long.png", Image.new("RGB", (4000, 1), red), "PNG")
    add("tall.png", Image.new("RGB", (1, 4000), red), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    add("rotated.jpg", plain, "JPEG", exif=exif)
    add("text chunk.png", plain, "PNG", pnginfo=chunk("Comment", "x" * 500_000))

    def spoil(name: str, content: bytes, reason: str = "cannot be read") -> None:
        (folder / name).write_bytes(content)
        unusable[name] = reason

    png, jpg = (folder / "plain.png").read_bytes(), (folder / "plain.jpg").read_bytes()
    spoil("empty.png", b"")
    spoil("text.png", b"not a picture")
    spoil("zeros.jpg", bytes(1000))
    spoil("cut.png", png[: len(png) // 2])
    spoil("cut.jpg", jpg[: len(jpg) - 60])
    spoil("header only.png", png[:33])
    spoil("web page.jpg", b"<!DOCTYPE html><title>404</title>")
    spoil("broken checksum.png", png.replace(b"IHDR", b"IHDX"))
    spoil("bomb.png", huge_png(40_000, 40_000))
    spoil("large.png", huge_png(10_000, 10_000))
    spoil("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    spoil("pdf.jpg", b"%PDF-1.4\n")
    spoil("sound.webp", b"RIFF\x24\x00\x00\x00WAVEfmt ")
    spoil("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) (w) file closefile\n%%EOF\n")
    spoil("archive.png", b"PK\x03\x04" + bytes(200))
    spoil("no frames.gif", b"GIF89a\x08\x00\x08\x00\x00\x00\x00;")
    spoil("cut.tiff", (folder / "plain.tiff").read_bytes()[:60])
    spoil("cut.webp", (folder / "plain.webp").read_bytes()[:30])
    spoil("cut.bmp", (folder / "plain.bmp").read_bytes()[:70])
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "float.tiff")
    unusable["float.tiff"] = "floating-point"
    for name in [*usable, *unusable]:
        (folder / name).with_name((folder / name).name).with_suffix(".txt").write_text("a caption", encoding="utf-8")
    plain.save(folder / "no caption.png")
    plain.save(folder / "empty caption.png")
    (folder / "empty caption.txt").write_text(" \n")
    unusable |= {"no caption.png": "caption is missing", "empty caption.png": "empty caption.txt is empty"}
    (folder / "long.txt").write_text("a very " * 15_000 + "long caption")
    plain.save(folder / "no utf-8.png")
    (folder / "no utf-8.txt").write_bytes("ein Käse".encode("cp1252"))
    unusable["no utf-8.png"] = "no utf-8.txt: it is not text in UTF-8 (at byte 5, 0xe4)"
    (folder / "tall.txt").write_bytes("a tall picture".encode("utf-16"))
    return usable, unusable


def chunk(name: str, text: str) -> PngInfo:
    found = PngInfo()
    found.add_text(name, text, zip=True)
    return found


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_sixty_hostile_files(tmp_path):
    """A usable picture would be left out or come out wrong, or a bad one end the run or vanish without a reason."""
    usable, unusable = hostile_folder(tmp_path / "pics")
    assert len(usable) + len(unusable) >= 60
    pictures = own(tmp_path / "pics", tmp_path, max_rejected_fraction=1.0)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["file"] for line in rejected} == set(unusable)
    for line in rejected:
        assert unusable[line["file"]] in line["reason"], line
    assert sorted(pictures.name(row) for row in range(len(pictures.captions))) == sorted(usable)
    for row in range(len(pictures.captions)):
        shown = first_row(pictures.image(row))[0]
        wanted = usable[pictures.name(row)]
        assert max(abs(a - b) for a, b in zip(shown, wanted, strict=True)) <= 6, (pictures.name(row), shown)  # JPEG


# ---- the embedded emoji ---------------------------------------------------------------------------------------------


def test_emoji_keep_their_splits():
    """Held-out emoji, or held-out pairs of emoji and colour, would be trained on."""
    built, pictures = emoji.load(), EmojiPictures(max_train_samples=6)
    trained = [row for row, held_out in enumerate(pictures.held_out) if not held_out]
    held_out = [row for row, held_out in enumerate(pictures.held_out) if held_out]
    assert len(held_out) == len(built.indices(held_out=True))
    assert not any(built.rows[pictures._rows[row][0]][0].held_out for row in trained)
    assert all(built.rows[pictures._rows[row][0]][0].held_out for row in held_out)
    for row in trained:
        index, ground, colour = pictures._rows[row]
        concept = built.rows[index][0]
        assert not concept.pair_held_out(ground) and (colour is None or not concept.thing_held_out(colour))
        assert pictures.image(row).size == (64, 64) and pictures.image(row).mode == "RGB"
        said = pictures.captions[row]
        assert ground == "white" or all(f"on a {ground} background" in caption for caption in said)
        assert colour is None or all(f"{colour} " in caption for caption in said)
    plain = [row for row in trained if pictures._rows[row][1:] == ("white", None)]
    assert len(plain) == 6 and all(pictures.repeats[row] == 18 for row in plain)
    assert all(pictures.repeats[row] == 1 for row in trained if row not in plain)


def test_most_samples_of_the_emoji_are_plain():
    """A prompt that names no colour means white, and the emoji's own colours."""
    pictures = EmojiPictures()
    share = {
        "plain": sum(pictures.repeats[i] for i, row in enumerate(pictures._rows) if row[1:] == ("white", None)),
        "in another colour": sum(pictures.repeats[i] for i, row in enumerate(pictures._rows) if row[2]),
    }
    total = pictures.repeats.sum()
    assert share["plain"] / total > 0.45 and 0.15 < share["in another colour"] / total < 0.25


def test_digests_of_the_emoji_tell_every_picture_apart():
    """Two pictures of one digest would share a latent; one of a changed digest is encoded again for nothing."""
    pictures = EmojiPictures(max_train_samples=6)
    digests = list(pictures.digests())
    assert digests == list(EmojiPictures(max_train_samples=6).digests())
    pixels = [pictures.image(row).tobytes() for row in range(len(digests))]
    assert len(set(digests)) >= len(set(pixels)) and len(digests) == len(pixels)
    for row, digest in enumerate(digests):
        assert (pictures._rows[row][2] is None) == (digest == hashlib.sha256(pixels[row]).digest())
