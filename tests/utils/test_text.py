"""Text as strangers save it: read as what it is, or refused with the byte that is none."""

import io

import pytest

from latentdiff.utils.text import Lines, NotText, decoded, lines

TEXT = "ein Käse, 猫\r\nпёс 🐕\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_every_encoding_that_says_its_name(encoding):
    """Notepad's "Unicode" would be trained as garbage."""
    content = ("\ufeff" * encoding.endswith("-be") + TEXT).encode(encoding)
    assert decoded(content) == TEXT
    assert list(Lines(io.BytesIO(content))) == TEXT.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("ein Käse".encode("cp1252"), r"UTF-8 \(at byte 5, 0xe4\)"),
        ("猫が座る".encode("shift-jis"), r"UTF-8 \(at byte 0, 0x94\)"),
        ("一只狗在跑".encode("gbk"), "UTF-8"),
        ("a cat".encode("utf-16-le"), "a NUL at byte 1; UTF-16 needs its byte order mark"),
        ("a cat".encode("utf-16-be"), "a NUL at byte 0"),
        ("a cat".encode("utf-32-le"), "a NUL at byte 1"),
        ("a cat".encode("utf-16")[:-1], r"UTF-16 \(at byte 10"),
        (b"\xff\xfe\x00\xd8a\0", r"UTF-16 \(at byte 2"),
        (b"\xef\xbb\xbfa\xff", r"UTF-8 \(at byte"),
        (b"\xff\xfe\0\0abc", "UTF-32"),
        (b"caf\xc3", r"UTF-8 \(at byte 3, 0xc3\)"),
        (b"\xed\xa0\x80", "UTF-8"),
    ],
    ids=str,
)
def test_what_is_not_surely_text_is_refused(content, reason):
    """A guess would train wrong words, with a mark of a question where a letter was at best."""
    with pytest.raises(NotText, match=reason):
        decoded(content)
    some = Lines(io.BytesIO(content))
    list(some)
    assert some.problem


def test_a_line_ends_at_its_end_alone():
    """A caption with U+2028 or a vertical tab would be two halves of one."""
    odd = "a\u2028b\x0bc\x0cd\x1ce\x85f"
    text = f"{odd}\n{odd}\r\n{odd}\r{odd}"
    assert lines(text) == [odd] * 4
    assert [line.strip("\r\n") for line in Lines(io.BytesIO(text.encode()))] == [odd] * 4


def test_a_bad_line_leaves_the_others():
    """One letter in another encoding would cost a file of a million lines."""
    some = Lines(io.BytesIO("één\nk\udce4se\ndeux\n".encode("utf-8", "surrogateescape")))
    found = []
    for _ in some:
        found.append(some.problem)
        some.problem = None
    assert found == [None, "it is not text in UTF-8 (at byte 1 of the line, 0xe4)", None]
