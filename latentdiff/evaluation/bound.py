"""The terms of DDPM's variational bound on the likelihood of latents, and which of them to measure.

Ho et al. 2020 (arXiv 2006.11239), eq. 5. Timesteps count as in the schedulers, from 0 to T - 1, so that x_t here is
DDPM's x_{t+1}; x_0 are the latents:

    -log p(x_0) <= KL(q(x_{T-1} | x_0) || N(0, I))                                    the prior, L_T of the paper
                   + sum over t >= 1 of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))                        L_t
                   - log p(x_0 | x_{t=0})                                                   the decoder, L_0

p is the chain that `DDPMScheduler.step` draws from: the posterior's mean at the predicted x_0, and the variance that
`variance_type` says. Latents are real numbers, not bytes, so nothing is discretised: the decoder is a Gaussian around
the predicted x_0 with one fixed variance v. Every v > 0 makes it a density, and so the sum a bound on the negative log
density, which may well be negative; by default v = beta_0, DDPM's larger choice for its last step.

How far the bound lies above the truth even with a perfect network is up to the variances. beta_t is exact for data of
unit variance and close for any that are broad beside the noise of the first steps; beta-tilde_t is exact for a single
point. Per dimension, with T = 1000, data N(0, s^2) and the schedule of emoji64, fixed_large costs 0.003 nats at s = 0.3
and 0.001 at 2, fixed_small 0.27 and 0.30, nine tenths of it in the first ten timesteps, where the two differ most.

`Bound` is the result: its parts, as a table, as curves, as JSON. `likelihood` measures it.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..diffusion.noise_schedule import bound_x0, predict_x0_and_epsilon
from ..diffusion.scheduling_ddpm import DDPMScheduler


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


# ------------------------------------------------------------------------------------------------------ the terms


def reverse_process(scheduler, variance_type: str | None = None) -> DDPMScheduler:
    """The chain to measure: DDPM on a scheduler's settings, with its noise levels in float64.

    In float32 the difference 1 - abar_t / abar_{t-1} of a small step keeps three digits.

    Args:
        scheduler: of this library or of diffusers, with DDPM's settings and `alphas_cumprod`.
        variance_type: see `DDPMScheduler`; by default the scheduler's own, and "fixed_large" where it has none.

    Raises:
        ValueError: the noise does not grow at every timestep, or all is noise before the last.
    """
    known = DDPMScheduler._get_init_keys(DDPMScheduler)
    settings = {name: value for name, value in scheduler.config.items() if name in known}
    settings["variance_type"] = variance_type or settings.get("variance_type", "fixed_large")
    process = DDPMScheduler.from_config(settings)
    process.alphas_cumprod = scheduler.alphas_cumprod.detach().cpu().double()
    levels = torch.cat([torch.ones(1), process.alphas_cumprod])
    if not (levels.diff() < 0).all() or levels[:-1].min() <= 0:
        raise ValueError(
            "alphas_cumprod must fall at every timestep, and be 0 at none but the last: else there is no Gaussian "
            "between two timesteps to measure"
        )
    return process


def gaussian_kl(
    squared_distance: torch.Tensor, variance_q: torch.Tensor, variance_p: torch.Tensor | float
) -> torch.Tensor:
    """KL(N(m, variance_q) || N(m', variance_p)) of each dimension in nats, where squared_distance = (m - m')^2."""
    ratio = variance_q / variance_p
    return 0.5 * (squared_distance / variance_p + ratio - 1 - ratio.log())


def prior_term(process: DDPMScheduler, latents: torch.Tensor) -> torch.Tensor:
    """KL(q(x_{T-1} | x_0) || N(0, I)), in which no network has a part: (B, C, h, w) -> (B,) float64 nats."""
    abar = process.alphas_cumprod[-1]
    return gaussian_kl(abar * latents.double().square(), 1 - abar, 1.0).flatten(1).sum(dim=1)


def denoising_term(
    process: DDPMScheduler,
    model_output: torch.Tensor,
    latents: torch.Tensor,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    decoder_variance: float,
) -> torch.Tensor:
    """L_t of each sample at its own timestep, for one x_t ~ q(x_t | x_0): (B,) float64 nats.

    With t >= 1 the distance of the two means is sqrt(abar_{t-1}) beta_t / (1 - abar_t) times that of x_0 and its
    prediction (DDPM, eq. 7 and 8); with an epsilon and the posterior's own variance this is eq. 12.

    Args:
        process: of `reverse_process`.
        model_output: for x_t, (B, C, h, w), or (B, 2C, h, w) where the variance is learned.
        latents, noisy_latents: x_0 and x_t, (B, C, h, w).
        timesteps: (B,) int64.
        decoder_variance: v.
    """
    prediction, learned = process._split_learned(model_output.double(), latents)
    abar, kind = process.alphas_cumprod, process.config.prediction_type
    predicted_x_0, _ = predict_x0_and_epsilon(abar, prediction, noisy_latents.double(), timesteps, kind)
    squared_error = (latents.double() - bound_x0(predicted_x_0, process.config)).square()
    # At t = 0 the posterior is a point: what the next lines give there is not used.
    posterior = _variances(process, timesteps, "fixed_small")
    variance = _variances(process, timesteps, process.variance_type, learned)
    before = abar[timesteps.clamp(min=1) - 1].view_as(posterior)
    squared_distance = before * (posterior / (1 - before)).square() * squared_error
    divergence = gaussian_kl(squared_distance, posterior, variance)
    decoder = 0.5 * (squared_error / decoder_variance + math.log(2 * math.pi * decoder_variance))
    return torch.where(timesteps == 0, decoder.flatten(1).sum(dim=1), divergence.flatten(1).sum(dim=1))


def _variances(
    process: DDPMScheduler, timesteps: torch.Tensor, variance_type: str, learned: torch.Tensor | None = None
) -> torch.Tensor:
    """What `step` draws with at each sample's own timestep: (B, 1, 1, 1), or shaped as `learned`."""
    if learned is not None:
        return torch.stack([process._get_variance(t, own) for t, own in zip(timesteps.tolist(), learned, strict=True)])
    different, which = timesteps.unique(return_inverse=True)
    table = torch.stack([process._get_variance(t, variance_type=variance_type) for t in different.tolist()])
    return table[which].reshape(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------- which timesteps


def stratified_timesteps(
    alphas_cumprod: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending timesteps (count,), and weights (count,) under which the sum of their L_t is unbiased for all of them.

    The decoder's is always there. The others are drawn one from each of count - 1 parts of 1 … T-1 that are alike in
    log(1 + SNR), the share of each L_t where the data have unit variance and the network is perfect. Drawn evenly, the
    few first timesteps, which hold most of the sum, would seldom be among them.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} timesteps for each picture; it must be at least 2, of which one is the decoder's")
    share = (1 - alphas_cumprod.double()).log().diff()  # of t = 1 … T-1, since 1 + SNR = 1 / (1 - abar)
    share = share / share.sum()
    places = (torch.arange(count - 1) + torch.rand(count - 1, generator=generator, dtype=torch.float64)) / (count - 1)
    drawn = torch.searchsorted(share.cumsum(0), places, right=True).clamp(max=len(share) - 1)
    timesteps = torch.cat([torch.zeros(1, dtype=torch.int64), drawn + 1])
    return timesteps, torch.cat([torch.ones(1, dtype=torch.float64), 1 / ((count - 1) * share[drawn])])
