"""Runs a script under DeepSpeed on CPUs: `python deepspeed_on_cpu.py SCRIPT ARGUMENTS`.

DeepSpeed shares out over gloo as it does over GPUs, but accelerate 1.15 lets it do so on GPUs alone: on CPUs it would
take every process for the only one. So it is told here to use gloo; everything behind that is its own. DeepSpeed 0.19
is told that nothing can be compiled here: a sum over shared memory would be, for minutes, when it is first used.
"""

import os
import runpy
import sys

import deepspeed.ops
from accelerate.state import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    deepspeed.ops.__compatible_ops__ = {}
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as if Python ran the script itself
    runpy.run_path(sys.argv[0], run_name="__main__")
