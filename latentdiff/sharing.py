"""`latentdiff push` and `latentdiff pull`: a saved pipeline to the Hub and from it."""

from pathlib import Path

from .cli import Pull, Push
from .config import ConfigError
from .finishing import NOT_PUSHED
from .hub import pull_folder, push_folder
from .posthoc_ema import SNAPSHOTS


def push(command: Push) -> None:
    """Push a folder, and say where it is."""
    if not (command.folder / "model_index.json").is_file():
        raise ConfigError(f"{command.folder} holds no model_index.json: give the folder of a whole saved pipeline")
    wanted = [f"{SNAPSHOTS}/*"] if command.ema_snapshots else []
    if wanted and not any(command.folder.glob(f"{SNAPSHOTS}/*.safetensors")):
        raise ConfigError(f"--ema-snapshots: {command.folder} holds none; a run with --ema_sigma_rel writes them")
    url = push_folder(
        command.folder,
        command.repo_id,
        private=command.private,
        revision=command.revision,
        commit_message=command.message,
        ignore_patterns=[pattern for pattern in NOT_PUSHED if pattern not in wanted],
    )
    print(url)


def pull(command: Pull) -> None:
    """Load a model into a folder, and say where it is."""
    folder = command.output_dir or Path(command.repo_id.split("/")[-1])
    print(pull_folder(command.repo_id, folder, command.revision))
