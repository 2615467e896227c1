"""What commands of `latentdiff` share: the flags of all that draw, and the checks of their values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from .config import ConfigError


def at_least_1(command: Any, *names: str) -> None:
    """Raise a ConfigError that names the flag unless the values are positive."""
    for name in names:
        if getattr(command, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(command, name)}; it must be at least 1")


def within(command: Any, low: float, high: float, *names: str) -> None:
    """Raise a ConfigError that names the flag unless the values lie between two."""
    for name in names:
        if not low <= getattr(command, name) <= high:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(command, name)}; it must lie in {low:g} … {high:g}"
            )


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command that draws takes."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved pipeline, or a model on the Hub as owner/name."""
    num_inference_steps: int | None = None
    """Denoising steps; by default 50, and 4 of a checkpoint that was distilled to draw in few."""
    guidance_scale: float | None = None
    """Weight of guidance; 1 is none. By default 7.5, and 1 of a distilled checkpoint with guidance of its own."""
    seed: int = 0
    """Picture i starts from the noise of seed + i."""
    batch_size: int = 32
    """Pictures drawn at a time; but for a last bit here and there it does not change them."""
    device: str | None = None
    """As torch names it; by default cuda where there is one, else cpu."""


@dataclass(frozen=True, kw_only=True)
class Drawing(Command):
    """What `generate`, `edit` and `interpolate` share."""

    batch_size: int = 8
    """Pictures drawn at a time; but for a last bit here and there it does not change them."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    scheduler: Literal["ddim", "ddpm", "euler", "dpm++", "unipc", "lcm"] | None = None
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
    guide_unet: Path | None = None
    """Folder of a worse UNet, or of a pipeline with one, to lead away from instead (arXiv 2406.02507)."""
    lora: Path | None = None
    """Folder of LoRA weights to draw with, as a run with --lora_rank leaves one; distilled ones draw in few steps."""
    clip_guidance: float | None = None
    """Scale of guidance by a CLIP (arXiv 2112.10741); needs --clip."""
    clip: Path | None = None
    """Folder of that CLIP."""
    prompt_weights: bool = False
    """Read "a (red:1.3) apple" as a weight."""
    long_prompts: bool = False
    """Read all of a prompt that is longer than the text encoder's limit."""
    ema_sigma_rel: float | None = None
    """Draw with the average of the weights of this relative width, such as 0.08, which is made of the snapshots of a
    run with --ema_sigma_rel (arXiv 2312.02696); by default with the weights that were saved."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the networks; fp16 and bf16 are for GPUs."""
    overwrite: bool = False
    """Replace files that hold something else. Pictures that are there with the same recipe are not drawn again."""

    def __post_init__(self) -> None:
        at_least_1(self, "batch_size")
        if self.num_inference_steps is not None:
            at_least_1(self, "num_inference_steps")
        within(self, 0, 2**63 - 1, "seed")
        within(self, 0, 1, "eta", "guidance_rescale")
        if self.guidance_scale is not None:
            within(self, -1e6, 1e6, "guidance_scale")
        if self.clip_guidance is not None:
            within(self, 0, 1e6, "clip_guidance")
        low, high = self.guidance_interval or (0, 1)
        if not 0 <= low < high:
            raise ConfigError(f"--guidance-interval is {low:g} {high:g}; it must be two noise levels, 0 <= low < high")
        if (self.clip is None) != (self.clip_guidance is None):
            raise ConfigError("--clip-guidance SCALE and --clip FOLDER go together: give both or none")
        if self.karras_sigmas and self.scheduler not in (None, "euler", "dpm++", "unipc"):
            raise ConfigError(f"--karras-sigmas: is for euler, dpm++ and unipc, not for {self.scheduler}")
        if self.guide_unet is not None and self.negative_prompt:
            raise ConfigError("--negative-prompt: has no effect with --guide-unet, which is led away from instead")
