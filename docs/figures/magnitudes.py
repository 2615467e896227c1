"""How large activations are in every block of the magnitude-preserving UNet, and of the plain UNet at the same places,
at initialisation and during training:

    python docs/figures/magnitudes.py --plain runs/ablation/base-seed0 --mp runs/ablation/mp-seed0

The runs are folders that train_text2img.py left, with the checkpoints of the steps asked for. Each network sees the
same 64 held-out emoji, each at eight of 512 evenly spread timesteps, under their captions. What is measured is the root
mean square, over pictures, pixels and channels, of what a block hands on: its residual branch added, and its attention.

To be seen: the plain UNet's activations differ between blocks by a factor of 3 at initialisation and of 4 to 6 in
training, in which nearly all keep growing. The magnitude-preserving ones begin at 0.99 to 1.02 (0.97 to 1.04 over six
seeds), and lie at 0.94 to 1.15 after 500 steps and 0.95 to 1.27 after 1,250. Middle and decoder are at 1 because their
blocks normalise what they hand on. EDM2's decoder does not: without that it grew to 2.1 here, as filters turn to what
the channels before them have in common, at the same held-out error.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from torch import nn

from latentdiff.config.presets import read_config
from latentdiff.config.train import TrainConfig
from latentdiff.data.latent_cache import HiddenStates, Moments
from latentdiff.data.pictures import EmojiPictures
from latentdiff.models.loading import load_unet
from latentdiff.models.mp_unet import MPUNet2DConditionModel
from latentdiff.models.unet import UNet
from latentdiff.training.checkpoint import list_checkpoints, step_of
from latentdiff.training.held_out import TIMESTEPS_PER_PICTURE, HeldOutLoss
from latentdiff.training.setup import load_networks
from latentdiff.utils.errors import ConfigError
from latentdiff.utils.files import write_whole
from latentdiff.utils.flags import run_cli

TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)  # of the plot's logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure how large activations are in every block of two runs' networks."""

    plain: Path
    """Folder of a run of a plain UNet."""
    mp: Path
    """Folder of a run of a magnitude-preserving one."""
    steps: tuple[int, ...] = (250, 500, 1250)
    """Checkpoints to measure, beside the networks at initialisation."""
    pictures: int = 64
    """Held-out pictures to measure on."""
    output: str = "docs/figures/magnitudes"
    """Where the numbers and the plot go: this with .json and .png."""


class Place(NamedTuple):
    """Where activations are measured."""

    name: str
    block: nn.Module
    """What hands them on."""


# ---- where


def places(unet: UNet) -> list[Place]:
    """The blocks in the order in which they run, named alike in both kinds of network."""
    find = _mp_blocks if isinstance(unet, MPUNet2DConditionModel) else _plain_blocks
    found, counts = [], {}
    for part, level, block in find(unet):
        size = unet.config.sample_size >> level
        counts[part, size] = number = counts.get((part, size), 0) + 1
        found.append(Place(f"{part} {size}×{size} {number}", block))
    return found


def _mp_blocks(unet: MPUNet2DConditionModel) -> Iterator[tuple[str, int, nn.Module]]:
    level = 0
    for part in ("encoder", "middle", "decoder"):
        for block in getattr(unet, part):
            level += {"down": 1, "keep": 0, "up": -1}[block.resample]
            yield part, level, block


def _plain_blocks(unet: UNet2DConditionModel) -> Iterator[tuple[str, int, nn.Module]]:
    """A residual block with the attention behind it is one block; so is what changes the resolution."""
    level = 0
    for part, blocks in (("encoder", unet.down_blocks), ("middle", [unet.mid_block]), ("decoder", unet.up_blocks)):
        for block in blocks:
            attentions = getattr(block, "attentions", [])
            for resnet, attention in zip_longest(block.resnets, attentions):
                yield part, level, resnet if attention is None else attention
            for name, change in (("downsamplers", 1), ("upsamplers", -1)):
                for resampler in getattr(block, name, None) or []:
                    level += change
                    yield part, level, resampler


# ---- how large


def magnitudes(unet: UNet, scheduler, questions: HeldOutLoss) -> dict[str, float]:
    """Name of a place -> the root mean square of what its block hands on, over all questions."""
    sums, counts = {}, {}

    def watch(name: str):
        def add(block: nn.Module, inputs: tuple, output: torch.Tensor | tuple[torch.Tensor]) -> None:
            handed_on = output[0] if isinstance(output, tuple) else output
            sums[name] = sums.get(name, 0.0) + handed_on.double().square().sum().item()
            counts[name] = counts.get(name, 0) + handed_on.numel()

        return add

    with ExitStack() as hooks:
        for name, block in places(unet):
            hooks.enter_context(block.register_forward_hook(watch(name)))
        questions.errors(unet, scheduler)
    return {name: (sums[name] / counts[name]) ** 0.5 for name in sums}


def measure(folder: Path, steps: tuple[int, ...], pictures: int) -> dict[int, dict[str, float]]:
    """Step of a run -> the magnitudes of its network's activations; 0 is initialisation.

    Raises:
        ConfigError: the folder is not a run's, or a checkpoint is missing.
    """
    config = TrainConfig(**read_config(str(folder / "train_config.yaml")))
    checkpoints = {step_of(path): path for path in list_checkpoints(folder)}
    if missing := [step for step in steps if step not in checkpoints]:
        raise ConfigError(f"{folder}: it has no checkpoint of step {missing[0]}; it has {sorted(checkpoints)}")
    parts, unet, scheduler = load_networks(config)
    emoji = EmojiPictures(None)
    questions = HeldOutLoss(
        emoji,
        Moments(emoji, parts.vae, False, None),
        HiddenStates(emoji, parts),
        vae_config=parts.vae.config,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        max_pictures=pictures,
    )
    networks = {step: load_unet(str(checkpoints[step])) for step in steps}
    return {step: magnitudes(network, scheduler, questions) for step, network in ({0: unet} | networks).items()}


# ---- what comes of it


def report(found: dict[str, dict[int, dict[str, float]]]) -> None:
    """A line for each network and step: the smallest and the largest magnitude, and where."""
    for kind, steps in found.items():
        for step, values in steps.items():
            least, most = min(values, key=values.get), max(values, key=values.get)
            ends = f"{values[least]:.3f} ({least}) … {values[most]:.3f} ({most})"
            print(f"{kind}, step {step}: {ends}, a factor of {values[most] / values[least]:.1f}")


def plot(found: dict[str, dict[int, dict[str, float]]], path: str) -> None:
    """A panel for each network, a line for each step, as a PNG."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (title, steps) in zip(panels, found.items(), strict=True):
        axes.axhline(1, color="grey", linewidth=0.8)
        for step, values in steps.items():
            axes.plot(values.values(), marker=".", label=f"step {step}" if step else "initialisation")
        axes.set_xticks(range(len(values)), values, rotation=60, ha="right", rotation_mode="anchor", fontsize="small")
        axes.set(title=title, yscale="log", yticks=TICKS, yticklabels=TICKS)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize="small")
    panels[0].set_ylabel("root mean square of activations")
    figure.savefig(path, dpi=80)


def main(settings: Settings) -> None:
    runs = {"plain UNet": settings.plain, "magnitude-preserving UNet": settings.mp}
    found = {kind: measure(folder, settings.steps, settings.pictures) for kind, folder in runs.items()}
    report(found)
    content = {"pictures": settings.pictures, "timesteps_per_picture": TIMESTEPS_PER_PICTURE, "root_mean_square": found}
    write_whole(f"{settings.output}.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    plot(found, f"{settings.output}.png")


if __name__ == "__main__":
    run_cli(main, Settings)
