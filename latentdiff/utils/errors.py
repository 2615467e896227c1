"""The two ways in which a user is told that something cannot be done, in a line that any terminal can show."""


def printable(text: object) -> str:
    """A text as one line for a terminal: what cannot be printed, such as an escape sequence's first character in the
    name of a stranger's file, becomes a question mark.
    """
    return "".join(character if character.isprintable() else "?" for character in str(text))


class ConfigError(Exception):
    """A user's mistake: its message is one clear line that names the thing, the value it had and what it may be.

    No ValueError: tyro would take that for a flag it could not parse, and draw its own box around the message.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


class RunStopped(Exception):
    """A run that cannot go on, by no fault of its settings: its message is one clear line."""

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


def first_line(error: BaseException) -> str:
    """What an error says, in one line: what the system calls it, or its message's first line, or the error's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
