"""What each command of `latentdiff` that measures takes."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from .cli_base import Command, Drawing, at_least_1, within
from .config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Evaluate(Drawing):
    """Measure what a checkpoint draws against real pictures: distances, retrieval, losses, and what each rests on.

    latentdiff evaluate checkpoints/emoji64 --guidance-scale 4 --num-inference-steps 20 --output-dir evaluated

    Pictures that are there are not drawn again, so what was interrupted goes on when the same command is given again.
    `accelerate launch -m latentdiff.cli evaluate …` shares the work among processes.
    """

    output_dir: Path
    """Folder for the pictures with their recipes, evaluation.json, a table and a plot."""
    count: int = 500
    """Captions to draw, one picture each. Numbers of different counts cannot be compared."""
    data: Path | None = None
    """Folder of one's own pictures with captions, which training has not seen; by default the embedded emoji."""
    network: str = "efficientnet-lite0"
    """What looks at the pictures: efficientnet-lite0, inception-v3, or the folder or Hub id of a DINOv2."""
    clip_score: Path | None = None
    """Folder of a CLIP that says how well pictures and captions match."""
    likelihood: bool = False
    """Bound the likelihood of the held-out pictures, too."""
    fill_card: bool = False
    """Put the numbers and the plot into the model card in the checkpoint's folder."""
    batch_size: int = 32
    """Pictures drawn at a time; but for a last bit here and there it does not change them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "count")
        if self.data is not None and not self.data.is_dir():
            raise ConfigError(f"--data {self.data}: no such folder")


@dataclass(frozen=True, kw_only=True)
class Retrieval(Command):
    """Measure whether drawn emoji are found again among the real ones: R@1, R@10, their ceiling and floor.

    latentdiff retrieval checkpoints/emoji64 --output retrieval.json
    """

    count: int = 500
    """Training captions to draw, half of each style."""
    output: Path | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class Backgrounds(Command):
    """Measure emoji on background colours they were never trained with: the colour drawn, and retrieval.

    latentdiff backgrounds checkpoints/emoji64
    """

    count: int = 240
    """Held-out pairs of emoji and background to draw, and as many that were trained on."""
    output: Path | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class ReconstructEma:
    """Make an average of another length of the weights after a run with --ema_sigma_rel, from the snapshots it kept.

    latentdiff reconstruct-ema runs/mine --sigma-rel 0.08

    What it writes is a UNet that diffusers and --guide-unet load, or a folder of both where the text encoder was
    trained, too. A run that is still going on can be asked, too.
    """

    run: tyro.conf.Positional[str]
    """Folder of the run, or a model on the Hub that was pushed with its snapshots."""
    sigma_rel: float
    """Relative width of the average, such as 0.08: its standard deviation as a share of the training so far."""
    step: int | None = None
    """The optimizer step at which the average ends; by default that of the last snapshot."""
    output: Path | None = None
    """Folder to write; by default unet-ema-… in the run's."""


@dataclass(frozen=True, kw_only=True)
class SweepEma(Command):
    """Measure which length of the average is best after a run with --ema_sigma_rel, and draw the curve.

    latentdiff sweep-ema runs/mine --sigma-rel 0.03 0.05 0.08 0.12 0.2

    It writes ema_sweep.json, a table in ema_sweep.md and the curve in ema_sweep.png: the held-out loss, with --count
    how drawn emoji compare to the real ones, too. What was interrupted goes on when the command is given again.
    """

    sigma_rel: tuple[float, ...] = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
    """Relative widths to try."""
    step: int | None = None
    """The optimizer step at which the averages end; by default that of the last snapshot."""
    count: int = 0
    """Captions of the embedded emoji to draw at each width, half of each style; by default none."""
    network: str = "efficientnet-lite0"
    """What looks at drawn pictures: efficientnet-lite0, inception-v3, or the folder or Hub id of a DINOv2."""
    output_dir: Path | None = None
    """Folder for the results; by default that of the run."""

    def __post_init__(self) -> None:
        if not self.sigma_rel:
            raise ConfigError("--sigma-rel is empty: give one width or more, such as 0.05 0.1")
        within(self, 0, 1e6, "count")
