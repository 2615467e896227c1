"""Parts of somebody's model: loaded whole, or refused in one line that names the part.

The libraries draw random numbers for what a file lacks, take settings of their own where a configuration is missing,
and raise whatever a damaged file makes them stumble over. All loading goes through here.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
import transformers
from diffusers.configuration_utils import ConfigMixin
from transformers import PreTrainedTokenizerBase

from ..utils.errors import ConfigError, RunStopped, is_out_of_memory, reason
from ..utils.files import read_json
from ..utils.tokens import token_limit

logger = logging.getLogger(__name__)

# A configuration that asks for more would be built for hours, and fill the memory.
MOST_LAYERS, MOST = 1000, 2**24
_SETTINGS = ("config.json", "model_index.json")  # what the names end with
_READ = (".json", ".txt", ".safetensors", ".bin", ".model")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Whatever a library raises over somebody's files in the block, as a ConfigError: `what` and, in brackets, why.

    To stand around a library's calls alone, so that no fault of ours is taken for one of the files.
    """
    try:
        yield
    except (ConfigError, RunStopped):
        raise
    except UnpicklingError as error:
        raise ConfigError(f"{what} (its pickle holds more than weights)") from error
    except Exception as error:  # of every kind: a library believes what it reads
        full = "out of memory: " if is_out_of_memory(error) else ""
        raise ConfigError(f"{what} ({full}{reason(error)})") from error


def load_network(kind: type, source: str | Path, part: str = "", **options: Any) -> torch.nn.Module:
    """A network as `kind.from_pretrained` loads it, from safetensors, or of an old model that has none, from what torch
    reads without running any code. To be called within `loading`.

    Args:
        kind: a class of diffusers or transformers.
        source: folder or Hub id.
        part: the subfolder, where it is in one.
        options: as `from_pretrained` takes them, such as `revision` and `dtype`.

    Raises:
        ConfigError: a file is none, a tensor is missing or of another shape, or a setting cannot be right.
        Exception: of any kind, from a damaged file.
    """
    folder = Path(source, part)
    check_files(folder, "config.json")
    where = {"subfolder": part} if part else {}
    _check_settings(_settings_of(kind, str(source), **where, revision=options.get("revision")))
    pickled = any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))
    if pickled:
        logger.warning("%s holds no safetensors: its pickled weights are read with weights_only=True", folder)
    options = where | {"use_safetensors": not pickled} | options  # both libraries say weights_only=True themselves
    with _no_report():
        network, found = kind.from_pretrained(
            str(source), output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_whole(found, folder)
    return network


def load_tokenizer(kind: type, source: str | Path, part: str = "", **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer as `kind.from_pretrained` loads it. To be called within `loading`.

    Raises:
        ConfigError: a file is none, or it knows no words.
        Exception: of any kind, from a damaged file.
    """
    check_files(Path(source, part))
    where = {"subfolder": part} if part else {}
    tokenizer = kind.from_pretrained(str(source), **where, **options)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # transformers makes an empty one where its files are missing; all captions would be the same to it
        raise ValueError("it is empty")
    return tokenizer


def settle_tokenizer(tokenizer: PreTrainedTokenizerBase, text_encoder: torch.nn.Module) -> None:
    """Give a tokenizer the length that the text encoder takes, where its own files do not say one.

    Raises:
        ValueError: what they say is no length, or it knows tokens that the text encoder does not.
    """
    tokenizer.model_max_length = token_limit(tokenizer, text_encoder)
    known = getattr(text_encoder.config, "vocab_size", None)
    if isinstance(known, int) and len(tokenizer) > known:
        raise ValueError(f"it has {len(tokenizer)} tokens, and the text encoder knows {known}")


def check_files(folder: Path, *needed: str) -> None:
    """What a library is to read of a local folder are files, and its settings objects of JSON: it would wait at a pipe
    for ever, take a folder or a link that leads nowhere for a file that is not there, and a text for the name of a
    model on the Hub. Of a model that is itself on the Hub there is nothing to see.

    Raises:
        ValueError: one is not.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ and not path.is_file():
            raise ValueError(f"{path.name} is no file, but a folder, a pipe, a device or a link that leads nowhere")
        if path.name.endswith(_SETTINGS):
            try:
                is_object = isinstance(read_json(path), dict)
            except ValueError as error:
                raise ValueError(f"{path.name} is no JSON: {reason(error)}") from None
            if not is_object:
                raise ValueError(f"{path.name} is no JSON object")
    for name in needed:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")


def _settings_of(kind: type, source: str, **where: Any) -> Any:
    """What stands in the config.json of a network."""
    if issubclass(kind, ConfigMixin):
        return kind.load_config(source, **where)
    return transformers.PretrainedConfig.get_config_dict(source, **where)[0]


def _check_settings(settings: Any) -> None:
    for name, value in settings.items():
        low, high = (1, MOST_LAYERS) if "layers" in name else (-MOST, MOST)
        if not all(low <= number <= high for number in _numbers(value)):
            raise ValueError(f"its config.json has {name} {value}: it may be {low} … {high}")


def _numbers(value: Any) -> Iterator[int]:
    """The whole ones in a setting that may be a number, or a list of them or of lists."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _check_whole(found: Mapping[str, Any], folder: Path) -> None:
    """What the libraries only warn of, after which they draw random numbers."""
    if missing := sorted(found["missing_keys"]):
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its weights lack {missing[0]}{more}")
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{name} is of the shape {tuple(there)} in its weights, and {tuple(wanted)} by its config.json"
        )
    if unused := sorted(name for name in found["unexpected_keys"] if not name.endswith("position_ids")):
        logger.warning("%s: %d tensors of its weights are not used, such as %s", folder, len(unused), unused[0])


@contextmanager
def _no_report() -> Iterator[None]:
    """Without the libraries' tables of tensors: what of them matters is said by `_check_whole`."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    kept = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, kept, strict=True):
            library.set_verbosity(level)
