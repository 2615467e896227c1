"""What is wrong with a command line that tyro has refused, in one line.

tyro says so in a drawn box. Rather than read that, each flag is tried alone, by tyro, on the dataclass's type of it.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass
from itertools import pairwise
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from .suggestions import perhaps


@dataclass(frozen=True)
class _Argument:
    """A field of a dataclass, as a command line may give it."""

    name: str
    kind: Any
    """Its type, with tyro's markers."""
    is_required: bool

    @property
    def is_positional(self) -> bool:
        return tyro.conf.Positional in get_args(self.kind)[1:]


@dataclass(frozen=True)
class _Given:
    """A flag as it was typed, and the words up to the next one."""

    name: str
    attached: str | None
    """What stands behind its equals sign."""
    words: tuple[str, ...]

    @property
    def values(self) -> tuple[str, ...]:
        return self.words if self.attached is None else (self.attached,)


def mistake_in(args: Sequence[str], kind: Any, markers: tuple, use_underscores: bool) -> str | None:
    """The first mistake that is found; None where there is none that can be told.

    Args:
        kind: what tyro made no object of, a dataclass; those that are its fields count as parts of it.
        markers: tyro's, as it was called with them.
        use_underscores: how flags are spelled in suggestions.
    """
    if not is_dataclass(kind):
        return None
    arguments = list(_arguments(kind))
    options = {one.name: one for one in arguments if not one.is_positional}
    switched_off = {f"no_{name}": one for name, one in options.items() if one.kind is bool}
    spare, given = _split(args)
    for flag in given:
        name = flag.name[2:].replace("-", "_")
        argument = options.get(name) or switched_off.get(name)
        if argument is None or not flag.name.startswith("--"):
            known = switched_off if name.startswith("no_") else options
            return f"there is no option {flag.name}{perhaps(name, [_spelled(one, use_underscores) for one in known])}"
        left = _left_over(argument.kind, flag, markers)
        if left is None:
            return f"{flag.name}: {_refusal(argument.kind, flag, markers)}"
        spare += left
        options[argument.name] = _Argument(argument.name, argument.kind, is_required=False)
    return _too_few_or_many([one for one in arguments if one.is_positional], spare) or next(
        (f"{_spelled(name, use_underscores)} is missing" for name, one in options.items() if one.is_required), None
    )


def _arguments(kind: type) -> Iterator[_Argument]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _arguments(hint)
        else:
            yield _Argument(field.name, hint, field.default is MISSING and field.default_factory is MISSING)


def _spelled(name: str, use_underscores: bool) -> str:
    return f"--{name if use_underscores else name.replace('_', '-')}"


def _split(args: Sequence[str]) -> tuple[list[str], list[_Given]]:
    """The words before the first flag, and the flags."""
    starts = [i for i, word in enumerate(args) if re.match("--?[a-zA-Z]", word) and word not in ("-inf", "-nan")]
    given = []
    for start, end in pairwise([*starts, len(args)]):
        name, equals, value = args[start].partition("=")
        given.append(_Given(name, value if equals else None, tuple(args[start + 1 : end])))
    return list(args[: starts[0]] if starts else args), given


def _left_over(kind: Any, flag: _Given, markers: tuple) -> list[str] | None:
    """The words behind a flag that are not of its value; None where tyro can make no value of a type of them."""
    if kind is bool:
        return list(flag.words) if flag.attached is None else None
    alone = make_dataclass("Alone", [("value", kind)])
    typed = ["--value" if flag.attached is None else f"--value={flag.attached}", *flag.words]
    options = {"config": markers, "return_unknown_args": True, "console_outputs": False, "add_help": False}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # of a value it speaks all the same
            return tyro.cli(alone, args=typed, **options)[1]
    except SystemExit:
        return None


def _refusal(kind: Any, flag: _Given, markers: tuple) -> str:
    """What is wrong with the value of a flag, and what it may be."""
    if kind is bool:
        return "it takes no value"

    def takes(kind: Any, value: str) -> bool:
        return _left_over(kind, _Given("", value, ()), markers) is not None

    unmarked = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    choices = get_args(unmarked) if NoneType in get_args(unmarked) else (unmarked,)
    choices = [choice for choice in choices if choice is not NoneType]
    if get_origin(choices[0]) is tuple:
        items = get_args(choices[0])
        if items[-1] is not Ellipsis and len(flag.values) < len(items):
            return f"it needs {len(items)} values, and has {len(flag.values) or 'none'}"
        choices = items[:1]
    elif not flag.values:
        return "it needs a value, and has none"
    wrong = next((value for value in flag.values if not takes(choices[0], value)), flag.values[0])
    return f"{wrong!r} is not {' or '.join(map(_in_words, choices))}{' or None' if takes(kind, 'None') else ''}"


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return {int: "a whole number", float: "a number"}.get(kind, getattr(kind, "__name__", str(kind)))


def _too_few_or_many(positional: list[_Argument], words: list[str]) -> str | None:
    if surplus := words[len(positional) :]:
        return f"there is no argument {surplus[0]!r}"
    missing = [one.name.upper() for one in positional[len(words) :] if one.is_required]
    return f"{missing[0]} is missing" if missing else None
