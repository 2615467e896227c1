"""Processes of their own that begin with the heavy libraries imported: `Forked([SCRIPT, "--flag"])`.

To import diffusers takes a processor ten seconds, and the tests start about a hundred processes. These are forked from
one that has imported torch, diffusers and what comes with them, nothing of this project, and has done nothing else.
From there on they are like any other: their memory, signals, exit status and modules are their own. How a process gets
there, the interpreter's start and the imports, is tested where the tests start one from the command line.
"""

import atexit
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.run",
        "torch.distributed.fsdp",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "scipy.linalg",
        "diffusers.loaders.lora_base",
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.pipelines.stable_diffusion",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.pipelines.stable_diffusion.safety_checker",
        "transformers.models.clip.modeling_clip",
        "datasets",
        "tyro",
    ]
)


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="latentdiff-forked-")


def hf_home() -> Path:
    """Where these processes keep what they fetch, and the code that comes with it. The libraries look once."""
    return Path(_home().name)


class Forked:
    """A process as `subprocess.Popen` makes one, of Python with these words on its command line, or of a function.

    `[SCRIPT, ...]`, `["-m", MODULE, ...]` and `["-c", CODE]` are understood; the processes of `["-m",
    "torch.distributed.run", ...]` are forked in their turn. What it says on stdout and stderr is appended to `output`.
    """

    def __init__(self, words: Sequence | Callable, *args, env: dict | None = None, cwd=None, output=None):
        self._said = None if output else tempfile.NamedTemporaryFile(prefix="said-")  # noqa: SIM115
        begin = (words, args) if callable(words) else (_as_python, ([str(word) for word in words],))
        env = {**(os.environ if env is None else env), "HF_HOME": str(hf_home())}
        output = str(output or self._said.name)
        self._process = _CONTEXT.Process(target=_begin, args=(*begin, env, str(cwd or os.getcwd()), output))
        # The server is started here, once, with the environment of now; it must look for nothing outside.
        before = dict(os.environ)
        os.environ.update(HF_HOME=str(hf_home()), HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str]:
        """Its end, and what it said until then; after `timeout` seconds it is ended."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            raise
        return (Path(self._said.name).read_text(errors="replace"),)


def _begin(function: Callable, args: tuple, env: dict, cwd: str, output: str) -> None:
    gc.freeze()  # what was imported stays: looking through it would copy the memory that is shared
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    import huggingface_hub.constants
    import torch

    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # the libraries asked when they were loaded
    huggingface_hub.constants.HF_HUB_OFFLINE = env.get("HF_HUB_OFFLINE") == "1"
    os.chdir(cwd)
    _to_the_end(function, *args)


def _to_the_end(function: Callable, *args) -> None:
    """With what is done at the end of a process, which multiprocessing leaves out."""
    assert not any(name.split(".")[0] == "latentdiff" for name in sys.modules)
    try:
        function(*args)
    finally:
        atexit._run_exitfuncs()


def _as_python(words: list[str]) -> None:
    """As `python WORDS`."""
    if words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    elif words[:2] == ["-m", "torch.distributed.run"]:
        _launch(words[2:])
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


def _launch(words: list[str]) -> None:
    """torchrun with everything of its own, but that its processes are forked from this one."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    def forking(config, entrypoint):
        assert entrypoint == sys.executable
        config.start_method = "fork"
        return lambda unbuffered, *rest: elastic_launch(config, _to_the_end)(_as_python, list(rest))

    run.elastic_launch = forking
    run.main(words)
