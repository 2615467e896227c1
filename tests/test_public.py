"""What `import latentdiff` offers, and what it costs."""

import subprocess
import sys

import pytest

import latentdiff

LOADED = """
import sys
from latentdiff import LatentDiffPipeline
print([name for name in sys.modules if name.startswith("latentdiff.pipelines.")])
from latentdiff import LatentDiffInpaintPipeline
print("latentdiff.pipelines.inpaint" in sys.modules)
"""


def test_a_pipeline_loads_what_it_needs():
    """Else a program that draws waits for pipelines that it does not use."""
    child = subprocess.run([sys.executable, "-c", LOADED], stdout=subprocess.PIPE, text=True, check=True)
    first, second = child.stdout.splitlines()
    assert "text2img" in first
    assert not any(name in first for name in ("img2img", "inpaint", "interpolate", "invert"))
    assert second == "True"


def test_every_name_is_there():
    assert {getattr(latentdiff, name).__name__ for name in latentdiff.__all__} == set(latentdiff.__all__)
    assert set(latentdiff.__all__) <= set(dir(latentdiff))
    with pytest.raises(AttributeError, match="no attribute 'LatentDifPipeline'"):
        latentdiff.LatentDifPipeline  # noqa: B018
