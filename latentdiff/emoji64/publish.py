"""Put a shipped checkpoint together from a finished run: `python -m latentdiff.emoji64.publish RUN`.

Copies the saved pipeline, draws the sample grid, plots the run's curves, and writes the model card with the numbers
that `latentdiff evaluate RUN --output-dir EVALUATED --fill-card` and `latentdiff backgrounds RUN --output
RUN/backgrounds.json` measured. Of a run of task inpaint the numbers and the grid are those of
`python benchmarks/inpainting.py --inpainting RUN --output RUN/inpainting`.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from ..config.presets import read_config
from ..config.train import TrainConfig
from ..data import emoji
from ..evaluation.ema import SWEEP
from ..evaluation.report import CURVE, NUMBERS, read_numbers, rows
from ..objectives.choice import objective_of
from ..objectives.tasks import task_of
from ..training.card import training_command
from ..utils.errors import ConfigError
from ..utils.files import packaged_checkpoint
from ..utils.flags import run_cli
from ..utils.model_card import model_card
from ..utils.weight_files import write_earlier_names
from .demo import GUIDANCE_SCALE, PROMPTS, draw

PARTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
MEASURES = {"retrieval": "retrieval.json", "backgrounds": "backgrounds.json", "inpainting": "inpainting.json"}
GRID, SAMPLES, CURVES, INPAINTED = "samples.png", "samples", "curves.png", "inpainting.png"
SWEPT = f"{SWEEP}.png"


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """What becomes the shipped checkpoint."""

    run: tyro.conf.Positional[str]
    """Output folder of the finished run."""
    output_dir: str = "checkpoints/emoji64"
    """Where the checkpoint goes; what is there is replaced."""
    machine: str = "2 CPU cores"
    """What the run was trained on, for the card."""
    note: str = ""
    """What else the card should say of the run."""


def main(config: PublishConfig) -> None:
    run, output = Path(config.run), Path(config.output_dir)
    if not (run / "model_index.json").is_file():
        raise ConfigError(f"run: {config.run!r} holds no finished model")
    settings = _settings(run)
    trained = TrainConfig(**settings)
    objective, inpaints = objective_of(trained), task_of(trained).inpaints
    is_distilled = objective.draws_in_few_steps
    how = objective.drawing() if is_distilled else {"num_inference_steps": 50, "guidance_scale": GUIDANCE_SCALE}
    sampler = "" if inpaints else f"Samples: {objective.sampler_in_words(**how)} "
    if inpaints and not (run / INPAINTED).is_file():
        raise ConfigError(f"run: {config.run!r} has no {INPAINTED}, which benchmarks/inpainting.py draws")
    output.mkdir(parents=True, exist_ok=True)
    for name in (*PARTS, "log.jsonl", *MEASURES.values(), NUMBERS, CURVE, f"{SWEEP}.json", SWEPT, INPAINTED):
        path, target = run / name, output / name
        # What an earlier checkpoint measured goes, too, where this one has no such measure.
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if path.exists():
            shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    for part in ("text_encoder", "tokenizer"):  # of a run of a version before 0.2
        write_earlier_names(output / part)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    _plot(log, output / CURVES, objective.name)
    model_card(
        output.name,
        license="cc-by-sa-4.0",
        description=f"{_description(run, settings, log, config.machine)} {config.note}".strip(),
        samples={INPAINTED: "known, blended, drawn by this model, and as it was"}
        if inpaints
        else _samples(output, how["guidance_scale"]),
        inpaints=inpaints,
        training_command=training_command(settings),
        sampler=f"{sampler}Each measure names its own.",
        call=how if is_distilled else None,
        draws_in_few_steps=is_distilled,
        takes_guidance=objective.takes_guidance,
        data=emoji.CREDITS,
        metrics=_metrics(run),
        curves=[CURVES, *(name for name in (CURVE, SWEPT) if (run / name).exists())],
        limits=[
            "It draws emoji it was trained on, at 64x64; what it never saw comes out as something it did.",
            "The VAE blurs fine texture and small text.",
        ],
    ).save(output / "README.md")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB")


def _samples(output: Path, guidance_scale: float) -> dict[str, str]:
    """Draw them: file -> prompt."""
    shutil.rmtree(output / SAMPLES, ignore_errors=True)
    draw(str(output), PROMPTS, output / GRID, output / SAMPLES, guidance_scale)
    pictures = sorted((output / SAMPLES).glob("*.png"))
    return {f"{SAMPLES}/{path.name}": prompt for path, prompt in zip(pictures, PROMPTS, strict=True)}


def _plot(log: list[dict], path: Path, loss: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=loss)
    for name, label in (("loss", "training"), ("held_out_loss", "held-out emoji")):
        if points := [(line["step"], line[name]) for line in log if name in line and line["step"] > 0]:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=100)


def _description(run: Path, settings: dict, log: list[dict], machine: str) -> str:
    batch = settings["train_batch_size"] * settings["gradient_accumulation_steps"]
    trained = [line for line in log if "pictures_per_second" in line]
    steps, gaps = trained[-1]["step"], [b["step"] - a["step"] for a, b in zip(trained, trained[1:], strict=False)]
    seconds = sum(
        gap * batch / line["pictures_per_second"]
        for gap, line in zip([trained[0]["step"], *gaps], trained, strict=True)
    )
    what = "The default checkpoint of latentdiff: emoji at 64x64 from words, with a colour for the background"
    origin = "trained from scratch"
    if settings["task"] == "inpaint":
        what = "The inpainting checkpoint of latentdiff: it paints what a mask leaves open of an emoji, after words"
        origin = "trained on random masks from the weights of emoji64"
    if settings["consistency"] is not None:
        what = "The few-step checkpoint of latentdiff: emoji at 64x64 from words, in one to eight steps"
        origin = "a latent consistency model distilled from emoji64"
    return (
        f"{what}.\n\n"
        f"A UNet of {_parameters(run / 'unet'):.1f} M parameters, {origin} for {steps} optimizer steps "
        f"({steps * batch:,} samples) in {seconds / 60:.0f} minutes on {machine}, over a frozen VAE (f = 4) "
        "and a frozen CLIP text encoder that `latentdiff.emoji64.vae` and `latentdiff.emoji64.clip` made from the "
        "same pictures. The weights are the exponential moving average."
    )


def _parameters(folder: Path) -> float:
    from safetensors import safe_open

    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys()) / 1e6  # noqa: SIM118


def _settings(run: Path) -> dict:
    """The run's; the frozen parts it stood on are those that are shipped with it."""
    saved = asdict(TrainConfig(**read_config(str(run / "train_config.yaml"))))
    if saved["consistency"] is not None:  # what it began from is no other's frozen parts alone
        return saved
    return saved | {"pretrained_model_name_or_path": packaged_checkpoint()}


def _metrics(run: Path) -> dict[str, str]:
    found = rows(read_numbers(run / NUMBERS)) if (run / NUMBERS).exists() else {}
    for name, file in MEASURES.items():
        path = run / file
        for key, value in (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}).items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v:.3f}" for k, v in value.items())
            found[f"{name}: {key.replace('_', ' ')}"] = value
    return found


if __name__ == "__main__":
    run_cli(main, PublishConfig)
