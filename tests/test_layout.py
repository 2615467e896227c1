"""The rules of the house: who may import whom, what travels to the Hub, what a wheel holds."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

from latentdiff.pipelines.portable_saving import code_files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "latentdiff"

# Which rooms may import from which others; each may from itself. A circle is nowhere.
MAY_IMPORT: dict[str, set[str]] = {
    "utils": set(),
    "diffusion": set(),
    "config": {"utils"},
    "pipelines": {"diffusion", "utils"},  # of which only what travels, by the tests below
    "models": {"utils", "diffusion"},
    "public": {"models", "pipelines", "diffusion"},
    "data": {"utils", "config", "models"},
    "distributed": {"utils", "config"},
    "objectives": {"data", "models", "config", "diffusion", "pipelines", "public", "utils"},
    "inference": {"models", "config", "diffusion", "pipelines", "public", "utils"},
    "cli": {"config", "utils"},
    "train": {"cli"},
}
MAY_IMPORT["training"] = {"objectives", "distributed"} | MAY_IMPORT["objectives"]
MAY_IMPORT["evaluation"] = {"inference", "training"} | MAY_IMPORT["inference"] | MAY_IMPORT["training"]
MAY_IMPORT["molecules"] = {"evaluation"} | MAY_IMPORT["evaluation"]
MAY_IMPORT["emoji64"] = {"evaluation"} | MAY_IMPORT["evaluation"]

FILES = {
    **{".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")},
    **{f"latentdiff.pipelines.{path.stem}": path for path in (ROOT / "pipelines").glob("*.py")},
}
# `latentdiff/__init__.py` and those of the rooms.
MODULES = {name: path for name, path in FILES.items() if path.name != "__init__.py"}


def imported(name: str) -> set[str]:
    """Every module that a module of ours imports, at any depth of the code, relative ones by their whole names."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(name.split(".")[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from ..data import emoji` imports a module, `from ..data.emoji import load` a name of one.
            found |= {f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in MODULES} or {
                module
            }
    return found


def from_project(name: str) -> set[str]:
    return {module for module in imported(name) if module in MODULES}


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rooms_import_what_they_may(name):
    """A dependency would run against the layering, and a room could not be read without those above it."""
    assert {room(module) for module in from_project(name)} - {room(name)} <= MAY_IMPORT[room(name)]


def test_no_circle():
    """Files of a room may import each other, too, but what imports itself by way of others loads in one order alone."""
    left = {name: from_project(name) for name in MODULES}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_the_picture_of_the_rooms_is_true():
    """A newcomer would be told of another house."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    arrows: dict[str, set[str]] = {}
    for source, target in re.findall(r"^ +(\w+) --> (\w+)$", page, re.MULTILINE):
        arrows.setdefault(source, set()).add(target)

    def reached(name: str) -> set[str]:
        return arrows.get(name, set()).union(*map(reached, arrows.get(name, set())))

    del arrows["train_text2img"]
    for name, allowed in MAY_IMPORT.items():
        assert arrows.get(name, set()) <= allowed <= reached(name), name


def test_rooms_have_no_code_of_their_own():
    """`--help` would load torch by way of an `__init__.py` that imports."""
    for path in [*PACKAGE.glob("*/__init__.py"), ROOT / "pipelines" / "__init__.py"]:
        assert not path.read_text(), path


def test_a_wheel_has_every_room():
    """An installed package would lack one that setup.cfg does not name, and nobody in a checkout would notice."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(setup["options"]["packages"].split()) == {*rooms, "latentdiff.pipelines"}


TRAVELLERS = sorted(
    name for name, path in MODULES.items() if f"{path.stem}.py" in code_files() or path.stem == "text2img"
)


@pytest.mark.parametrize("name", [*TRAVELLERS, "latentdiff.models.mp_unet", "latentdiff.models.mp_layers"])
def test_what_travels_to_the_hub_needs_only_diffusers(name):
    """A repo on the Hub would not load for somebody who has only diffusers and transformers."""
    others = {module.split(".")[0] for module in imported(name)} - set(sys.stdlib_module_names) - {"latentdiff"}
    with_diffusers = {
        "PIL",
        "huggingface_hub",
        "safetensors",
        "tokenizers",
    }  # without which neither is installed
    assert others <= {"torch", "numpy", "diffusers", "transformers"} | with_diffusers


def test_what_travels_is_what_the_pipelines_import():
    """A file left behind would be missed only by a stranger."""
    reached, new = set(), {name for name in MODULES if room(name) == "pipelines"}
    while new:
        reached |= new
        new = {module for name in new for module in from_project(name)} - reached
    names = {name.rsplit(".", 1)[1] for name in reached}
    assert {path.removesuffix(".py") for path in code_files()} == names - {"text2img"} | {"pipeline"}


def test_nothing_imports_the_entry_script():
    for name in MODULES:
        assert "train_text2img" not in imported(name), name


def test_nothing_unpickles():
    """A downloaded file could run code: torch.load is called with weights_only=True or not at all."""
    for path in [*FILES.values(), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "pickle" not in {alias.name for alias in node.names}, path
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert {alias.name for alias in node.names} == {"UnpicklingError"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), path


def test_text_files_name_their_encoding():
    """On Windows a caption or a name would be read and written in the country's own."""
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_text = node.func.attr in ("read_text", "write_text") or (
                    node.func.attr == "open"
                    and [ast.unparse(mode) for mode in node.args] in (["'a'"], ["'r'"], ["'w'"])
                )
                assert not is_text or "encoding" in {k.arg for k in node.keywords}, f"{path}:{node.lineno}"


# Windows has none of these, and macOS counts some otherwise.
OF_SOME_SYSTEMS = {"resource", "fcntl", "pwd", "grp", "termios", "ctypes", "psutil"}
OF_SOME_SYSTEMS |= {"os.sysconf", "os.pread", "os.pwrite", "os.fork", "os.fsync", "os.getuid", "os.sched_getaffinity"}
OF_SOME_SYSTEMS |= {"os.kill", "os.killpg", "os.statvfs", "os.name", "sys.platform", "signal.SIGHUP", "signal.SIGKILL"}
OF_SOME_SYSTEMS |= {"mmap.MADV_RANDOM", "mmap.MADV_WILLNEED", "mmap.MADV_DONTNEED"}


def test_what_differs_among_systems_lies_in_one_file():
    """It would be called somewhere where it is not there."""
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | imported(name)
        assert name == "latentdiff.utils.system" or not used & OF_SOME_SYSTEMS, name


def test_no_code_lies_beside_the_weights():
    """Copies in git would be read, searched and mended by mistake; what is saved or pushed gets them anew."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/checkpoints/*/*.py" in ignored


def test_files_and_rooms_stay_readable():
    """A file past about 400 lines is doing two things, and a room past 3,000 has become a house."""
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert max(lines.values()) <= 450, max(lines, key=lines.get)
    for kind in MAY_IMPORT:
        assert sum(count for name, count in lines.items() if room(name) == kind) <= 3000, kind
