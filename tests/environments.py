"""Throw-away environments of other releases, which share this one's torch instead of fetching it anew."""

import os
import re
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


class NoPackages(Exception):
    """pip could not install something; its last words."""


def make_environment(folder: Path, *packages: str) -> Path:
    """An environment with these packages, as pip takes them; one that is there is brought up to them.

    Returns:
        its Python.

    Raises:
        NoPackages: they are not to be had, as without a network.
    """
    folder = folder.resolve()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    _share("torch", folder)
    torch = f"torch=={distribution('torch').version.split('+')[0]}"  # else pip may want another one
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", *packages, torch]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NoPackages("\n".join(done.stdout.strip().splitlines()[-3:]))
    return python


def _share(package: str, folder: Path) -> None:
    """Let an environment import a package of this one, and what that needs, and nothing else that is installed here."""
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    for name in _with_requirements(package):
        for path in {path.parts[0] for path in distribution(name).files if path.parts[0] not in ("..", "__pycache__")}:
            source, link = Path(distribution(name).locate_file(path)), shared / path
            if source.exists() and not link.is_symlink():
                link.symlink_to(source)
    *_, packages = (path for path in folder.rglob("site-packages") if path.is_dir())
    (packages / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")


def _with_requirements(package: str) -> set[str]:
    """The names of the distributions that a package needs and that are here, its own among them."""
    found, wanted = set(), {package}
    while wanted:
        name = wanted.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform
            continue
        found.add(name)
        needed = {re.match(r"[\w.-]+", one).group() for one in requires if "extra ==" not in one}
        wanted |= needed - found
    return found


if __name__ == "__main__":
    print(make_environment(Path(sys.argv[1]), *sys.argv[2:]))
