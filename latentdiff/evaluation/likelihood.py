"""How likely latents are under a trained model: the bound of `bound_terms` on held-out emoji, or on any pictures:
`python -m latentdiff.evaluation.likelihood checkpoints/emoji64`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, tqdm
from PIL import Image

from ..config.commands import Likelihood
from ..data import emoji
from ..data.batches import Batch
from ..data.entry_store import ENCODE_BATCH
from ..diffusion.noise_schedule import add_noise
from ..distributed.processes import join_processes
from ..inference.loading import load_pipeline
from ..inference.recipe import folder_ingredient
from ..models.latents import encode_moments, sample_latents, to_pixels
from ..models.loading import load_guide_unet
from ..models.parts import FrozenParts, encode_prompt, in_eval_mode
from ..objectives.prediction import predict
from ..utils import randomness
from ..utils.errors import ConfigError
from ..utils.files import write_whole
from .bound import Bound, denoising_term, plot_bounds, prior_term, reverse_process, stratified_timesteps, with_error

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
    terms = []
    pairs = torch.cartesian_prod(torch.arange(len(latents)), torch.arange(timesteps.shape[1]))
    with in_eval_mode(model):
        for part in tqdm(pairs.split(batch_size), desc="measuring likelihood", unit="batch"):
            of, columns = part.T
            x_0, t = latents[of].double(), timesteps[of, columns]
            noise = torch.stack([_noise(x_0.shape[1:], seed, indices[i], column) for i, column in part.tolist()])
            x_t = add_noise(abar, x_0, noise, t)
            seen, text = (tensor.to(model.device, model.dtype) for tensor in (x_t, encoder_hidden_states[of]))
            batch = Batch(seen, noise, t, text, None)
            output = predict(model, batch, seen, t.to(model.device)).sample.cpu()
            terms.append(denoising_term(process, output, x_0, x_t, t, v))
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
    streams = [randomness.generator(seed, "bound timesteps", i) for i in indices]
    timesteps, weights = zip(*(stratified_timesteps(abar, count, stream) for stream in streams), strict=True)
    return torch.stack(timesteps), torch.stack(weights)


def _noise(shape: Sequence[int], seed: int, picture: int, column: int) -> torch.Tensor:
    stream = randomness.generator(seed, "bound noise", picture, column)
    return torch.randn(shape, generator=stream, dtype=torch.float64)


def bound_of_pictures(
    pipeline, images: Sequence[Image.Image], captions: Sequence[str], *, unet: torch.nn.Module | None = None, **how
) -> Bound:
    """The bound of captioned pictures' latents under a text-to-image pipeline.

    The processes of a launch share the pictures: all of them call it, and get the same result.

    Args:
        pipeline: for its UNet, VAE, text encoder, tokenizer and scheduler.
        images: RGB, of one size that the VAE can halve, of which the latents are drawn once from its posterior.
        captions: one for each.
        unet: another UNet to measure in the place of the pipeline's.
        how: see `variational_bound`.

    Raises:
        ConfigError: no pictures, or a UNet that is given more than noisy latents, as for inpainting.
    """
    unet = unet or pipeline.unet
    if unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ConfigError(
            f"the UNet takes {unet.config.in_channels} channels, the latents have "
            f"{pipeline.vae.config.latent_channels}: the likelihood of an inpainting model is not defined here"
        )
    if not len(images):
        raise ConfigError("likelihood: there are no pictures to measure it on")
    state = PartialState()
    mine = np.array_split(np.arange(len(images)), state.num_processes)[state.process_index].tolist()
    parts = []
    if mine:
        encoded = [
            _encode(pipeline, images, captions, mine[i : i + ENCODE_BATCH]) for i in range(0, len(mine), ENCODE_BATCH)
        ]
        latents, text = map(torch.cat, zip(*encoded, strict=True))
        parts = [variational_bound(unet, pipeline.scheduler, latents, text, indices=mine, **how)]
    return Bound.joined(gather_object(parts))


def _encode(
    pipeline, images: Sequence[Image.Image], captions: Sequence[str], which: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some pictures' latents and their captions' hidden states, on the CPU."""
    parts = FrozenParts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    mean, std = (moment.cpu() for moment in encode_moments(parts.vae, to_pixels([images[i] for i in which])))
    noise = [torch.randn(mean.shape[1:], generator=randomness.generator(0, "bound posterior", i)) for i in which]
    latents = sample_latents(parts.vae.config, mean, std, torch.stack(noise))
    return latents, encode_prompt(parts, [captions[i] for i in which]).cpu()


def emoji_pictures(held_out: bool, count: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """Pictures of the default set on white with their plainest captions that name the style, in a drawn order.

    Args:
        held_out: those that are never trained on, or those that are.
        count: at most so many; by default as many as are held out.
    """
    pictures = emoji.load()

    def order(index: int) -> float:
        concept, style = pictures.rows[index]
        return randomness.fraction("likelihood", concept.key, style)

    most = len(pictures.indices(held_out=True)) if count is None else count
    chosen = sorted(pictures.indices(held_out=held_out), key=order)[:most]
    return [pictures.composite(i) for i in chosen], [emoji.captions(*pictures.rows[i])[1] for i in chosen]


def held_out_bound(pipeline, *, held_out: bool = True, count: int | None = None, **how) -> Bound:
    """The bound of `emoji_pictures` under a pipeline; `how` is that of `bound_of_pictures`."""
    return bound_of_pictures(pipeline, *emoji_pictures(held_out, count), **how)


# ------------------------------------------------------------------------------------------------ the command line


KINDS = {"held_out": True, "trained": False}
OWN = "unet"  # what the pipeline's own UNet is called


def likelihood(command: Likelihood) -> None:
    """Measure each UNet, print tables, and write what is asked for."""
    state = join_processes()
    device = str(state.device) if state.num_processes > 1 and command.device is None else command.device
    pipeline = load_pipeline(command.checkpoint, device, command.dtype, single_file_config=command.single_file_config)
    how = {
        "timesteps_per_picture": None if command.all_timesteps else command.timesteps,
        **{name: getattr(command, name) for name in ("count", "variance_type", "decoder_variance", "seed")},
        "batch_size": command.batch_size,
    }
    measured: dict[str, dict[str, Bound]] = {}
    for name, unet in _unets(command, pipeline):
        try:
            found = {kind: held_out_bound(pipeline, unet=unet, held_out=which, **how) for kind, which in KINDS.items()}
        except ValueError as error:
            raise ConfigError(f"{command.checkpoint}: {error}") from None
        if state.is_main_process:
            _print(name, found, measured)
        measured[name] = found
    if state.is_main_process:
        _write(command, pipeline, measured)


def _unets(command: Likelihood, pipeline) -> Iterator[tuple[str, torch.nn.Module]]:
    """Each one by the last two names of its path."""
    if not command.unet:
        yield OWN, pipeline.unet
    for folder in command.unet:
        unet = load_guide_unet(folder, "--unet", dtype=pipeline.dtype)
        yield "/".join(folder.resolve().parts[-2:]), unet.to(pipeline.device)


def _print(name: str, found: dict[str, Bound], earlier: dict[str, dict[str, Bound]]) -> None:
    """The tables, and how far below the UNet before it lies."""
    for kind, bound in found.items():
        print(f"{name}, {kind.replace('_', ' ')} pictures\n{bound}")
        for before in list(earlier)[-1:]:
            print(f"{with_error(*bound.below(earlier[before][kind]))} nats below {before}")
        print(flush=True)


def _write(command: Likelihood, pipeline, measured: dict[str, dict[str, Bound]]) -> None:
    if command.output is not None:
        source = Path(pipeline.name_or_path)
        own = source if source.is_file() else source / OWN
        unets = [
            {
                "unet": name,
                "sha256": folder_ingredient(folder).sha256,
                **{kind: bound.as_dict() for kind, bound in found.items()},
            }
            for folder, (name, found) in zip(command.unet or (own,), measured.items(), strict=True)
        ]
        found = {"checkpoint": asdict(folder_ingredient(pipeline.name_or_path)), "unets": unets}
        write_whole(command.output, (json.dumps(found, indent=2) + "\n").encode())
    if command.plot is not None:
        plot_bounds({name: found["held_out"] for name, found in measured.items()}, command.plot)
