"""The command line: what it understands, how it teaches, what it says about mistakes, and that this needs no torch."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latentdiff import LatentDiffPipeline, cli
from latentdiff.evaluation import backgrounds, features, retrieval
from tiny import tiny_components

ROOT = Path(__file__).resolve().parent.parent


def fails(capsys, *argv) -> str:
    """Run a command that must fail as a user's mistake; return its one line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in argv])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    error = error[error.index("error: ") :]  # a bar may have been drawn before
    assert error.count("\n") == 1
    return error


def without_torch(begin: str, *argv: str) -> str:
    """What a process of its own says that fails if it loads torch."""
    code = f"""
import runpy, sys
sys.argv[1:] = {list(argv)!r}
try:
    {begin}
except SystemExit as stopped:
    assert stopped.code in (None, 0, 2)
assert not {{"torch", "diffusers", "numpy"}} & set(sys.modules)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["latentdiff/cli.py", "generate", "--help"], "--prompts"),
        (["train_text2img.py", "--help"], "optimisation options"),
        (["latentdiff/train.py", "--help"], "--learning_rate FLOAT"),
        (["latentdiff/cli.py", "check", "--help"], "latentdiff check --train_data_dir"),
        (["train_text2img.py", "--lr", "3"], "no option --lr; perhaps you meant --learning_rate"),
        (["latentdiff/cli.py", "train", "--optimiser", "adamw"], "perhaps you meant --optimizer"),
        (["latentdiff/cli.py", "generat"], "perhaps you meant generate"),
    ],
    ids=" ".join,
)
def test_help_and_mistakes_need_no_torch(words, shown):
    """They would take seconds to come."""
    script, *flags = words
    begin = (
        f"runpy.run_path({script!r}, run_name='__main__')"
        if script == "train_text2img.py"
        else (f"runpy.run_module({script[:-3].replace('/', '.')!r}, run_name='__main__')")
    )
    assert shown in without_torch(begin, *flags)


def test_completion_comes_from_the_shell(tmp_path):
    """The TAB key would do nothing, or load torch each time."""
    script = tmp_path / "latentdiff"
    main = "runpy.run_module('latentdiff.cli', run_name='__main__')"
    without_torch(main, "--tyro-write-completion", "bash", str(script))
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    lines = ["latentdiff inter", "latentdiff generate x --guidance-s", "latentdiff generate x --scheduler dp"]
    lines.append("latentdiff train --learning-r")
    for line, completed in zip(lines, ["interpolate", "--guidance-scale", "dpm++", "--learning-rate"], strict=True):
        # As the shell does: the script registers a function, which fills COMPREPLY.
        ask = f"""
            source {script}
            COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
            COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            $(complete -p latentdiff | sed 's/.*-F \\([^ ]*\\).*/\\1/') latentdiff
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        replies = subprocess.run(["bash", "-c", ask], capture_output=True, text=True).stdout.split()
        assert completed in replies, (line, replies)


def test_completion_of_no_shell_is_one_line(capsys):
    assert "one of bash, zsh, fish, tcsh" in fails(capsys, "--tyro-write-completion", "cmd", "x")
    assert "name the file" in fails(capsys, "--tyro-write-completion", "bash")


@pytest.mark.parametrize("name", cli.NAMES)
def test_each_command_teaches_by_an_example(name, capsys, monkeypatch):
    """An example in the help would be refused."""
    monkeypatch.setattr("latentdiff.config.checks.Path.is_dir", lambda path: True)  # they name folders of the reader's
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    examples = re.findall(rf"^latentdiff {name} .*(?:\n +.*)*", shown, re.MULTILINE)
    assert examples or name == "serve"
    for example in examples:
        assert cli.parse(shlex.split(example)[1:])[0] == name


def test_the_overview_lists_every_command_and_how_to_complete(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"• {name}" in shown for name in cli.NAMES) and "--tyro-write-completion bash" in shown


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give a command: generate, edit, "),
        (["generat"], "no command generat; perhaps you meant generate; the commands are generate, "),
        (["--prompts", "a"], "no command --prompts; the commands are"),
        (["generate"], "CHECKPOINT is missing (see latentdiff generate --help)"),
        (["generate", "x"], "--prompts is empty"),
        (["generate", "x", "--prompts", "a", "--colums", "3"], "--colums; perhaps you meant --columns"),
        (["generate", "x", "--prompts", "a", "--seed", "five"], "--seed: 'five' is not a whole number"),
        (["generate", "x", "--prompts", "a", "--seed", "-1"], "--seed is -1; it must lie in 0"),
        (["generate", "x", "--prompts", "a", "--seed"], "--seed: it needs a value"),
        (
            ["generate", "x", "--prompts", "a", "--scheduler", "pndm"],
            "--scheduler: 'pndm' is not one of ddim, ddpm, euler, dpm++, unipc, lcm",
        ),
        (["generate", "x", "--prompts", "a", "--eta", "2"], "--eta is 2.0; it must lie in 0 … 1"),
        (["generate", "x", "--prompts", "a", "--guidance-scale", "nan"], "--guidance-scale is nan; it must lie in"),
        (["generate", "x", "--prompts", "a", "--clip-guidance", "-9", "--clip", "c"], "--clip-guidance is -9.0"),
        (["generate", "x", "--prompts", "a", "--guidance-interval", "3", "1"], "--guidance-interval is 3 1; it must"),
        (["generate", "x", "--prompts", "a", "--seed", "1", "--seeds", "2"], "--seed and --seeds"),
        (["generate", "x", "--prompts", "a", "--seeds", "2", "-3"], "--seeds has -3"),
        (["generate", "x", "--prompts", "a", "--columns", "0"], "--columns is 0; it must be at least 1"),
        (["generate", "x", "--prompts", "a", "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["generate", "x", "--prompts", "a", "--clip-guidance", "9"], "--clip-guidance SCALE and --clip FOLDER go"),
        (["generate", "x", "--prompts", "a", "--karras-sigmas", "--scheduler", "ddim"], "--karras-sigmas: is for"),
        (["generate", "x", "--prompts", "a", "--guide-unet", "u", "--negative-prompt", "b"], "--negative-prompt: has"),
        (["generate", "x", "--prompts", "c\udce9t"], "prompts: 'c\\udce9t' is not text in UTF-8"),
        (["generate", "x", "--prompts", "a", "--negative-prompt", "\ud83d"], "negative_prompt: '\\ud83d' is not text"),
        (["generate", "x", "--prompts-file", "/dev/zero"], "--prompts-file /dev/zero: it is larger than 16 MiB"),
        (["redraw", "/dev/zero"], "/dev/zero cannot be read as a PNG: it is no file"),
        (["edit", "x", "--prompts", "a"], "--image is missing"),
        (["edit", "x", "--prompts", "a", "--image", "i", "--strength", "0"], "--strength is 0; it must lie above 0"),
        (["edit", "x", "--prompts", "a", "--image", "i", "--mask-blur", "4"], "--mask-blur: has no effect without"),
        (["edit", "x", "--prompts", "a", "--image", "i", "--keep-unmasked"], "--keep-unmasked: has no effect without"),
        (["edit", "x", "--prompts", "a", "--image", "i", "--mask", "m", "--source-prompt", "b"], "two ways to edit"),
        (["edit", "x", "--prompts", "a", "--image", "i", "--source-prompt", "b", "--seeds", "1"], "--seeds: has no"),
        (["edit", "x", "--prompts", "a", "--image", "i", "--source-prompt", "b", "--scheduler", "euler"], "ddim alone"),
        (["interpolate", "x", "--prompts", "a"], "--prompts has one, and no --seeds"),
        (["interpolate", "x", "--prompts", "a", "b", "--seeds", "1", "2", "3"], "--prompts has 2; it must be one, or"),
        (["interpolate", "x", "--prompts", "a", "b", "--num-frames", "1"], "--num-frames is 1; it must lie in 2"),
        (["check", "--prediction_type", "noise"], "--prediction_type: 'noise' is not one of epsilon"),
        (["check", "--resolution", "large"], "--resolution: 'large' is not"),
        (["check", "--nothing"], "no option --nothing (see latentdiff check --help)"),
        (["train", "--lr", "3"], "no option --lr; perhaps you meant --learning_rate (see latentdiff train --help)"),
        (["train", "--preset"], "--preset: it needs a value"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else None,
)
def test_a_mistyped_command_is_one_line(argv, said, capsys):
    """A box of ten lines would hide what is wrong, or torch be loaded before anything is said."""
    assert said in fails(capsys, *argv)


def test_mistakes_are_one_clear_line(tiny_pipeline_folder, tmp_path, capsys):
    folder, missing = str(tiny_pipeline_folder), str(tmp_path / "none")
    assert f"{missing}: no such folder" in fails(capsys, "retrieval", missing)
    assert f"{tmp_path} holds no model_index.json" in fails(capsys, "generate", str(tmp_path), "--prompts", "a")
    assert "num_inference_steps is 0" in fails(capsys, "backgrounds", folder, "--num-inference-steps", "0")
    assert "--device warp" in fails(capsys, "generate", folder, "--prompts", "a", "--device", "warp")
    wrong_suffix = ["--num-inference-steps", "1", "--grid", str(tmp_path / "grid.what")]
    assert "grid.what cannot be written" in fails(capsys, "generate", folder, "--prompts", "a", *wrong_suffix)
    (tmp_path / "model_index.json").write_text("{")
    assert "its model_index.json cannot be read" in fails(capsys, "retrieval", str(tmp_path))


def test_a_model_that_the_hub_does_not_have(hub, capsys):
    assert "nobody/nothing: neither a folder here nor" in fails(capsys, "retrieval", "nobody/nothing")


def test_measures_print_and_write_json(monkeypatch, tmp_path, capsys):
    """The commands hand their flags on, and write what was measured."""
    quoted = {"sampler": "DDIM", "num_inference_steps": 4, "guidance_scale": 2.0, "seed": 9, "network": "toy"}
    recall = retrieval.Recall(at_1=0.25, at_10=0.5)

    def measure(pipeline, *, count, settings, network):
        assert settings == retrieval.DrawSettings(num_inference_steps=4, guidance_scale=2.0, seed=9)
        return retrieval.RetrievalResult(
            **quoted, count=count, gallery_size=7, drawn=recall, ceiling=recall, floor=recall
        )

    monkeypatch.setattr(retrieval, "load_pipeline", lambda *_, **options: LatentDiffPipeline(**tiny_components()))
    monkeypatch.setattr(features, "load", lambda device: None)
    flags = ["--count", "12", "--num-inference-steps", "4", "--guidance-scale", "2", "--seed", "9"]
    for name, module in (("retrieval", retrieval), ("backgrounds", backgrounds)):
        monkeypatch.setattr(module, f"measure_{name}", measure)
        cli.main([name, "somewhere", *flags, "--output", str(tmp_path / f"{name}.json")])
        assert "R@1 0.250" in capsys.readouterr().out
        saved = json.loads((tmp_path / f"{name}.json").read_text())
        assert saved["count"] == 12 and saved["drawn"]["at_10"] == 0.5


def test_defaults_are_those_of_the_library():
    """The command line repeats them so as not to import torch for --help."""
    pipeline = LatentDiffPipeline(**tiny_components())
    assert retrieval.DrawSettings.of(cli.Retrieval(checkpoint=""), pipeline) == retrieval.DrawSettings()
    assert retrieval.measure_retrieval.__kwdefaults__["count"] == cli.Retrieval(checkpoint="").count
    assert backgrounds.measure_backgrounds.__kwdefaults__["count"] == cli.Backgrounds(checkpoint="").count
