"""Coverage and matching as their papers define them, and what a chemist looks at first."""

import numpy as np
import pytest
import torch
from rdkit import Chem

from latentdiff.molecules.geometry import random_rotations
from latentdiff.molecules.measures import Coverage, coverage, distances, keeps_stereo, mean_coverage, sound
from latentdiff.molecules.reference import conformers


def test_coverage_of_a_table():
    """Worked by hand: two references, three drawn."""
    found = coverage(np.array([[0.2, 0.9, 0.7], [0.8, 0.6, 1.0]]))
    assert found == Coverage(cov_r=0.5, mat_r=pytest.approx(0.4), cov_p=pytest.approx(1 / 3), mat_p=pytest.approx(0.5))


def test_what_failed_covers_nothing():
    found = coverage(np.array([[np.nan, 0.1]]))
    assert (found.cov_r, found.cov_p, found.mat_p) == (1.0, 0.5, pytest.approx(0.55))


def test_every_molecule_counts_the_same():
    assert mean_coverage([Coverage(1, 0.1, 1, 0.1), Coverage(0, 0.3, 0, 0.5)]) == Coverage(
        0.5, pytest.approx(0.2), 0.5, pytest.approx(0.3)
    )


def test_distances_know_rotations_and_symmetries():
    """Benzene turned by a sixth, and any molecule turned and moved, is the same structure."""
    mol = Chem.AddHs(Chem.MolFromSmiles("c1ccccc1"))
    _, places = conformers("c1ccccc1", embeddings=1)
    sixth = [*range(1, 6), 0, *range(7, 12), 6]
    turn = random_rotations(1, torch.Generator().manual_seed(0))[0].numpy()
    assert distances(mol, places, places[:, sixth] @ turn + 4).max() < 1e-2
    assert distances(mol, places, places * 1.2).min() > 0.1


def test_stereo_is_read_from_the_structure():
    smiles = Chem.CanonSmiles("C[C@H](O)CN")
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    _, places = conformers(smiles, embeddings=3)
    assert keeps_stereo(mol, places).all() and not keeps_stereo(mol, -places).any()


def test_broken_bonds_and_clashes_are_seen():
    mol = Chem.AddHs(Chem.MolFromSmiles("CCCCO"))
    _, places = conformers("CCCCO", embeddings=2)
    assert sound(mol, places).all()
    long = places.copy()
    long[:, 4:5] += 0.4  # oxygen, away from where it is bound
    assert not sound(mol, long)[:, 0].any()
    folded = places.copy()
    folded[:, 4] = folded[:, 0] + 0.3
    assert not sound(mol, folded)[:, 1].any()
