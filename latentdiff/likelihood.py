"""How likely latents are under a trained model: DDPM's variational bound, term by term.

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
and 0.001 at 2, fixed_small 0.27 and 0.30, nearly all in the first ten timesteps, where the two differ most.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from diffusers import UNet2DConditionModel
from PIL import Image

from . import emoji, random_streams
from .bounds import Bound, plot_bounds, with_error
from .cli_errors import run_cli
from .config import ConfigError
from .latents import encode_moments, sample_latents, to_pixels
from .loading import load_pipeline
from .models import FrozenParts, encode_prompt
from .noise_schedule import add_noise, bound_x0, predict_x0_and_epsilon
from .recipe import folder_ingredient, folder_sha256, write_whole
from .scheduling_ddpm import DDPMScheduler

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


# ------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def variational_bound(
    model: torch.nn.Module,
    scheduler,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    *,
    timesteps_per_picture: int | None = 32,
    variance_type: str | None = None,
    decoder_variance: float | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
) -> Bound:
    """The bound of latents under their own captions, by the model's present weights.

    Args:
        model: called as `model(noisy_latents, timesteps, encoder_hidden_states).sample`; it has a device and a dtype.
        scheduler: the noise that the model was trained on; see `reverse_process`.
        latents: (N, C, h, w), scaled as the model sees them, on the CPU. encoder_hidden_states: (N, L, D).
        timesteps_per_picture: terms of each, an unbiased estimate by `stratified_timesteps`; None sums all T.
        variance_type: of the chain; by default the scheduler's own, see `reverse_process`.
        decoder_variance: v; by default beta_0.
        seed, indices: the draws for picture i follow from the seed and indices[i] (by default i) alone, so that it does
            not matter which process measures it.

    Raises:
        ValueError: a schedule without such a chain, fewer than two timesteps, or a variance that is not positive.
    """
    process = reverse_process(scheduler, variance_type)
    abar = process.alphas_cumprod
    v = 1 - float(abar[0]) if decoder_variance is None else decoder_variance
    if not v > 0:
        raise ValueError(f"decoder_variance is {v}; it must be positive")
    indices = range(len(latents)) if indices is None else indices
    timesteps, weights = _timesteps(abar, timesteps_per_picture, seed, indices)
    was_training = model.training
    model.eval()
    terms = []
    pairs = torch.cartesian_prod(torch.arange(len(latents)), torch.arange(timesteps.shape[1]))
    for part in tqdm(pairs.split(batch_size), desc="measuring likelihood", unit="batch"):
        of, columns = part.T
        x_0, t = latents[of].double(), timesteps[of, columns]
        noise = torch.stack([_noise(x_0.shape[1:], seed, indices[i], column) for i, column in part.tolist()])
        x_t = add_noise(abar, x_0, noise, t)
        seen, text = (tensor.to(model.device, model.dtype) for tensor in (x_t, encoder_hidden_states[of]))
        output = model(seen, t.to(model.device), text).sample.cpu()
        terms.append(denoising_term(process, output, x_0, x_t, t, v))
    model.train(was_training)
    return Bound(
        prior=prior_term(process, latents),
        timesteps=timesteps,
        terms=torch.cat(terms).view_as(weights),
        weights=weights,
        dimensions=latents[0].numel(),
        every_timestep=timesteps_per_picture is None,
        num_train_timesteps=len(abar),
        prediction_type=process.config.prediction_type,
        variance_type=process.variance_type,
        decoder_variance=v,
        seed=seed,
    )


def _timesteps(
    abar: torch.Tensor, count: int | None, seed: int, indices: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each picture the timesteps and their weights, (N, K) each."""
    if count is None:
        each = torch.arange(len(abar)).expand(len(indices), -1)
        return each, torch.ones(each.shape, dtype=torch.float64)
    streams = [random_streams.generator(seed, "bound timesteps", i) for i in indices]
    timesteps, weights = zip(*(stratified_timesteps(abar, count, stream) for stream in streams), strict=True)
    return torch.stack(timesteps), torch.stack(weights)


def _noise(shape: Sequence[int], seed: int, picture: int, column: int) -> torch.Tensor:
    stream = random_streams.generator(seed, "bound noise", picture, column)
    return torch.randn(shape, generator=stream, dtype=torch.float64)


def bound_of_pictures(
    pipeline,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    unet: torch.nn.Module | None = None,
    indices: Sequence[int] | None = None,
    **how,
) -> Bound:
    """The bound of captioned pictures' latents under a text-to-image pipeline.

    Args:
        pipeline: for its UNet, VAE, text encoder, tokenizer and scheduler.
        images: RGB, of one size that the VAE can halve. Of each the latents are drawn once from its posterior.
        captions: one for each.
        unet: another UNet to measure in the place of the pipeline's.
        indices: the pictures to measure, by number; by default all.
        how: see `variational_bound`.

    Raises:
        ConfigError: a UNet that is given more than noisy latents, as for inpainting.
    """
    unet = unet or pipeline.unet
    if unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ConfigError(
            f"the UNet takes {unet.config.in_channels} channels, the latents have "
            f"{pipeline.vae.config.latent_channels}: the likelihood of an inpainting model is not defined here"
        )
    indices = range(len(images)) if indices is None else indices
    parts = FrozenParts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    mean, std = encode_moments(parts.vae, to_pixels([images[i] for i in indices]))
    noise = [torch.randn(mean.shape[1:], generator=random_streams.generator(0, "bound posterior", i)) for i in indices]
    latents = sample_latents(parts.vae.config, mean.cpu(), std.cpu(), torch.stack(noise))
    text = encode_prompt(parts, [captions[i] for i in indices]).cpu()
    return variational_bound(unet, pipeline.scheduler, latents, text, indices=indices, **how)


def emoji_pictures(held_out: bool, count: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """Pictures of the default set on white with their plainest captions that name the style, in a drawn order.

    Args:
        held_out: those that are never trained on, or those that are.
        count: at most so many; by default as many as are held out.
    """
    pictures = emoji.load()

    def order(index: int) -> float:
        concept, style = pictures.rows[index]
        return random_streams.fraction("likelihood", concept.key, style)

    most = len(pictures.indices(held_out=True)) if count is None else count
    chosen = sorted(pictures.indices(held_out=held_out), key=order)[:most]
    return [pictures.composite(i) for i in chosen], [emoji.captions(*pictures.rows[i])[1] for i in chosen]


def held_out_bound(pipeline, *, held_out: bool = True, count: int | None = None, **how) -> Bound:
    """The bound of `emoji_pictures` under a pipeline, whose pictures the processes of a launch share.

    All processes call it, and get the same result. `how` is that of `bound_of_pictures`.
    """
    images, captions = emoji_pictures(held_out, count)
    state = PartialState()
    mine = np.array_split(np.arange(len(images)), state.num_processes)[state.process_index].tolist()
    parts = [bound_of_pictures(pipeline, images, captions, indices=mine, **how)] if mine else []
    return Bound.joined(gather_object(parts))


# ------------------------------------------------------------------------------------------------ the command line


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the bound of a checkpoint on emoji that it was never trained on, and on as many that it was.

    python -m latentdiff.likelihood runs/mine --unet runs/mine/checkpoint-*/unet_ema --output bound.json
    """

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved pipeline, or a model on the Hub as owner/name."""
    unet: tuple[Path, ...] = ()
    """Folders of UNets of the same run, such as its checkpoints have, to measure instead of the pipeline's own."""
    count: int | None = None
    """Pictures of each kind; by default as many as are held out."""
    timesteps: int = 32
    """Terms of the bound that are drawn for each picture."""
    all_timesteps: bool = False
    """Sum every term instead."""
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] | None = None
    """Of the chain; by default what the checkpoint's scheduler says, and fixed_large where it says nothing."""
    decoder_variance: float | None = None
    """Of the last step's density; by default beta_0."""
    seed: int = 0
    """Of noise and timesteps."""
    batch_size: int = 64
    """Noisy pictures at a time."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the networks."""
    device: str | None = None
    """As torch names it; by default cuda where there is one, else cpu."""
    output: Path | None = None
    """JSON file for the numbers."""
    plot: Path | None = None
    """PNG for the terms over the timesteps."""

    def __post_init__(self) -> None:
        for name in ("count", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.timesteps < 2:
            raise ConfigError(f"--timesteps is {self.timesteps}; it must be at least 2: the decoder's and another")
        if self.decoder_variance is not None and self.decoder_variance <= 0:
            raise ConfigError(f"--decoder-variance is {self.decoder_variance:g}; it must be positive")


KINDS = {"held_out": True, "trained": False}
OWN = "unet"  # what the pipeline's own UNet is called


def main(settings: Settings) -> None:
    """Measure each UNet, print tables, and write what is asked for."""
    pipeline = load_pipeline(settings.checkpoint, settings.device, settings.dtype)
    how = {
        "timesteps_per_picture": None if settings.all_timesteps else settings.timesteps,
        **{name: getattr(settings, name) for name in ("count", "variance_type", "decoder_variance", "seed")},
        "batch_size": settings.batch_size,
    }
    measured: dict[str, dict[str, Bound]] = {}
    for name, unet in _unets(settings, pipeline):
        try:
            found = {kind: held_out_bound(pipeline, unet=unet, held_out=which, **how) for kind, which in KINDS.items()}
        except ValueError as error:
            raise ConfigError(f"{settings.checkpoint}: {error}") from None
        if PartialState().is_main_process:
            _print(name, found, measured)
        measured[name] = found
    if PartialState().is_main_process:
        _write(settings, pipeline, measured)


def _unets(settings: Settings, pipeline) -> Iterator[tuple[str, torch.nn.Module]]:
    """Each one by the last two names of its path."""
    if not settings.unet:
        yield OWN, pipeline.unet
    for folder in settings.unet:
        try:
            unet = UNet2DConditionModel.from_pretrained(str(folder), dtype=pipeline.dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"--unet {folder}: no UNet can be loaded from it: {first_line}") from None
        yield "/".join(folder.resolve().parts[-2:]), unet.to(pipeline.device)


def _print(name: str, found: dict[str, Bound], earlier: dict[str, dict[str, Bound]]) -> None:
    """The tables, and how far below the UNet before it lies."""
    for kind, bound in found.items():
        print(f"{name}, {kind.replace('_', ' ')} pictures\n{bound}")
        for before in list(earlier)[-1:]:
            print(f"{with_error(*bound.below(earlier[before][kind]))} nats below {before}")
        print(flush=True)


def _write(settings: Settings, pipeline, measured: dict[str, dict[str, Bound]]) -> None:
    if settings.output is not None:
        folders = settings.unet or (Path(pipeline.name_or_path) / OWN,)
        unets = [
            {"unet": name, "sha256": folder_sha256(folder), **{kind: bound.as_dict() for kind, bound in found.items()}}
            for folder, (name, found) in zip(folders, measured.items(), strict=True)
        ]
        found = {"checkpoint": asdict(folder_ingredient(pipeline.name_or_path)), "unets": unets}
        write_whole(settings.output, (json.dumps(found, indent=2) + "\n").encode())
    if settings.plot is not None:
        plot_bounds({name: found["held_out"] for name, found in measured.items()}, settings.plot)


if __name__ == "__main__":
    run_cli(main, Settings)
