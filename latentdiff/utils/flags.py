"""The ways from a command line into a function: tyro for the flags, one clear line for a user's mistake."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from .errors import ConfigError, RunStopped


def run_cli(main: Callable[[Any], None], config_type: type) -> None:
    """Parse `config_type` from the command line and call `main(config)`."""
    with user_errors():
        main(parse_flags(config_type))


# ---- tyro's boxes around mistakes, as lines

_SHELLS = ("bash", "zsh", "fish", "tcsh")
_COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
_RULE = re.compile(r"^[─-]{3,}$")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What tyro and Python say, and what it means; anything else stays as it is.
_WORDS = (
    (r"Error parsing (\S+?): ", r"\1: "),
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
    (r"could not convert string to float: (.*)", r"\1 is not a number"),
    (r"no type matching (.*) could be instantiated from \[(.*)\]\.", r"\2 is not \1"),
    (r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)\.", lambda found: _choices(*found.groups())),
    (r"Missing value for argument '(.*)'\. Expected (\d+) values\.", r"\1: it needs a value, and has none"),
    (r"Expected one of \{(.*)\}\.", r"give a command: \1"),
    (r"Unrecognized (?:or misplaced )?options: ", "there is no option or argument "),
    (r" \(applied to [^)]*\)", ""),
)


def parse_flags(config_type: Any, args: Sequence[str] | None = None, **options: Any) -> Any:
    """`tyro.cli`, where a mistake is a ConfigError of one line instead of a box. Help stays as tyro draws it.

    Raises:
        ConfigError: an unknown or missing flag, or a value that it cannot have.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] and args[0].replace("_", "-") in _COMPLETION and (len(args) < 2 or args[1] not in _SHELLS):
        raise ConfigError(f"{args[0]}: name the shell, one of {', '.join(_SHELLS)}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _unwrapped(not {"-h", "--help"} & set(args)):
            return tyro.cli(config_type, args=args, **options)
    except SystemExit as end:
        if end.code != 2:
            raise
        message = one_line(said.getvalue())
        said.truncate(0)
        for flag in (arg for arg in args if arg.startswith("--")):  # as it was typed
            message = message.replace(flag.replace("_", "-"), flag)
        raise ConfigError(message) from None
    finally:
        sys.stderr.write(said.getvalue())


@contextlib.contextmanager
def _unwrapped(wanted: bool) -> Iterator[None]:
    """A terminal so wide that no line of tyro's is broken."""
    before = os.environ.get("COLUMNS")
    if wanted:
        os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif wanted:
            del os.environ["COLUMNS"]


def one_line(box: str) -> str:
    """What one of tyro's boxes says, in one line: the mistake and what may have been meant."""
    lines = _COLOUR.sub("", box).splitlines()
    # Where the output is no UTF-8 the box has no sides, and under its title another rule.
    head, foot = (1, -1) if lines and lines[0].startswith("╭") else (2, None)
    sections: list[list[str]] = [[]]
    for line in (line[2:].rstrip("│ ") for line in lines[head:foot]):
        if _RULE.match(line):
            sections.append([])
        else:
            sections[-1].append(line)
    mistake, *rest = sections
    if mistake and mistake[0].startswith("Missing from "):
        unknown = [line.strip() for section in rest if section[0] == "Unrecognized options:" for line in section[1:]]
        lacks = "; ".join([*_missing(mistake), *(f"there is no option or argument {token}" for token in unknown[:1])])
        return f"{lacks} (see {_prog(mistake)} --help)"
    until = mistake.index("") if "" in mistake else len(mistake)
    line = " ".join(part.strip() for part in mistake[:until])
    for pattern, words in _WORDS:
        line = re.sub(pattern, words, line)
    for section in rest:
        if section and section[0].startswith("Available subcommands: "):
            line += f"; the commands are {section[0].split(': ')[1]}"
        elif section and section[0].startswith("Perhaps you meant"):
            where = [part.strip()[3:].removesuffix(" --help") for part in section if part.strip().startswith("in ")]
            line += f"; perhaps you meant {_named(section)[0]}" + "".join(f" of {prog}" for prog in where[:1])
    return line


def _choices(value: str, flag: str, choices: str) -> str:
    """In a fixed order, which tyro's is not, and without the None that leaving the flag out stands for."""
    names = sorted(name.strip("'\"") for name in choices.rstrip(",").split(", "))
    return f"{flag}: {value} is not one of {', '.join(name for name in names if name != 'None')}"


def _named(section: Sequence[str]) -> list[str]:
    """The flags and arguments that a section explains: each begins a line that is indented once."""
    return [line.split()[0].rstrip(",") for line in section if re.match(r" {4}\S", line)]


def _missing(section: Sequence[str]) -> list[str]:
    return [f"{name} is missing" for name in _named(section)]


def _prog(section: Sequence[str]) -> str:
    return section[0].removeprefix("Missing from ").removesuffix(":")


class user_errors:  # noqa: N801 - reads as a statement
    """A ConfigError inside the block prints its one line and exits with status 2, a RunStopped with status 1.

    So do a disk that is full or cannot be written any more (1) and Ctrl-C (130). Anything else is a fault of ours and
    keeps its traceback.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (ConfigError, RunStopped)):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            print(f"error: {error.filename or 'writing a file'}: {error.strerror}", file=sys.stderr)
            raise SystemExit(1) from None
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
