"""The files that a saved model's weights lie in: which are read, which another saving left, and the names in them.

How files are named is what diffusers and transformers have done since 2023.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

SAVING = ".saving-"  # begins the name of a folder in which a model is written before it is moved to where it belongs

# Whole, a shard, or the index of shards; the variant, such as "fp16", stands in one of three places.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(?:safetensors|bin)"
    r"(?:\.index(?:\.(\w+))?\.json)?"
)
# What a tokenizer is read from, by one release of transformers or another.
_VOCABULARY = {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"}

# By the class that was saved: how its weights' names begin since transformers 5.6, and how they did in all releases
# before. Those find none under the new names, and go on with random numbers that they merely report; what converts to a
# single file, and exports made with those releases, do the same. All releases read the earlier names.
_EARLIER_NAMES = {
    "CLIPTextModel": ("", "text_model."),
    "CLIPVisionModel": ("", "vision_model."),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model.vision_model."),
}


def only_variant(folder: str | os.PathLike) -> str | None:
    """The variant that has to be named for a model, or a pipeline, to load: a part of it has no other weights.

    None where none has to be, several would have to, or there is no such folder.
    """
    folder = Path(folder)
    parts = [folder / name for name in _settings(folder / "model_index.json") or ["."]]
    found = [{variant for _, variant in _weights(part)} for part in parts if part.is_dir()]
    needed = set().union(*(of_part for of_part in found if None not in of_part))
    return needed.pop() if len(needed) == 1 else None


def _settings(path: Path) -> dict:
    """What a JSON file says; nothing where it is missing or damaged, which loading the model says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _weights(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files of weights in a model's folder, each with its variant."""
    for path in folder.iterdir():
        if found := _WEIGHTS.fullmatch(path.name):
            yield path, next(filter(None, found.groups()), None)


def remove_half_saved(folder: Path) -> None:
    """Remove what killed processes were saving in a folder that this one alone writes to."""
    for path in folder.glob(f"{SAVING}*"):
        shutil.rmtree(path, ignore_errors=True)


def move_saved(aside: Path, folder: Path) -> None:
    """Move a pipeline that was saved in a folder of its own to where it belongs.

    What another model left there, and would be read in its place, is removed: see `remove_replaced`.
    """
    for source in (aside, *(path for path in aside.iterdir() if path.is_dir())):
        target = folder / source.relative_to(aside)
        target.mkdir(exist_ok=True)
        written = {path.name for path in source.iterdir() if path.is_file()}
        for name in written:
            os.replace(source / name, target / name)
        remove_replaced(target, written)


def remove_replaced(folder: Path, written: set[str]) -> None:
    """Of a model's or a tokenizer's folder, remove what would be read in place of the files that were just written.

    These are weights of the same variant in other files (whole, in shards, pickled), and other vocabularies. Other
    variants stay, since a model's are saved one by one.
    """
    weights = {path.name: variant for path, variant in _weights(folder)}
    saved = {variant for name, variant in weights.items() if name in written}
    left = {name for name, variant in weights.items() if variant in saved}
    left |= _VOCABULARY if written & _VOCABULARY else set()
    for name in left - written:
        (folder / name).unlink(missing_ok=True)


def remove_variants(folder: Path) -> None:
    """Remove a model's weights but for those of no variant."""
    for path, variant in list(_weights(folder)):
        if variant is not None:
            path.unlink()


def remove_pipeline(folder: Path) -> None:
    """Remove a saved pipeline: its index, and those folders beside it that the index names as parts."""
    index = folder / "model_index.json"
    parts = _settings(index)
    index.unlink(missing_ok=True)  # first: what is half removed is no pipeline
    for path in folder.iterdir():  # rather than the index's names, which may lead anywhere
        if path.is_dir() and isinstance(parts.get(path.name), list):
            shutil.rmtree(path, ignore_errors=True)


def write_earlier_names(folder: Path) -> None:
    """Have all releases of transformers 4 and 5 read what the present one saved in a model's or a tokenizer's folder.

    Weights get the names of `_EARLIER_NAMES`; of a tokenizer of CLIP's the files are added that releases before 5 read.
    What is that way already is left alone.
    """
    kinds = _settings(folder / "config.json").get("architectures") or [None]
    for path, _ in list(_weights(folder)) if kinds[0] in _EARLIER_NAMES else []:
        _rename_weights(path, *_EARLIER_NAMES[kinds[0]])
    kind = _settings(folder / "tokenizer_config.json").get("tokenizer_class")
    if kind in ("CLIPTokenizer", "CLIPTokenizerFast") and (folder / "tokenizer.json").is_file():
        Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))  # vocab.json and merges.txt


def _rename_weights(path: Path, beginning: str, earlier: str) -> None:
    """In a file of weights, or the index of several."""

    def renamed(names: dict) -> dict:
        return {earlier_name(name): value for name, value in names.items()}

    def earlier_name(name: str) -> str:
        is_new = name.startswith(beginning) and not name.startswith(earlier)
        return earlier + name.removeprefix(beginning) if is_new else name

    if path.suffix == ".json":
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = renamed(index["weight_map"])
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            names, metadata = dict.fromkeys(file.keys()), file.metadata()
        if renamed(names).keys() != names.keys():
            aside = path.with_name(f".{path.name}")
            save_file(renamed(load_file(path)), aside, metadata=metadata)
            os.replace(aside, path)
