"""`make demo`: the shipped checkpoint draws, then a small UNet is trained from scratch and draws too."""

import json
import subprocess
import sys
import time
from pathlib import Path

from ..config.drawing import Generate
from ..data import emoji
from ..inference.generate import generate
from ..utils.errors import ConfigError
from ..utils.files import packaged_checkpoint
from ..utils.flags import user_errors

OUTPUT = Path("demo-output")
GUIDANCE_SCALE = 4.0
PROMPTS = (
    "a cat", "a dog", "a red apple", "pizza", "a yellow star", "a blue car", "a rocket", "a house",
    "a tree", "a smiling face", "a fish", "a clock", "a guitar", "an umbrella", "a slice of cake", "a butterfly",
    "a rocket on a yellow background", "a red apple, openmoji style, on a green background",
    "a dog, twemoji style, on a purple background", "an umbrella on a pink background",
)  # fmt: skip


def draw(
    checkpoint: str,
    prompts: tuple[str, ...],
    grid: Path,
    folder: Path | None = None,
    guidance_scale: float | None = GUIDANCE_SCALE,
) -> None:
    """A labelled grid of the prompts, and each picture in `folder`; says where they are."""
    generate(
        Generate(
            checkpoint=checkpoint,
            prompts=prompts,
            grid=grid,
            output_dir=folder,
            columns=5,
            guidance_scale=guidance_scale,
            overwrite=True,
        )
    )


def main() -> None:
    """The whole demonstration."""
    started = time.perf_counter()
    checkpoint = packaged_checkpoint()
    if not Path(checkpoint).is_dir():
        raise ConfigError(f"the shipped checkpoint is not in {checkpoint}: run this from a checkout")
    shipped, trained, run = OUTPUT / "shipped.png", OUTPUT / "trained.png", OUTPUT / "run"
    print("1. Drawing with the shipped checkpoint", flush=True)
    draw(checkpoint, PROMPTS, shipped)
    print("2. Training a small UNet from scratch on a part of the emoji", flush=True)
    train = [sys.executable, "-m", "latentdiff.train", "--preset", "demo"]
    subprocess.run([*train, "--output_dir", str(run), "--overwrite_output_dir"], check=True)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, *_, last = [line for line in lines if "held_out_loss" in line]
    print(
        f"   held-out loss {first['held_out_loss']:.3f} at step {first['step']}, "
        f"{last['held_out_loss']:.3f} at step {last['step']}\n3. Drawing with it",
        flush=True,
    )
    built = emoji.load()
    seen = [emoji.captions(*built.rows[i])[0] for i in built.indices()[:20:2]]
    draw(str(run), tuple(seen), trained)
    print(f"\nPictures: {shipped} (shipped checkpoint) and {trained} (your own two minutes of training)")
    print(f"The model you trained: {run}; {time.perf_counter() - started:.0f} s in all")
    if last["held_out_loss"] >= first["held_out_loss"]:
        raise SystemExit("the held-out loss did not fall")


if __name__ == "__main__":
    with user_errors():
        main()
