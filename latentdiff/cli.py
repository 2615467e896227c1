"""The command line: what each command of `latentdiff` takes. What it does is loaded when it is called.

Nothing here imports torch or diffusers, so that `--help`, completion and a mistyped flag answer at once.
"""

import importlib
import re
import sys
from typing import Annotated, Any, Union

import tyro

from .config.commands import (
    Backgrounds,
    Check,
    Evaluate,
    Likelihood,
    Pull,
    Push,
    ReconstructEma,
    Retrieval,
    Serve,
    SweepEma,
)
from .config.drawing import Edit, Generate, Interpolate, Redraw
from .config.presets import parse_train_config
from .utils.flags import parse_flags, user_errors

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
    Push: "training.push",
    Pull: "training.push",
    Evaluate: "evaluation.evaluate",
    Retrieval: "evaluation.retrieval",
    Backgrounds: "evaluation.backgrounds",
    Likelihood: "evaluation.likelihood",
    ReconstructEma: "evaluation.ema",
    SweepEma: "evaluation.ema",
    Check: "training.preflight",
}


def command_name(kind: type) -> str:
    """What a command is called on the command line; its function is called so with underscores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()


NAMES = {command_name(kind): kind for kind in COMMANDS}
STYLE = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)


def parse(argv: list[str] | None = None) -> Any:
    """The command that `argv` (by default the process's own) asks for."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["check"]:  # its flags stand over a preset or a file, as in training
        return Check(config=parse_train_config(argv[1:], prog="latentdiff check"))
    if argv and argv[0] in NAMES:
        return parse_flags(NAMES[argv[0]], argv[1:], prog=f"latentdiff {argv[0]}", config=STYLE)
    brief = [Annotated[kind, tyro.conf.subcommand(description=_summary(kind))] for kind in COMMANDS]
    return parse_flags(Union[tuple(brief)], argv, prog="latentdiff", description=DESCRIPTION, config=STYLE)  # noqa: UP007


def _summary(kind: type) -> str:
    return " ".join(kind.__doc__.split("\n\n")[0].split())


def main(argv: list[str] | None = None) -> None:
    """Run a command; a user's mistake (ConfigError) is one line on stderr and status 2."""
    with user_errors():
        command = parse(argv)
        module = importlib.import_module(f".{COMMANDS[type(command)]}", __package__)
        getattr(module, command_name(type(command)).replace("-", "_"))(command)


if __name__ == "__main__":
    main()
