"""Exponential moving averages of weights, counted in optimizer steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .sharding import own_part


class EMA:
    """A running average, in float32, of those of a module's parameters that are trained.

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that early averages are not held back by the
    initial weights. Of a sharded module each process averages what it holds.

    Args:
        module: whose parameters that require gradients are averaged; the average starts from them.
        decay: in [0, 1).
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        self.decay = decay
        self.parameters = [p.detach().float().clone() for p in _trained(module)]

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in _trained(module)]
        torch._foreach_lerp_(self.parameters, current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Write the average into the module's parameters, in their dtype."""
        torch._foreach_copy_(_trained(module), self.parameters)

    @torch.no_grad()
    def copy_from(self, module: torch.nn.Module) -> None:
        """Take the module's parameters as the average, e.g. after loading one from disk."""
        torch._foreach_copy_(self.parameters, _trained(module))

    @contextmanager
    def swapped_into(self, module: torch.nn.Module) -> Iterator[None]:
        """In the block the module computes with the average; afterwards, also on errors, it has its own weights."""
        kept = [p.detach().clone() for p in _trained(module)]
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(_trained(module), kept)


def _trained(module: torch.nn.Module) -> list[torch.Tensor]:
    return [own_part(p) for p in module.parameters() if p.requires_grad]
