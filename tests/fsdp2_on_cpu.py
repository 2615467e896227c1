"""Runs a script under accelerate's FSDP2 configuration on CPUs: `python fsdp2_on_cpu.py SCRIPT ARGUMENTS`.

torch shards over gloo as it does over GPUs, but accelerate 1.15 turns to FSDP on GPUs alone: on CPUs it would quietly
replicate (DDP). So it is told here what it finds on GPUs; everything behind that is accelerate's own.
"""

import os
import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **options):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is None:
        return
    self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if self.mixed_precision != "no":
        fsdp_plugin.set_mixed_precision(self.mixed_precision)
    self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _init_with_fsdp
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as if Python ran the script itself
    runpy.run_path(sys.argv[0], run_name="__main__")
