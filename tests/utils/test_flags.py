"""What a user is told when a command ends early, and with which status."""

import contextlib
import errno
import io
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro
from safetensors import SafetensorError

from latentdiff.utils.errors import ConfigError, RunStopped
from latentdiff.utils.flags import parse_flags, user_errors


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("unet: wrong"), 2, "error: unet: wrong"),
        (RunStopped("step 3: over"), 1, "error: step 3: over"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/log.jsonl"),
            1,
            "error: /x/log.jsonl: No space left on device",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 1, "error: /x: Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: writing a file: No space left on device"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            1,
            "error: writing a file: I/O error: No space left on device (os error 28)",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "error: /x: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/\x1b[2J"), 1, "error: /?[2J: File name too long"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 32 bytes"),
            1,
            "error: out of memory ([enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 32 "
            "bytes): fewer pictures at a time, smaller ones or a smaller model need less",
        ),
        (
            MemoryError(),
            1,
            "error: out of memory (MemoryError): fewer pictures at a time, smaller ones or a smaller model need less",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_and_a_status(capsys, error, status, line):
    with pytest.raises(SystemExit) as end, user_errors():
        raise error
    assert end.value.code == status and capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_a_fault_of_ours_keeps_its_traceback(error):
    """It would look like a user's mistake, and nobody could find it."""
    with pytest.raises(type(error)), user_errors():
        raise error


@dataclass
class Flags:
    """A few."""

    name: str
    """A name."""
    how_many: int = 1
    """A number."""
    share: float | None = None
    """Another."""
    shape: Literal["round", "square"] = "round"
    """A choice."""
    sizes: tuple[int, ...] = ()
    """Some."""
    ends: tuple[float, float] | None = None
    """Two."""
    loud: bool = False
    """A switch."""


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--name", "a", "--how_many", "x" * 150], f"--how_many: '{'x' * 150}' is not a whole number"),
        (["--name", "a", "--share", "half"], "--share: 'half' is not a number or None"),
        (["--name", "a", "--share=half"], "--share: 'half' is not a number or None"),
        (["--name", "a", "--sizes", "1", "two"], "--sizes: 'two' is not a whole number"),
        (["--name", "a", "--ends", "1"], "--ends: it needs 2 values, and has 1"),
        (["--name", "a", "--loud=yes"], "--loud: it takes no value"),
        (["--name", "a", "--name", "a", "b"], "there is no argument 'b'"),
        (["--name", "a", "-n", "1"], "there is no option -n (see prog --help)"),
        (["--name", "a", "--shape", "oval"], "--shape: 'oval' is not one of round, square"),
        (["--name"], "--name: it needs a value, and has none"),
        ([], "--name is missing (see prog --help)"),
        (["--nam", "a"], "there is no option --nam; perhaps you meant --name (see prog --help)"),
        (["--name", "a", "--how-money", "2"], "there is no option --how-money; perhaps you meant --how-many"),
        (["--name", "a", "--no-lout"], "there is no option --no-lout; perhaps you meant --no-loud"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(argv, line, encoding):
    """tyro's box would come through."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(stdout), pytest.raises(ConfigError) as error:
        parse_flags(Flags, argv, prog="prog")
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_what_cannot_be_told_is_shown_as_tyro_has_it(capsys):
    """A refusal would be silent."""
    with pytest.raises(SystemExit) as end:
        parse_flags(Annotated[Flags, tyro.conf.subcommand("a")] | Annotated[Flags, tyro.conf.subcommand("b")], ["c"])
    assert end.value.code == 2 and "subcommand" in capsys.readouterr().err


def test_help_is_not_touched(capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(Flags, ["--help"], prog="prog")
    assert end.value.code == 0 and "--how-many INT" in (shown := capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 100
