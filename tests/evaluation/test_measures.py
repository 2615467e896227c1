"""Drawn pictures against real ones: the numbers are those of the distances, beside a floor that is fairly drawn."""

# ruff: noqa: F401, F811 - the fixture of another file

import numpy as np
import pytest
import torch

from latentdiff.evaluation import distances, measures, retrieval
from latentdiff.evaluation.features import extract_features, picture_key, sha256_of
from latentdiff.evaluation.measures import emoji_reference, measure, measure_emoji, measure_floor
from latentdiff.utils.errors import ConfigError
from tests.evaluation.test_retrieval import Thumbnail, noise_artist, real_artist, toy_set


def features(count: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 8)) + shift).float()


def test_each_measure_is_the_distance_of_its_name():
    """Precision and recall would be exchanged, or numbers stand under another's name."""
    drawn, real = features(30, shift=0.5), features(50, 1)
    found = measure(drawn, real)
    assert (found.count, found.reference_count) == (30, 50)
    assert found.frechet_distance == distances.frechet_distance(drawn, real)
    assert found.frechet_distance_error == distances.frechet_distance_error(drawn, real)
    assert (found.kernel_distance, found.kernel_distance_error) == distances.kernel_distance(drawn, real)
    assert (found.precision, found.recall) == distances.precision_recall(real=real, drawn=drawn)
    # Pictures of one kind are precise and leave most out.
    few = measure(real[:1] + 0.01 * features(30), real)
    assert few.precision == 1 and few.recall < 0.2


def test_the_floor_is_real_pictures_against_the_others(monkeypatch):
    """A picture on both sides would be at no distance from itself, and the floor be too low to reach."""
    real = features(61)
    floor = measure_floor(real, 20)
    assert (floor.count, floor.reference_count) == (20, 41)
    halves = measure_floor(real, 1000)
    assert (halves.count, halves.reference_count) == (30, 31)
    assert floor == measure_floor(real, 20) and abs(floor.kernel_distance) < 4 * floor.kernel_distance_error
    monkeypatch.setattr(measures, "measure", lambda *sides: sides)
    sides = measure_floor(real, 20)
    assert sorted(torch.cat(sides)[:, 0].tolist()) == sorted(real[:, 0].tolist())
    more, _ = measure_floor(real, 25)
    assert torch.equal(more[:20], sides[0])


def test_the_frechet_distance_falls_with_the_count():
    """Why counts are quoted: the same real pictures, only more of them, come out nearer."""
    real = features(400)
    few, more = measure_floor(real, 10), measure_floor(real, 150)
    assert few.frechet_distance > 2 * more.frechet_distance


def test_too_few_pictures_are_refused():
    with pytest.raises(ConfigError, match="3 pictures against 50 cannot be measured: there must be 4 of each"):
        measure(features(3), features(50))


def test_emoji_are_measured_at_once(toy_set):
    """The real pictures themselves are at no distance and all found; noise is far and found by chance."""
    network = Thumbnail()
    reference, galleries = emoji_reference(network, toy_set)
    assert (
        reference.features.shape == (120, 768)
        and reference.name == "emoji64, twemoji and openmoji on white, 120 pictures"
    )
    real = [toy_set.composite(i) for i in toy_set.indices(held_out=None)]
    assert reference.sha256 == sha256_of(map(picture_key, real))
    assert torch.equal(reference.features, extract_features(network, real))  # else the floor were another draw

    asked = retrieval.training_queries(toy_set)[:40]
    captions = [retrieval.plain_caption(*row) for row in asked]
    right = measure_emoji([real_artist(toy_set)(c, None) for c in captions], asked, network, reference, galleries)
    generator = torch.Generator().manual_seed(0)
    noise = measure_emoji([noise_artist("", generator) for _ in asked], asked, network, reference, galleries)
    assert right.retrieval.drawn.at_1 == 1 and right.drawn.precision == 1
    assert noise.retrieval.drawn.at_1 < 0.2 and noise.drawn.precision == 0
    assert noise.drawn.frechet_distance > 2 * right.floor.frechet_distance > right.drawn.frechet_distance
    assert right.floor == noise.floor and right.floor.count == 40
