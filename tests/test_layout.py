"""The rule of who may import whom, and that what travels to the Hub travels alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "latentdiff"

# Modules of the project that a file may import from; files that are not named may import any.
ALLOWED = {
    "config": set(),
    "presets": {"config"},
    "noise_schedule": set(),
    "clip_guidance": {"guidance", "noise_schedule"},
    "scheduling_ddpm": {"noise_schedule"},
    "scheduling_ddim": {"noise_schedule"},
    "scheduler_conformance": {"noise_schedule", "scheduling_ddpm", "scheduling_ddim"},
    "losses": {"noise_schedule"},
    "scheduling_consistency": {"noise_schedule"},
    "consistency": {"guidance", "noise_schedule", "scheduling_consistency"},
    "mp_layers": set(),
    "mp_unet": {"mp_layers", "noise_schedule"},
    "weight_norm": {"config", "mp_layers", "mp_unet", "sharding"},
    "guidance": set(),
    "distances": set(),
    "random_streams": set(),
    "ema": {"config", "posthoc_ema", "sharding"},
    "posthoc_ema": set(),
    "sharding": {"config", "deepspeed_zero"},
    "deepspeed_zero": {"config"},
    "latents": set(),
    "masks": set(),
    "efficientnet_lite": {"config"},
    "models": {"config", "mp_layers", "mp_unet"},
    "emoji": {"config", "random_streams"},
    "images": set(),
    "sources": {"config", "images"},
    "tars": {"config", "images", "sources"},
    "survey": {"config", "images", "random_streams", "sources"},
    "data": {"config", "emoji", "images", "random_streams", "sources", "survey", "tars"},
    "buckets": {"random_streams"},
    "entry_store": {"config"},
    "latent_cache": {"latents", "data", "models", "entry_store"},
    "divergence": {"config", "batches"},
    "lora": {"config"},
    "optimizers": {"config"},
    "recipe": {"config"},
    "grid": set(),
    "cli": {"cli_base", "cli_errors", "cli_measuring", "config", "serve"},
    "cli_base": {"config"},
    "cli_measuring": {"cli_base", "config"},
    "cli_errors": {"config", "presets"},
    "public": {"mp_unet", "pipelines", "scheduling_consistency", "scheduling_ddim", "scheduling_ddpm"},
    "loading": {
        "clip_guidance",
        "config",
        "models",
        "public",
        "recipe",
        "scheduling_consistency",
        "scheduling_ddim",
        "scheduling_ddpm",
    },
    "drawing": {"config", "images", "loading", "pipelines", "public", "recipe"},
    "animation": {"config", "grid"},
    "bound_terms": {"noise_schedule", "scheduling_ddpm"},
    "bounds": set(),
    "likelihood": {
        "bound_terms",
        "bounds",
        "cli_errors",
        "config",
        "emoji",
        "entry_store",
        "latents",
        "loading",
        "models",
        "noise_schedule",
        "processes",
        "random_streams",
        "recipe",
    },
    "batches": {"random_streams", "data", "latent_cache", "latents", "masks", "buckets"},
}
TRAVELLERS = [
    *PACKAGE.glob("scheduling_*.py"),
    PACKAGE / "noise_schedule.py",
    PACKAGE / "guidance.py",
    PACKAGE / "clip_guidance.py",
    PACKAGE / "posthoc_ema.py",
    PACKAGE / "mp_layers.py",
    PACKAGE / "mp_unet.py",
    *(ROOT / "pipelines").glob("*.py"),
]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of the code, relative ones as `latentdiff.…`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"latentdiff.{node.module}" if node.level and node.module else node.module or "latentdiff"
            found |= {base} if node.module else {f"{base}.{alias.name}" for alias in node.names}
    return found


def from_project(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("latentdiff.")}


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_follow_the_rule(module):
    """A dependency would run against the layering, and the file could not be read alone."""
    assert from_project(PACKAGE / f"{module}.py") <= ALLOWED[module]


@pytest.mark.parametrize("path", TRAVELLERS, ids=lambda path: path.name)
def test_what_travels_to_the_hub_needs_only_diffusers(path):
    """A repo on the Hub would not load for somebody who has only diffusers and transformers."""
    others = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"latentdiff"}
    with_diffusers = {"PIL", "huggingface_hub", "safetensors"}  # which it cannot be installed without
    assert others <= {"torch", "numpy", "diffusers", "transformers"} | with_diffusers
    travelling = {other.stem for other in TRAVELLERS} | {"pipelines"}
    assert from_project(path) <= travelling


def test_nothing_imports_the_entry_script():
    for path in [*ROOT.glob("latentdiff/*.py"), *ROOT.glob("pipelines/*.py")]:
        assert "train_text2img" not in imported(path), path


def test_nothing_unpickles():
    """A downloaded file could run code: torch.load is called with weights_only=True or not at all."""
    for path in [*ROOT.glob("latentdiff/*.py"), *ROOT.glob("pipelines/*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "pickle" not in {alias.name for alias in node.names}, path
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert {alias.name for alias in node.names} == {"UnpicklingError"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), path


def test_modules_stay_readable():
    """A file past about 400 lines is doing two things."""
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "pipelines").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 450, path
