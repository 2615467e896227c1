"""What a run on molecules learns from at (step, micro-batch): conformers in random orientations, and noise for them.

As for pictures, everything that is drawn follows from the seed, the step and the global sample index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.buckets import BucketOrder
from ..utils import randomness
from .chemistry import with_hydrogens
from .geometry import random_rotations
from .graph import Graph, GraphBatch, collate, graph_of
from .reference import UNITS, Isomer

SIZES = (12, 16, 20, 24, 32)  # molecules of up to so many atoms are trained on together


@dataclass(frozen=True)
class MoleculeBatch:
    """One process's share of a micro-batch, on its device.

    Attributes:
        places: (B, N, 3) x_0 in units of the network's `coordinate_scale`, centred; 0 where there is no atom.
        noise: (B, N, 3). timesteps: (B,) int64.
    """

    graph: GraphBatch
    places: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


class MoleculeBatches:
    """Isomers in their drawn order; of each a conformer, turned at random, every second one as its mirror image.

    Args:
        isomers: with their conformers.
        coordinate_scale: Angstrom for each unit of x_0.
        num_train_timesteps: T of the noise schedule.
        seed: of the run.
        micro_batch, accumulation, processes, process: as of `data.batches.Batches`.
        device: where the batches go.
    """

    def __init__(
        self,
        isomers: Sequence[Isomer],
        *,
        coordinate_scale: float,
        num_train_timesteps: int,
        seed: int,
        micro_batch: int,
        accumulation: int = 1,
        processes: int = 1,
        process: int = 0,
        device: torch.device | str = "cpu",
    ):
        self._isomers, self._scale, self._num_train_timesteps = isomers, coordinate_scale, num_train_timesteps
        self._seed, self._device = seed, device
        self._micro_batch, self._processes, self._process = micro_batch, processes, process
        self.global_batch = micro_batch * accumulation * processes
        self._graphs = [graph_of_isomer(isomer) for isomer in isomers]
        sizes = np.searchsorted(SIZES, [len(graph) for graph in self._graphs])
        buckets = [np.flatnonzero(sizes == size).astype(np.int32) for size in range(len(SIZES) + 1)]
        self._order = BucketOrder([rows for rows in buckets if len(rows)], self.global_batch, seed, None)

    @property
    def epoch_length(self) -> int:
        """Isomers in an epoch."""
        return self._order.epoch_length

    def rows_at(self, step: int) -> list[int]:
        """The isomers that make up optimizer step `step` on all processes together."""
        return self._order.rows(step)

    def name(self, row: int) -> str:
        """The SMILES."""
        return self._isomers[row].smiles

    def at(self, step: int, micro_step: int = 0) -> MoleculeBatch:
        """This process's share of micro-batch `micro_step` of optimizer step `step`, both counted from 0."""
        first = (micro_step * self._processes + self._process) * self._micro_batch
        mine = slice(first, first + self._micro_batch)
        whole, rows = self.global_batch, self.rows_at(step)
        choice = torch.rand(whole, generator=self._generator("conformer", step))[mine].tolist()
        mirrored = (torch.rand(whole, generator=self._generator("mirror", step)) < 0.5)[mine]
        graph = collate([self._graphs[row] for row in rows[mine]], mirrored.tolist())
        places = torch.zeros(*graph.mask.shape, 3)
        for b, (row, chosen) in enumerate(zip(rows[mine], choice, strict=True)):
            conformers = self._isomers[row].coordinates
            one = torch.from_numpy(conformers[int(chosen * len(conformers))].astype(np.float32))
            places[b, : len(one)] = (one - one.mean(dim=0)) / (UNITS * self._scale)
        places *= torch.where(mirrored, -1.0, 1.0)[:, None, None]
        turns = random_rotations(whole, self._generator("rotation", step))[mine]
        largest = max(len(self._graphs[row]) for row in rows)  # so that micro-batches do not change what is drawn
        noise = torch.randn(whole, largest, 3, generator=self._generator("noise", step))[mine, : places.shape[1]]
        timesteps = torch.randint(self._num_train_timesteps, (whole,), generator=self._generator("timesteps", step))
        return MoleculeBatch(
            graph.to(self._device),
            (places @ turns).to(self._device),
            noise.to(self._device),
            timesteps[mine].to(self._device),
        )

    def _generator(self, stream: str, step: int) -> torch.Generator:
        return randomness.generator(self._seed, stream, step)


def graph_of_isomer(isomer: Isomer) -> Graph:
    """Its atoms in the order of the conformers'."""
    return graph_of(with_hydrogens(isomer.smiles))
