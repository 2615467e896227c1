"""What `import latentdiff` offers, and what it costs."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest

import latentdiff
from forked import Forked

LOADED = """
import sys
from latentdiff import LatentDiffPipeline
print([name for name in sys.modules if name.startswith("latentdiff.pipelines.")])
from latentdiff import LatentDiffInpaintPipeline
print("latentdiff.pipelines.inpaint" in sys.modules)
"""


def test_a_pipeline_loads_what_it_needs():
    """Else a program that draws waits for pipelines that it does not use."""
    (said,) = Forked(["-c", LOADED]).communicate()
    first, second = said.splitlines()
    assert "text2img" in first
    assert not any(name in first for name in ("img2img", "inpaint", "interpolate", "invert"))
    assert second == "True"


def test_every_name_is_there():
    assert {getattr(latentdiff, name).__name__ for name in latentdiff.__all__} == set(latentdiff.__all__)
    assert set(latentdiff.__all__) <= set(dir(latentdiff))
    with pytest.raises(AttributeError, match="no attribute 'LatentDifPipeline'"):
        latentdiff.LatentDifPipeline  # noqa: B018


@pytest.mark.parametrize("module", ["latentdiff.scheduling_ddim", "latentdiff.diffusion.scheduling_ddim"])
def test_an_index_that_names_a_schedulers_module_loads(module, tiny_pipeline_folder, tmp_path):
    """diffusers' own pipelines save our schedulers under the module's name, which was another before version 0.2."""
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "saved")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": [module, "DDIMScheduler"]}))
    for kind in (latentdiff.LatentDiffPipeline, diffusers.StableDiffusionPipeline):
        assert type(kind.from_pretrained(folder).scheduler) is latentdiff.DDIMScheduler


def test_no_room_is_called_as_a_pipeline_of_diffusers():
    """diffusers would take a class for one of its own, by the name of the folder that its module is in."""
    for path in Path(latentdiff.__file__).parent.glob("*/__init__.py"):
        assert not hasattr(diffusers.pipelines, path.parent.name), path
