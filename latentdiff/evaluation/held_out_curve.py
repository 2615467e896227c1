"""The held-out denoising loss as a curve over timesteps and over noise levels.

Networks that predict different things, or were trained on different noise schedules, have losses that cannot be
compared. The error of epsilon at the same log-SNR can: of the same pictures under the same noise it does not depend on
either, and its integral over log-SNR is twice what the variational bound takes from these levels (Kingma et al. 2021,
arXiv 2107.00630, eq. 18).
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure

from ..data.latent_cache import HiddenStates, Moments
from ..data.pictures import CaptionedPictures
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.parts import FrozenParts
from ..training.held_out import LOG_SNRS, HeldOutErrors, HeldOutLoss

BINS_OF_TIMESTEPS = 10
BINS_OF_LOG_SNR = 13  # of one each


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The errors within one bin, averaged."""

    low: float
    high: float
    """The bin's ends: timesteps, or log-SNRs."""
    count: int
    """Questions, of which a picture asks several."""
    loss: float
    """In what the network predicts."""
    epsilon: float
    epsilon_error: float
    """Its standard error; 0 of a single question."""
    x_0: float


@dataclass(frozen=True, kw_only=True)
class HeldOutCurve:
    """How wrong a network is on pictures that it was not trained on, each mean over latents of about unit variance."""

    pictures: int
    prediction_type: str
    loss: float
    """The mean over evenly spread timesteps in what the network predicts, as a training run logs it."""
    epsilon: float
    """The mean error of the noise over evenly spread log-SNRs: what compares networks of any kind."""
    epsilon_error: float
    """Its standard error. Networks that were asked the same differ by less chance than this."""
    over_timesteps: tuple[CurvePoint, ...]
    over_log_snr: tuple[CurvePoint, ...]
    """Without the bins that the noise schedule does not reach."""


def held_out_curve(
    pipeline: DiffusionPipeline, pictures: CaptionedPictures, *, max_pictures: int = 256, batch_size: int = 64
) -> HeldOutCurve | None:
    """The curve of a pipeline's UNet on its own noise schedule; None without held-out pictures.

    All processes call it together and share the work; each returns the same.

    Args:
        pipeline: a text-to-image one, with any scheduler that has a diffusers configuration.
        pictures: of which those marked `held_out` are measured, `max_pictures` at most, under their first captions.
    """
    scheduler = training_schedule(pipeline.scheduler)
    parts = FrozenParts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    moments, hidden_states = Moments(pictures, parts.vae, False, None), HiddenStates(pictures, parts)

    def errors(alphas_cumprod: torch.Tensor | None) -> HeldOutErrors | None:
        loss = HeldOutLoss(
            pictures,
            moments,
            hidden_states,
            vae_config=parts.vae.config,
            num_train_timesteps=scheduler.config.num_train_timesteps,
            max_pictures=max_pictures,
            alphas_cumprod=alphas_cumprod,
        )
        return _all_errors(loss, pipeline.unet, scheduler, batch_size) if loss.pictures else None

    evenly = errors(None)
    if evenly is None:
        return None
    at_levels = errors(scheduler.alphas_cumprod)
    log_snr = torch.logit(scheduler.alphas_cumprod.double())[at_levels.timesteps]
    over_log_snr = curve_points(at_levels, log_snr, torch.linspace(*LOG_SNRS, BINS_OF_LOG_SNR + 1))
    edges = torch.linspace(0, scheduler.config.num_train_timesteps, BINS_OF_TIMESTEPS + 1)
    return HeldOutCurve(
        pictures=min(max_pictures, int(pictures.held_out.sum())),
        prediction_type=scheduler.config.prediction_type,
        loss=evenly.loss.mean().item(),
        epsilon=sum(point.epsilon for point in over_log_snr) / len(over_log_snr),
        epsilon_error=sum(point.epsilon_error**2 for point in over_log_snr) ** 0.5 / len(over_log_snr),
        over_timesteps=curve_points(evenly, evenly.timesteps, edges),
        over_log_snr=over_log_snr,
    )


def training_schedule(scheduler) -> DDPMScheduler:
    """The noise schedule that a sampler of any kind runs on."""
    known = DDPMScheduler._get_init_keys(DDPMScheduler)
    return DDPMScheduler.from_config({name: value for name, value in scheduler.config.items() if name in known})


def _all_errors(loss: HeldOutLoss, unet: torch.nn.Module, scheduler: DDPMScheduler, batch_size: int) -> HeldOutErrors:
    """Those of all processes, in the order of one."""
    state, autocast = PartialState(), nullcontext
    if unet.dtype != torch.float32:  # the questions are in fp32
        autocast = partial(torch.autocast, unet.device.type, unet.dtype)
    mine = loss.errors(unet, scheduler, batch_size, autocast, share=(state.process_index, state.num_processes))
    found = dict(gather_object(list(mine.items())))
    return HeldOutErrors.joined(found[number] for number in sorted(found))


def curve_points(errors: HeldOutErrors, places: torch.Tensor, edges: torch.Tensor) -> tuple[CurvePoint, ...]:
    """The means of bins that are not empty.

    Args:
        places: (K,), where on the axis each question stands; what lies beyond the ends counts to the outermost bins.
        edges: ascending.
    """
    bins = torch.bucketize(places.double(), edges[1:-1].double(), right=True)
    points = []
    for number in bins.unique().tolist():
        inside = bins == number
        loss, epsilon, x_0 = (values[inside].double() for values in (errors.loss, errors.epsilon, errors.x_0))
        spread = epsilon.std().item() if len(epsilon) > 1 else 0.0
        points.append(
            CurvePoint(
                low=edges[number].item(),
                high=edges[number + 1].item(),
                count=len(epsilon),
                loss=loss.mean().item(),
                epsilon=epsilon.mean().item(),
                epsilon_error=spread / len(epsilon) ** 0.5,
                x_0=x_0.mean().item(),
            )
        )
    return tuple(points)


def plot_curves(curves: Mapping[str, HeldOutCurve], path: Path) -> None:
    """The errors of noise and of latents over log-SNR, a line for each network, as a PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    labels = {"epsilon": "mean squared error of the noise", "x_0": "mean squared error of the latents"}
    for axes, (name, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for title, curve in curves.items():
            middles = [(point.low + point.high) / 2 for point in curve.over_log_snr]
            means = [getattr(point, name) for point in curve.over_log_snr]
            errors = [point.epsilon_error if name == "epsilon" else 0 for point in curve.over_log_snr]
            axes.errorbar(middles, means, errors, marker=".", capsize=2, label=title)
        axes.set(xlabel="log-SNR (much noise … little noise)", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
