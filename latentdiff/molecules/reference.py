"""Reference structures: real small molecules, their stereoisomers, and the conformers that a force field gives them.

The molecules are those of the table of identifiers in the package `chemicals` (MIT; from PubChem, in the public
domain). Each isomer is embedded by ETKDGv3 (Riniker and Landrum 2015; Wang et al. 2020) and relaxed by MMFF94s (Halgren
1999); what lies within 6 kcal/mol of the lowest is kept, but for repetitions. Of two mirror images one is kept: the
other one's structures are the mirror images of its structures.

`python -m latentdiff.molecules.reference` makes the file that is shipped, in about half an hour of one core. Other
versions of rdkit embed otherwise, so what is trained on and compared with is the file.
"""

import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..utils.randomness import fraction
from . import chemistry
from .chemistry import Refused, rdkit_chem

EMBEDDINGS = 12  # tries for each isomer
WINDOW = 6.0  # kcal/mol above the lowest
SAME_ENERGY, SAME_SHAPE = 0.05, 0.125  # kcal/mol and Angstrom, within which two are one
UNITS = 1000  # a coordinate is a whole number of thousandths of an Angstrom
SPLITS = ("train", "validation", "test", "scaffold")
FILE = Path(__file__).with_name("conformers.parquet")


@dataclass(frozen=True)
class Isomer:
    """One molecule with its conformers.

    Attributes:
        smiles: canonical, with all stereo; the atoms of `coordinates` are in its order, hydrogens behind.
        split: a member of `SPLITS`; isomers of one molecule are in the same one.
        energies: (K,) float32, kcal/mol above the lowest, ascending.
        coordinates: (K, N, 3) int16, thousandths of an Angstrom, centred.
    """

    smiles: str
    split: str
    energies: np.ndarray
    coordinates: np.ndarray


def split_of(flat_smiles: str, scaffold: str) -> str:
    """A twenty-fifth of the molecules for the test, as many for validation, and every molecule of a twentieth of the
    ring systems; by name, so that a larger set only adds to a smaller one's."""
    if scaffold and fraction("scaffold", scaffold) < 0.05:
        return "scaffold"
    place = fraction("molecule", flat_smiles)
    return "test" if place < 0.04 else "validation" if place < 0.08 else "train"


def molecules() -> list[str]:
    """The SMILES, without stereo, of every molecule in the table that can be drawn, sorted."""
    import chemicals

    found = set()
    folder = Path(chemicals.__file__).parent / "Identifiers"
    for name in ("chemical identifiers pubchem large.tsv", "chemical identifiers pubchem small.tsv"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            smiles = line.split("\t")[4]
            if "." in smiles or len(smiles) > 60:  # the greater part, which need not be read
                continue
            try:
                mol = chemistry.read_smiles(smiles)
                chemistry.check_size(mol, smiles)
            except Refused:
                continue
            if mol.GetNumHeavyAtoms() > 1 and not any(atom.GetIsotope() for atom in mol.GetAtoms()):
                found.add(chemistry.flat(mol))
    return sorted(found)


def isomers_of(flat_smiles: str) -> list[str]:
    """Its stereoisomers, of two mirror images the one whose SMILES comes first."""
    found = chemistry.isomers(chemistry.read_smiles(flat_smiles))
    return [one for one in found if one <= chemistry.mirror_image(one)]


def conformers(smiles: str, seed: int = 0, embeddings: int = EMBEDDINGS) -> tuple[np.ndarray, np.ndarray] | None:
    """Energies (K,) and coordinates (K, N, 3) in Angstrom, relaxed; None where there are none.

    Whatever lost the stereo that the SMILES says is left out.
    """
    Chem = rdkit_chem()
    from rdkit.Chem import AllChem

    mol = chemistry.with_hydrogens(smiles)
    options = AllChem.ETKDGv3()
    options.randomSeed, options.useRandomCoords = seed + 1, True
    if not AllChem.EmbedMultipleConfs(mol, embeddings, options) or not AllChem.MMFFHasAllMoleculeParams(mol):
        return None
    relaxed = AllChem.MMFFOptimizeMoleculeConfs(mol, maxIters=2000, mmffVariant="MMFF94s")
    by_energy = sorted((energy, index) for index, (failed, energy) in enumerate(relaxed) if failed == 0)
    heavy, kept = Chem.RemoveHs(mol), []
    for energy, index in by_energy:
        if energy - by_energy[0][0] > WINDOW or chemistry.structure_smiles(mol, index) != smiles:
            continue
        near = [other for earlier, other in kept if energy - earlier < SAME_ENERGY]
        if all(AllChem.GetBestRMS(heavy, heavy, other, index) > SAME_SHAPE for other in near):
            kept.append((energy, index))
    if not kept:
        return None
    places = np.stack([mol.GetConformer(index).GetPositions() for _, index in kept])
    return np.array([energy for energy, _ in kept]) - kept[0][0], places - places.mean(axis=1, keepdims=True)


def _work(flat_smiles: str) -> list[dict]:
    rows, mol = [], chemistry.read_smiles(flat_smiles)
    split = split_of(flat_smiles, chemistry.scaffold(mol))
    for smiles in isomers_of(flat_smiles):
        seed = int.from_bytes(hashlib.sha256(smiles.encode()).digest()[:3])
        if found := conformers(smiles, seed):
            energies, places = found
            whole = np.rint(places * UNITS).astype(np.int16)
            rows.append({"smiles": smiles, "split": split, "energies": energies.astype(np.float32),
                         "coordinates": whole.tobytes()})  # fmt: skip
    return rows


def build(path: Path = FILE, processes: int = 1) -> None:
    """Make the file of all molecules."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import rdkit

    every = molecules()
    with ProcessPoolExecutor(processes) as pool:
        done = pool.map(_work, every, chunksize=16)
        rows = [row for found in tqdm(done, total=len(every), unit="molecule") for row in found]
    made_by = {"rdkit": rdkit.__version__, "embeddings": EMBEDDINGS, "window": WINDOW, "units": UNITS,
               "origin": "identifiers of the package chemicals (MIT), from PubChem; ETKDGv3 and MMFF94s of rdkit (BSD)",
               }  # fmt: skip
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"made_by": json.dumps(made_by)})
    pq.write_table(table, path, compression="zstd", compression_level=19)


def load(split: str, path: Path = FILE) -> list[Isomer]:
    """The isomers of a split, sorted by SMILES."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, filters=[("split", "==", split)])
    rows = []
    for row in table.to_pylist():
        energies = np.array(row["energies"], np.float32)
        places = np.frombuffer(row["coordinates"], np.int16).reshape(len(energies), -1, 3)
        rows.append(Isomer(row["smiles"], row["split"], energies, places))
    return sorted(rows, key=lambda isomer: isomer.smiles)


if __name__ == "__main__":
    build(processes=int(sys.argv[1]) if len(sys.argv) > 1 else 1)
