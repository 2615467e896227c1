"""What the README and docs/ say can be typed: their commands parse, their files exist, the README's Python runs."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES[ROOT / "README.md"]
LINES = [
    line.split("#")[0].strip()
    for text in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]
NAMES = dict(line.split("=") for line in LINES if re.match(r"[A-Z]+=", line))
COMMANDS = [
    re.sub(r"\$([A-Z]+)", lambda name: NAMES[name[1]], line) for line in LINES if line.split("=")[0] not in NAMES
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    """A reader would find nothing behind a link, or a picture would be missing."""
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)", PAGES[page])
    }
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        if target.startswith("#"):
            assert target[1:] in headings, target
        else:
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch):
    """A flag, target or module in the README would not exist."""
    monkeypatch.chdir(ROOT)
    # The folders of the examples are the reader's: the flags are what is checked.
    monkeypatch.setattr("latentdiff.config.checks.Path.is_dir", lambda path: True)
    monkeypatch.setattr("latentdiff.config.presets.read_config", lambda path: {})
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0] == "source":
        assert words[1].removesuffix("/bin/activate") in (ROOT / "Makefile").read_text()
    elif words[0].endswith("latentdiff"):
        from latentdiff.cli import parse

        parse(words[1:])
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    elif "-m" in words:
        assert (ROOT / words[words.index("-m") + 1].replace(".", "/")).with_suffix(".py").is_file()
    else:
        from latentdiff.config.presets import parse_train_config

        assert words[:2] == ["accelerate", "launch"] and "train_text2img.py" in words
        flags = words[words.index("train_text2img.py") + 1 :]
        parse_train_config(flags)


def test_python_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    exec(block, {})
    assert (tmp_path / "cat.png").stat().st_size > 500
