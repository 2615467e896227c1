"""The command line: what it saves, what it says about mistakes, and that help needs no torch."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFont

import latentdiff
from latentdiff import cli, evaluation
from latentdiff.grid import labelled_grid, wrap


def fails(capsys, *argv) -> str:
    """Run a command that must fail as a user's mistake; return its one line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(argv))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_generate_saves_pictures_and_a_grid(tiny_pipeline_folder, tmp_path, capsys):
    argv = ["generate", str(tiny_pipeline_folder), "--prompts", "A cat, red", "a dog", "--num-inference-steps", "2"]
    argv += ["--output-dir", str(tmp_path / "pictures"), "--grid", str(tmp_path / "grid.png"), "--columns", "2"]
    cli.main(argv)
    names = ["000-a-cat-red.png", "001-a-dog.png"]
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == names
    assert capsys.readouterr().out.split("\n")[:3] == [
        *(str(tmp_path / "pictures" / name) for name in names), str(tmp_path / "grid.png")
    ]  # fmt: skip
    both = [np.asarray(Image.open(tmp_path / "pictures" / name)) for name in names]
    assert both[0].shape == (16, 16, 3) and (both[0] != both[1]).any()
    assert Image.open(tmp_path / "grid.png").width == 2 * 128 + 3 * 8

    # Picture i depends on seed + i and its prompt alone.
    argv = ["generate", str(tiny_pipeline_folder), "--prompts", "a dog", "--num-inference-steps", "2", "--seed", "1"]
    cli.main([*argv, "--output-dir", str(tmp_path / "alone")])
    alone = np.asarray(Image.open(tmp_path / "alone" / "000-a-dog.png")).astype(int)
    assert abs(alone - both[1]).max() <= 1


def test_measures_print_and_write_json(monkeypatch, tmp_path, capsys):
    """The commands hand their flags on, and write what was measured."""
    quoted = {"sampler": "DDIM", "num_inference_steps": 4, "guidance_scale": 2.0, "seed": 9, "network": "toy"}
    recall = evaluation.Recall(at_1=0.25, at_10=0.5)

    def measure(pipeline, *, count, settings, network):
        assert settings == evaluation.DrawSettings(num_inference_steps=4, guidance_scale=2.0, seed=9)
        return evaluation.RetrievalResult(
            **quoted, count=count, gallery_size=7, drawn=recall, ceiling=recall, floor=recall
        )

    monkeypatch.setattr(cli, "load_pipeline", lambda checkpoint, device: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(evaluation.efficientnet_lite, "load", lambda device: None)
    flags = ["--count", "12", "--num-inference-steps", "4", "--guidance-scale", "2", "--seed", "9"]
    for name in ("retrieval", "backgrounds"):
        monkeypatch.setattr(evaluation, name, measure)
        cli.main([name, "somewhere", *flags, "--output", str(tmp_path / f"{name}.json")])
        assert "R@1 0.250" in capsys.readouterr().out
        saved = json.loads((tmp_path / f"{name}.json").read_text())
        assert saved["count"] == 12 and saved["drawn"]["at_10"] == 0.5


def test_defaults_are_those_of_the_library():
    """The command line repeats them so as not to import torch for --help."""
    for name in (field.name for field in fields(evaluation.DrawSettings)):
        assert getattr(cli.Generate(checkpoint="", prompts=()), name) == getattr(evaluation.DrawSettings(), name)
    assert evaluation.retrieval.__kwdefaults__["count"] == cli.Retrieval(checkpoint="").count
    assert evaluation.backgrounds.__kwdefaults__["count"] == cli.Backgrounds(checkpoint="").count


def test_mistakes_are_one_clear_line(tiny_pipeline_folder, tmp_path, capsys):
    folder, missing = str(tiny_pipeline_folder), str(tmp_path / "none")
    assert f"{missing}: no such folder" in fails(capsys, "retrieval", missing)
    assert f"{tmp_path} holds no model_index.json" in fails(capsys, "generate", str(tmp_path), "--prompts", "a")
    assert "--prompts is empty" in fails(capsys, "generate", folder, "--prompts")
    assert "num_inference_steps is 0" in fails(capsys, "backgrounds", folder, "--num-inference-steps", "0")
    assert "--device warp" in fails(capsys, "generate", folder, "--prompts", "a", "--device", "warp")
    wrong_suffix = ["--num-inference-steps", "1", "--grid", str(tmp_path / "grid.what")]
    assert "grid.what cannot be written" in fails(capsys, "generate", folder, "--prompts", "a", *wrong_suffix)
    (tmp_path / "model_index.json").write_text("{")
    assert "cannot be loaded" in fails(capsys, "retrieval", str(tmp_path))


def test_a_model_that_the_hub_does_not_have(hub, capsys):
    assert "nobody/nothing: neither a folder here nor" in fails(capsys, "retrieval", "nobody/nothing")


def test_help_does_not_load_torch():
    """The package's own `__init__` is stood in for: what it imports is not this module's doing."""
    code = f"""
import sys, types
package = types.ModuleType("latentdiff")
package.__path__ = [{str(Path(latentdiff.__file__).parent)!r}]
sys.modules["latentdiff"] = package
from latentdiff.cli import main
try:
    main(["generate", "--help"])
except SystemExit as stopped:
    assert stopped.code == 0
assert not {{"torch", "diffusers", "numpy"}} & set(sys.modules)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "--prompts" in finished.stdout


# ---- the grid


def test_grid_places_enlarged_pictures_with_room_for_the_longest_label():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    short, long = (labelled_grid(images, ["a", "b", label], columns=2) for label in ("c", "a long caption " * 6))
    assert short.width == long.width == 2 * 128 + 3 * 8 and long.height > short.height
    pixels = np.asarray(short)
    step = (short.height - 8) // 2
    for i, colour in enumerate(colours):
        x, y = 8 + i % 2 * 136, 8 + i // 2 * step
        assert (pixels[y : y + 128, x : x + 128] == colour).all()
        assert (pixels[y + 128 : y + step, x : x + 128] < 128).any(), "its label stands below"


def test_wrapped_lines_fit_and_lose_nothing():
    font = ImageFont.load_default(12)
    text = "a donaudampfschifffahrtsgesellschaft on a light blue background"
    lines = wrap(text, font, 100)
    assert all(font.getlength(line) <= 100 for line in lines) and len(lines) > 3
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("", font, 100) == [""]


def test_grid_refuses_what_does_not_fit_together():
    image = Image.new("RGB", (64, 64))
    for images, labels, columns in (([], [], 1), ([image], ["a", "b"], 1), ([image], ["a"], 0)):
        with pytest.raises(ValueError, match="do not make a grid"):
            labelled_grid(images, labels, columns)
    with pytest.raises(ValueError, match="one size"):
        labelled_grid([image, Image.new("RGB", (32, 64))], ["a", "b"], 1)
