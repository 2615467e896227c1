"""Rotations are rotations, evenly drawn, and alignment finds the one that was applied."""

import torch

from latentdiff.molecules.geometry import aligned, random_rotations


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rotations_keep_lengths_and_handedness():
    turns = random_rotations(1000, generator())
    torch.testing.assert_close(turns @ turns.transpose(1, 2), torch.eye(3).expand(1000, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(1000), atol=1e-5, rtol=0)


def test_rotations_are_evenly_drawn():
    """The mean of all rotations is 0, and that of each squared entry a third."""
    turns = random_rotations(20000, generator())
    assert turns.mean(dim=0).abs().max() < 0.02 and (turns.square().mean(dim=0) - 1 / 3).abs().max() < 0.01


def test_alignment_recovers_a_rotation():
    """To 1e-5, of structures of different numbers of atoms; what is no atom comes out as 0."""
    places = torch.randn(6, 9, 3, generator=generator())
    mask = torch.arange(9) < torch.tensor([9, 8, 7, 6, 5, 4])[:, None]
    moved = places @ random_rotations(6, generator(1)) + 5
    found = aligned(places, moved, mask)
    torch.testing.assert_close(found[mask], moved[mask], atol=1e-5, rtol=0)
    assert (found[~mask] == 0).all()


def test_alignment_does_not_reflect():
    """The mirror image of a chiral molecule is another molecule: no rotation lays one onto the other."""
    places = torch.randn(4, 8, 3, generator=generator())
    mask = torch.ones(4, 8, dtype=torch.bool)
    mirrored = places * torch.tensor([-1.0, 1.0, 1.0])
    found = aligned(places, mirrored, mask)
    assert (found - mirrored).square().mean(dim=(1, 2)).min() > 0.01
    between = torch.cdist(found, found) - torch.cdist(places, places)
    assert between.abs().max() < 1e-4  # moved as a whole


def test_alignment_is_the_best_of_many():
    """No other rotation is nearer, in the least squares' sense."""
    places, onto = (torch.randn(1, 7, 3, generator=generator(seed)) for seed in (0, 1))
    mask = torch.ones(1, 7, dtype=torch.bool)
    best = (aligned(places, onto, mask) - onto).square().sum()
    centred = places - places.mean(dim=1, keepdim=True)
    others = centred @ random_rotations(5000, generator(2)) + onto.mean(dim=1, keepdim=True)
    assert best <= (others - onto).square().sum(dim=(1, 2)).min() + 1e-5
