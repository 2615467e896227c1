"""How far two sets of pictures lie apart, from a network's features of them: pure functions of tensors (N, D).

Fréchet distance: Heusel et al. 2017 (arXiv 1706.08500); kernel distance: Bińkowski et al. 2018 (arXiv 1801.01401);
precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991). All in float64, whatever the features come in.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

ROWS = 1024  # of a matrix of all pairs that are in memory at a time
NEIGHBOURS = 3  # k of the manifolds of precision and recall, as in the paper


class KernelDistance(NamedTuple):
    """An unbiased estimate, which may be negative, and its standard error."""

    value: float
    standard_error: float


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    """Of the drawn pictures, those that lie among the real ones."""
    recall: float
    """Of the real pictures, those that lie among the drawn ones."""


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of the Gaussians with the sets' means and covariances
    (arXiv 1706.08500, eq. 6): not negative, and biased upwards the more the fewer pictures there are.

    With X centred and divided by sqrt(N - 1), S = X^T X, so S_1 S_2 has the eigenvalues of the positive matrix
    (X_1 X_2^T)(X_1 X_2^T)^T, and the trace of its root is the sum of the singular values of X_1 X_2^T. No root of a
    matrix is taken, which fails where there are fewer pictures than dimensions.

    Args:
        first, second: (N, D) and (M, D).

    Raises:
        ValueError: fewer than two rows, not as many columns, or numbers that are not finite.
    """
    return _between(*map(_centred, _checked(first, second)))


def frechet_distance_error(drawn: torch.Tensor, real: torch.Tensor, groups: int = 10) -> float:
    """The standard error of the Fréchet distance that comes from which pictures were drawn: the jackknife's, with a
    group of them left out in turn. The bias is the same without each group and does not enter.

    Args:
        drawn: (N, D), N at least 4; fewer than 2 * `groups` are put into fewer groups.
        real: (M, D).

    Raises:
        ValueError: as `frechet_distance`.
    """
    drawn, real = _checked(drawn, real, least=4)
    groups = min(groups, len(drawn) // 2)
    group, of_real = torch.arange(len(drawn)) % groups, _centred(real)
    without_each = torch.tensor([_between(_centred(drawn[group != out]), of_real) for out in range(groups)])
    return ((groups - 1) * without_each.double().var(correction=0)).sqrt().item()


_Centred = tuple[torch.Tensor, torch.Tensor]


def _centred(features: torch.Tensor) -> _Centred:
    """X of at most D rows with X^T X the covariance; the mean (D,)."""
    mean = features.mean(dim=0)
    x = (features - mean) / (len(features) - 1) ** 0.5
    if len(x) > x.shape[1]:
        x = torch.linalg.qr(x, mode="r").R  # the same X^T X
    return x, mean


def _between(first: _Centred, second: _Centred) -> float:
    (x, mean_x), (y, mean_y) = first, second
    trace_of_root = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean_x - mean_y).square().sum() + x.square().sum() + y.square().sum() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> KernelDistance:
    """The squared maximum mean discrepancy under k(x, y) = (x . y / D + 1)^3, unbiased (arXiv 1801.01401, eq. 4).

    Its standard error is the jackknife's: the spread of the values with each picture left out in turn (Arvesen 1969 for
    two samples). On average it is not too small, and about 1.4 times too large where both sets come from one
    distribution (Efron & Stein 1981, The jackknife estimate of variance).

    Args, Raises:
        as `frechet_distance`, with at least three rows each.
    """
    x, y = _checked(first, second, least=3)
    of_x, of_y = _sums_with_others(x, x) - _kernel_of_itself(x), _sums_with_others(y, y) - _kernel_of_itself(y)
    x_to_y, y_to_x = _sums_with_others(x, y), _sums_with_others(y, x)
    m, n = len(x), len(y)
    within_x, within_y, across = of_x.sum(), of_y.sum(), x_to_y.sum()
    value = within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * across / (m * n)
    without_each_x = (within_x - 2 * of_x) / ((m - 1) * (m - 2)) - 2 * (across - x_to_y) / ((m - 1) * n)
    without_each_y = (within_y - 2 * of_y) / ((n - 1) * (n - 2)) - 2 * (across - y_to_x) / (m * (n - 1))
    variance = sum((k - 1) * v.var(correction=0) for k, v in ((m, without_each_x), (n, without_each_y)))
    return KernelDistance(value.item(), variance.sqrt().item())


def _kernel_of_itself(features: torch.Tensor) -> torch.Tensor:
    return (features.square().sum(dim=1) / features.shape[1] + 1) ** 3


def _sums_with_others(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """For each row the sum of k with all of `others`: (N,)."""
    return torch.cat([((part @ others.T / others.shape[1] + 1) ** 3).sum(dim=1) for part in features.split(ROWS)])


def precision_recall(real: torch.Tensor, drawn: torch.Tensor, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Which pictures of one set lie on the manifold of the other, the union of the balls around its pictures that reach
    to their k-th nearest neighbours in it (arXiv 1904.06991, eq. 1 and 2).

    Args:
        real, drawn: (N, D) and (M, D).
        k: below N and M.

    Raises:
        ValueError: as `frechet_distance`, or k out of range.
    """
    real, drawn = _checked(real, drawn)
    if not 1 <= k < min(len(real), len(drawn)):
        raise ValueError(f"k is {k}; it must be from 1 to {min(len(real), len(drawn)) - 1}, one less than pictures")
    return PrecisionRecall(_share_inside(drawn, real, k), _share_inside(real, drawn, k))


def _share_inside(features: torch.Tensor, manifold: torch.Tensor, k: int) -> float:
    # The nearest of all is the picture itself.
    radii = torch.cat([distances.kthvalue(k + 1, dim=1).values for distances in _distances(manifold, manifold)])
    inside = torch.cat([(distances <= radii).any(dim=1) for distances in _distances(features, manifold)])
    return inside.double().mean().item()


def _distances(features: torch.Tensor, others: torch.Tensor) -> Iterator[torch.Tensor]:
    """(rows, M) at a time, from differences rather than products: of equal pictures exactly 0."""
    for part in features.split(ROWS):
        yield torch.cdist(part, others, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(first: torch.Tensor, second: torch.Tensor, least: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features must be of shapes (N, D) and (M, D), not {shapes}")
    if min(len(first), len(second)) < least:
        raise ValueError(f"features are of shapes {shapes}; there must be at least {least} rows of each")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("features hold numbers that are not finite")
    return first.double(), second.double()
