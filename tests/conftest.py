"""What the tests share: no network, a Hub on the loopback address, a tiny Stable Diffusion folder of random weights."""

import configparser
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from hub_server import TOKEN, HubServer

ROOT = Path(__file__).resolve().parent.parent

# Set before huggingface_hub is imported, which reads them once: nothing goes online, and what a test sends through the
# fixture `hub` goes to a server of its own. No cache and no token of whoever runs the tests is read or written.
_HUB = HubServer().start()
_HOME = tempfile.TemporaryDirectory(prefix="latentdiff-tests-")
os.environ.update(
    HF_ENDPOINT=_HUB.url,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HOME=_HOME.name,
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

from tiny import make_pictures, original_components, reset_accelerate, tiny_components  # noqa: E402


@pytest.fixture
def hub(monkeypatch):
    """The tests' own Hub, empty, with a token that may write to it; going online is allowed for this test."""
    import huggingface_hub

    for kept in (_HUB.repos, _HUB.commits, _HUB.lfs_objects, _HUB.private, _HUB.requests):
        kept.clear()
    _HUB.lfs_suffix = None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return _HUB


@pytest.fixture(scope="session")
def script():
    """The entry script as a module."""
    path = ROOT / "train_text2img.py"
    spec = importlib.util.spec_from_file_location("train_text2img", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> dict[str, str]:
    """An environment in which latentdiff is found as a wheel lays it, far from any checkout."""
    site = tmp_path_factory.mktemp("site")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    places = dict(line.split(" = ") for line in setup["options"]["package_dir"].split("\n") if line)
    for package in setup["options"]["packages"].split():
        source = ROOT / places.get(package, package.replace(".", "/"))
        folder = site / package.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.glob("*.py"):
            shutil.copy(path, folder)
    return {**os.environ, "PYTHONPATH": str(site)}


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory) -> Path:
    """A saved Stable Diffusion folder at toy size: not to be written to."""
    from latentdiff import LatentDiffPipeline

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    LatentDiffPipeline(**tiny_components()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def original_folder(tmp_path_factory) -> Path:
    """A saved folder at toy size of Stable Diffusion 1's shape, and beside it `original.safetensors`, the same in a
    single file: not to be written to."""
    from latentdiff import LatentDiffPipeline, cli

    folder = tmp_path_factory.mktemp("original") / "original"
    LatentDiffPipeline(**original_components()).save_pretrained(folder)
    cli.main(["export", str(folder), str(folder.with_suffix(".safetensors"))])
    return folder


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """accelerate as in a new process, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # the numbers here are a CPU's
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twelve of them: not to be written to."""
    return make_pictures(tmp_path_factory.mktemp("data") / "pics", 12)


@pytest.fixture
def settings(tiny_pipeline_folder, pictures, tmp_path) -> dict:
    """A run of four steps of eight pictures."""
    return {
        "pretrained_model_name_or_path": str(tiny_pipeline_folder),
        "unet": "pretrained",
        "train_data_dir": str(pictures),
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "run"),
        "train_batch_size": 8,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 3,
        "logging_steps": 1,
        "validation_prompts": (),
        "report_to": "none",
        "checkpoints_total_limit": None,
    }


@pytest.fixture
def train(script, settings, fresh_accelerate):
    """Run the script in this process with changed settings, over what the folder holds; returns the output folder."""
    from latentdiff.config.train import TrainConfig

    def run(**changes) -> Path:
        reset_accelerate()
        torch.manual_seed(torch.seed())  # nothing may hang on the global generator
        begins = {"overwrite_output_dir": changes.get("resume_from_checkpoint") is None}
        config = TrainConfig(**{**settings, **begins, **changes})
        script.main(config)
        return Path(config.output_dir)

    return run


@pytest.fixture
def later(monkeypatch):
    """Some seconds after the pictures were written: nothing can have changed within the grain of the clock."""
    import time

    now = time.time() + 10
    monkeypatch.setattr(time, "time", lambda: now)
