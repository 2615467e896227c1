"""The embedded data set: its pictures, captions and splits."""

import numpy as np
import pytest

from latentdiff.data import emoji


@pytest.fixture(scope="module")
def built():
    return emoji.load()


def concept(built, name):
    return next(concept for concept, _ in built.rows if concept.names[0] == name)


def test_every_concept_is_drawn_once_in_every_style(built):
    """The retrieval ceiling compares the two styles of one emoji."""
    pairs = [(concept.key, style) for concept, style in built.rows]
    assert len(set(pairs)) == len(pairs) == built.pictures.shape[0]
    keys = {key for key, _ in pairs}
    assert len(pairs) == len(keys) * len(emoji.STYLES)
    assert len(keys) > 1000 and len(built.indices()) > 1000


def test_default_leaves_out_what_it_says(built):
    for index in built.indices(held_out=None):
        drawn = built.rows[index][0]
        assert drawn.category in emoji.CATEGORIES and drawn.emoji_version <= 3
        assert not any("1f3fb" <= part <= "1f3ff" for part in drawn.key.split("-") if len(part) == 5)
        assert "20e3" not in drawn.key
    assert {"skin tone", "flag", "keycap or letter"} <= set(built.left_out)


def test_pictures_are_not_blank(built):
    """An SVG that failed to render would be trained on as white."""
    opaque = (built.pictures[..., 3] > 128).mean(axis=(1, 2))
    assert opaque.min() > 0.005
    shades = [np.unique(np.asarray(built.composite(i))).size for i in built.indices()[:50]]
    assert min(shades) > 3


def test_border_shows_the_background(built):
    """The colour asked for is measured at the border, so the emoji must leave it free."""
    for colour, rgb in emoji.BACKGROUNDS.items():
        pixels = np.stack([np.asarray(built.composite(i, colour)) for i in built.indices()[:40]])
        corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == rgb).all(axis=-1).mean() > 0.9


def test_splits_are_fixed_by_code_point():
    """The split would move with the order or the number of emoji: it is a hash of the code points alone."""
    import hashlib

    for key in ("1f408", "1f34e", "1f680"):
        cat = emoji.Concept(key=key, names=("x",), category="Objects", emoji_version=1.0)
        digest = hashlib.sha256(f"concept-0|{key}".encode()).hexdigest()[:16]
        assert cat.held_out == (int(digest, 16) / 2**64 < 0.05)
        assert not cat.pair_held_out("white")


def test_shares_of_the_splits(built):
    default = {built.rows[i][0] for i in built.indices(held_out=None)}
    assert 0.03 < np.mean([c.held_out for c in default]) < 0.08
    pairs = np.mean([c.pair_held_out(colour) for c in default for colour in emoji.COLOURS])
    assert 0.13 < pairs < 0.17
    assert not {built.rows[i][0].key for i in built.indices()} & {
        built.rows[i][0].key for i in built.indices(held_out=True)
    }


@pytest.mark.parametrize(
    "name, words",
    [
        ("cat", "a cat"),
        ("umbrella", "an umbrella"),
        ("grapes", "grapes"),
        ("unicorn", "a unicorn"),
        ("popcorn", "popcorn"),
    ],
)
def test_articles(name, words):
    assert emoji.noun_phrase(name) == words


def test_captions_say_style_and_colour(built):
    said = emoji.captions(concept(built, "cat"), "twemoji", "blue")
    assert said[:2] == ["a cat on a blue background", "a cat, twemoji style, on a blue background"]
    assert all("blue background" in caption for caption in said)
    assert all("background" not in caption for caption in emoji.captions(concept(built, "cat"), "twemoji"))
    assert "the face of a cat" in emoji.captions(concept(built, "cat face"), "twemoji")
    assert "a slice of cake" in emoji.captions(concept(built, "shortcake"), "openmoji")


def test_training_captions_are_a_fixed_choice(built):
    cat = concept(built, "cat face")
    assert emoji.training_captions(cat, "twemoji", "red", 4) == emoji.training_captions(cat, "twemoji", "red", 4)
    assert set(emoji.training_captions(cat, "twemoji", "white", 8)) <= set(emoji.captions(cat, "twemoji"))


def test_captions_name_the_colour_of_the_thing(built):
    said = emoji.captions(concept(built, "automobile"), "twemoji", "blue", "orange")
    assert said[0] == "an orange automobile on a blue background" and "an orange car on a blue background" in said
    assert not any("red" in caption for caption in said)  # its everyday name "red car" says a colour already
    assert concept(built, "automobile").names_without_colour[:2] == ("automobile", "car")
    assert not concept(built, "green apple").names_without_colour


def test_colours_are_far_apart():
    """A border pixel must have one clear nearest name."""
    values = np.array(list(emoji.BACKGROUNDS.values()), dtype=float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=-1) + 1e9 * np.eye(len(values))
    assert distances.min() > 60
