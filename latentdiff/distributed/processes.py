"""The processes of one launch: who there is, and work that they share."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm.auto import tqdm

T, R = TypeVar("T"), TypeVar("R")


def join_processes() -> PartialState:
    """This process among those of accelerate's launcher or torchrun; without one it is alone.

    To be called before anything else asks: accelerate's state would take several processes without accelerators for as
    many launches of one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def shared_out(items: Sequence[T], work: Callable[[T], R], description: str) -> list[R]:
    """The results of all items in their order, each made by one of the processes. All of them call it together."""
    state = PartialState()
    mine = range(state.process_index, len(items), state.num_processes)
    bar = tqdm(mine, desc=description, unit="batch", disable=not state.is_local_main_process)
    found = dict(gather_object([(number, work(items[number])) for number in bar]))
    return [found[number] for number in range(len(items))]
