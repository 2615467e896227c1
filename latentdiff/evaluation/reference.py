"""What an evaluation asks for and holds the answers against: captions in a fixed order, and the real pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image

from ..config.train import TrainConfig
from ..data import emoji
from ..data.pictures import CaptionedPictures, EmojiPictures, OwnPictures, open_source
from ..data.survey import survey
from ..utils.files import cache_folder
from ..utils.randomness import fraction
from .features import picture_key, sha256_of
from .retrieval import plain_caption, take, training_queries


@dataclass(frozen=True)
class Questions:
    """N captions to draw, and M real pictures, the captions' own among them."""

    name: str
    """To quote: what the real pictures are."""
    captions: Sequence[str]
    own: Sequence[int]
    """For each caption the number of its own real picture."""
    images: Sequence[Image.Image]
    """The real pictures: RGB, of one size, perhaps decoded when they are asked for."""
    keys: Sequence[bytes]
    """Digests of what each real picture follows from."""
    held_out: CaptionedPictures
    """What the held-out loss is measured on."""
    asked: Sequence[tuple[emoji.Concept, str]] | None = None
    """The emoji and style of each caption, where these are the embedded emoji."""
    emoji_set: emoji.EmojiSet | None = None

    @property
    def sha256(self) -> str:
        """Of all real pictures."""
        return sha256_of(self.keys)


def emoji_questions(count: int, pictures: emoji.EmojiSet | None = None) -> Questions:
    """Training captions of the embedded emoji that name a style, half of each, and the default set on white.

    Raises:
        ConfigError: a count that the set does not have.
    """
    pictures = pictures or emoji.load()
    asked = take(training_queries(pictures), count, "training captions that name a style")
    indices = pictures.indices(held_out=None)
    images = [pictures.composite(i) for i in indices]
    numbers = {(pictures.rows[i][0].key, pictures.rows[i][1]): number for number, i in enumerate(indices)}
    return Questions(
        name=f"emoji64, {' and '.join(emoji.STYLES)} on white",
        captions=[plain_caption(*row) for row in asked],
        own=[numbers[concept.key, style] for concept, style in asked],
        images=images,
        keys=[picture_key(image) for image in images],
        held_out=EmojiPictures(),
        asked=asked,
        emoji_set=pictures,
    )


def own_questions(folder: Path, count: int, size: tuple[int, int], output_dir: Path) -> Questions:
    """The first caption of each picture of one's own, in an order that depends on the pictures' names alone.

    Args:
        folder: as `train_data_dir`; training should not have seen it, since the held-out loss is measured on it, too.
        size: width and height, to which the pictures' middles are brought.
        output_dir: where the list of pictures goes, and that of those that cannot be used.

    Raises:
        ConfigError: no such folder, pictures that cannot be used, or a count that it does not have.
    """
    config = TrainConfig(train_data_dir=str(folder), output_dir=str(output_dir))
    state = PartialState()
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        survey(config, open_source(config), cache_folder() / "seen.sqlite")
    state.wait_for_everyone()
    pictures = OwnPictures(config, lambda: open_source(config), [size])
    pictures.held_out = np.ones(len(pictures.held_out), bool)
    rows = sorted(range(len(pictures.held_out)), key=lambda row: fraction("evaluation", pictures.name(row)))
    own = take(rows, count, f"pictures in {folder}")
    return Questions(
        name=folder.resolve().name,
        captions=[pictures.captions[row][0] for row in own],
        own=own,
        images=_Decoded(pictures),
        keys=list(pictures.digests()),
        held_out=pictures,
    )


class _Decoded(Sequence):
    """A data set's pictures, each read when it is asked for."""

    def __init__(self, pictures: CaptionedPictures):
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures.held_out)

    def __getitem__(self, row: int) -> Image.Image:
        return self._pictures.image(row)
