"""Prompt retrieval and composition: known answers on toy features, pipelines that draw what they should, or noise."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from latentdiff.data import emoji
from latentdiff.evaluation import backgrounds, retrieval
from latentdiff.evaluation.retrieval import DrawSettings, found_at, recall_at
from latentdiff.utils.errors import ConfigError


class Thumbnail:
    """A toy judge: the 16x16 thumbnail itself."""

    name, sha256 = "thumbnail", "0" * 64

    def features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1)


@pytest.fixture(scope="module")
def toy_set() -> emoji.EmojiSet:
    """60 "emoji" in both styles: a random pattern in the middle, the other style a little different."""
    generator = np.random.default_rng(0)
    rows, pictures = [], []
    for i in range(60):
        names = (f"thing {i}",)
        concept = emoji.Concept(key=f"{i:x}", names=names, category=emoji.CATEGORIES[0], emoji_version=1.0)
        pattern = generator.integers(0, 256, (8, 8, 3))
        for style in emoji.STYLES:
            picture = np.zeros((64, 64, 4), np.uint8)
            changed = np.clip(pattern + generator.integers(-40, 40, pattern.shape), 0, 255)
            picture[12:52, 12:52, :3] = np.kron(changed, np.ones((5, 5, 1)))
            picture[12:52, 12:52, 3] = 255
            pictures.append(picture)
            rows.append((concept, style))
    return emoji.EmojiSet(np.stack(pictures), rows, {})


class FakePipeline:
    """Draws by `artist(prompt, generator)`, and keeps the size of each batch it was asked for."""

    scheduler = SimpleNamespace()

    def __init__(self, artist):
        self.artist, self.batches = artist, []

    def __call__(self, prompts, num_inference_steps, guidance_scale, generator, output_type):
        assert output_type == "pil"
        self.batches.append(len(prompts))
        return SimpleNamespace(images=[self.artist(*pair) for pair in zip(prompts, generator, strict=True)])


def real_artist(pictures: emoji.EmojiSet):
    """Draws the very picture that a caption names."""
    drawn = {}
    for i, (concept, style) in enumerate(pictures.rows):
        for colour in emoji.BACKGROUNDS:
            drawn[retrieval.plain_caption(concept, style, colour)] = (i, colour)
    return lambda prompt, generator: pictures.composite(*drawn[prompt])


def noise_artist(prompt, generator):
    return Image.fromarray(torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy())


# ---- recall on features whose answer is known


def test_recall_counts_the_targets_among_the_nearest():
    """Directions in a plane around a mean of zero: the order of the neighbours is that of the angles."""

    def at(degrees):
        radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([radians.cos(), radians.sin()], dim=1)

    gallery, queries = at([0.0, 90.0, 180.0, 270.0]), at([10.0, 80.0, 80.0, 350.0])
    targets = torch.tensor([0, 0, 2, 0])  # nearest first: 0 1 3 2, 1 0 2 3, 1 0 2 3, 0 3 1 2
    assert [recall_at(queries, gallery, targets, k) for k in (1, 2, 3, 4)] == [0.5, 0.75, 1.0, 1.0]
    # A length, or a shift of both, says nothing.
    assert recall_at(7 * queries + 5, gallery + 5, targets, 1) == recall_at(7 * queries, gallery, targets, 1) == 0.5


def test_equally_near_pictures_share_the_chance():
    """A model that draws the gallery's mean is as near to everything: it must score k / M, not 1."""
    gallery = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    queries, targets = torch.zeros(4, 2), torch.arange(4)
    assert recall_at(queries, gallery, targets, 1) == 0.25
    assert recall_at(queries, gallery, targets, 3) == 0.75


def test_a_broken_picture_finds_nothing():
    gallery, targets = torch.eye(3), torch.arange(3)
    assert recall_at(torch.eye(3), gallery, targets, 1) == 1
    assert found_at(torch.full((3, 3), float("nan")), gallery, targets, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("k", [0, 4])
def test_recall_refuses_a_k_the_gallery_does_not_have(k):
    with pytest.raises(ValueError, match=f"k is {k}; the gallery has 3"):
        recall_at(torch.eye(3), torch.eye(3), torch.arange(3), k)


# ---- retrieval


def test_the_real_pictures_are_all_found(toy_set, tmp_path):
    pipeline = FakePipeline(real_artist(toy_set))
    settings = DrawSettings(num_inference_steps=3, guidance_scale=2.0, seed=5, batch_size=16)
    result = retrieval.measure_retrieval(pipeline, count=40, settings=settings, network=Thumbnail(), pictures=toy_set)
    assert (result.drawn.at_1, result.drawn.at_10) == (1.0, 1.0)
    assert result.floor.at_1 == 0, "a shuffled caption must never be the picture's own"
    assert result.ceiling.at_1 > 0.9, "the toy styles differ by little"
    assert pipeline.batches == [16, 16, 8]

    result.save_json(tmp_path / "new" / "metrics.json")
    saved = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert saved["drawn"] == {"at_1": 1.0, "at_10": 1.0}
    assert {name: saved[name] for name in ("count", "gallery_size", "sampler", "network", "seed")} == {
        "count": 40, "gallery_size": 60, "sampler": "SimpleNamespace", "network": "thumbnail", "seed": 5
    }  # fmt: skip
    assert (saved["num_inference_steps"], saved["guidance_scale"]) == (3, 2.0)


def test_noise_is_found_by_chance_alone(toy_set):
    """R@10 in a gallery of 60 is 1/6 by chance: 100 captions stay within four deviations (0.15) of it."""
    result = retrieval.measure_retrieval(FakePipeline(noise_artist), count=100, network=Thumbnail(), pictures=toy_set)
    assert abs(result.drawn.at_10 - 1 / 6) < 0.15
    assert abs(result.floor.at_10 - 1 / 6) < 0.15
    assert result.drawn.at_1 < 0.1


def test_the_other_style_of_the_right_emoji_is_no_self_match(toy_set):
    """Drawing the real picture of the other style must give exactly the ceiling."""
    real = real_artist(toy_set)
    swap = {"twemoji": "openmoji", "openmoji": "twemoji"}

    def artist(prompt, generator):
        thing, style = prompt.removesuffix(" style").split(", ")
        return real(f"{thing}, {swap[style]} style", generator)

    result = retrieval.measure_retrieval(FakePipeline(artist), count=60, network=Thumbnail(), pictures=toy_set)
    assert result.drawn == result.ceiling


def test_queries_are_trained_emoji_and_half_of_each_style(toy_set):
    asked = retrieval.training_queries(toy_set)
    assert len(set(asked)) == len(asked) == len(toy_set.indices())
    assert not any(concept.held_out for concept, _ in asked)
    first = asked[:20]
    assert len({concept for concept, _ in first}) == 20, "no emoji twice before all were once"
    assert sum(style == "twemoji" for _, style in first) == 10


def test_pictures_do_not_depend_on_the_batch_size():
    prompts = [f"picture {i}" for i in range(7)]
    drawn = [
        retrieval.draw(FakePipeline(noise_artist), prompts, DrawSettings(seed=3, batch_size=size)) for size in (1, 3, 7)
    ]
    arrays = np.stack([[np.asarray(image) for image in images] for images in drawn])
    assert (arrays == arrays[0]).all()
    assert len(np.unique(arrays[0].reshape(7, -1), axis=0)) == 7, "each picture has noise of its own"


@pytest.mark.parametrize("count", [3, 10_000])
def test_a_count_the_set_does_not_have_is_refused(toy_set, count):
    with pytest.raises(ConfigError, match=f"count is {count}; it must be from 4 to {len(toy_set.indices())}"):
        retrieval.measure_retrieval(FakePipeline(noise_artist), count=count, network=Thumbnail(), pictures=toy_set)


@pytest.mark.parametrize("wrong", [{"num_inference_steps": 0}, {"batch_size": 0}, {"seed": -1}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DrawSettings(**wrong)


# ---- composition


def test_pairs_are_held_out_beside_trained_ones(toy_set):
    both = backgrounds.composition_pairs(toy_set)
    assert len(set(both)) == len(both) > 100
    for held_out, seen in both:
        assert held_out.concept.pair_held_out(held_out.colour)
        assert not seen.concept.pair_held_out(seen.colour) and not seen.concept.held_out
        assert (held_out.concept, held_out.style) == (seen.concept, seen.style)
        assert toy_set.rows[held_out.index] == (held_out.concept, held_out.style)


def test_right_pictures_have_the_right_colours_and_are_found(toy_set):
    pipeline = FakePipeline(real_artist(toy_set))
    result = backgrounds.measure_backgrounds(pipeline, count=24, network=Thumbnail(), pictures=toy_set)
    assert (result.colour_held_out, result.colour_seen) == (1.0, 1.0)
    assert result.held_out == result.seen == result.real == retrieval.Recall(at_1=1.0, at_10=1.0)
    assert "held out  colour 1.000  R@1 1.000" in str(result)


def test_pictures_on_white_have_none_of_the_colours_asked_for(toy_set):
    real = real_artist(toy_set)
    pipeline = FakePipeline(lambda prompt, generator: real(prompt.split(", on a ")[0], generator))
    result = backgrounds.measure_backgrounds(pipeline, count=24, network=Thumbnail(), pictures=toy_set)
    assert (result.colour_held_out, result.colour_seen) == (0.0, 0.0)
    assert result.held_out.at_1 == 1.0


@pytest.mark.parametrize("name", emoji.BACKGROUNDS)
def test_a_named_colour_is_read_off_the_border_through_noise(name):
    noise = np.random.default_rng(0).normal(0, 15, (64, 64, 3))
    pixels = np.clip(np.array(emoji.BACKGROUNDS[name]) + noise, 0, 255).astype(np.uint8)
    pixels[2:-2, 2:-2] = 255 - pixels[2:-2, 2:-2]
    assert backgrounds.nearest_colour(backgrounds.border_colour(Image.fromarray(pixels))) == name


def test_the_tolerance_keeps_named_colours_apart():
    colours = np.array(list(emoji.BACKGROUNDS.values()), dtype=float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=2)[np.triu_indices(len(colours), 1)]
    assert distances.min() > 2 * backgrounds.BACKGROUND_TOLERANCE


def test_masking_spares_what_the_border_does_not_reach():
    """A ring cuts the picture in two: outside becomes white, inside keeps the background's colour."""
    blue = emoji.BACKGROUNDS["blue"]
    picture = Image.new("RGB", (64, 64), blue)
    ImageDraw.Draw(picture).rectangle((16, 16, 47, 47), outline=(250, 225, 60), width=4)
    ImageDraw.Draw(picture).line((32, 0, 32, 16), fill=(250, 225, 60))  # touches the border: both sides must go
    masked = np.asarray(backgrounds.mask_background(picture))
    assert (masked[5, [5, 60]] == 255).all() and (masked[[60, 40], [5, 60]] == 255).all()
    assert masked[32, 32].tolist() == list(blue)
    assert masked[17, 32].tolist() == masked[5, 32].tolist() == [250, 225, 60]
