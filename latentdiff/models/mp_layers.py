"""Operations and layers that keep the magnitude of what goes through them: independent numbers of unit variance come
out as such (Karras et al. 2023, arXiv 2312.02696, section 2 and appendix B)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

SILU_MAGNITUDE = 0.596  # of SiLU(x) for x ~ N(0, 1)


def pixel_norm(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Scaled to a root mean square of 1 over `dim` (section 2, appendix B)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x * (x.shape[dim] ** 0.5 / norm.clamp(min=1e-4)).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU at the magnitude of its input (eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) (eq. 88)."""
    norm = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / norm), b, alpha=t / norm)


def mp_cat(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Channels of both (B, C, …), scaled so that each is half of what follows, however many it has (eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    if n_a != n_b:
        a, b = a * ((n_a + n_b) / 2 / n_a) ** 0.5, b * ((n_a + n_b) / 2 / n_b) ** 0.5
    return torch.cat([a, b], dim=1)


def filter_norms(weight: torch.Tensor) -> torch.Tensor:
    """The norm of each filter along the first dimension, in float32, shaped to divide them."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True, dtype=torch.float32)


def _unit_filters(weight: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Each filter at the norm `gain`. Gradients lose what would only lengthen a filter (section 2, appendix B)."""
    return weight * (gain / filter_norms(weight).clamp(min=1e-12)).to(weight.dtype)


class MPLinear(nn.Linear):
    """A linear layer without bias whose rows act at unit norm, whatever norm is stored, as that of an average is."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _unit_filters(self.weight))


class MPConv2d(nn.Conv2d):
    """A convolution without bias whose filters act at unit norm, or at that of `gain`.

    The zeros around a grid have no magnitude: what they take from the sum, a third on a grid of 4 x 4, the filters make
    up for, on the average over the grid.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return F.conv2d(x, _unit_filters(self.weight, gain / self._share_inside(x) ** 0.5), padding=self.padding)

    def _share_inside(self, x: torch.Tensor) -> float:
        """The share of all numbers that the filters see at all places of a grid (B, C, h, w) which are its own."""
        kernel_size, padding = self.kernel_size[0], self.padding[0]
        outside = padding * (padding + 1)  # along an axis, of kernel_size for each place
        return math.prod(1 - outside / (kernel_size * size) for size in x.shape[2:])


@torch.no_grad()
def normalize_weights(module: nn.Module) -> None:
    """Store every filter at the norm sqrt(fan-in), a magnitude of 1 per number. What the layers compute stays the same.

    Training does so after each step of the optimizer, whose steps then turn filters of every size equally fast.
    """
    for layer in module.modules():
        if isinstance(layer, MPLinear | MPConv2d):
            layer.weight.mul_(layer.weight[0].numel() ** 0.5 / filter_norms(layer.weight).clamp(min=1e-12))


class FourierFeatures(nn.Module):
    """Numbers (B,) -> float32 cosines (B, C) of magnitude 1 (eq. 75).

    Frequencies and phases are the evenly spaced quantiles of the distributions that the paper draws them from, so that
    no precision in which the weights are kept rounds them.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = torch.arange(self.channels, device=x.device, dtype=torch.float32)
        turns = torch.special.ndtri((number + 0.5) / self.channels)
        phases = number * ((5**0.5 - 1) / 2) % 1  # steps of the golden ratio cover every range of frequencies evenly
        return (2 * math.pi * (x.float()[:, None] * turns + phases)).cos() * 2**0.5
