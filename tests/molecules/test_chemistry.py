"""What is a molecule that can be drawn, and what is refused in one line that says why."""

import pytest

from latentdiff.molecules.chemistry import (
    Refused,
    check_size,
    flat,
    isomers,
    mirror_image,
    open_stereo,
    read_smiles,
    scaffold,
)


@pytest.mark.parametrize(
    "smiles, why",
    [
        ("", "not a SMILES"),
        ("C1CC", "not a SMILES"),
        ("not a molecule\x1b[2J", "not a SMILES"),
        ("C(C)(C)(C)(C)C", "not a SMILES"),
        ("[Na+].[Cl-]", "2 molecules, as of a salt"),
        ("C[Si](C)(C)C", "it has Si; what can be drawn is made of H, C, N, O, F, S, Cl, Br"),
        ("[CH3]", "a radical"),
        ("CC(=O)[O-]", "an ion of charge -1"),
        ("*C", r"it has \*"),
    ],
)
def test_what_cannot_be_drawn_is_refused(smiles, why):
    with pytest.raises(Refused, match=why) as refused:
        read_smiles(smiles)
    assert str(refused.value).isprintable()


def test_charges_that_cancel_are_no_ion():
    assert read_smiles("C[N+](=O)[O-]").GetNumAtoms() == 4


def test_atoms_keep_their_order():
    assert [atom.GetSymbol() for atom in read_smiles("[H]OC(=O)CN").GetAtoms()] == ["O", "C", "O", "C", "N"]


def test_size_is_counted_without_hydrogens():
    check_size(read_smiles("CCCCCCCCC"), "CCCCCCCCC")
    with pytest.raises(Refused, match="10 atoms besides hydrogen; at most 9"):
        check_size(read_smiles("CCCCCCCCCC"), "CCCCCCCCCC")


@pytest.mark.parametrize(
    "smiles, unsaid, found",
    [
        ("CC(O)F", ["atom 1"], ["C[C@@H](O)F", "C[C@H](O)F"]),
        ("C[C@H](O)F", [], ["C[C@H](O)F"]),
        ("CC=CF", ["double bond 1"], ["C/C=C/F", "C/C=C\\F"]),
        ("CCO", [], ["CCO"]),
    ],
)
def test_open_stereo_is_found_and_enumerated(smiles, unsaid, found):
    mol = read_smiles(smiles)
    assert open_stereo(mol) == unsaid and isomers(mol) == found


def test_mirror_images():
    assert mirror_image("C[C@H](O)F") == "C[C@@H](O)F"
    assert mirror_image("CCO") == "CCO" and mirror_image("C/C=C/F") == "C/C=C/F"
    meso = isomers(read_smiles("C[C@H](O)[C@@H](C)O"))[0]
    assert mirror_image(meso) == meso


def test_what_splits_go_by():
    mol = read_smiles("C[C@H]1CCOC1")
    assert flat(mol) == "CC1CCOC1" and scaffold(mol) == "C1CCOC1" and scaffold(read_smiles("CCO")) == ""
