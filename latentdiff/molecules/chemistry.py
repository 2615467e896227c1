"""Molecules by rdkit: what a SMILES says, what of it can be drawn, and its stereoisomers.

The atoms keep the order of the SMILES; hydrogens follow behind the heavy atoms. rdkit is of the extra `molecules` and
is loaded when a molecule is.
"""

from typing import TYPE_CHECKING

from ..utils.errors import ConfigError

if TYPE_CHECKING:
    from rdkit import Chem

ELEMENTS = ("H", "C", "N", "O", "F", "S", "Cl", "Br")
"""Those that the shipped structures have enough of to be learned."""
MOST_HEAVY_ATOMS = 9
MOST_ISOMERS = 32  # of five open centres


class Refused(ConfigError):
    """A molecule that cannot be drawn; the message names it and says why."""


def rdkit_chem():
    """rdkit's `Chem`, without its warnings on stderr.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        raise ConfigError("molecules need the package rdkit: pip install 'latentdiff[molecules]'") from None
    RDLogger.DisableLog("rdApp.*")
    return Chem


def read_smiles(smiles: str) -> "Chem.Mol":
    """A molecule without hydrogens, its atoms in the order of the SMILES.

    Raises:
        Refused: it is no SMILES, or not one whole neutral molecule of `ELEMENTS` without unpaired electrons.
    """
    Chem = rdkit_chem()
    mol = Chem.MolFromSmiles(smiles)
    if mol is None or not mol.GetNumAtoms():
        raise Refused(f"{smiles!a}: not a SMILES that rdkit reads")
    mol = Chem.RemoveHs(mol)
    if len(parts := Chem.GetMolFrags(mol)) > 1:
        raise Refused(f"{smiles!a}: {len(parts)} molecules, as of a salt or a mixture; give one at a time")
    if unknown := sorted({atom.GetSymbol() for atom in mol.GetAtoms()} - set(ELEMENTS)):
        raise Refused(f"{smiles!a}: it has {', '.join(unknown)}; what can be drawn is made of {', '.join(ELEMENTS)}")
    if any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
        raise Refused(f"{smiles!a}: a radical; only molecules without unpaired electrons can be drawn")
    if charge := Chem.GetFormalCharge(mol):
        raise Refused(f"{smiles!a}: an ion of charge {charge:+d}; only neutral molecules can be drawn")
    return mol


def with_hydrogens(smiles: str) -> "Chem.Mol":
    """The molecule of a SMILES that `read_smiles` takes, its hydrogens as atoms behind the others."""
    Chem = rdkit_chem()
    return Chem.AddHs(Chem.MolFromSmiles(smiles))


def structure_smiles(mol: "Chem.Mol", conformer: int) -> str:
    """The canonical SMILES that a conformer has, its stereo read from the coordinates."""
    Chem = rdkit_chem()
    seen = Chem.Mol(mol, confId=conformer)
    Chem.AssignStereochemistryFrom3D(seen, conformer)
    return Chem.MolToSmiles(Chem.RemoveHs(seen))


def check_size(mol: "Chem.Mol", smiles: str, most: int = MOST_HEAVY_ATOMS) -> None:
    """Raises Refused where there are more heavy atoms than were trained."""
    if (count := mol.GetNumHeavyAtoms()) > most:
        raise Refused(f"{smiles!a}: {count} atoms besides hydrogen; at most {most} can be drawn")


def open_stereo(mol: "Chem.Mol") -> list[str]:
    """The stereocentres and double bonds whose sense the molecule does not say, in words."""
    Chem = rdkit_chem()
    found = Chem.FindPotentialStereo(mol)
    unsaid = [one for one in found if one.specified == Chem.StereoSpecified.Unspecified]
    is_bond = Chem.StereoType.Bond_Double
    kinds = {Chem.StereoType.Atom_Tetrahedral: "atom", is_bond: "double bond"}
    return [f"{kinds[one.type]} {one.centeredOn}" for one in unsaid if one.type in kinds]


def isomers(mol: "Chem.Mol") -> list[str]:
    """Canonical SMILES of every stereoisomer that what is said allows, sorted; impossible ones are left out."""
    Chem = rdkit_chem()
    from rdkit.Chem.EnumerateStereoisomers import EnumerateStereoisomers, StereoEnumerationOptions

    options = StereoEnumerationOptions(onlyUnassigned=True, unique=True, tryEmbedding=True, maxIsomers=MOST_ISOMERS)
    found = EnumerateStereoisomers(mol, options=options)
    return sorted({Chem.MolToSmiles(one) for one in found})


def mirror_image(smiles: str) -> str:
    """The canonical SMILES of the mirror image; its own where that is the same molecule."""
    Chem = rdkit_chem()
    mol = Chem.MolFromSmiles(smiles)
    for atom in mol.GetAtoms():
        atom.InvertChirality()
    return Chem.MolToSmiles(mol)


def flat(mol: "Chem.Mol") -> str:
    """Canonical SMILES that say nothing of stereo: all isomers have the same."""
    return rdkit_chem().MolToSmiles(mol, isomericSmiles=False)


def scaffold(mol: "Chem.Mol") -> str:
    """Its rings and what joins them, without kinds of atoms and bonds (Bemis and Murcko 1996); "" for a chain."""
    rdkit_chem()
    from rdkit.Chem.Scaffolds import MurckoScaffold

    core = MurckoScaffold.GetScaffoldForMol(mol)
    return rdkit_chem().MolToSmiles(core, isomericSmiles=False)
