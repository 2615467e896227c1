"""The two ways in which a user is told that something cannot be done."""


class ConfigError(Exception):
    """A user's mistake: its message is one clear line that names the thing, the value it had and what it may be.

    No ValueError: tyro would take that for a flag it could not parse, and draw its own box around the message.
    """


class RunStopped(Exception):
    """A run that cannot go on, by no fault of its settings: its message is one clear line."""
