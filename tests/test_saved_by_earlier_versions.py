"""Folders that an earlier version saved load, draw, and go on with the present code; `fixtures/*/README.md` lists them.

Numbers are compared with those that the earlier version got. Processors and builds of torch sum up in another order, so
that they agree to about 1e-6 only where these differ.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from latentdiff import ConsistencyScheduler, LatentDiffPipeline, MPUNet2DConditionModel
from stranger import stranger_draws
from tiny import make_pictures

FOLDER = Path(__file__).resolve().parent / "fixtures" / "saved_by_0_1"
pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folders: not to be written to."""
    return unpack(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folders and the pictures of their runs, in the present folder, whose paths the runs' settings have."""
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures", 12)
    return unpack(tmp_path)


def unpack(folder: Path) -> Path:
    shutil.unpack_archive(FOLDER / "folders.tar.xz", folder)
    return folder


def expected(name: str) -> torch.Tensor:
    return load_file(FOLDER / "expected.safetensors")[name]


def draw(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a cat", num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(0)).images


def assert_same_picture(found: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(found, expected(f"picture.{name}"), rtol=0, atol=1e-5)


def test_the_pictures_tell_the_folders_apart():
    """Else a comparison below would pass whatever was loaded."""
    names = ("plain", "magnitude_preserving", "consistency", "lora")
    for i, name in enumerate(names):
        picture = expected(f"picture.{name}")
        assert picture.shape == (1, 3, 16, 16) and picture.std() > 0.1
        for other in names[:i]:
            assert (picture - expected(f"picture.{other}")).abs().mean() > 0.01


@pytest.mark.parametrize("kind", [LatentDiffPipeline, StableDiffusionPipeline])
def test_a_pipeline_draws_its_picture(saved, kind):
    """Somebody's model would not load any more, or draw something else."""
    assert_same_picture(draw(kind.from_pretrained(saved / "plain")), "plain")


def test_the_magnitude_preserving_unet_is_the_present_one(saved):
    """Its index names a module of the earlier version; nobody's code is run for it unasked."""
    pipeline = LatentDiffPipeline.from_pretrained(saved / "magnitude_preserving")
    assert type(pipeline.unet) is MPUNet2DConditionModel
    assert_same_picture(draw(pipeline), "magnitude_preserving")


def test_a_distilled_model_keeps_its_scheduler(saved):
    """It would be drawn with DDIM, which blurs."""
    pipeline = LatentDiffPipeline.from_pretrained(saved / "consistency")
    assert type(pipeline.scheduler) is ConsistencyScheduler
    assert pipeline.scheduler.config.original_inference_steps == 50
    assert_same_picture(draw(pipeline), "consistency")


@pytest.mark.parametrize("kind", [LatentDiffPipeline, StableDiffusionPipeline])
def test_adapters_act_as_they_did(saved, kind):
    """They would be left out, or act with another strength."""
    pytest.importorskip("peft")
    pipeline = kind.from_pretrained(saved / "plain")
    pipeline.load_lora_weights(saved / "lora")
    assert_same_picture(draw(pipeline), "lora")


@pytest.mark.parametrize("name", ["plain", "magnitude_preserving"])
def test_the_code_in_the_folder_runs_without_latentdiff(saved, name):
    """The code that lies on the Hub since then would not load with the diffusers of today."""
    assert_same_picture(stranger_draws(str(saved / name)), name)


@pytest.mark.parametrize("name", ["plain", "magnitude_preserving", "consistency"])
def test_saved_again_it_is_the_same_model(saved, name, tmp_path):
    """What was fetched once and pushed anew would draw something else; also with the code that goes along now."""
    LatentDiffPipeline.from_pretrained(saved / name).save_pretrained(tmp_path / name)
    assert_same_picture(draw(LatentDiffPipeline.from_pretrained(tmp_path / name)), name)
    before, after = (json.loads((folder / name / "model_index.json").read_text()) for folder in (saved, tmp_path))
    assert before == after | {"_diffusers_version": before["_diffusers_version"]}


def test_a_run_goes_on_from_its_checkpoint(here, script):
    """A run that was begun before an update could not be finished after it, would go another way, or begin afresh."""
    log = here / "run" / "log.jsonl"
    before = log.read_text()
    script.run_training(script.main, ["--config", "run/train_config.yaml", "--resume_from_checkpoint", "latest"])
    assert log.read_text().startswith(before)  # and with the speeds of then
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    found = torch.tensor([line["loss"] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(found, expected("losses"), rtol=1e-4, atol=0)
    assert (here / "run" / "model_index.json").is_file()


def test_settings_are_read_as_they_were_meant(here, script):
    """A run that is started again from its file would be another one, or refused. There may be more settings now."""
    for path in sorted(here.glob("*/train_config.yaml")):
        seen = []
        script.run_training(seen.append, ["--config", str(path)])
        seen[0].save(here / "again.yaml")
        before, after = (yaml.safe_load(one.read_text()) for one in (path, here / "again.yaml"))
        assert before and before == {name: after[name] for name in before}, path
