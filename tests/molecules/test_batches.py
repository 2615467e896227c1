"""What a run learns from is the same on any number of processes, centred, and half of it mirrored."""

import numpy as np
import pytest
import torch
from rdkit import Chem

from latentdiff.molecules.batches import MoleculeBatches
from latentdiff.molecules.graph import volumes_and_gradients
from latentdiff.molecules.reference import UNITS, Isomer, conformers


@pytest.fixture(scope="module")
def isomers():
    rows = []
    for smiles in ("C[C@H](O)F", "CCCCCCCO", "CCO", "C[C@H](N)C(=O)O"):
        smiles = Chem.CanonSmiles(smiles)
        energies, places = conformers(smiles, embeddings=2)
        rows.append(Isomer(smiles, "train", energies, np.rint(places * UNITS).astype(np.int16)))
    return rows


def batches(isomers, **settings) -> MoleculeBatches:
    usual = {"coordinate_scale": 1.4, "num_train_timesteps": 1000, "seed": 0, "micro_batch": 8}
    return MoleculeBatches(isomers, **(usual | settings))


def test_shares_of_processes_make_up_the_batch(isomers):
    """Two processes, and two micro-batches, would train on other noise than one."""
    whole = batches(isomers).at(3)
    for pieces in (
        [batches(isomers, micro_batch=4, processes=2, process=process).at(3) for process in (0, 1)],
        [batches(isomers, micro_batch=4, accumulation=2).at(3, micro) for micro in (0, 1)],
    ):
        assert torch.equal(torch.cat([piece.timesteps for piece in pieces]), whole.timesteps)
        for number, piece in enumerate(pieces):
            atoms = piece.places.shape[1]
            mine = slice(4 * number, 4 * number + 4)
            torch.testing.assert_close(piece.places, whole.places[mine, :atoms])
            assert torch.equal(piece.noise, whole.noise[mine, :atoms])


def test_molecules_are_centred_turned_and_sometimes_mirrored(isomers):
    """Whatever is mirrored means the mirror image: the volumes have the sign that is told."""
    source, signs = batches(isomers), []
    for step in range(8):
        batch = source.at(step)
        assert batch.places.sum(dim=1).abs().max() < 1e-4
        assert (batch.places[~batch.graph.mask] == 0).all()
        volumes, _, _ = volumes_and_gradients(batch.places, batch.graph)
        assert (volumes > 0.1).all()
        signs += batch.graph.signs.tolist()
    assert {1.0, -1.0} == set(signs)


def test_a_step_is_of_molecules_of_about_one_size(isomers):
    """Padding is computed for nothing."""
    source = batches(isomers)
    assert {source.at(step).graph.mask.sum(dim=1).max().item() for step in range(12)} == {9, 13, 24}
    assert sorted({source.name(row) for step in range(12) for row in source.rows_at(step)}) == sorted(
        isomer.smiles for isomer in isomers
    )
    assert source.epoch_length == 4 and source.global_batch == 8
