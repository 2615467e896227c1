"""What the network is told of a molecule: the same of the same molecule, and nothing of its coordinates."""

import numpy as np
import pytest
import torch
from rdkit import Chem

from latentdiff.molecules.graph import collate, graph_of, volumes_and_gradients
from latentdiff.molecules.reference import conformers

CHIRAL = ["C[C@H](O)F", "C[C@@H](O)F", "C[C@@](F)(Cl)Br", "CC[S@](C)=O", "C[C@H]1CO1", "C[C@H](N)C(=O)O"]


def with_hydrogens(smiles: str):
    return Chem.AddHs(Chem.MolFromSmiles(Chem.CanonSmiles(smiles)))


@pytest.mark.parametrize("smiles", CHIRAL)
def test_a_structure_with_the_right_handedness_has_positive_volumes(smiles):
    """rdkit's own structures of a molecule, and their mirror images: a sign would be taught the wrong way round."""
    mol = with_hydrogens(smiles)
    _, places = conformers(Chem.CanonSmiles(smiles), embeddings=3)
    graphs = collate([graph_of(mol)] * len(places))
    volumes, _, _ = volumes_and_gradients(torch.tensor(places), graphs)
    assert len(volumes) == len(places) and (volumes > 1).all()
    mirrored, _, _ = volumes_and_gradients(-torch.tensor(places), graphs)
    torch.testing.assert_close(mirrored, -volumes)
    meant, _, _ = volumes_and_gradients(
        -torch.tensor(places), collate([graph_of(mol)] * len(places), [True] * len(places))
    )
    torch.testing.assert_close(meant, volumes)


def test_gradients_are_those_of_the_volumes():
    graph = collate([graph_of(with_hydrogens(smiles)) for smiles in CHIRAL])
    places = torch.randn(*graph.mask.shape, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    volumes, gradients, felt = volumes_and_gradients(places, graph)
    (wanted,) = torch.autograd.grad(volumes.sum(), places)
    torch.testing.assert_close(felt[..., 1:], wanted)
    assert gradients.shape == (len(CHIRAL), 4, 3) and felt[..., 0].count_nonzero() == len(CHIRAL)


@pytest.mark.parametrize(
    "one, other",
    [("C/C=C/F", "C/C=C\\F"), ("C/C(Br)=C(/F)Cl", "C/C(Br)=C(\\F)Cl"), ("F/C=C/C=C\\F", "F/C=C/C=C/F")],
)
def test_sides_of_double_bonds_are_told(one, other):
    """The two isomers have the same bonds."""
    kinds = [np.sort(graph_of(with_hydrogens(smiles)).pairs[..., 3].ravel()) for smiles in (one, other)]
    graphs = [graph_of(with_hydrogens(smiles)) for smiles in (one, other)]
    assert all(kind.max() > 0 for kind in kinds)
    key = [sorted((tuple(g.atoms[i]), tuple(g.atoms[j]), g.pairs[i, j, 3], g.pairs[i, j, 0])
                  for i in range(len(g)) for j in range(len(g))) for g in graphs]  # fmt: skip
    assert key[0] != key[1]


@pytest.mark.parametrize("smiles", [*CHIRAL, "C/C=C/F", "c1ccncc1", "CC(=O)N"])
def test_relabelled_atoms_are_the_same_molecule(smiles):
    """Kinds of atoms and pairs move with the atoms, and a centre keeps its handedness."""
    mol = with_hydrogens(smiles)
    order = np.random.default_rng(0).permutation(mol.GetNumAtoms())
    graph, other = graph_of(mol), graph_of(Chem.RenumberAtoms(mol, order.tolist()))
    np.testing.assert_array_equal(graph.atoms[order], other.atoms)
    np.testing.assert_array_equal(graph.pairs[np.ix_(order, order)], other.pairs)
    places = torch.randn(1, len(graph), 3, generator=torch.Generator().manual_seed(1))
    one, _, _ = volumes_and_gradients(places, collate([graph]))
    two, _, _ = volumes_and_gradients(places[:, order], collate([other]))
    torch.testing.assert_close(one.sort().values, two.sort().values)


def test_molecules_lie_side_by_side():
    graphs = [graph_of(with_hydrogens(smiles)) for smiles in ("CCO", "C[C@H](O)F", "O")]
    batch = collate(graphs)
    assert batch.mask.sum(dim=1).tolist() == [9, 9, 3] and batch.pairs.shape == (3, 9, 9, 4)
    assert batch.centres.tolist() == [[9 + number for number in graphs[1].centres[0]]]
