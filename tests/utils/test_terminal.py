"""Whatever is printed, and by whom, a terminal shows it and does nothing else."""

import io
import logging
import sys

import pytest
from tqdm.auto import tqdm

from latentdiff.utils.flags import user_errors
from latentdiff.utils.terminal import for_terminal, safe_output

HOSTILE = "a\x1b]0;owned\x07\x1b[2Jb\rc\x9b3Jd\u202ee"


def test_commands_to_a_terminal_are_question_marks():
    """It would set the title, empty the screen, or show another name than the file has."""
    assert for_terminal(HOSTILE) == "a?]0;owned??[2Jb?c?3Jd?e"


@pytest.mark.parametrize("text", ["a\nb\tc\r\n", "\r 50%|###  |\x1b[A", "\x1b[1;31mred\x1b[0m", "Käse 🧀 日本", ""])
def test_what_bars_and_help_need_is_left(text):
    assert for_terminal(text) == text


def test_all_that_print_are_heard_through_it(capsys):
    """A name would get past by way of a bar, a log or a library."""
    handler = logging.StreamHandler(sys.stderr)  # as libraries make theirs, before any command runs
    logger = logging.getLogger("a library")
    logger.addHandler(handler)
    with safe_output():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        logger.warning(HOSTILE)
        tqdm.write(HOSTILE)
        with tqdm([1], desc=HOSTILE) as bar:
            list(bar)
    logger.removeHandler(handler)
    out, err = capsys.readouterr()
    assert out.count("owned") == 2 and err.count("owned") >= 3
    assert not set("\x07\x1b\x9b\u202e") & set(out + err)
    print(HOSTILE)
    assert capsys.readouterr().out == f"{HOSTILE}\n"  # only in the block


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_ends_nothing(monkeypatch, encoding):
    """A caption, a path or a file's name that is no text ended the command that printed it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with user_errors():
        print("猫 é \udce9")
    written = stream.buffer.getvalue().decode(encoding)
    assert "\\udce9" in written and ("猫" in written if encoding == "utf-8" else "\\u732b" in written)
