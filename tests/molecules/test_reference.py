"""Reference structures: of the molecule that is named, relaxed, without repetitions, in fixed splits."""

import numpy as np
import pytest
from rdkit import Chem

from latentdiff.molecules.measures import distances, keeps_stereo, sound
from latentdiff.molecules.reference import conformers, isomers_of, split_of


@pytest.mark.parametrize("smiles", ["CCCO", "C[C@H](O)CN", "C/C=C/CO", "O=C1CCCC1"])
def test_conformers_are_of_the_molecule_and_differ(smiles):
    smiles = Chem.CanonSmiles(smiles)
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    energies, places = conformers(smiles)
    assert energies[0] == 0 and (np.diff(energies) >= 0).all() and energies[-1] <= 6
    assert places.shape == (len(energies), mol.GetNumAtoms(), 3) and np.abs(places.mean(axis=1)).max() < 1e-9
    assert keeps_stereo(mol, places).all() and sound(mol, places).all()
    between = distances(mol, places, places)
    same = (np.abs(np.subtract.outer(energies, energies)) < 0.05) & ~np.eye(len(energies), dtype=bool)
    assert (between[same] > 0.125).all()


def test_of_two_mirror_images_one_is_kept():
    assert isomers_of("CC(O)F") == ["C[C@@H](O)F"]
    assert len(isomers_of("CC(O)C(C)O")) == 2  # the meso form, and one of the other two
    assert len(isomers_of("CC=CF")) == 2


def test_splits_go_by_name_alone():
    """A molecule would be measured that was trained, under another isomer's name or in another version."""
    assert split_of("CCO", "") == split_of("CCO", "") == "train"
    names = [split_of(f"C{number}", "") for number in range(5000)]
    shares = {name: names.count(name) / len(names) for name in set(names)}
    assert shares["test"] == pytest.approx(0.04, abs=0.01) and shares["validation"] == pytest.approx(0.04, abs=0.01)
    rings = [split_of("C", f"ring {number}") for number in range(5000)]
    assert rings.count("scaffold") / len(rings) == pytest.approx(0.05, abs=0.01)
