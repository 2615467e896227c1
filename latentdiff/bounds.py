"""A variational bound as a result: its parts, as a table, as curves, as JSON. `likelihood` measures it."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The bound on -log p of N pictures' latents, from K terms of each, and what it was measured with."""

    prior: torch.Tensor
    """(N,) nats."""
    timesteps: torch.Tensor
    """(N, K), ascending; the first is 0, the decoder's."""
    terms: torch.Tensor
    """(N, K): L_t in nats."""
    weights: torch.Tensor
    """(N, K): how many timesteps each stands for."""
    dimensions: int
    """Of a picture's latents."""
    every_timestep: bool
    """Whether K is all of them; else they are drawn."""
    num_train_timesteps: int
    prediction_type: str
    variance_type: str
    decoder_variance: float
    seed: int

    @property
    def per_picture(self) -> torch.Tensor:
        """(N,) nats."""
        return self.prior + (self.weights * self.terms).sum(dim=1)

    @property
    def nats(self) -> float:
        """The mean over pictures."""
        return float(self.per_picture.mean())

    @property
    def standard_error(self) -> float | None:
        """Of `nats`, for the spread of the pictures and of what was drawn; a single picture has none."""
        return _standard_error(self.per_picture)

    @property
    def bits_per_dimension(self) -> float:
        """Bits for each dimension of the latents."""
        return self.nats / (self.dimensions * math.log(2))

    def below(self, other: "Bound") -> tuple[float, float | None]:
        """How many nats it is lower than another model's bound of the same pictures, and their standard error.

        Under the same seed both models met the same noise, so that this is known far better than either bound.
        """
        difference = other.per_picture - self.per_picture
        return float(difference.mean()), _standard_error(difference)

    def groups(self, most: int = 10) -> list[dict[str, float | None]]:
        """What neighbouring timesteps add to the bound: the decoder's alone, then at most so many groups.

        Each has its `first` and `last` timestep, `nats` with their `standard_error`, and `per_timestep`, the mean L_t.
        """
        others = self.timesteps.shape[1] - 1
        if self.every_timestep:  # as what is drawn: narrow where the terms are large
            ends = {round(others ** (i / most)) for i in range(1, most + 1)}
        else:
            ends = {round(others * i / most) for i in range(1, most + 1)}
        edges = [0, 1, *sorted(1 + end for end in ends if end)]
        return [self._group(slice(*pair)) for pair in itertools.pairwise(edges)]

    def _group(self, columns: slice) -> dict[str, float | None]:
        weights, timesteps = self.weights[:, columns], self.timesteps[:, columns]
        nats = (weights * self.terms[:, columns]).sum(dim=1)
        return {
            "first": int(timesteps.min()),
            "last": int(timesteps.max()),
            "nats": float(nats.mean()),
            "standard_error": _standard_error(nats),
            "per_timestep": float(nats.mean() / weights.sum(dim=1).mean()),
        }

    def as_dict(self) -> dict:
        """Every number, for JSON: totals, parts and each picture's own, with the conditions."""
        terms = [self._group(slice(k, k + 1)) for k in range(self.timesteps.shape[1])]
        return {
            "nats": self.nats,
            "standard_error": self.standard_error,
            "bits_per_dimension": self.bits_per_dimension,
            "prior": float(self.prior.mean()),
            "denoising": sum(term["nats"] for term in terms[1:]),
            "decoder": terms[0]["nats"],
            "pictures": len(self.prior),
            "dimensions": self.dimensions,
            "timesteps": "all" if self.every_timestep else self.timesteps.shape[1],
            "num_train_timesteps": self.num_train_timesteps,
            "prediction_type": self.prediction_type,
            "variance_type": self.variance_type,
            "decoder_variance": self.decoder_variance,
            "seed": self.seed,
            "terms": terms,
            "per_picture": self.per_picture.tolist(),
        }

    def __str__(self) -> str:
        total = f"{with_error(self.nats, self.standard_error)} nats a picture"
        lines = [
            f"bound on -log p  {total}, {self.bits_per_dimension:.4f} bits for each of {self.dimensions} dimensions",
            f"prior            {float(self.prior.mean()):.4g}",
        ]
        for group in reversed(self.groups()):
            first, last = group["first"], group["last"]
            where = "decoder, t = 0" if last == 0 else f"t = {first}" if first == last else f"t = {first} … {last}"
            lines.append(f"{where:<16} {with_error(group['nats'], group['standard_error'])}")
        count = "all" if self.every_timestep else f"{self.timesteps.shape[1]} of"
        lines.append(
            f"{len(self.prior)} pictures, {count} {self.num_train_timesteps} timesteps each, {self.prediction_type}, "
            f"{self.variance_type}, decoder's variance {self.decoder_variance:.3g}, seed {self.seed}"
        )
        return "\n".join(lines)

    @classmethod
    def joined(cls, parts: Sequence["Bound"]) -> "Bound":
        """The bound of all pictures from those of some each, such as several processes measured."""
        per_picture = ("prior", "timesteps", "terms", "weights")
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in per_picture})


def _standard_error(per_picture: torch.Tensor) -> float | None:
    return float(per_picture.std() / len(per_picture) ** 0.5) if len(per_picture) > 1 else None


def with_error(value: float, error: float | None) -> str:
    """ "12.34 ± 0.56", or "12.34" alone."""
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def plot_bounds(bounds: Mapping[str, Bound], path: str | os.PathLike) -> None:
    """L_t over the timesteps t >= 1, both logarithmic, a named curve for each bound."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="timestep", ylabel="L_t in nats", xscale="log", yscale="log")
    for name, bound in bounds.items():
        groups = bound.groups(most=40)[1:]
        middles = [(group["first"] * group["last"]) ** 0.5 for group in groups]
        label = f"{name}: {bound.bits_per_dimension:.3f} bits a dimension"
        axes.plot(middles, [group["per_timestep"] for group in groups], marker=".", label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
