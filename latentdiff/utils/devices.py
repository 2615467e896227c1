"""Where networks run: the accelerator that torch has found, of whatever make, or the processor."""

import torch

from .errors import ConfigError


def default_device() -> torch.device:
    """The accelerator that is here (cuda, mps, xpu, …), else the processor."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def device_named(name: str | None) -> torch.device:
    """The device that `--device` names, or the default.

    Raises:
        ConfigError: torch knows none of that name, or it is not here.
    """
    if name is None:
        return default_device()
    try:
        asked = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device that torch knows, such as cpu, cuda or cuda:1") from None
    best = default_device().type
    here = [best, *(f"{best}:{i}" for i in range(torch.accelerator.device_count()))] if best != "cpu" else []
    if asked.type != "cpu" and str(asked) not in here:
        raise ConfigError(f"--device {name}: there is none here; it may be {', '.join(['cpu', *here])}")
    return asked
