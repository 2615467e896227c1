"""What a stranger names a file reaches no terminal as more than a name."""

import pytest

from latentdiff.utils.errors import ConfigError, RunStopped, printable

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\nb\udc80\u202ec"


def test_what_is_no_letter_is_a_question_mark():
    """An escape sequence would set the terminal's title, empty it, or write what nobody said."""
    assert printable(HOSTILE) == "a?]0;owned??[2J??b??c"
    assert printable("Käse 🧀 日本.png") == "Käse 🧀 日本.png"


@pytest.mark.parametrize("kind", [ConfigError, RunStopped])
def test_mistakes_are_one_line(kind):
    """A name in an error would do the same, and half a character end the program while it says what is wrong."""
    said = str(kind(f"no {HOSTILE}"))
    assert said.isprintable() and said.encode()
