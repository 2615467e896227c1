"""What a mistyped name may have meant: of a command, a flag or a setting in a file."""

import difflib
from collections.abc import Iterable

# What people of the field say for short, and what it is called here.
ABBREVIATIONS = {
    "bs": "batch_size",
    "cfg": "guidance_scale",
    "ckpt": "checkpoint",
    "lr": "learning_rate",
    "steps": "max_train_steps",
    "wd": "weight_decay",
}
MOST = 3


def likely(word: str, known: Iterable[str]) -> list[str]:
    """The names that a word which is none of them may stand for, at most three; hyphens and underscores are the same.

    One that is spelled nearly so; or else those of which every part of the word begins a part, so that `accum_steps` is
    `gradient_accumulation_steps`; or one that is spelled a little so.
    """
    names = {_plain(name): name for name in known}
    word = _plain(word)
    written_out = "_".join(ABBREVIATIONS.get(part, part) for part in word.split("_"))
    for asked in dict.fromkeys((written_out, word)):
        if near := difflib.get_close_matches(asked, names, n=1, cutoff=0.85):
            return [names[near[0]]]
        if begun := sorted((name for name in names if _begins_parts(asked, name)), key=lambda name: name.count("_")):
            return [names[name] for name in begun[:MOST]]
    return [names[name] for name in difflib.get_close_matches(word, names, n=1, cutoff=0.7)]


def perhaps(word: str, known: Iterable[str]) -> str:
    """The end of a message that a word is none of the known: "; perhaps you meant …", or nothing."""
    found = likely(word, known)
    return f"; perhaps you meant {' or '.join(found)}" if found else ""


def _begins_parts(word: str, name: str) -> bool:
    begins, parts = word.split("_"), name.split("_")
    return all(len(begin) > 1 and any(part.startswith(begin) for part in parts) for begin in begins)


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
