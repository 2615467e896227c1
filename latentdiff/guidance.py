"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): caption dropout and the formula."""

import torch

from . import random_streams


def dropped_captions(seed: int, step: int, batch: int, probability: float) -> torch.Tensor:
    """Which samples of a global batch are trained without their caption, drawn anew at every step -> (batch,) bool."""
    generator = random_streams.generator(seed, "caption dropout", step)
    return torch.rand(batch, generator=generator) < probability


def classifier_free_guidance(
    unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """e_u + w (e_c - e_u), eq. 6 with w = 1 + the paper's w; w = 1 is the conditional branch."""
    return unconditional + guidance_scale * (conditional - unconditional)
