"""How pictures are drawn: the options of sampling and the schedulers' names, for all that draws. No torch."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args


class SchedulerNames(NamedTuple):
    """What one scheduler is called, and where."""

    class_name: str
    """In recipes; a class of this project, else of diffusers."""
    title: str
    """On the page."""
    sampler: str
    """On AUTOMATIC1111's page, whose words PNGs carry, too."""


Scheduler = Literal["ddim", "ddpm", "euler", "dpm++", "unipc", "lcm"]
SCHEDULERS: dict[str, SchedulerNames] = {
    "ddim": SchedulerNames("DDIMScheduler", "DDIM", "DDIM"),
    "ddpm": SchedulerNames("DDPMScheduler", "DDPM", "DDPM"),
    "euler": SchedulerNames("EulerDiscreteScheduler", "Euler", "Euler"),
    "dpm++": SchedulerNames("DPMSolverMultistepScheduler", "DPM-Solver++", "DPM++ 2M"),
    "unipc": SchedulerNames("UniPCMultistepScheduler", "UniPC", "UniPC"),
    "lcm": SchedulerNames("ConsistencyScheduler", "Consistency (LCM)", "LCM"),
}
assert set(SCHEDULERS) == set(get_args(Scheduler))


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The two options that every drawing has."""

    num_inference_steps: int | None = None
    """Denoising steps; by default 50, and 4 of a checkpoint that was distilled to draw in few."""
    guidance_scale: float | None = None
    """Weight of guidance; 1 is none. By default 7.5, and 1 of a distilled checkpoint with guidance of its own."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Steps):
    """All of them. In a recipe, which is one of these, nothing is left open."""

    negative_prompt: str = ""
    """What guidance leads away from."""
    scheduler: Scheduler | None = None
    """By default the checkpoint's own; lcm is for those distilled to draw in few steps."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    """How a few steps are spread over all; by default as the checkpoint says."""
    karras_sigmas: bool = False
    """Noise levels as in arXiv 2206.00364, for euler, dpm++ and unipc."""
    eta: float = 0.0
    """Noise that ddim adds at each step, from 0 to 1."""
    guidance_rescale: float = 0.0
    """Keeps strong guidance from burning out the colours (arXiv 2305.08891); from 0 to 1."""
    guidance_interval: tuple[float, float] | None = None
    """Guide between these noise levels alone, such as 0.3 5 or 0.3 inf (arXiv 2404.07724)."""
    prompt_weights: bool = False
    """Read "a (red:1.3) apple" as a weight."""
    long_prompts: bool = False
    """Read all of a prompt that is longer than the text encoder's limit."""
