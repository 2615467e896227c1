"""The command line: what each command of `latentdiff` takes. What it does is loaded when it is called.

Nothing here imports torch or diffusers, so that `--help`, completion and a mistyped flag answer at once.
"""

import importlib
import inspect
import re
import sys
from typing import Annotated, Any, Union

import tyro

from .config.commands import (
    Backgrounds,
    Check,
    Evaluate,
    Export,
    Likelihood,
    Pull,
    Push,
    ReconstructEma,
    Retrieval,
    Serve,
    SweepEma,
    Train,
)
from .config.drawing import Edit, Generate, Interpolate, Redraw
from .config.presets import FLAT, TrainFlags, parse_train_config
from .utils.errors import ConfigError
from .utils.flags import COMPLETION, parse_flags, user_errors
from .utils.suggestions import perhaps

DESCRIPTION = """Draw with a latent diffusion model, edit, measure what it draws, and share it.

  latentdiff generate checkpoints/emoji64 --prompts "a cat" "a dog" --grid both.png
  latentdiff COMMAND --help

Completion of commands and flags by the shell's TAB key, here for bash (zsh and fish work the same way):

  latentdiff --tyro-write-completion bash ~/.local/share/bash-completion/completions/latentdiff
"""


# The module that does what a command says, in a function of the command's name.
COMMANDS = {
    Generate: "inference.generate",
    Edit: "inference.generate",
    Interpolate: "inference.generate",
    Redraw: "inference.redraw",
    Serve: "inference.serve",
    Export: "inference.export",
    Push: "training.push",
    Pull: "training.push",
    Evaluate: "evaluation.evaluate",
    Retrieval: "evaluation.retrieval",
    Backgrounds: "evaluation.backgrounds",
    Likelihood: "evaluation.likelihood",
    ReconstructEma: "evaluation.ema",
    SweepEma: "evaluation.ema",
    Train: "training.text2img",
    Check: "training.preflight",
}


def command_name(kind: type) -> str:
    """What a command is called on the command line; its function is called so with underscores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()


# These take the settings of a run, over a preset or a file.
SETTINGS_OF_A_RUN = (Train, Check)
NAMES = {command_name(kind): kind for kind in COMMANDS}
STYLE = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)


def parse(argv: list[str] | None = None) -> tuple[str, Any]:
    """The name of the command that `argv` (by default the process's own) asks for, and what its function is given.

    Raises:
        ConfigError: there is no such command, or it is given what it does not take.
    """
    argv = sys.argv[1:] if argv is None else argv
    name, prog = next(iter(argv), ""), f"latentdiff {next(iter(argv), '')}"
    if name in NAMES and NAMES[name] in SETTINGS_OF_A_RUN:
        return name, parse_train_config(argv[1:], prog=prog, description=inspect.getdoc(NAMES[name]))
    if name in NAMES:
        return name, parse_flags(NAMES[name], argv[1:], prog=prog, config=STYLE)
    if name in ("-h", "--help") or name.replace("_", "-") in COMPLETION:
        kinds = [
            Annotated[_flags(kind), tyro.conf.subcommand(command_name(kind), description=_summary(kind))]
            for kind in COMMANDS
        ]
        parse_flags(Union[tuple(kinds)], argv, prog="latentdiff", description=DESCRIPTION, config=STYLE + FLAT)  # noqa: UP007
    unknown = f"there is no command {name}{perhaps(name, NAMES)}; the commands are" if name else "give a command:"
    raise ConfigError(f"{unknown} {', '.join(NAMES)}")


def _flags(kind: type) -> type:
    return TrainFlags if kind in SETTINGS_OF_A_RUN else kind


def _summary(kind: type) -> str:
    return " ".join(kind.__doc__.split("\n\n")[0].split())


def main(argv: list[str] | None = None) -> None:
    """Run a command; a user's mistake (ConfigError) is one line on stderr and status 2."""
    with user_errors():
        name, settings = parse(argv)
        module = importlib.import_module(f".{COMMANDS[NAMES[name]]}", __package__)
        getattr(module, name.replace("-", "_"))(settings)


if __name__ == "__main__":
    main()
