"""What each command of `latentdiff` takes that measures, serves, pushes, pulls or checks."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..utils.errors import ConfigError
from .checks import at_least_1, check_single_file_config, within
from .drawing import Command, Drawing


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
class Likelihood:
    """Measure the bound of a checkpoint on emoji that it was never trained on, and on as many that it was.

    latentdiff likelihood runs/mine --unet runs/mine/checkpoint-*/unet_ema --output bound.json
    """

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved pipeline, a model on the Hub as owner/name, or a single .safetensors file."""
    single_file_config: str | None = None
    """Folder or Hub id with the configurations and the tokenizer for a single file; by default from the Hub."""
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
    """As torch names it; by default the accelerator that is here (cuda, mps, xpu), else cpu."""
    output: Path | None = None
    """JSON file for the numbers."""
    plot: Path | None = None
    """PNG for the terms over the timesteps."""

    def __post_init__(self) -> None:
        check_single_file_config(self, self.checkpoint)
        for name in ("count", "batch_size"):
            if getattr(self, name) is not None:
                at_least_1(self, name)
        if self.timesteps < 2:
            raise ConfigError(f"--timesteps is {self.timesteps}; it must be at least 2: the decoder's and another")
        if self.decoder_variance is not None and self.decoder_variance <= 0:
            raise ConfigError(f"--decoder-variance is {self.decoder_variance:g}; it must be positive")


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
        super().__post_init__()
        if not self.sigma_rel:
            raise ConfigError("--sigma-rel is empty: give one width or more, such as 0.05 0.1")
        within(self, 0, 1e6, "count")


LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Open a page to draw on: text to image, image to image, inpainting, interpolation."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved pipeline, a model on the Hub as owner/name, or a single .safetensors file."""
    inpaint_checkpoint: str | None = None
    """One whose UNet was trained to inpaint; by default the checkpoint's own blends the parts."""
    single_file_config: str | None = None
    """Folder or Hub id with the configurations and the tokenizer for a single file; by default from the Hub."""
    lora: Path | None = None
    """Folder or .safetensors file of LoRA weights to draw with; distilled ones draw in few steps."""
    host: str = LOOPBACK
    """Address to listen on. The page asks for no password: any but 127.0.0.1 opens it to whoever can reach that."""
    port: int | None = None
    """By default the first free one from 7860."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names under which browsers may ask for the page, as behind a proxy: draw.example.org"""
    max_queue: int = 8
    """Drawings that may wait; one at a time is drawn."""
    max_upload_mb: int = 10
    """The largest file that may be uploaded."""
    device: str | None = None
    """As torch names it; by default the accelerator that is here (cuda, mps, xpu), else cpu."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the networks; fp16 and bf16 are for GPUs."""

    def __post_init__(self) -> None:
        check_single_file_config(self, self.checkpoint, self.inpaint_checkpoint)
        for name in ("max_queue", "max_upload_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must lie in 1 … 65535")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"[\w.-]+|[0-9A-Fa-f:]+", name, re.ASCII):
                raise ConfigError(f"--allowed-hosts {name!a}: must be a name or an address, without http:// and port")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as a single file, as A1111, ComfyUI, sd-scripts and stable-diffusion.cpp read it.

    latentdiff export runs/mine mine.safetensors --dtype fp16

    For models of the shape of Stable Diffusion 1.x and 2.x, for inpainting, too. Of one that predicts v, the settings
    that A1111 asks for stand beside it, in mine.yaml.
    """

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved pipeline, or a model on the Hub as owner/name."""
    output: tyro.conf.Positional[Path]
    """The file, a .safetensors."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Precision of the weights; by default that in which each part is stored."""
    overwrite: bool = False
    """Replace the file if it is there."""

    def __post_init__(self) -> None:
        if self.output.suffix != ".safetensors":
            raise ConfigError(f"{self.output}: must end in .safetensors")
        if self.output.exists() and not self.overwrite:
            raise ConfigError(f"{self.output} is there: --overwrite replaces it")


@dataclass(frozen=True, kw_only=True)
class Push:
    """Push a saved pipeline to the Hub.

    latentdiff push runs/mine you/mine

    The token is HF_TOKEN, or that of `hf auth login`.
    """

    folder: tyro.conf.Positional[Path]
    """What `save_pretrained` or a training run wrote."""
    repo_id: tyro.conf.Positional[str]
    """owner/name, made if it is not there."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch; by default main."""
    message: str = "Upload with latentdiff"
    """Of the commit."""
    ema_snapshots: bool = False
    """Take along what averages of other lengths are made of: many times the size of the model."""


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Load a model from the Hub into a folder.

    latentdiff pull you/mine --output-dir mine
    """

    repo_id: tyro.conf.Positional[str]
    """owner/name"""
    output_dir: Path | None = None
    """By default the model's name."""
    revision: str | None = None
    """Branch, tag or commit; by default main."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train on the embedded emoji or on one's own captioned pictures.

    latentdiff train --preset finetune --pretrained_model_name_or_path MODEL --train_data_dir my_pictures

    `accelerate launch -m latentdiff.train …` does so on any number of processes.
    """


@dataclass(frozen=True, kw_only=True)
class Check:
    """Look before training: takes every flag of `latentdiff train`, and says what it finds in pictures, captions, VAE,
    disk, time and memory.

    latentdiff check --train_data_dir my_pictures
    """
