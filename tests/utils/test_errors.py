"""What a stranger names a file reaches no terminal as more than a name."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from latentdiff.utils.errors import ConfigError, RunStopped, is_out_of_memory, is_out_of_room, printable

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\r\nb\udc80\u202ec"


def test_what_is_no_letter_is_a_question_mark():
    """An escape sequence would set the terminal's title, empty it, or write what nobody said."""
    assert printable(HOSTILE) == "a?]0;owned??[2J??b??c"
    assert printable("Käse 🧀 日本.png") == "Käse 🧀 日本.png"


@pytest.mark.parametrize(
    ("error", "room", "memory"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True, False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True, False),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True, False),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing"), True, False),
        (RuntimeError("basic_ios::clear: iostream error"), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False, True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False, True),
        (MemoryError(), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False, False),
    ],
    ids=str,
)
def test_what_a_librarys_error_means(error, room, memory):
    """A disk or a memory that is full would look like a fault in a library, or a fault like a full disk."""
    assert (is_out_of_room(error), is_out_of_memory(error)) == (room, memory)
    try:
        try:
            raise error
        except type(error) as inner:
            raise ValueError("saving failed") from inner
    except ValueError as outer:  # as a library may wrap it
        assert (is_out_of_room(outer), is_out_of_memory(outer)) == (room, memory)


def test_a_message_has_an_end():
    """A path of a thousand folders would fill the screen."""
    said = str(ConfigError("begin " + "x/" * 10_000 + " end"))
    assert len(said) < 2100 and said.startswith("begin x/") and said.endswith("x/ end")


@pytest.mark.parametrize("kind", [ConfigError, RunStopped])
def test_mistakes_are_one_line(kind):
    """A name in an error would do the same, and half a character end the program while it says what is wrong."""
    said = str(kind(f"no {HOSTILE}"))
    assert said.isprintable() and said.encode()
