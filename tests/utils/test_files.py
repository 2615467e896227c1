"""Files are written whole, and for whom the umask says."""

import os

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.utils.files import give_usual_mode, move_into_place


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
