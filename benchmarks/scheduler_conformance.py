"""Measures of any scheduler that has diffusers' interface, against closed forms; one function for each property.

`python benchmarks/scheduler_conformance.py` takes them of our schedulers and of diffusers' and writes the table in
docs/schedulers.md, where each row is explained; with names of classes, `diffusers.HeunDiscreteScheduler`, it prints the
table of these. Stable Diffusion's noise schedule; float64, as far as a scheduler computes in it.
"""

import argparse
import functools
import inspect
import math
import pydoc
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, product
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from latentdiff.diffusion.noise_schedule import (
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    alphas_cumprod,
    make_betas,
    noise_level,
)
from latentdiff.diffusion.scheduling_ddim import DDIMScheduler
from latentdiff.diffusion.scheduling_ddpm import DDPMScheduler

STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}
MEAN, DEVIATION = 0.3, 0.5  # of the Gaussian data

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]  # x_t and t -> what a network puts out
Levels = Callable[[float], tuple[float, float]]  # t -> sqrt(abar_t) and sqrt(1 - abar_t)

# ---- what is measured with ------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, size: int = 64) -> torch.Tensor:
    """float64 (1, 1, 1, size): a picture of one row, for schedulers that want four dimensions."""
    return torch.randn(1, 1, 1, size, generator=seeded(seed), dtype=torch.float64)


@functools.cache
def arguments_of(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def build(scheduler_class: type[SchedulerMixin], **options) -> SchedulerMixin:
    """The scheduler on Stable Diffusion's noise schedule, with those of the options that it has."""
    taken = arguments_of(scheduler_class.__init__)
    return scheduler_class(**{name: value for name, value in (STABLE_DIFFUSION | options).items() if name in taken})


def step(scheduler: SchedulerMixin, output: torch.Tensor, t, x: torch.Tensor, **options) -> torch.Tensor:
    """`scheduler.step`, with those of the options that it has."""
    taken = arguments_of(type(scheduler).step)
    options = {name: value for name, value in options.items() if name in taken}
    return scheduler.step(output, t, x, **options).prev_sample


@functools.cache
def levels_of(rescale_betas_zero_snr: bool = False) -> Levels:
    """The levels that belong to a timestep on the training grid, whatever a scheduler makes of it."""
    abars = alphas_cumprod(make_betas(rescale_betas_zero_snr=rescale_betas_zero_snr)).double()

    @functools.cache
    def levels(t: float) -> tuple[float, float]:
        signal = (1 + noise_level(abars, t) ** 2) ** -0.5
        return signal, (1 - signal**2) ** 0.5

    return lambda t: levels(float(t))


def answer(prediction_type: str, signal: float, sigma: float, x_t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
    """What a network puts out that takes x_t for `x_0` and noise (see `noise_schedule.predict_x0_and_epsilon`)."""
    noise = (x_t - signal * x_0) / sigma
    return {"epsilon": noise, "sample": x_0, "v_prediction": signal * noise - sigma * x_0}[prediction_type]


def oracle(scheduler: SchedulerMixin, levels: Levels, x_0: torch.Tensor) -> Denoiser:
    """Is told x_0, and reads the noise off x_t and the noise level of t."""
    return lambda x_t, t: answer(scheduler.config.prediction_type, *levels(t), x_t, x_0)


def regression(signal: float, sigma: float) -> float:
    """The slope of E[x_0 | x_t] in x_t: the covariance of the two over the variance of x_t."""
    return signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + sigma**2)


def ideal_denoiser(scheduler: SchedulerMixin, levels: Levels) -> Denoiser:
    """Predicts E[x_0 | x_t] for x_0 ~ N(MEAN, DEVIATION^2): the best that a network can do."""

    def denoiser(x_t: torch.Tensor, t: float) -> torch.Tensor:
        signal, sigma = levels(t)
        x_0 = MEAN + regression(signal, sigma) * (x_t - signal * MEAN)
        return answer(scheduler.config.prediction_type, signal, sigma, x_t, x_0)

    return denoiser


def walk(scheduler: SchedulerMixin, denoiser: Denoiser, x: torch.Tensor, timesteps=None, **options) -> torch.Tensor:
    """The loop of a pipeline over the announced timesteps, or some of them."""
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = step(scheduler, denoiser(scheduler.scale_model_input(x, t), t), t, x, **options)
    return x


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Infinite where something is not a number."""
    difference = (a - b).abs().max().item()
    return math.inf if math.isnan(difference) else difference


# ---- the measures ---------------------------------------------------------------------------------------------------


def wrongly_announced(scheduler_class: type[SchedulerMixin], counts: Iterable[int], **options) -> list[int]:
    """The step counts for which not just as many timesteps are announced, descending, each on the training grid."""
    scheduler, wrong = build(scheduler_class, **options), []
    for n in counts:
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.numpy()
        # A method with two evaluations a step, as Heun's, announces every timestep but the first twice.
        timesteps = np.append(timesteps[:1], timesteps[1 :: scheduler.order])
        on_the_grid = timesteps[-1] >= 0 and timesteps[0] < scheduler.config.num_train_timesteps
        if not (len(timesteps) == n and on_the_grid and (np.diff(timesteps) < 0).all()):
            wrong.append(n)
    return wrong


def distance_from_announced(scheduler_class: type[SchedulerMixin], num_inference_steps: int, **options) -> float:
    """The largest difference between what the network is shown, and x_0 with the noise that belongs to the timestep.

    The network always answers with the same x_0 and noise. Where a sampler adds noise of its own, the mixture of both
    is what it is to show. The last difference is that of the result from x_0.
    """
    scheduler, levels = build(scheduler_class, **options), levels_of(options.get("rescale_betas_zero_snr", False))
    scheduler.set_timesteps(num_inference_steps)
    x_0, noise = normal(1), normal(2)
    x, worst = scheduler.add_noise(x_0, noise, scheduler.timesteps[:1]), 0.0
    for i, t in enumerate(scheduler.timesteps):
        signal, sigma = levels(t)
        x_t = signal * x_0 + sigma * noise
        worst = max(worst, max_difference(scheduler.scale_model_input(x, t), x_t))
        output = answer(scheduler.config.prediction_type, signal, sigma, x_t, x_0)
        generator = seeded(100 + i)
        x = step(scheduler, output, t, x, generator=generator)
        if not x.isfinite().all():
            return math.inf
        if not torch.equal(generator.get_state(), seeded(100 + i).get_state()):
            noise = mixed_noise(x, x_0, noise, torch.randn(x.shape, generator=seeded(100 + i), dtype=x.dtype))
    return max(worst, max_difference(x, x_0))


def mixed_noise(x: torch.Tensor, x_0: torch.Tensor, old: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """The noise in x = a x_0 + b old + c fresh, brought to unit variance."""
    parts = torch.stack([x_0, old, fresh], dim=-1).reshape(-1, 3)
    _, b, c = torch.linalg.lstsq(parts, x.reshape(-1, 1)).solution.flatten().tolist()
    return (abs(b) * old + c * fresh) / math.hypot(b, c)


def oracle_error(scheduler_class: type[SchedulerMixin], num_inference_steps: int, eta: float = 0.0, **options) -> float:
    """How far from x_0 a sampler ends, from pure noise, whose denoiser knows x_0."""
    scheduler, levels = build(scheduler_class, **options), levels_of(options.get("rescale_betas_zero_snr", False))
    scheduler.set_timesteps(num_inference_steps)
    x_0, start = normal(1), normal(2) * scheduler.init_noise_sigma
    return max_difference(walk(scheduler, oracle(scheduler, levels, x_0), start, generator=seeded(3), eta=eta), x_0)


def ancestral_moments(levels: Levels, timesteps: list[int]) -> tuple[float, float]:
    """Mean and variance of what DDPM draws, from N(0, 1), with the ideal denoiser; a step is linear (DDPM, eq. 7)."""
    mean, variance = 0.0, 1.0
    for t, prev_t in pairwise([*timesteps, -1]):
        signal, sigma = levels(t)
        prev_signal, prev_sigma = levels(prev_t) if prev_t >= 0 else (1.0, 0.0)
        alpha, beta_share = (signal / prev_signal) ** 2, (prev_sigma / sigma) ** 2
        x_0_weight = prev_signal * (1 - alpha) / sigma**2
        slope = x_0_weight * regression(signal, sigma) + alpha**0.5 * beta_share
        mean = slope * mean + x_0_weight * (1 - regression(signal, sigma) * signal) * MEAN
        variance = slope**2 * variance + beta_share * (1 - alpha)
    return mean, variance


def moments_error(
    scheduler_class: type[SchedulerMixin], num_inference_steps: int, size: int = 100_000, **options
) -> float:
    """How far the mean and the variance of `size` draws are from DDPM's, in standard errors: the larger of the two.

    DDIM draws with eta = 1, which makes it DDPM (DDIM, section 4.1).
    """
    scheduler, levels = build(scheduler_class, **options), levels_of(options.get("rescale_betas_zero_snr", False))
    scheduler.set_timesteps(num_inference_steps)
    mean, variance = ancestral_moments(levels, scheduler.timesteps.tolist())
    denoiser, start = ideal_denoiser(scheduler, levels), normal(2, size) * scheduler.init_noise_sigma
    drawn = walk(scheduler, denoiser, start, generator=seeded(3), eta=1.0)
    in_mean = (drawn.mean().item() - mean) / (variance / size) ** 0.5
    in_variance = (drawn.var().item() / variance - 1) / (2 / (size - 1)) ** 0.5
    return math.inf if math.isnan(in_mean) else max(abs(in_mean), abs(in_variance))


def inversion_error(
    scheduler_class: type[SchedulerMixin], num_inference_steps: int, repeats: int = 1, **options
) -> float:
    """How far from its start a sample of the data ends that goes up, by DDIM inversion, and down again.

    The root mean square, in units of DEVIATION. repeats: how often `inversion_step` is made at each timestep, each time
    from the result of the time before. diffusers' DDIM goes up by its DDIMInverseScheduler.
    """
    scheduler, levels = build(scheduler_class, **options), levels_of(options.get("rescale_betas_zero_snr", False))
    scheduler.set_timesteps(num_inference_steps)
    denoiser, x_0 = ideal_denoiser(scheduler, levels), MEAN + DEVIATION * normal(1, 1000)
    if hasattr(scheduler, "inversion_step"):
        x = x_0
        for t in scheduler.timesteps.flip(0):
            x_t = x
            for _ in range(repeats):
                x_t = scheduler.inversion_step(denoiser(x_t, t), t, x, model_input=x_t).prev_sample
            x = x_t
    else:
        upwards = build(diffusers.DDIMInverseScheduler, **options)
        upwards.set_timesteps(num_inference_steps)
        x = walk(upwards, denoiser, x_0)
    error = (walk(scheduler, denoiser, x) - x_0).square().mean().item() ** 0.5 / DEVIATION
    return math.inf if math.isnan(error) else error


def ode_error(scheduler_class: type[SchedulerMixin], num_inference_steps: int, last: int = 499) -> float:
    """How far from the solution of the probability-flow ODE a walk on the trailing grid is at timestep `last`.

    dx/dsigma = (x - E[x_0 | x]) / sigma for x = x_t / sqrt(abar_t) (arXiv 2206.00364, eq. 1 and 3). For Gaussian data
    x - MEAN is then proportional to sqrt(DEVIATION^2 + sigma^2).
    """
    scheduler, levels = build(scheduler_class, timestep_spacing="trailing"), levels_of()
    scheduler.set_timesteps(num_inference_steps)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 1, 9)

    def solution(t: float) -> torch.Tensor:
        signal, sigma = levels(t)
        return signal * (MEAN + (DEVIATION**2 + (sigma / signal) ** 2) ** 0.5 * z)

    arrival = (scheduler.timesteps == last).nonzero()[-1].item()  # some announce a timestep twice, for two evaluations
    _, sigma = levels(scheduler.timesteps[0])
    # add_noise knows whether this scheduler's x is x_t or x_t / sqrt(abar_t).
    start = solution(scheduler.timesteps[0])
    x = scheduler.add_noise(torch.zeros_like(z), start / sigma, scheduler.timesteps[:1])
    x = walk(scheduler, ideal_denoiser(scheduler, levels), x, scheduler.timesteps[:arrival])
    return max_difference(scheduler.scale_model_input(x, scheduler.timesteps[arrival]), solution(last))


def order_of_convergence(scheduler_class: type[SchedulerMixin]) -> float:
    """p, where `ode_error` falls as N^-p: the slope of a line through the logarithms.

    The step counts divide 1000, so no timestep is rounded, and are even, so that every grid has timestep 499 on it. The
    walk ends there, and not at x_0: the step to x_0 has infinite length in log SNR, in which these methods have their
    order, whatever the count.
    """
    counts = (20, 40, 50, 100)
    errors = [ode_error(scheduler_class, n) for n in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


# ---- the table ------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DDIMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
]
COUNTS = (1, 2, 3, 4, 7, 10, 25, 30, 50, 61, 100)
LARGE_COUNTS = (333, 999, 1000)
ZERO_SNR = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def oracle_cases(spacing: str, counts=COUNTS, large_counts=LARGE_COUNTS) -> Iterator[dict]:
    """Prediction type x zero SNR x step count; the large counts for v-prediction without zero SNR alone, to save time.

    Left out: one step of epsilon-prediction from pure noise, where the noise is all of x_t and says nothing of x_0.
    """
    for prediction_type, zero_snr, n in product(PREDICTION_TYPES, (False, True), counts):
        if not (n == 1 and zero_snr and prediction_type == "epsilon" and spacing != "leading"):
            options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
            yield {"num_inference_steps": n, "timestep_spacing": spacing} | options
    for n in large_counts:
        yield {"num_inference_steps": n, "timestep_spacing": spacing, "prediction_type": "v_prediction"}


def attempt(measure: Callable[..., float], *args, **options) -> float:
    """Infinite where the scheduler fails on the way."""
    try:
        return measure(*args, **options)
    except (IndexError, AssertionError, ValueError, NotImplementedError):
        return math.inf


def summary(errors: list[float], limit: float = 1e-3, digits: str = ".0e") -> str:
    """The largest error, or how many are past the limit."""
    wrong = [error for error in errors if error > limit]
    if not wrong:
        return f"{max(errors):{digits}}"
    finite = [error for error in wrong if math.isfinite(error)]
    details = [f"{max(finite):{'.0f' if max(finite) > 10 else '.2g'}}"] if finite else []
    details += [f"no number in {len(wrong) - len(finite)}"] if len(finite) < len(wrong) else []
    return f"**{len(wrong)} of {len(errors)}**: {', '.join(details)}"


def announced_cell(scheduler_class: type[SchedulerMixin], spacing: str) -> str:
    wrong = wrongly_announced(scheduler_class, range(1, 1001), timestep_spacing=spacing)
    return f"**{len(wrong)} of 1000**" if wrong else "0"


def distance_cell(scheduler_class: type[SchedulerMixin], spacing: str) -> str:
    counts = COUNTS + LARGE_COUNTS
    return summary([attempt(distance_from_announced, scheduler_class, n, timestep_spacing=spacing) for n in counts])


def oracle_cell(scheduler_class: type[SchedulerMixin], spacing: str) -> str:
    knows_zero_snr = "rescale_betas_zero_snr" in arguments_of(scheduler_class.__init__)
    cases = [case for case in oracle_cases(spacing) if knows_zero_snr or not case.get("rescale_betas_zero_snr")]
    return summary([attempt(oracle_error, scheduler_class, **case) for case in cases])


def moments_cell(scheduler_class: type[SchedulerMixin]) -> str:
    if not (scheduler_class.__name__ == "DDPMScheduler" or "eta" in arguments_of(scheduler_class.step)):
        return "–"
    cases = [(n, {"timestep_spacing": spacing}) for spacing in TIMESTEP_SPACINGS for n in (7, 50)] + [(50, ZERO_SNR)]
    return summary([moments_error(scheduler_class, n, **options) for n, options in cases], limit=4, digits=".1f")


def inversion_cell(scheduler_class: type[SchedulerMixin], prediction_type: str) -> str:
    if "eta" not in arguments_of(scheduler_class.step):
        return "–"
    errors = [inversion_error(scheduler_class, n, prediction_type=prediction_type) for n in (10, 50, 250)]
    return ", ".join(f"{error:.2g}" if math.isfinite(error) else "**no number**" for error in errors)


def order_cell(scheduler_class: type[SchedulerMixin]) -> str:
    return "–" if scheduler_class.__name__ == "DDPMScheduler" else f"{order_of_convergence(scheduler_class):.2f}"


ROWS: dict[str, Callable[[type[SchedulerMixin]], str]] = {
    **{f"announced wrongly, {s}": lambda c, s=s: announced_cell(c, s) for s in TIMESTEP_SPACINGS},
    **{f"distance from the announced, {s}": lambda c, s=s: distance_cell(c, s) for s in TIMESTEP_SPACINGS},
    **{f"oracle's error, {s}": lambda c, s=s: oracle_cell(c, s) for s in TIMESTEP_SPACINGS},
    "moments, in standard errors": moments_cell,
    **{f"inversion, {p}": lambda c, p=p: inversion_cell(c, p) for p in PREDICTION_TYPES},
    "order of convergence": order_cell,
}


def table(scheduler_classes: list[type[SchedulerMixin]]) -> str:
    """The Markdown table, a column for each scheduler, under a line that names the versions."""
    names = [f"{c.__module__.split('.')[0]} {c.__name__.removesuffix('Scheduler')}" for c in scheduler_classes]
    lines = [["", *names], ["---"] * (len(names) + 1)]
    lines += [[label, *(cell(c) for c in scheduler_classes)] for label, cell in ROWS.items()]
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__.split('+')[0]}:"
    return "\n".join([versions, "", *("| " + " | ".join(line) + " |" for line in lines)])


def named_class(name: str) -> type[SchedulerMixin]:
    found = pydoc.locate(name)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise argparse.ArgumentTypeError(f"{name} is not a scheduler's class, such as diffusers.HeunDiscreteScheduler")
    return found


def main(args: list[str] | None = None, page: Path = Path(__file__).parents[1] / "docs" / "schedulers.md") -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/scheduler_conformance.py", description=__doc__)
    parser.add_argument("schedulers", nargs="*", type=named_class, help="default: the table of the page is written")
    chosen = parser.parse_args(args).schedulers
    if chosen:
        print(table(chosen))
        return
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    written = f"{begin}{table(SCHEDULERS)}\n{end}"
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: written, page.read_text(), flags=re.DOTALL))
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
