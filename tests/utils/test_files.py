"""Files are written whole, and for whom the umask says."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.utils.errors import ConfigError
from latentdiff.utils.files import (
    cache_folder,
    give_usual_mode,
    move_into_place,
    read_at_most,
    read_json,
)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_mode_of_the_umask(umask, mode, tmp_path):
    """A colleague could read a model's configuration and not its weights, as safetensors writes them."""
    before = os.umask(umask)
    try:
        for name in ("aside", "kept"):
            (tmp_path / name / "unet").mkdir(parents=True)
            save_file({"a": torch.zeros(2)}, tmp_path / name / "unet" / "a.safetensors")
        move_into_place(tmp_path / "aside", tmp_path / "final")
        give_usual_mode(tmp_path / "kept" / "unet" / "a.safetensors")
    finally:
        os.umask(before)
    for name in ("final", "kept"):
        [file] = (tmp_path / name / "unet").iterdir()
        assert file.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"a":' * 100_000, "\udce9", ""])
def test_what_is_no_json(content, tmp_path):
    """A file that is nested deep ended in a RecursionError, which nobody had thought of."""
    (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_a_pipe_is_not_waited_at(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(OSError):
        read_json(tmp_path / "a.json")


def test_a_device_is_not_read_for_ever():
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_at_most("/dev/zero", 2**20)


def test_no_home(monkeypatch):
    """A service has none, and ended in a traceback of the standard library's."""
    for name in ("HOME", "XDG_CACHE_HOME", "LATENTDIFF_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(ConfigError, match="set HOME or LATENTDIFF_CACHE"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/latentdiff")
