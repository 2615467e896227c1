"""Random masks: what they cover, and what they follow from."""

import numpy as np
import pytest
import torch

from latentdiff.data.masks import WHOLE_PICTURE, random_masks
from latentdiff.utils import randomness


def generators(count: int, first: int = 0):
    return [randomness.generator(0, "mask", number) for number in range(first, first + count)]


def test_zeros_and_ones_of_the_picture_s_size():
    """Half a pixel known means nothing to the VAE's input, and a transposed mask would lie elsewhere."""
    masks = random_masks(generators(50), (24, 40))
    assert masks.shape == (50, 1, 40, 24) and masks.dtype == torch.float32
    assert set(masks.unique().tolist()) == {0.0, 1.0}


def test_a_mask_follows_from_its_own_generator():
    """The masks of a sample would depend on how many processes share its step, or on the global generator."""
    torch.manual_seed(1)
    together = random_masks(generators(8), (32, 32))
    torch.manual_seed(2)
    np.random.seed(2)
    shares = torch.cat([random_masks(generators(3), (32, 32)), random_masks(generators(5, first=3), (32, 32))])
    assert torch.equal(together, shares)
    assert len({mask.numpy().tobytes() for mask in random_masks(generators(8), (32, 32), whole_picture=0)}) == 8


def test_a_quarter_leaves_nothing_known():
    """Text to image would be forgotten, or inpainting hardly be trained."""
    whole = random_masks(generators(2000), (16, 16)).mean((1, 2, 3)) == 1
    # Some half planes and rectangles cover so small a picture too, which only adds to the share: a few in a thousand.
    deviation = (WHOLE_PICTURE * (1 - WHOLE_PICTURE) / 2000) ** 0.5
    assert -4 * deviation < whole.float().mean() - WHOLE_PICTURE < 4 * deviation + 0.01


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_else_something_is_known_and_something_open(size):
    """A mask that leaves nothing open trains nothing; and masks of one extent teach that extent alone."""
    share = random_masks(generators(1000), size, whole_picture=0).mean((1, 2, 3))
    assert share.min() > 0 and (share == 1).float().mean() < 0.01
    # Small and large ones: no fifth of the range may be rare.
    counts = torch.histc(share, bins=5, min=0, max=1)
    assert counts.min() > 20


def test_every_place_is_open_about_as_often():
    """A corner that is always known would never be learnt; brushes and rectangles favour the middle, not by much."""
    often = random_masks(generators(4000), (16, 16), whole_picture=0).mean((0, 1))
    assert often.min() > 0.25 and often.max() < 0.6
    # Mirrored and transposed about the same. 4000 draws have deviations below 0.008, the largest of 256 four of these.
    for other in (often.flip(0), often.flip(1), often.T):
        assert (often - other).abs().max() < 4 * 2**0.5 * 0.008
