"""Kill a training run again and again at random moments and compare what it ends with: `python tests/kill_stress.py`.

An uninterrupted run at toy size is the reference: pictures are cached, trained on, validated, checkpointed at every
other step and pushed at the end; the averages of two widths leave snapshots. Then the same run, with a cache of its
own, is started, killed with SIGKILL, and resumed with `--resume_from_checkpoint latest`, so many times in a row; at
last it may finish. The moments are drawn, in turns, from its start to when its settings are written, from there on, and
from its last checkpoint to its end, while the finished model is saved and pushed. Weights, averages and their
snapshots, optimizer state and loss log must be the reference's to the last bit, and so must what was pushed; and in the
output, the cache and the repository no file may be that the reference has not.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forked import Forked
from hub_server import TOKEN

SCRIPT = Path(__file__).resolve().parent.parent / "train_text2img.py"
STEPS = 24
PHASES = ("at the start", "in between", "at the end")
AVERAGES = ("--ema_sigma_rel", "0.05", "0.1", "--ema_snapshot_steps", "3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many in all")
    parser.add_argument("--kills_per_run", type=int, default=5, help="how many before a run may finish")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parsed = parser.parse_args()
    import conftest  # its own Hub, and a home without tokens

    with tempfile.TemporaryDirectory(prefix="kill-stress-") as folder:
        model, pictures = make_inputs(Path(folder))
        same, kills = stress(Path(folder), model, pictures, conftest._HUB, **vars(parsed))
    print(f"{kills} kills: {'the same' if same else 'NOT the same'} as the uninterrupted run")
    sys.exit(not same)


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A toy Stable Diffusion folder and 200 pictures, so that caching takes a moment too."""
    import numpy as np
    from PIL import Image

    import tiny
    from latentdiff import LatentDiffPipeline

    LatentDiffPipeline(**tiny.tiny_components()).save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    lines = []
    for i in range(200):
        shades = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(shades).save(folder / "pictures" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return folder / "model", folder / "pictures"


def stress(folder: Path, model: Path, pictures: Path, hub, *, kills: int, kills_per_run: int, seed: int):
    """Whether every run that was killed ended as the reference did, and how many kills hit a living process."""
    output = folder / "reference"
    process = start(output, model, pictures, "tester/reference")
    times = [time.monotonic(), wait_for_life(output, process), wait_for_the_end(output, process)]
    assert process.wait() == 0
    times.append(time.monotonic())
    lengths = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    reference = result(output, hub.files("tester/reference"))

    moments, done, same, number = random.Random(seed), 0, True, 0
    while done < kills and same:
        output, repo = folder / f"killed-{number}", f"tester/killed-{number}"
        for turn in range(min(kills_per_run, kills - done)):
            process = start(output, model, pictures, repo)
            phase = PHASES[(number + turn) % len(PHASES)]
            if phase != "at the start":
                wait_for_life(output, process)
            if phase == "at the end":
                wait_for_the_end(output, process)
            # Half of what is in between: what was done before the last kill is not done again.
            moment = moments.uniform(0, lengths[PHASES.index(phase)] / (2 if phase == "in between" else 1))
            try:
                process.wait(moment)  # it was done before: no kill
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
                print(f"kill {done} {phase}, after {moment:.2f} s: {what_is_there(output)}", flush=True)
        assert start(output, model, pictures, repo).wait() == 0
        found = result(output, hub.files(repo))
        differing = [name for name in {**reference, **found} if found.get(name) != reference.get(name)]
        print(f"run {number}: " + (f"DIFFERS in {', '.join(differing)}" if differing else "the same"), flush=True)
        same, number = same and not differing, number + 1
    return same, done


def start(output: Path, model: Path, pictures: Path, repo: str) -> Forked:
    settings = {
        "pretrained_model_name_or_path": model, "unet": "pretrained", "train_data_dir": pictures, "output_dir": output,
        "cache_dir": f"{output}-cache", "train_batch_size": 4, "max_train_steps": STEPS, "learning_rate": 1e-3,
        "lr_warmup_steps": 3, "lr_scheduler": "cosine", "held_out_fraction": 0.1, "logging_steps": 5,
        "checkpointing_steps": 2, "checkpoints_total_limit": 2, "validation_steps": 8,
        "validation_inference_steps": 1, "validation_prompts": "a cat", "report_to": "none", "hub_model_id": repo,
        "resume_from_checkpoint": "latest",
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    environment |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    words = [SCRIPT, *flags, *AVERAGES, "--random_flip", "--push_to_hub"]
    return Forked(words, env=environment, output=f"{output}.log")


def wait_for_life(output: Path, process: Forked) -> float:
    """Until the imports are done and the run has written its settings anew; the time then."""
    path = output / "train_config.yaml"
    before = path.stat().st_mtime_ns if path.exists() else None
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        time.sleep(0.005)
    return time.monotonic()


def wait_for_the_end(output: Path, process: Forked) -> float:
    """Until the last checkpoint is there; the time then."""
    while process.poll() is None and not (output / f"checkpoint-{STEPS}").exists():
        time.sleep(0.005)
    return time.monotonic()


def what_is_there(output: Path) -> str:
    if not output.is_dir():
        return "nothing"
    return ", ".join(sorted(path.name for path in output.iterdir() if not path.name.endswith(".yaml"))) or "nothing"


def result(output: Path, pushed: dict[str, bytes]) -> dict[str, str]:
    """Name -> digest of everything that a run is for, and of any other file that it is there. Optimizer state by its
    tensors: the file also holds names."""
    import torch

    found = {f"pushed {name}": "there" for name in pushed}
    # How the cache is divided into shards is a matter of time; what a killed run was writing there goes after an hour.
    for path in output.with_name(f"{output.name}-cache").rglob("[!.]*"):
        if path.is_file() and path.suffix != ".safetensors":
            found[f"cached {path.name}"] = "there"
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = path.relative_to(output).as_posix()
        found[name] = "there"
        if path.suffix in (".safetensors", ".png") or path.name in ("model_index.json", "scheduler_config.json"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "optimizer.bin":
            state = torch.load(path, weights_only=True)["state"]
            tensors = [t for _, entry in sorted(state.items()) for _, t in sorted(entry.items())]
            found[name] = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    found["log.jsonl"] = json.dumps([{k: v for k, v in x.items() if k != "pictures_per_second"} for x in lines])
    for name, content in pushed.items():
        if name.endswith((".safetensors", ".png")):
            found[f"pushed {name}"] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    main()
