"""Distances between sets of features, against closed forms, scipy's root of a matrix and plain loops."""

import numpy as np
import pytest
import scipy.linalg
import torch

from latentdiff.evaluation import distances
from latentdiff.evaluation.distances import frechet_distance, frechet_distance_error, kernel_distance, precision_recall


def features(count: int, dimensions: int, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Correlated numbers: a fixed mixture of independent ones, scaled and shifted."""
    mixture = np.random.default_rng(99).normal(size=(dimensions, dimensions))
    drawn = np.random.default_rng(seed).normal(size=(count, dimensions)) @ mixture / dimensions**0.5
    return torch.from_numpy(drawn * scale + shift)


def by_the_formula(x: torch.Tensor, y: torch.Tensor) -> float:
    """As torchmetrics and pytorch-fid have it, with the root of a matrix."""
    (mean_x, cov_x), (mean_y, cov_y) = ((z.numpy().mean(0), np.cov(z.numpy(), rowvar=False)) for z in (x, y))
    root = scipy.linalg.sqrtm(cov_x @ cov_y)
    return float(np.square(mean_x - mean_y).sum() + np.trace(cov_x + cov_y - 2 * root.real))


@pytest.mark.parametrize(("m", "n"), [(300, 200), (40, 500), (15, 10)])  # more and fewer than the 20 dimensions
def test_frechet_distance_is_the_formula(m, n):
    """Else no number here could stand beside another project's."""
    x, y = features(m, 20, 0), features(n, 20, 1, shift=0.3, scale=1.5)
    assert frechet_distance(x, y) == pytest.approx(by_the_formula(x, y), rel=1e-5 if min(m, n) > 20 else 1e-4)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_frechet_distance_of_two_lines():
    """In one dimension it is (mu_1 - mu_2)^2 + (s_1 - s_2)^2; of a set and itself 0, of a shifted one its square."""
    x, y = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[10.0], [11.0], [12.0]])
    assert frechet_distance(x, y) == pytest.approx((2 - 11) ** 2 + (2 - 1) ** 2)
    z = features(30, 50)
    assert frechet_distance(z, z) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(z, z + 2) == pytest.approx(50 * 4)


def test_features_in_half_precision_are_not_summed_in_it():
    """Sums of thousands of squares in float16 would overflow."""
    x, y = (features(400, 8, seed, scale=40).half() for seed in (0, 1))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(x.double(), y.double()), rel=1e-12)


def test_the_error_of_the_frechet_distance_is_its_spread():
    """Two samplers would be told apart by chance, or not where they differ; above and below as many as dimensions."""
    for count in (80, 15):
        real = features(200, 20, 1000, shift=0.3)
        drawn = [features(count, 20, seed) for seed in range(80)]
        spread = np.std([frechet_distance(x, real) for x in drawn], ddof=1)
        errors = np.array([frechet_distance_error(x, real) for x in drawn])
        assert 0.8 * spread < np.mean(errors**2) ** 0.5 < 1.6 * spread
    assert frechet_distance_error(features(4, 20), real) > 0


def mmd_by_loops(x: torch.Tensor, y: torch.Tensor) -> float:
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_kernel_distance_is_the_double_loop(monkeypatch):
    """A picture beside itself would make the estimate biased; or the pieces of the sum not be the whole."""
    x, y = features(12, 5, 0), features(9, 5, 1, shift=0.5)
    expected = mmd_by_loops(x, y)
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(distances, "ROWS", 4)
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-9)


def test_the_error_of_the_kernel_distance_is_that_of_leaving_each_out():
    """Closed sums stand for as many values as there are pictures: one slip, and the error quoted is another's."""
    x, y = features(8, 4, 0), features(6, 4, 1, shift=0.5)
    variance = 0.0
    for ours, other in ((x, y), (y, x)):
        values = [mmd_by_loops(torch.cat([ours[:i], ours[i + 1 :]]), other) for i in range(len(ours))]
        variance += (len(ours) - 1) * np.var(values)
    assert kernel_distance(x, y).standard_error == pytest.approx(variance**0.5, rel=1e-9)


def test_kernel_distance_is_zero_on_average_for_one_distribution():
    """A biased estimate would depend on the count of pictures; an error that is too small find differences in noise."""
    found = [kernel_distance(features(40, 6, 2 * seed), features(25, 6, 2 * seed + 1)) for seed in range(200)]
    values, errors = (np.array(numbers) for numbers in zip(*found, strict=True))
    spread = values.std(ddof=1)
    assert abs(values.mean()) < 4 * spread / len(values) ** 0.5
    assert spread < (errors**2).mean() ** 0.5 < 1.8 * spread


def test_the_error_of_a_true_difference_is_its_spread():
    found = [kernel_distance(features(40, 6, 2 * s), features(25, 6, 2 * s + 1, shift=0.7)) for s in range(200)]
    values, errors = (np.array(numbers) for numbers in zip(*found, strict=True))
    assert values.mean() > 5 * values.std() / 20
    assert (errors**2).mean() ** 0.5 == pytest.approx(values.std(ddof=1), rel=0.25)


def test_precision_and_recall_of_closed_cases():
    """Sets that are one, far apart, or a part of the other; and a drawn picture that lies far from all others."""
    real = features(30, 4)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    line = torch.arange(10.0)[:, None]
    drawn = torch.cat([line[:5], torch.tensor([[1000.0]])])
    # Of the line each ball reaches to its neighbour: the last lies outside of all. Among the drawn its own ball reaches
    # back to 4, so that it covers the whole line.
    assert precision_recall(line, drawn, k=1) == (5 / 6, 1)
    assert precision_recall(line, line[:5] + 0.25, k=1) == (1, 0.6)  # 0 … 5 lie within 1 of 0.25 … 4.25, 6 of 10


@pytest.mark.parametrize("measure", [frechet_distance, frechet_distance_error, kernel_distance, precision_recall])
def test_what_makes_no_sense_is_refused(measure):
    good = features(10, 4)
    for bad, said in (
        (features(10, 5), r"\(N, D\) and \(M, D\)"),
        (good[0], r"\(N, D\) and \(M, D\)"),
        (good[:1], "at least"),
        (good / 0, "not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            measure(good, bad)


def test_neighbours_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="k is 3; it must be from 1 to 2"):
        precision_recall(features(10, 4), features(3, 4))
