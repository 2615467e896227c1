"""How good drawn conformers are: the protocol of the field, and what a chemist looks at first.

Coverage and matching (Xu et al. 2021, arXiv 2102.10240; Ganea et al. 2021, arXiv 2106.07802): for a molecule with K
reference conformers 2 K are drawn, and each pair's distance is the least RMSD over rotations and symmetries, without
hydrogens. With delta = 0.5 Angstrom, recall asks of each reference whether a drawn one lies within delta (COV-R) and
how far the nearest is (MAT-R), precision asks so of each drawn one (COV-P, MAT-P); a measure of a set of molecules is
the mean of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .chemistry import rdkit_chem, structure_smiles

DELTA = 0.5  # Angstrom, the threshold for small molecules
BOND, ANGLE = 0.1, 0.12  # by which share a bond, or a distance over two bonds, may be off its bounds
CLASH = 0.7  # of the least distance that two atoms further apart may have


@dataclass(frozen=True)
class Coverage:
    """Of one molecule, or the mean of many; shares in [0, 1] and Angstrom."""

    cov_r: float
    mat_r: float
    cov_p: float
    mat_p: float


def distances(mol, references: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """RMSD of each reference (K, N, 3) to each drawn structure (M, N, 3), in Angstrom: (K, M).

    Args:
        mol: of rdkit, with the N atoms of the structures; hydrogens are left out.
    """
    Chem = rdkit_chem()
    from rdkit.Chem import rdMolAlign

    one, other = (Chem.RemoveHs(with_conformers(mol, places)) for places in (references, drawn))
    found = [[rdMolAlign.GetBestRMS(other, one, m, k) for m in range(len(drawn))] for k in range(len(references))]
    return np.array(found)


def coverage(between: np.ndarray, delta: float = DELTA) -> Coverage:
    """From the distances (K, M); those that are not finite cover nothing and count as twice delta."""
    between = np.where(np.isfinite(between), between, 2 * delta)
    nearest_drawn, nearest_reference = between.min(axis=1), between.min(axis=0)
    return Coverage(
        cov_r=float((nearest_drawn <= delta).mean()),
        mat_r=float(nearest_drawn.mean()),
        cov_p=float((nearest_reference <= delta).mean()),
        mat_p=float(nearest_reference.mean()),
    )


def mean_coverage(found: Sequence[Coverage]) -> Coverage:
    """Every molecule counts the same."""
    return Coverage(**{name: float(np.mean([getattr(one, name) for one in found])) for name in vars(found[0])})


def with_conformers(mol, places: np.ndarray):
    """A copy of an rdkit molecule with structures (K, N, 3) as its conformers, numbered from 0."""
    Chem = rdkit_chem()
    from rdkit.Geometry import Point3D

    copy = Chem.Mol(mol)
    copy.RemoveAllConformers()
    for one in places:
        conformer = Chem.Conformer(len(one))
        for atom, place in enumerate(one):
            conformer.SetAtomPosition(atom, Point3D(*map(float, place)))
        copy.AddConformer(conformer, assignId=True)
    return copy


def keeps_stereo(mol, places: np.ndarray) -> np.ndarray:
    """Whether each structure (K, N, 3) has the stereo that the molecule says: (K,) bool."""
    Chem = rdkit_chem()
    wanted, built = Chem.MolToSmiles(Chem.RemoveHs(mol)), with_conformers(mol, places)
    return np.array([structure_smiles(built, number) == wanted for number in range(len(places))])


def sound(mol, places: np.ndarray) -> np.ndarray:
    """Whether all bonds and angles of each structure are within their usual bounds, and no atoms clash: (K, 2) bool.

    The bounds are those of distance geometry, as rdkit knows them.
    """
    Chem = rdkit_chem()
    from rdkit.Chem import rdDistGeom

    bounds = rdDistGeom.GetMoleculeBoundsMatrix(mol)
    low, high = np.minimum(bounds, bounds.T), np.maximum(bounds, bounds.T)
    hops = Chem.GetDistanceMatrix(mol)
    between = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1)
    slack = np.select([hops == 1, hops == 2], [BOND, ANGLE], np.inf)
    with np.errstate(invalid="ignore"):
        within = (between >= low * (1 - slack)) & (between <= high * (1 + slack)) | (hops > 2) | (hops == 0)
    apart = (between >= CLASH * low) | (hops <= 3)
    return np.stack([within.all(axis=(1, 2)), apart.all(axis=(1, 2))], axis=1)
