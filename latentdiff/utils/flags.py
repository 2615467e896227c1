"""The ways from a command line into a function: tyro for the flags, one clear line for a user's mistake."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from .errors import ConfigError, RunStopped, first_line, is_out_of_memory, is_out_of_room, printable, reason
from .mistakes import mistake_in
from .terminal import safe_output


def run_cli(main: Callable[[Any], None], config_type: type) -> None:
    """Parse `config_type` from the command line and call `main(config)`."""
    with user_errors():
        main(parse_flags(config_type))


SHELLS = ("bash", "zsh", "fish", "tcsh")
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")


def parse_flags(
    config_type: Any, args: Sequence[str] | None = None, prog: str | None = None, config: tuple = (), **options: Any
) -> Any:
    """`tyro.cli`, where a mistake is a ConfigError of one line instead of a box. Help stays as tyro draws it.

    Raises:
        ConfigError: an unknown or missing flag, or a value that it cannot have.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] and args[0].replace("_", "-") in COMPLETION:
        _check_completion(*args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_type, args=args, prog=prog, config=config, **options)
    except SystemExit as end:
        if end.code == 2 and (mistake := mistake_in(args, config_type, config, options.get("use_underscores", False))):
            raise ConfigError(f"{mistake} (see {prog or Path(sys.argv[0]).name} --help)") from None
        sys.stderr.write(said.getvalue())
        raise
    except BrokenPipeError:  # `--help | head`; what Python still has to write at its end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _check_completion(flag: str, shell: str | None = None, file: str | None = None, *_: str) -> None:
    if shell not in SHELLS:
        raise ConfigError(f"{flag}: name the shell, one of {', '.join(SHELLS)}")
    if file is None and "write" in flag:
        raise ConfigError(f"{flag} {shell}: name the file to write, too")


class user_errors:  # noqa: N801 - reads as a statement
    """A ConfigError inside the block prints its one line and exits with status 2, a RunStopped with status 1.

    So do what the system refuses (1), such as to write to a full disk or to give more memory, and Ctrl-C (130).
    Anything else is a fault of ours and keeps its traceback. What is printed in the block is text to any terminal: see
    `safe_output`.
    """

    def __enter__(self) -> None:
        self._output = contextlib.ExitStack()
        self._output.enter_context(safe_output())

    def __exit__(self, kind, error, traceback) -> None:
        with self._output:
            said, status = _last_words(error)
            if said is not None:
                print(said, file=sys.stderr)
                raise SystemExit(status) from None


# What is for no program to decide: another user's file, a broken disk, a name that no file can have.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ESTALE)


def _named_file(error: Exception) -> str:
    name = getattr(error, "filename", None)
    return "writing a file" if name is None else printable(name if isinstance(name, int) else os.fsdecode(name))


def _last_words(error: BaseException | None) -> tuple[str | None, int]:
    """The line that a program ends with, and its status; no line for what has to be looked into."""
    if isinstance(error, (ConfigError, RunStopped)):
        return f"error: {error}", 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    if isinstance(error, Exception) and is_out_of_room(error):
        return f"error: {_named_file(error)}: {printable(first_line(error))}", 1
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"error: {_named_file(error)}: {error.strerror}", 1
    if isinstance(error, Exception) and is_out_of_memory(error):
        less = "fewer pictures at a time, smaller ones or a smaller model need less"
        return f"error: out of memory ({printable(reason(error))}): {less}", 1
    return None, 0
