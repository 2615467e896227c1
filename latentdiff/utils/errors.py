"""The two ways in which a user is told that something cannot be done."""


class ConfigError(Exception):
    """A user's mistake: its message is one clear line that names the thing, the value it had and what it may be.

    No ValueError: tyro would take that for a flag it could not parse, and draw its own box around the message.
    """


class RunStopped(Exception):
    """A run that cannot go on, by no fault of its settings: its message is one clear line."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line: what the system calls it, or its message's first line, or the error's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
