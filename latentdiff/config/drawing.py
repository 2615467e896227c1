"""What each command of `latentdiff` that draws takes, and the checks of the values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..utils.errors import ConfigError
from .checks import at_least_1, check_single_file_config, is_text, within
from .sampling import Sampling, Steps


@dataclass(frozen=True, kw_only=True)
class Command(Steps):
    """What every command that draws takes."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a saved pipeline, a model on the Hub as owner/name, or a single .safetensors file."""
    single_file_config: str | None = None
    """Folder or Hub id of a model of the same kind as a single file, whose configurations and tokenizer are taken:
    it has none; by default those of the Stable Diffusion that it looks like, from the Hub."""
    seed: int = 0
    """Picture i starts from the noise of seed + i."""
    batch_size: int = 32
    """Pictures drawn at a time; but for a last bit here and there it does not change them."""
    device: str | None = None
    """As torch names it; by default the accelerator that is here (cuda, mps, xpu), else cpu."""

    def __post_init__(self) -> None:
        check_single_file_config(self, self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class Drawing(Sampling, Command):
    """What `generate`, `edit` and `interpolate` share."""

    batch_size: int = 8
    """Pictures drawn at a time; but for a last bit here and there it does not change them."""
    guide_unet: Path | None = None
    """Folder of a worse UNet, or of a pipeline with one, to lead away from instead (arXiv 2406.02507)."""
    lora: Path | None = None
    """Folder of LoRA weights to draw with, as a run with --lora_rank leaves one, or a .safetensors file of them, as
    sd-scripts writes it, too; distilled ones draw in few steps."""
    clip_guidance: float | None = None
    """Scale of guidance by a CLIP (arXiv 2112.10741); needs --clip."""
    clip: Path | None = None
    """Folder of that CLIP."""
    ema_sigma_rel: float | None = None
    """Draw with the average of the weights of this relative width, such as 0.08, which is made of the snapshots of a
    run with --ema_sigma_rel (arXiv 2312.02696); by default with the weights that were saved."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the networks; fp16 and bf16 are for GPUs."""
    overwrite: bool = False
    """Replace files that hold something else. Pictures that are there with the same recipe are not drawn again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "batch_size")
        is_text(self, *(name for name in ("prompts", "negative_prompt", "source_prompt") if hasattr(self, name)))
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


@dataclass(frozen=True, kw_only=True)
class PictureList(Drawing):
    """What `generate` and `edit` share: a list of prompts, each drawn from one seed or several."""

    prompts: tuple[str, ...] = ()
    """One or more, each in quotes."""
    prompts_file: Path | None = None
    """A text file of more prompts, one on each line."""
    seeds: tuple[int, ...] = ()
    """Draw each prompt once from each of these, instead of --seed."""
    height: int | None = None
    """In pixels; by default what the model was trained at."""
    width: int | None = None
    """In pixels; by default what the model was trained at."""
    output_dir: Path | None = None
    """Folder for a PNG of each picture, which carries its recipe; "pictures" where neither this nor --grid is given."""
    grid: Path | None = None
    """File for one picture of all, with their prompts underneath."""
    columns: int | None = None
    """Pictures in a row of the grid; by default as many as seeds, or 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("columns", "height", "width"):
            if getattr(self, name) is not None:
                at_least_1(self, name)
        if not self.prompts and self.prompts_file is None:
            raise ConfigError('--prompts is empty: give one or more, such as --prompts "a cat" "a dog"')
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise ConfigError(f"--seeds has {seed}; each must lie in 0 … {2**63 - 1}")
        if self.seeds and self.seed:
            raise ConfigError("--seed and --seeds: give one of them")


@dataclass(frozen=True, kw_only=True)
class Generate(PictureList):
    """Draw a picture of each prompt.

    latentdiff generate checkpoints/emoji64 --guidance-scale 4 --prompts "a cat" "a dog" --seeds 1 2 3 --grid six.png

    Each picture is written when it is drawn, and says in its PNG how (see `latentdiff redraw`). What was interrupted
    goes on where it stopped when the same command is given again.
    """


@dataclass(frozen=True, kw_only=True)
class Edit(PictureList):
    """Change a picture by words: all of it, what a mask covers, or what it shows.

    latentdiff edit checkpoints/emoji64 --image cat.png --prompts "a dog" --strength 0.6

    latentdiff edit checkpoints/emoji64 --image cat.png --mask hat.png --prompts "a cat with a hat"

    latentdiff edit checkpoints/emoji64 --image cat.png --source-prompt "a cat" --prompts "a red cat"
    """

    image: Path
    """The picture to change; of another shape than what is drawn, its middle."""
    mask: Path | None = None
    """White where the picture is painted anew, black where it stays."""
    mask_blur: int = 0
    """Pixels around the mask over which the painting passes into the picture."""
    keep_unmasked: bool = False
    """Put the picture's own pixels back outside the mask, which the VAE would else change a little."""
    source_prompt: str | None = None
    """What the picture shows: it is then drawn again from its own noise, under the changed prompt."""
    strength: float | None = None
    """How much of the picture is given up, from 0 to 1; by default 0.8, with a mask 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask is not None and self.source_prompt is not None:
            raise ConfigError("--mask and --source-prompt are two ways to edit: give one of them")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(f"--strength is {self.strength:g}; it must lie above 0 and at most at 1")
        for name in ("mask_blur", "keep_unmasked"):
            if getattr(self, name) and self.mask is None:
                raise ConfigError(f"--{name.replace('_', '-')}: has no effect without --mask")
        within(self, 0, 8192, "mask_blur")
        if self.source_prompt is not None:
            self._check_inversion()

    def _check_inversion(self) -> None:
        for name in ("seed", "seeds", "eta"):
            if getattr(self, name):
                raise ConfigError(f"--{name}: has no effect with --source-prompt, where nothing is drawn by lot")
        if self.scheduler not in (None, "ddim"):
            raise ConfigError(f"--scheduler is {self.scheduler}; with --source-prompt it can be ddim alone")


@dataclass(frozen=True, kw_only=True)
class Interpolate(Drawing):
    """Draw a film that leads from prompt to prompt, or from noise to noise.

    latentdiff interpolate checkpoints/emoji64 --prompts "a cat" "a dog" "a fish" --num-frames 24 --output film.gif

    latentdiff interpolate checkpoints/emoji64 --prompts "a cat" --seeds 1 2 3 --loop --output cats.mp4

    Beside the film stands a PNG of some of its frames in a row, which carries the recipe.
    """

    prompts: tuple[str, ...]
    """The stations of the path, each in quotes; or one, with several seeds."""
    seeds: tuple[int, ...] = ()
    """The noise at each station, instead of --seed at all of them."""
    seed: int = 0
    """The noise that all of the film starts from."""
    num_frames: int = 24
    """In all, spread evenly between the stations."""
    loop: bool = False
    """Go back to the first station at the end."""
    output: Path = Path("film.gif")
    """The film, a .gif or an .mp4."""
    fps: float = 12.0
    """Frames a second."""
    columns: int = 8
    """Frames in the row."""
    height: int | None = None
    """In pixels; by default what the model was trained at."""
    width: int | None = None
    """In pixels; by default what the model was trained at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds and self.seed:
            raise ConfigError("--seed and --seeds: give one of them")
        stations = max(len(self.prompts), len(self.seeds))
        for name, given in (("prompts", len(self.prompts)), ("seeds", len(self.seeds) or 1)):
            if given not in (1, stations):
                raise ConfigError(f"--{name} has {given}; it must be one, or one for each of {stations} stations")
        if stations < 2:
            raise ConfigError("--prompts has one, and no --seeds: a path needs two of one of them at the least")
        within(self, stations, 10_000, "num_frames")
        within(self, 2, 10_000, "columns")


@dataclass(frozen=True, kw_only=True)
class Redraw:
    """Draw a picture again from the recipe that its PNG carries.

    latentdiff redraw pictures/000-a-cat.png

    The same checkpoint on the same kind of device gives the same picture; what differs is said.
    """

    picture: tyro.conf.Positional[Path]
    """A PNG that latentdiff has drawn."""
    checkpoint: str | None = None
    """Where the checkpoint lies; by default the shipped one, or a model of the Hub that has been loaded before."""
    single_file_config: str | None = None
    """Folder or Hub id whose configurations and tokenizer a single file was drawn with, if one was given."""
    image: Path | None = None
    """The picture that was edited."""
    mask: Path | None = None
    """The mask that it was edited with."""
    guide_unet: Path | None = None
    """Where the guiding UNet lies, if there was one."""
    clip: Path | None = None
    """Where the guiding CLIP lies, if there was one."""
    lora: Path | None = None
    """Where the LoRA weights lie, if there were any."""
    output: Path | None = None
    """By default beside the picture, with -redrawn in its name."""
    batch_size: int | None = None
    """1 is faster, but may change a last bit; by default as many copies as pictures were drawn together."""
    device: str | None = None
    """As torch names it; by default the accelerator that is here (cuda, mps, xpu), else cpu."""
    anyway: bool = False
    """Draw also where the checkpoint, an input or the version is another one than in the recipe, or where that asks for
    far more than the checkpoint is made for."""
    overwrite: bool = False
    """Replace the output if it is there."""

    def __post_init__(self) -> None:
        check_single_file_config(self, self.checkpoint)
        if self.batch_size is not None:
            at_least_1(self, "batch_size")
