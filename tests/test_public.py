"""What `import latentdiff` offers, and what it costs."""

import subprocess
import sys

import pytest

import latentdiff

LOADED = """
import gc, sys
from latentdiff import LatentDiffPipeline
print(gc.isenabled(), [name for name in sys.modules if name.startswith("latentdiff.pipelines.")])
gc.disable()
from latentdiff import LatentDiffInpaintPipeline
print(gc.isenabled(), "latentdiff.pipelines.inpaint" in sys.modules)
"""


def test_a_pipeline_loads_what_it_needs_and_leaves_the_garbage_collector_as_it_was():
    """Else a program that draws waits for pipelines that it does not use, or its memory grows without end."""
    child = subprocess.run([sys.executable, "-c", LOADED], stdout=subprocess.PIPE, text=True, check=True)
    first, second = child.stdout.splitlines()
    assert first.startswith("True") and "text2img" in first
    assert not any(name in first for name in ("img2img", "inpaint", "interpolate", "invert"))
    assert second == "False True"


def test_every_name_is_there():
    assert {getattr(latentdiff, name).__name__ for name in latentdiff.__all__} == set(latentdiff.__all__)
    assert set(latentdiff.__all__) <= set(dir(latentdiff))
    with pytest.raises(AttributeError, match="no attribute 'LatentDifPipeline'"):
        latentdiff.LatentDifPipeline  # noqa: B018
