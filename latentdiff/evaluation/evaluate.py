"""`latentdiff evaluate`: what a checkpoint's pictures are worth, in numbers that each name how they were found.

Pictures are drawn once and kept with their recipes, features under the hashes of network and picture: what was
interrupted goes on where it stopped. Processes of one launch share all work, and end with the numbers of one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from .. import __version__
from ..config.commands import Evaluate
from ..config.presets import read_config
from ..config.train import TrainConfig
from ..data.entry_store import ENCODE_BATCH
from ..diffusion.clip_guidance import ClipGuidance
from ..diffusion.scheduling_consistency import ConsistencyScheduler
from ..distributed.processes import join_processes, shared_out
from ..inference.drawing import draw_recipes
from ..inference.generate import file_name, is_there, load, picture_recipe
from ..inference.loading import Network, Networks, load_clip
from ..inference.recipe import Ingredient, Recipe, save_png
from ..models.latents import decode_latents, encode_moments, psnr, sample_latents, to_pixels
from ..utils.errors import ConfigError
from ..utils.files import cache_folder, write_whole
from . import features as feature_networks
from .features import FeatureNetwork, extract_features
from .held_out_curve import HeldOutCurve, held_out_curve, plot_curves
from .likelihood import bound_of_pictures
from .measures import PictureMeasures, measure, measure_floor
from .reference import Questions, emoji_questions, own_questions
from .report import CURVE, NUMBERS, TABLE, fill_card, markdown
from .retrieval import Recalls, galleries_of, recalls_of

PICTURES, FEATURES = "pictures", "features"
MAX_HELD_OUT = 256  # pictures that losses are measured on


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What has to be quoted with the numbers."""

    count: int
    drawing: dict[str, Any]
    """What the pictures' recipes share: checkpoint and guides with their hashes, sampler, steps, guidance, precision;
    picture i starts from the noise of `seed` + i."""
    weights: str
    """Which average of the weights over training was drawn with, as far as the checkpoint says."""
    network: Ingredient
    """What looked at the pictures."""
    reference: Ingredient
    """The real pictures."""
    latentdiff: str
    torch: str
    diffusers: str


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The real pictures of the captions, through the VAE and back from the mean of its posterior."""

    psnr: float
    """Peak signal-to-noise ratio in dB, the mean over pictures."""
    measures: PictureMeasures
    """What pictures could reach at best whose latents are perfect."""


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """The mean cosine of pictures and captions in the eyes of a CLIP."""

    clip: Ingredient
    drawn: float
    drawn_error: float
    """Standard error over pictures."""
    real: float
    """Of the captions' own real pictures."""
    shuffled: float
    """Of the drawn pictures, each under the next one's caption."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All numbers. None: not asked for, or not defined for these pictures."""

    conditions: Conditions
    drawn: PictureMeasures
    floor: PictureMeasures
    """As many real pictures as were drawn (half of all at the most) against the others."""
    reconstruction: Reconstruction
    retrieval: Recalls | None = None
    """Of the embedded emoji."""
    clip_score: ClipScore | None = None
    held_out: HeldOutCurve | None = None
    likelihood: dict[str, Any] | None = None
    """The variational bound of the held-out pictures' latents, as `bounds.Bound.as_dict`, without each picture's."""


def evaluate(command: Evaluate) -> None:
    """Draw what is not there yet, measure, print, and write numbers, table and curve."""
    if command.fill_card and not (Path(command.checkpoint) / "README.md").is_file():
        raise ConfigError(f"--fill-card: {command.checkpoint} has no README.md, the card to fill")
    state = join_processes()
    if state.num_processes > 1 and command.device is None:
        command = replace(command, device=str(state.device))
    networks = load(command)
    if command.likelihood and not _denoises(networks):
        raise ConfigError(f"--likelihood: {command.checkpoint} is a consistency model, whose answers bound none")
    network = feature_networks.load(command.network, networks.pipeline.device)
    clip = command.clip_score and load_clip(command.clip_score, networks.pipeline, "--clip-score", scale=1.0)
    height, width = networks.pipeline.picture_size(None, None)
    questions = (
        emoji_questions(command.count)
        if command.data is None
        else own_questions(command.data, command.count, (width, height), command.output_dir)
    )
    shared = picture_recipe(command, networks, kind="text2img", height=height, width=width)
    images = draw_missing(command, networks, questions.captions, shared)
    evaluation = _measure(command, networks, network, clip, questions, images, shared)
    if state.is_main_process:
        _write(command, evaluation)


# ------------------------------------------------------------------------------------------------------ drawing


def draw_missing(
    command: Evaluate, networks: Networks, captions: Sequence[str], shared: Recipe
) -> Sequence[Image.Image]:
    """One picture for each caption, of which each process draws its batches; the folder must be one for all of them.

    Raises:
        ConfigError: the folder holds pictures of other recipes, or cannot be written.
    """
    size = 1 if command.long_prompts else command.batch_size
    state, count = PartialState(), len(captions)
    recipes = [
        replace(shared, prompt=caption, seed=shared.seed + i, batch_size=min(size, count - i // size * size))
        for i, caption in enumerate(captions)
    ]
    folder = command.output_dir / PICTURES
    paths = [folder / f"{i:05d}-{file_name(caption)}.png" for i, caption in enumerate(captions)]
    there = {i for i, path in enumerate(paths) if is_there(path, recipes[i], command.overwrite)}
    state.wait_for_everyone()  # before the first new picture, which others would find
    mine = {i for i in range(count) if i // size % state.num_processes == state.process_index}
    for i, image in draw_recipes(networks, recipes, wanted=mine - there):
        try:
            save_png(image, paths[i], recipes[i])
        except OSError as error:
            raise ConfigError(f"{paths[i]} cannot be written: {error.strerror or error}") from None
    state.wait_for_everyone()
    return _Files(paths)


class _Files(Sequence):
    """Pictures on disk, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Image.Image:
        with Image.open(self._paths[number]) as image:
            return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------- measuring


def _denoises(networks: Networks) -> bool:
    """A consistency model's answer is no mean over pictures, as a denoiser's: its squared error says nothing of it."""
    return not isinstance(networks.own_scheduler, ConsistencyScheduler)


def _measure(
    command: Evaluate,
    networks: Networks,
    network: FeatureNetwork,
    clip: Network | None,
    questions: Questions,
    images: Sequence[Image.Image],
    shared: Recipe,
) -> Evaluation:
    real = extract_features(network, questions.images, cache_folder(), questions.keys)
    drawn = extract_features(network, images, command.output_dir / FEATURES)
    recalls, held_out = None, None
    if _denoises(networks):
        held_out = held_out_curve(networks.pipeline, questions.held_out, max_pictures=MAX_HELD_OUT)
    if questions.asked is not None:
        recalls = recalls_of(drawn, questions.asked, galleries_of(real, questions.emoji_set))
    return Evaluation(
        conditions=_conditions(command, networks, network, questions, shared),
        drawn=measure(drawn, real),
        floor=measure_floor(real, len(drawn)),
        reconstruction=reconstruction(networks, network, questions, real),
        retrieval=recalls,
        clip_score=clip and clip_score(clip, questions, images),
        held_out=held_out,
        likelihood=_likelihood(networks, questions) if command.likelihood else None,
    )


def _conditions(
    command: Evaluate, networks: Networks, network: FeatureNetwork, questions: Questions, shared: Recipe
) -> Conditions:
    drawing = json.loads(shared.to_json())
    del drawing["prompt"], drawing["kind"], drawing["version"]
    return Conditions(
        count=len(questions.captions),
        drawing=drawing | {"batch_size": command.batch_size},
        weights=averaged_weights(Path(command.checkpoint), command.ema_sigma_rel),
        network=Ingredient(name=network.name, sha256=network.sha256),
        reference=Ingredient(name=f"{questions.name}, {len(questions.images)} pictures", sha256=questions.sha256),
        latentdiff=__version__,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
    )


def averaged_weights(checkpoint: Path, ema_sigma_rel: float | None) -> str:
    """Which average was drawn with: the one that was asked for, or the one that a run says it saved."""
    if ema_sigma_rel is not None:
        return f"EMA of sigma_rel {ema_sigma_rel:g}, reconstructed"
    if not (checkpoint / "train_config.yaml").is_file():
        return "as saved"
    settings = asdict(TrainConfig()) | read_config(str(checkpoint / "train_config.yaml"))
    if not settings["use_ema"]:
        return "no average"
    widths = settings["ema_sigma_rel"]  # the first is what is saved
    return f"EMA of sigma_rel {widths[0]:g}" if widths else f"EMA of decay {settings['ema_decay']:g}"


def reconstruction(
    networks: Networks, network: FeatureNetwork, questions: Questions, real: torch.Tensor
) -> Reconstruction:
    """What the VAE alone costs, against the reference's features `real` (M, D)."""
    vae = networks.pipeline.vae

    def work(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = to_pixels([questions.images[number] for number in numbers])
        mean, std = encode_moments(vae, pixels)
        decoded = decode_latents(vae, sample_latents(vae.config, mean, std, torch.zeros_like(mean))).clamp(-1, 1).cpu()
        return psnr(decoded, pixels), network.features(decoded).float().cpu()

    found = shared_out(_batches(questions.own), work, "through the VAE")
    ratios, features = map(torch.cat, zip(*found, strict=True))
    return Reconstruction(psnr=ratios.mean().item(), measures=measure(features, real))


def clip_score(clip: Network, questions: Questions, images: Sequence[Image.Image]) -> ClipScore:
    """What a CLIP says of the drawn pictures, of the real ones, and of wrong captions."""
    guide: ClipGuidance = clip.model
    count = len(images)

    @torch.no_grad()
    def work(numbers: Sequence[int]) -> torch.Tensor:
        device = guide.model.device
        drawn, real = (
            to_pixels([of[i] for i in these]).to(device)
            for of, these in ((images, numbers), (questions.images, [questions.own[i] for i in numbers]))
        )
        text, other = (
            guide.embed_text([questions.captions[i % count] for i in these], device)
            for these in (numbers, [i + 1 for i in numbers])
        )
        return torch.stack([guide.score(drawn, text), guide.score(real, text), guide.score(drawn, other)]).cpu()

    drawn, real, shuffled = torch.cat(shared_out(_batches(range(count)), work, "asking the CLIP"), dim=1).double()
    return ClipScore(
        clip=clip.ingredient,
        drawn=drawn.mean().item(),
        drawn_error=drawn.std().item() / count**0.5,
        real=real.mean().item(),
        shuffled=shuffled.mean().item(),
    )


def _likelihood(networks: Networks, questions: Questions) -> dict[str, Any]:
    """The bound of the held-out pictures, without each one's and each timestep's part."""
    pictures = questions.held_out
    rows = np.flatnonzero(pictures.held_out)[:MAX_HELD_OUT].tolist()
    images, captions = [pictures.image(row) for row in rows], [pictures.captions[row][0] for row in rows]
    values = bound_of_pictures(networks.pipeline, images, captions).as_dict()
    return {name: value for name, value in values.items() if name not in ("terms", "per_picture")}


def _batches(items: Sequence[int]) -> list[Sequence[int]]:
    return [items[start : start + ENCODE_BATCH] for start in range(0, len(items), ENCODE_BATCH)]


# ------------------------------------------------------------------------------------------------------ writing


def _write(command: Evaluate, evaluation: Evaluation) -> None:
    folder, values = command.output_dir, json.loads(json.dumps(asdict(evaluation)))
    table = markdown(values)
    write_whole(folder / NUMBERS, (json.dumps(values, indent=2) + "\n").encode())
    write_whole(folder / TABLE, table.encode())
    if evaluation.held_out is not None:
        plot_curves({evaluation.conditions.drawing["checkpoint"]["name"]: evaluation.held_out}, folder / CURVE)
    print(table)
    print(f"in {folder}")
    if command.fill_card:
        fill_card(Path(command.checkpoint), folder, values)
