"""The two ways in which a user is told that something cannot be done, in a line that any terminal can show, and what
libraries' errors mean."""

import errno
from collections.abc import Iterator

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# As the libraries say these in errors of kinds of their own: safetensors, torch's writer of archives, a C++ stream.
_NO_ROOM_IN_WORDS = ("No space left", "os error 28", "quota exceeded", "PytorchStreamWriter", "basic_ios::clear")
_NO_MEMORY_IN_WORDS = ("can't allocate", "not enough memory", "out of memory", "Cannot allocate", "ALLOC_FAILED")
_MEMORY_KINDS = ("OutOfMemoryError", "MemoryError", "ArrayMemoryError")


LONGEST = 2000  # letters of a message; a path of a thousand folders in it would fill the screen


def printable(text: object) -> str:
    """A text as one line for a terminal: what cannot be printed, such as an escape sequence's first character in the
    name of a stranger's file, becomes a question mark.
    """
    return "".join(character if character.isprintable() else "?" for character in str(text))


def _message(text: object) -> str:
    """A text as one line for a terminal, its middle left out where it is too long to be read."""
    line = printable(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


class ConfigError(Exception):
    """A user's mistake: its message is one clear line that names the thing, the value it had and what it may be.

    No ValueError: tyro would take that for a flag it could not parse, and draw its own box around the message.
    """

    def __init__(self, message: object = ""):
        super().__init__(_message(message))


class RunStopped(Exception):
    """A run that cannot go on, by no fault of its settings: its message is one clear line."""

    def __init__(self, message: object = ""):
        super().__init__(_message(message))


def first_line(error: BaseException) -> str:
    """What an error says, in one line: what the system calls it, or its message's first line, or the error's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str:
    """Why a library's call failed, in one line of at most 300 letters. A key error's message is the key alone."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    said = " ".join(str(error).split())
    unclear = isinstance(error, LookupError | AttributeError | TypeError | AssertionError | ArithmeticError)
    return f"{type(error).__name__}: {said}".removesuffix(": ")[:300] if unclear or not said else said[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of a full memory, the processor's or a GPU's."""
    return any(
        type(one).__name__ in _MEMORY_KINDS
        or isinstance(one, RuntimeError)
        and any(words in str(one) for words in _NO_MEMORY_IN_WORDS)
        for one in _chain(error)
    )


def is_out_of_room(error: BaseException) -> bool:
    """Whether an error is that of a disk that is full, or cannot be written any more."""
    return any(
        isinstance(one, OSError)
        and one.errno in _NO_ROOM
        or isinstance(one, Exception)
        and any(words in str(one) for words in _NO_ROOM_IN_WORDS)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
