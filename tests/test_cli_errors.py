"""What a user is told when a command ends early, and with which status."""

import errno

import pytest

from latentdiff.cli_errors import user_errors
from latentdiff.config import ConfigError, RunStopped


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
