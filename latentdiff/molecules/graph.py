"""What the network is told of a molecule: kinds of atoms, kinds of pairs, and the handedness of its stereocentres.

Nothing here knows coordinates, so that nothing of the answer is given away.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .chemistry import ELEMENTS, rdkit_chem

MOST_HOPS = 5  # bonds between two atoms from which on all are equally far
_BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
_CHARGES = (-1, 0, 1)
_HYBRIDIZATIONS = ("S", "SP", "SP2", "SP3", "SP3D", "SP3D2")
ATOM_KINDS = {"element": len(ELEMENTS), "charge": 3, "hybridization": 7, "hydrogens": 5, "ring": 5}
"""Of each atom's features how many values there are; each value has an embedding, and they are added up."""
PAIR_KINDS = {"hops": MOST_HOPS + 1, "bond": len(_BONDS) + 1, "ring": 5, "double": 3}
"""Of each pair's; "double" is whether the two lie on the same side or on different sides of a double bond."""


@dataclass(frozen=True)
class Graph:
    """One molecule of N atoms, hydrogens among them.

    Attributes:
        atoms: (N, 5) uint8, by `ATOM_KINDS`.
        pairs: (N, N, 4) uint8, by `PAIR_KINDS`.
        centres: (S, 5) int64: a stereocentre, and its four neighbours in an order in which their signed volume is
            positive; of three neighbours and a lone pair the centre itself stands for that.
    """

    atoms: np.ndarray
    pairs: np.ndarray
    centres: np.ndarray

    def __len__(self) -> int:
        return len(self.atoms)


@dataclass(frozen=True)
class GraphBatch:
    """Graphs side by side, filled up to the largest.

    Attributes:
        atoms: (B, N, 5) int64. pairs: (B, N, N, 4) int64.
        mask: (B, N) bool, where there is an atom.
        centres: (S, 5) int64, atoms by their number in the whole batch, b N + n.
        signs: (S,) float32: 1, or -1 where the mirror image is meant.
    """

    atoms: torch.Tensor
    pairs: torch.Tensor
    mask: torch.Tensor
    centres: torch.Tensor
    signs: torch.Tensor

    def to(self, device: torch.device | str) -> "GraphBatch":
        """On a device."""
        return GraphBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def graph_of(mol) -> Graph:
    """The graph of an rdkit molecule with its hydrogens as atoms."""
    Chem = rdkit_chem()
    atoms = np.array([_atom(atom) for atom in mol.GetAtoms()], np.uint8)
    count, hops = len(atoms), Chem.GetDistanceMatrix(mol)
    pairs = np.zeros((count, count, len(PAIR_KINDS)), np.uint8)
    pairs[..., 0] = np.minimum(hops, MOST_HOPS)
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        pairs[[i, j], [j, i], 1] = 1 + _BONDS.index(str(bond.GetBondType()))
        for a, b, side in _sides(bond):
            pairs[[a, b], [b, a], 3] = side
    for ring in sorted(mol.GetRingInfo().AtomRings(), key=len, reverse=True):  # of two the smaller one counts
        pairs[np.ix_(ring, ring, [2])] = _ring_size(len(ring))
    return Graph(atoms, pairs, _centres(mol))


def _atom(atom) -> tuple[int, ...]:
    ring = min(
        (len(ring) for ring in atom.GetOwningMol().GetRingInfo().AtomRings() if atom.GetIdx() in ring), default=0
    )
    hybridization = str(atom.GetHybridization())
    return (
        ELEMENTS.index(atom.GetSymbol()),
        _CHARGES.index(max(-1, min(1, atom.GetFormalCharge()))),
        _HYBRIDIZATIONS.index(hybridization) if hybridization in _HYBRIDIZATIONS else len(_HYBRIDIZATIONS),
        min(4, sum(one.GetAtomicNum() == 1 for one in atom.GetNeighbors())),
        _ring_size(ring),
    )


def _ring_size(size: int) -> int:
    """None, 3, 4, 5, or more."""
    return 0 if size == 0 else min(size, 6) - 2


def _sides(bond) -> list[tuple[int, int, int]]:
    """Pairs of atoms at the two ends of a double bond: 1 on the same side, 2 on different ones."""
    Chem = rdkit_chem()
    stereo = bond.GetStereo()
    same = {Chem.BondStereo.STEREOZ: 1, Chem.BondStereo.STEREOCIS: 1, Chem.BondStereo.STEREOE: 2,
            Chem.BondStereo.STEREOTRANS: 2}.get(stereo)  # fmt: skip
    if same is None:
        return []
    named, found = tuple(bond.GetStereoAtoms()), []
    ends = (bond.GetBeginAtom(), bond.GetEndAtom())
    others = [[a.GetIdx() for a in end.GetNeighbors() if a.GetIdx() not in {e.GetIdx() for e in ends}] for end in ends]
    for a in others[0]:
        for b in others[1]:
            turned = (a != named[0]) != (b != named[1])
            found.append((a, b, 3 - same if turned else same))
    return found


def _centres(mol) -> np.ndarray:
    """Looking from the first neighbour, the others run clockwise for CHI_TETRAHEDRAL_CW; then the volume of (first,
    second, third, fourth) is negative, and two of them change places."""
    Chem = rdkit_chem()
    found = []
    for atom in mol.GetAtoms():
        tag = atom.GetChiralTag()
        if tag not in (Chem.ChiralType.CHI_TETRAHEDRAL_CW, Chem.ChiralType.CHI_TETRAHEDRAL_CCW):
            continue
        around = [bond.GetOtherAtomIdx(atom.GetIdx()) for bond in atom.GetBonds()]
        around += [atom.GetIdx()] * (4 - len(around))  # a lone pair, on the other side of the centre
        if tag == Chem.ChiralType.CHI_TETRAHEDRAL_CW:
            around[2], around[3] = around[3], around[2]
        found.append([atom.GetIdx(), *around])
    return np.array(found, np.int64).reshape(-1, 5)


def collate(graphs: Sequence[Graph], mirrored: Sequence[bool] | None = None) -> GraphBatch:
    """Side by side; those that are `mirrored` mean their mirror image."""
    size = max(len(graph) for graph in graphs)
    atoms = torch.zeros(len(graphs), size, len(ATOM_KINDS), dtype=torch.long)
    pairs = torch.zeros(len(graphs), size, size, len(PAIR_KINDS), dtype=torch.long)
    mask = torch.zeros(len(graphs), size, dtype=torch.bool)
    centres, signs = [], []
    for b, graph in enumerate(graphs):
        n = len(graph)
        atoms[b, :n], pairs[b, :n, :n] = torch.from_numpy(graph.atoms), torch.from_numpy(graph.pairs)
        mask[b, :n] = True
        centres.append(torch.from_numpy(graph.centres) + b * size)
        signs += [-1.0 if mirrored is not None and mirrored[b] else 1.0] * len(graph.centres)
    return GraphBatch(atoms, pairs, mask, torch.cat(centres), torch.tensor(signs, dtype=torch.float32))


def volumes_and_gradients(places: torch.Tensor, graph: GraphBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an atom feels of handedness.

    Returns:
        (S,): the signed volume of each centre's neighbours, positive where it is as it has to be.
        (S, 4, 3): its gradient with respect to the four of them.
        (B, N, 4): for each atom its centre's volume, and the sum of the gradients that are its own.
    """
    flat = places.flatten(0, 1)
    felt = flat.new_zeros(len(flat), 4)
    if not len(graph.centres):
        return flat.new_zeros(0), flat.new_zeros(0, 4, 3), felt.unflatten(0, places.shape[:2])
    a, b, c, d = flat[graph.centres[:, 1:]].unbind(dim=1)
    a, b, c, sign = a - d, b - d, c - d, graph.signs.to(flat.dtype)[:, None]
    by_a, by_b, by_c = (torch.linalg.cross(one, other) * sign for one, other in ((b, c), (c, a), (a, b)))
    volumes = (a * by_a).sum(dim=1)
    gradients = torch.stack([by_a, by_b, by_c, -(by_a + by_b + by_c)], dim=1)
    felt = felt.index_add(0, graph.centres[:, 0], F.pad(volumes[:, None], (0, 3)))
    felt = felt.index_add(0, graph.centres[:, 1:].flatten(), F.pad(gradients.flatten(0, 1), (1, 0)))
    return volumes, gradients, felt.unflatten(0, places.shape[:2])
