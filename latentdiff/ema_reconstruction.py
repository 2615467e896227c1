"""`latentdiff reconstruct-ema`: an average of any length after a run, as a network that diffusers loads."""

import json
from pathlib import Path

from safetensors.torch import save

from .cli_measuring import ReconstructEma
from .config import ConfigError
from .loading import HUB_ID
from .posthoc_ema import Reconstruction, reconstructions, snapshots_folder
from .recipe import write_whole


def reconstruct_ema(command: ReconstructEma) -> None:
    """Write the average as diffusers' folders, and say how near it is to one that would have been kept."""
    averages = reconstructions_of(command.run, command.sigma_rel, command.step)
    width = f"{command.sigma_rel:.3f}"
    width = width if float(width) == command.sigma_rel else f"{command.sigma_rel:g}"
    name = f"unet-ema-{width}" + ("" if command.step is None else f"-step-{command.step}")
    output = command.output or (Path(command.run) if Path(command.run).is_dir() else Path()) / name
    for network, average in averages.items():
        folder = output if len(averages) == 1 else output / network
        write_network(average, folder)
        widths = dict.fromkeys(f"{snapshot.sigma_rel:g}" for snapshot in average.snapshots)
        print(
            f"{folder}: {network} at step {average.step}, sigma_rel {average.sigma_rel:g}, of {len(average.snapshots)} "
            f"snapshots of {' and '.join(widths)}; {average.profile_error:.2%} of its profile is missed"
        )


def write_network(average: Reconstruction, folder: Path) -> None:
    """A folder that diffusers' (or transformers') `from_pretrained` loads, with the average in fp32.

    Raises:
        ConfigError: it cannot be written.
        ValueError: the snapshots do not belong together.
    """
    config = average.snapshots[-1].config
    weights = "diffusion_pytorch_model.safetensors" if "_diffusers_version" in config else "model.safetensors"
    try:
        write_whole(folder / weights, save(average.tensors(), metadata={"format": "pt"}))
        write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror or error})") from None


def reconstructions_of(run: str, sigma_rel: float, step: int | None) -> dict[str, Reconstruction]:
    """For each network that a run trained, by its name, its average of one width; see `posthoc_ema.reconstructions`.

    Args:
        run: a folder, or a model on the Hub.

    Raises:
        ConfigError: such an average is not to be had.
    """
    if not Path(run).is_dir() and not HUB_ID.fullmatch(run):
        raise ConfigError(f"{run}: no such folder (nor is it the name of a model on the Hub, owner/name)")
    try:
        return reconstructions(snapshots_folder(run), sigma_rel, step)
    except ValueError as error:
        raise ConfigError(str(error)) from None
