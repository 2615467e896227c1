"""The network that takes noise out of a molecule's coordinates: AlphaFold3's diffusion module on its ligand case.

After Abramson et al. 2024 (Nature 630, supplement, algorithms 20 to 24), for molecules of a few dozen atoms: every atom
is a token, a transformer attends among all of them with a bias for each pair, and each block is conditioned on the
noise level. There are no equivariant layers: that a molecule may stand in any orientation is learned from random
rotations. Unlike there, what a pair's bias follows from is the graph alone, without a reference conformer, which would
give the answer away; and handedness, which attention over places hardly sees, is told by the signed volumes of
stereocentres.

It is called as a UNet is, on x_t of coordinates in units of `coordinate_scale` and a timestep of the scheduler, and
puts out v. With coordinates of unit variance that is EDM's preconditioning as AlphaFold3 has it: c_in x is x_t itself
and the network's answer F the negative of v; and the squared error of v, unweighted, is the error of the denoised
coordinates with EDM's weight (arXiv 2206.00364, table 1).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from .graph import ATOM_KINDS, PAIR_KINDS, GraphBatch, volumes_and_gradients
from .noise import log_sigmas


@dataclass
class MoleculeDenoiserOutput(BaseOutput):
    """v, (B, N, 3)."""

    sample: torch.Tensor


class Block(nn.Module):
    """Attention with a bias for each pair, and a gated transition, each scaled and shifted by the noise level."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.transition_in = nn.Linear(width, 4 * width, bias=False)
        self.transition_out = nn.Linear(2 * width, width, bias=False)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x (B, N, D), bias (B, heads, N, N) with -inf where there is no atom, noise (B, D) -> (B, N, D)."""
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(noise)[:, None].chunk(6, dim=2)
        q, k, v = (
            self.to_qkv(self.norm(x) * (1 + scale) + shift).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias).softmax(dim=-1)
        x = x + gate * self.to_out((weights @ v).transpose(1, 2).flatten(2))
        a, b = self.transition_in(self.norm(x) * (1 + scale_2) + shift_2).chunk(2, dim=2)
        return x + gate_2 * self.transition_out(F.silu(a) * b)


class MoleculeDenoiser(ModelMixin, ConfigMixin):
    """v of noisy coordinates.

    Args:
        width, layers, heads: of the transformer.
        coordinate_scale: Angstrom for each unit of x_0, the standard deviation of a coordinate in the data.
        num_train_timesteps, noise_mean, noise_deviation: which noise level a timestep is, as in `noise.log_sigmas`.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 160,
        layers: int = 6,
        heads: int = 8,
        coordinate_scale: float = 1.5,
        num_train_timesteps: int = 1000,
        noise_mean: float = -1.2,
        noise_deviation: float = 1.5,
    ):
        super().__init__()
        self.atom_embeddings = nn.ModuleList(nn.Embedding(count, width) for count in ATOM_KINDS.values())
        self.pair_bias = nn.Embedding(math.prod(PAIR_KINDS.values()), layers * heads)
        nn.init.normal_(self.pair_bias.weight, std=0.1)
        self.noise_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.register_buffer("frequencies", torch.randn(width // 2, generator=torch.Generator().manual_seed(0)))
        self.place_in = nn.Linear(3, width, bias=False)
        self.handedness_in = nn.Linear(4, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.place_out = nn.Linear(width, 3)
        self.handedness_out = nn.Linear(width, 1)
        for last in (self.place_out, self.handedness_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, graph: GraphBatch, return_dict: bool = True
    ) -> MoleculeDenoiserOutput | tuple[torch.Tensor]:
        """v (B, N, 3) of x_t (B, N, 3); where there is no atom 0. Both are centred.

        Args:
            timestep: (B,) or one for all; between whole ones the noise level is interpolated.
        """
        mask = graph.mask[..., None].to(sample.dtype)
        count = mask.sum(dim=1, keepdim=True)
        x_t = centred(sample, mask, count)
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        volumes, gradients, felt = volumes_and_gradients(x_t, graph)
        tokens = self.place_in(x_t) + self.handedness_in(felt)
        for embedding, kind in zip(self.atom_embeddings, graph.atoms.unbind(dim=-1), strict=True):
            tokens = tokens + embedding(kind)
        noise = self._noise(timesteps).to(sample.dtype)
        for block, bias in zip(self.blocks, self._biases(graph, sample.dtype), strict=True):
            tokens = block(tokens, bias, noise)
        tokens = self.norm(tokens)
        v = self.place_out(tokens)
        if len(graph.centres):
            turn = self.handedness_out(tokens.flatten(0, 1)[graph.centres[:, 0]])
            push = (turn[:, None] * gradients).flatten(0, 1)
            v = v.flatten(0, 1).index_add(0, graph.centres[:, 1:].flatten(), push.to(v.dtype)).view_as(v)
        v = centred(v, mask, count)
        return MoleculeDenoiserOutput(sample=v) if return_dict else (v,)

    def _noise(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Fourier features of log(sigma) / 4 (AlphaFold3, algorithm 22), through a small network: (B, D)."""
        level = log_sigmas(
            timesteps, self.config.num_train_timesteps, self.config.noise_mean, self.config.noise_deviation
        )
        angles = 2 * math.pi * level[:, None] / 4 * self.frequencies
        return self.noise_embedding(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.place_in.weight.dtype))

    def _biases(self, graph: GraphBatch, dtype: torch.dtype) -> list[torch.Tensor]:
        """For each block (B, heads, N, N)."""
        kind = torch.zeros_like(graph.pairs[..., 0])
        for values, one in zip(PAIR_KINDS.values(), graph.pairs.unbind(dim=-1), strict=True):
            kind = kind * values + one
        bias = self.pair_bias(kind).to(dtype).permute(0, 3, 1, 2)
        bias = bias.masked_fill(~graph.mask[:, None, None, :], float("-inf"))
        return list(bias.chunk(len(self.blocks), dim=1))


def centred(places: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Around the mean of the atoms, and 0 where there is none. mask (B, N, 1), count (B, 1, 1)."""
    places = places * mask
    return (places - places.sum(dim=1, keepdim=True) / count) * mask
