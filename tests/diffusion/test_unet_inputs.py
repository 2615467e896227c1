"""What size a model's pictures are, whatever its configuration says of it."""

from types import SimpleNamespace

import pytest

from latentdiff.diffusion.unet_inputs import trained_size


def of(*size):
    return SimpleNamespace(sample_size=size[0]) if size else SimpleNamespace()


@pytest.mark.parametrize(
    ("unet", "vae", "size"),
    [
        (of(64), of(256), (512, 512)),
        (of([64, 48]), of(256), (512, 384)),
        (of((64, 48)), None, (512, 384)),
        (of(None), of(512), (512, 512)),
        (of(), of([512, 384]), (512, 384)),
        (of(None), None, None),
        (of(), of(), None),
    ],
)
def test_one_side_or_two_or_the_vaes(unet, vae, size):
    """Training multiplied a list, and took None for a number."""
    assert trained_size(unet, vae, 8) == size


@pytest.mark.parametrize("size", [0, -1, "x", [], [64], [64, 64, 64], [64, "x"], 1e30, 10**9, True, {}])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="the unet's config.json has sample_size .*: it may be one side or"):
        trained_size(of(size), None, 8)
