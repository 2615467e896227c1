"""What a command prints, whoever wrote it: names of files, captions, errors of libraries, what the Hub answers.

A terminal takes some characters for commands, which would set its title, empty it or overwrite what stands there. And
where it is no UTF-8, a character that it does not have would end the program that prints it.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

# All but a new line and a tab. What progress bars and coloured help need is left: a return at the beginning of what is
# written or before a new line, colours, and a step upwards.
_COMMANDS = re.compile(
    r"(?P<needed>\x1b\[[0-9;]*m|\x1b\[A|\A\r|\r(?=\n|\Z))"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def for_terminal(text: str) -> str:
    """A text of many lines with a question mark in the place of each character that a terminal would obey."""
    return _COMMANDS.sub(lambda found: found["needed"] or "?", text)


@contextmanager
def safe_output() -> Iterator[None]:
    """In the block nothing reaches the standard output or error but text that it can show; what their encoding does
    not have is written as its number, such as \\u732b. It holds for all who print there: tqdm, logging, libraries."""
    with _safe(sys.stdout), _safe(sys.stderr):
        yield


@contextmanager
def _safe(stream: TextIO | None) -> Iterator[None]:
    if stream is None:  # of a program without a terminal
        yield
        return
    write, errors = stream.write, getattr(stream, "errors", None)
    with suppress(AttributeError, ValueError):  # no stream of bytes
        stream.reconfigure(errors="backslashreplace")
    # In its place rather than around it: whoever got hold of the stream before, as logging did, prints to it, too.
    stream.write = lambda text: write(for_terminal(text))
    try:
        yield
    finally:
        with suppress(AttributeError):
            del stream.write
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors=errors)
