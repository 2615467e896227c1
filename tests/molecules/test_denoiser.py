"""The network on molecules: exact where it has to be, whatever its weights are."""

import pytest
import torch
from rdkit import Chem

from latentdiff.molecules.denoiser import MoleculeDenoiser
from latentdiff.molecules.graph import collate, graph_of

SMILES = ["C[C@H](O)F", "CCO", "C[C@H]1CO1"]


@pytest.fixture(scope="module")
def network():
    """With weights that let everything through: those of a new one put out 0."""
    torch.manual_seed(0)
    network = MoleculeDenoiser(width=32, layers=2, heads=4).eval()
    for name, weight in network.named_parameters():
        if any(part in name for part in ("place_out", "handedness_out", "modulation")):
            torch.nn.init.normal_(weight, std=0.2)
    return network


def graphs(order=None):
    mols = [Chem.AddHs(Chem.MolFromSmiles(smiles)) for smiles in SMILES]
    if order is not None:
        mols = [Chem.RenumberAtoms(mol, order[: mol.GetNumAtoms()]) for mol in mols]
    return [graph_of(mol) for mol in mols]


def noisy(count: int = 10) -> torch.Tensor:
    return torch.randn(3, count, 3, generator=torch.Generator().manual_seed(1))


def test_a_new_network_says_nothing():
    """Its first loss is then that of the mean, at every noise level."""
    answer = MoleculeDenoiser(width=16, layers=1, heads=2)(noisy(), 500, collate(graphs())).sample
    assert answer.count_nonzero() == 0


@torch.no_grad()
def test_padding_changes_nothing(network):
    together = network(noisy(), 500, collate(graphs())).sample
    for number, graph in enumerate(graphs()):
        alone = network(noisy()[number : number + 1, : len(graph)], 500, collate([graph])).sample
        torch.testing.assert_close(together[number, : len(graph)], alone[0], atol=1e-5, rtol=0)
        assert (together[number, len(graph) :] == 0).all()


@torch.no_grad()
def test_relabelled_atoms_permute_the_output(network):
    order = [3, 0, 8, 1, 4, 2, 7, 6, 5]
    graph, places = graphs()[0], noisy(9)[:1]
    mol = Chem.RenumberAtoms(Chem.AddHs(Chem.MolFromSmiles(SMILES[0])), order)
    answer = network(places, 300, collate([graph])).sample[:, order]
    other = network(places[:, order], 300, collate([graph_of(mol)])).sample
    torch.testing.assert_close(answer, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_where_a_molecule_lies_makes_no_difference(network):
    moved = network(noisy() + torch.tensor([3.0, -2.0, 1.0]), 500, collate(graphs())).sample
    torch.testing.assert_close(moved, network(noisy(), 500, collate(graphs())).sample, atol=1e-5, rtol=0)
    assert moved.sum(dim=1).abs().max() < 1e-4


@torch.no_grad()
def test_handedness_is_seen(network):
    """The mirror image of a molecule would be drawn as often as the molecule."""
    one = network(noisy(), 500, collate(graphs(), [False] * 3)).sample
    other = network(noisy(), 500, collate(graphs(), [True] * 3)).sample
    assert (one - other)[0].abs().max() > 1e-3 and (one - other)[2].abs().max() > 1e-3
    torch.testing.assert_close(one[1], other[1])  # ethanol has no centre


@torch.no_grad()
def test_noise_levels_are_seen_and_the_call_is_a_unets(network, tmp_path):
    graph = collate(graphs())
    one = network(noisy(), torch.tensor([10, 500, 990]), graph, return_dict=False)[0]
    assert (one - network(noisy(), 10, graph).sample)[1:].abs().max() > 1e-3
    torch.testing.assert_close(one[0], network(noisy(), 10.0, graph).sample[0])
    network.save_pretrained(tmp_path)
    again = MoleculeDenoiser.from_pretrained(tmp_path)(noisy(), 10, graph).sample
    torch.testing.assert_close(again, network(noisy(), 10, graph).sample, atol=0, rtol=0)
