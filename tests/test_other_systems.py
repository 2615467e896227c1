"""What runs where Python has less than on Linux: tried without it, since the tests have no other system."""

import json
import os
import resource
from pathlib import Path

import psutil
import pytest
import torch

from forked import Forked
from latentdiff.inference.loading import load_pipeline
from latentdiff.utils import devices, files, system
from latentdiff.utils.errors import ConfigError
from tests.end_to_end.test_command_line import flags

# Windows, as far as a program can tell: modules and functions that are not there, folders that cannot be opened, files
# that only a writer can sync, and open ones that can be neither replaced nor removed.
AS_ON_WINDOWS = """
import errno, fcntl, gc, importlib, mmap, os, pkgutil, shutil, signal, sys
import accelerate, datasets, diffusers, peft, torch, transformers, torch.distributed.fsdp

ways = fcntl.fcntl
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "getuid", "killpg", "pread", "pwrite", "sysconf", "uname"):
    delattr(os, name)
for name in [name for name in dir(mmap) if name.startswith("MADV_")]:
    delattr(mmap, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1"):
    delattr(signal, name)
shutil._use_fd_functions = False

class Map(mmap.mmap):
    @property
    def madvise(self):
        raise AttributeError("madvise")

mmap.mmap = Map
real = {name: getattr(os, name) for name in ("fsync", "open", "replace", "rename", "unlink", "remove")}

def refuse_open(path):
    if os.path.isfile(path):
        here = os.stat(path)
        for number in os.listdir("/proc/self/fd"):
            try:
                if os.path.samestat(os.fstat(int(number)), here):
                    raise PermissionError(errno.EACCES, "it is open", str(path))
            except OSError as error:
                if error.errno == errno.EACCES:
                    raise

def fsync(descriptor):
    if ways(descriptor, 3) & os.O_ACCMODE == os.O_RDONLY:  # 3: F_GETFL
        raise OSError(errno.EBADF, "Bad file descriptor")
    real["fsync"](descriptor)

def open(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return real["open"](path, *args, **kwargs)

def moving(name):
    def move(source, target, **kwargs):
        refuse_open(target)
        real[name](source, target, **kwargs)
    return move

def removing(name):
    def remove(path, **kwargs):
        refuse_open(path)
        real[name](path, **kwargs)
    return remove

os.fsync, os.open = fsync, open
os.replace, os.rename = moving("replace"), moving("rename")
os.unlink, os.remove = removing("unlink"), removing("remove")

import latentdiff.utils.system
latentdiff.utils.system.WINDOWS = True
import latentdiff.cli, latentdiff.pipelines
"""
EVERY_MODULE = """
for package in (latentdiff, latentdiff.pipelines):
    for found in pkgutil.walk_packages(package.__path__[:1], package.__name__ + "."):
        importlib.import_module(found.name)
"""


def run(code: str, folder: Path) -> str:
    process = Forked(["-c", AS_ON_WINDOWS + code], cwd=folder, env={**os.environ, "ACCELERATE_USE_CPU": "1"})
    (said,) = process.communicate(timeout=300)
    assert process.returncode == 0, said[-4000:]
    return said


def test_what_windows_has_is_enough(settings, tmp_path):
    """A run would end where it writes a checkpoint or maps the cache, or a module not even load."""
    settings |= {"max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "validation_steps": 1}
    settings |= {"validation_prompts": "a cat", "validation_inference_steps": 1, "aspect_ratio_buckets": True}
    words = [word for word in flags(settings) if word != "True"]
    draw = ["generate", "run", "--num-inference-steps", "1", "--prompts", "a: b?", "--grid", "grid.png"]
    run(
        f"""
train = {words!r}
latentdiff.cli.main(["train", *train])
gc.collect()  # what the run had open, as at the end of its process
latentdiff.cli.main(["train", *train, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"])
latentdiff.cli.main({draw!r} + ["--output-dir", "drawn"])
{EVERY_MODULE}
""",
        tmp_path,
    )
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").open(encoding="utf-8")][-1] == 3
    assert (tmp_path / "grid.png").is_file() and [path.name for path in (tmp_path / "drawn").iterdir()]


def test_memory_is_counted_in_bytes(monkeypatch):
    """macOS has bytes where Linux has kilobytes: a step would seem to need a thousand times as much."""
    peak = system.most_memory_used()
    assert abs(peak / psutil.Process().memory_info().rss - 1) < 5 and peak > 2**26
    monkeypatch.setattr(system.sys, "platform", "darwin")
    assert system.most_memory_used() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, rel=0.2)
    monkeypatch.setattr(system, "resource", None)
    assert system.most_memory_used() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert system.memory_there() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_shipped_checkpoint_from_another_drive(monkeypatch):
    """There is no relative path between two drives of Windows."""

    def other_drive(path):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(files.os.path, "relpath", other_drive)
    assert Path(files.packaged_checkpoint()).is_absolute() and (Path(files.packaged_checkpoint()) / "unet").is_dir()


class Accelerator:
    """What torch.accelerator says where there are two devices of a kind, or none."""

    def __init__(self, kind: str | None):
        self._kind = kind

    def is_available(self) -> bool:
        return self._kind is not None

    def current_accelerator(self) -> torch.device:
        return torch.device(self._kind)

    def device_count(self) -> int:
        return 2 if self._kind else 0


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_accelerator_that_is_here_is_taken(kind, monkeypatch):
    """A Mac's or an Intel GPU would stand idle."""
    monkeypatch.setattr(devices.torch, "accelerator", Accelerator(kind))
    assert devices.device_named(None).type == kind
    assert devices.device_named(f"{kind}:1") == torch.device(kind, 1)
    assert devices.device_named("cpu").type == "cpu"
    with pytest.raises(ConfigError, match=f"^--device {kind}:2: there is none here; it may be cpu, {kind}, {kind}:0, "):
        devices.device_named(f"{kind}:2")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda", "--device cuda: there is none here; it may be cpu"),
        ("mps", "--device mps: there is none here; it may be cpu"),
        ("xpu:1", "--device xpu:1: there is none here; it may be cpu"),
        ("meta", "--device meta: there is none here; it may be cpu"),
        ("gpu", "--device gpu: not a device that torch knows, such as cpu, cuda or cuda:1"),
        ("", "--device : not a device that torch knows"),
    ],
)
def test_a_device_that_is_not_here_is_a_line(name, said, monkeypatch, tiny_pipeline_folder):
    """It would be a traceback out of torch, after the model was loaded."""
    monkeypatch.setattr(devices.torch, "accelerator", Accelerator(None))
    assert devices.default_device() == torch.device("cpu")
    with pytest.raises(ConfigError) as refused:
        load_pipeline(str(tiny_pipeline_folder), name)
    assert str(refused.value).startswith(said)
