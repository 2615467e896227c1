"""The ways from a command line into a function: tyro for the flags, one clear line for a user's mistake."""

import argparse
import errno
import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro

from .config import ConfigError, RunStopped, TrainConfig, preset, read_config


def run_cli(main: Callable[[Any], None], config_type: type) -> None:
    """Parse `config_type` from the command line and call `main(config)`."""
    with user_errors():
        main(tyro.cli(config_type))


def run_training(main: Callable[[TrainConfig], None], argv: list[str] | None = None) -> None:
    """Parse a TrainConfig, over `--preset NAME` or `--config FILE` where one is given, and call `main(config)`."""
    with user_errors():
        main(parse_train_config(argv))


def parse_train_config(argv: list[str] | None = None, prog: str | None = None) -> TrainConfig:
    """Flags over a config file over a preset over the defaults.

    Raises:
        ConfigError: an unknown preset, an unreadable file, or settings that make no sense together.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="emoji64")
    first.add_argument("--config")
    first.add_argument("--optimizer")  # decides which of a preset's settings hold
    chosen, rest = first.parse_known_args(argv)
    given = read_config(chosen.config) if chosen.config else {}
    if chosen.optimizer is not None:
        given["optimizer"] = chosen.optimizer
    values = preset(chosen.preset, given.get("optimizer", TrainConfig.optimizer)) | given
    return tyro.cli(
        TrainConfig,
        default=TrainConfig(**values),
        args=rest,
        prog=prog,
        description=f"{TrainConfig.__doc__}\n\n--preset NAME and --config FILE set what the flags then change.",
    )


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
