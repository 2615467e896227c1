"""latentdiff where it is installed, where it is only checked out, and where both are so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentdiff.inference.loading import load_pipeline
from latentdiff.models.loading import load_frozen
from latentdiff.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
# Who installed the checkout to work on it has a finder of its pipelines, and nobody else has.
ALONE = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'Editable' not in str(finder)]; "


def said(code: str, folder: Path, env: dict[str, str]) -> str:
    """What a process says that runs `code` in a folder."""
    done = subprocess.run([sys.executable, "-c", ALONE + code], cwd=folder, env=env, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("where", ["elsewhere", "in a checkout", "in a checkout alone"])
def test_the_pipelines_are_found(where, installed, tmp_path):
    """They lie at the top of a checkout, which hides the installed package from whoever stands there."""
    folder = tmp_path if where == "elsewhere" else ROOT
    env = {**os.environ, "PYTHONPATH": ""} if where == "in a checkout alone" else installed
    expected = ROOT if folder == ROOT else Path(installed["PYTHONPATH"]) / "latentdiff"
    found = said("import latentdiff.pipelines as p; print(p.__file__)", folder, env)
    assert Path(found) == expected / "pipelines" / "__init__.py"


SHIPPED = "checkpoints/emoji64: no such folder; the checkpoints that latentdiff ships are in its repository"


@pytest.mark.parametrize("command", ["train", "check"])
def test_the_shipped_model_is_no_part_of_the_package(command, installed, tmp_path):
    """It would be looked for on the Hub, after the seconds that torch takes to load."""
    error = said(f"from latentdiff.cli import main; main([{command!r}])", tmp_path, installed)
    assert error.startswith(f"error: pretrained_model_name_or_path: {SHIPPED}") and error.count("\n") == 0, error


def test_the_shipped_model_is_not_drawn_with_where_it_is_not(tmp_path, monkeypatch):
    """So would it be here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=SHIPPED):
        load_pipeline("checkpoints/emoji64", "cpu")
    with pytest.raises(ConfigError, match=SHIPPED):
        load_frozen("checkpoints/emoji64")


def test_help_into_a_pipe_that_is_closed(installed, tmp_path):
    """`latentdiff generate --help | head -1` would end in a traceback."""
    command = f"{sys.executable} -m latentdiff.cli check --help | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert done.stdout.startswith("usage: latentdiff check") and not done.stderr
