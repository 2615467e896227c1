"""Rotations: random ones, and the one that lays a structure best onto another."""

import torch


def random_rotations(count: int, generator: torch.Generator) -> torch.Tensor:
    """Evenly among all, from quaternions of normal numbers (Shoemake 1992): (count, 3, 3) float32, on the CPU."""
    w, x, y, z = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1).unbind(dim=1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


@torch.no_grad()
def aligned(places: torch.Tensor, onto: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`places` moved as a whole, without reflection, so that its squared distance to `onto` is least (Kabsch 1976).

    AlphaFold3's supplement, algorithm 28, with every atom of the same weight.

    Args:
        places, onto: (B, N, 3). mask: (B, N) bool, the atoms that count; the others come out as 0.

    Returns:
        (B, N, 3) in the dtype of `places`, without gradient.
    """
    weight = mask[..., None].double()
    count = weight.sum(dim=1, keepdim=True)
    centre, target = ((one.double() * weight).sum(dim=1, keepdim=True) / count for one in (places, onto))
    own, other = (places.double() - centre) * weight, (onto.double() - target) * weight
    u, _, vh = torch.linalg.svd(own.transpose(1, 2) @ other)
    sign = torch.ones(len(places), 3, dtype=torch.float64, device=places.device)
    sign[:, 2] = torch.linalg.det(u @ vh).sign()
    return (((own @ (u * sign[:, None]) @ vh) + target) * weight).to(places.dtype)
