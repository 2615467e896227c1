"""Memory and time per step of a training process against the size of its data set.

    python benchmarks/data_set_size.py

Each size is a parquet file of tiny pictures and a cache with an entry for each picture and each caption, of random
numbers in the shape that the shipped VAE and text encoder give (encoding a million pictures in earnest takes hours and
ends in the same files). Then train_text2img.py runs on each as anybody starts it, the sizes in turn, so that what else
the machine does hits all alike; its memory is read from /proc while it trains, its speed from its log. A million take
about 30 GB of disk.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 1_000_000], help="how many pictures")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each run")
    parser.add_argument("--turns", type=int, default=3, help="runs of each size; the median counts")
    parser.add_argument("--folder", type=Path, default=Path("runs/data_set_size"), help="where data and caches go")
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.fill:  # in a process of its own, whose memory is nobody's
        fill(settings.folder, settings.fill)
        return
    for size in settings.sizes:
        started = time.perf_counter()
        write_data_set(settings.folder / str(size), size)
        subprocess.run([sys.executable, __file__, "--fill", str(size), "--folder", settings.folder], check=True)
        print(f"{size:,} pictures: data and cache there after {time.perf_counter() - started:.0f} s", flush=True)
    runs = {size: [] for size in settings.sizes}
    for _ in range(settings.turns):
        for size in settings.sizes:
            runs[size].append(train(settings.folder, size, settings.steps))
            print(f"{size:,} pictures: " + ", ".join(f"{k} {v:.4g}" for k, v in runs[size][-1].items()), flush=True)
    first = settings.sizes[0]
    for name in next(iter(runs.values()))[0]:
        medians = {size: median(run[name] for run in of_size) for size, of_size in runs.items()}
        said = (f"{size:,}: {value:.4g} ({value / medians[first] - 1:+.1%})" for size, value in medians.items())
        print(f"{name}: {', '.join(said)}")


def write_data_set(folder: Path, size: int) -> None:
    """A parquet file of `size` pictures that differ in what stands behind a PNG's end, which nobody decodes."""
    import datasets

    if (folder / "data" / "train.parquet").exists():
        return
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    png = file.getvalue()

    def rows():
        for number in range(size):
            yield {"image": {"bytes": png + number.to_bytes(8, "big"), "path": None}, "text": f"picture {number}"}

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder / "generated"))
    table.to_parquet(folder / "data" / "train.parquet")


def run_settings(folder: Path, size: int) -> dict:
    """The run that is measured; only the size of the data set differs."""
    return {
        "train_data_dir": str(folder / str(size) / "data"),
        "cache_dir": str(folder / str(size) / "cache"),
        "output_dir": str(folder / str(size) / "run"),
        "cache_text": "always",
        "mixed_precision": "bf16",
        "report_to": "none",
        "logging_steps": 10,
    }


def fill(folder: Path, size: int) -> None:
    """Everything that the run's own start does, with random numbers for what the networks would say."""
    from latentdiff.config.train import TrainConfig
    from latentdiff.data import latent_cache
    from latentdiff.training.data import load_data
    from latentdiff.training.setup import load_networks, make_accelerator, make_output_dir

    drawn = torch.Generator().manual_seed(0)

    def moments(self, variants):
        return {name: torch.randn(len(variants), 4, 16, 16, generator=drawn).abs() for name in ("mean", "std")}

    def hidden_states(self, numbers):
        return {"hidden_states": torch.randn(len(numbers), 20, 192, generator=drawn)}

    latent_cache.Moments._encode, latent_cache.HiddenStates._encode = moments, hidden_states
    config = TrainConfig(**run_settings(folder, size))
    make_output_dir(config)
    parts, unet, scheduler = load_networks(config)
    load_data(config, make_accelerator(config), parts, unet, scheduler)


def train(folder: Path, size: int, steps: int) -> dict[str, float]:
    """Run the script and watch it."""
    settings = run_settings(folder, size) | {"max_train_steps": steps, "checkpointing_steps": 10 * steps}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    log = Path(settings["output_dir"]) / "log.jsonl"
    log.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_text2img.py", *flags, "--validation_prompts"],
        env={**os.environ, "HF_HOME": str(folder / "hf"), "TQDM_DISABLE": "1"},
        stdout=subprocess.DEVNULL,
    )
    memory, first_step = [], None
    while process.poll() is None:
        if log.exists() and log.stat().st_size:
            first_step = first_step or time.perf_counter() - started
            memory += resident(process.pid)
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"the run on {size:,} pictures ended with {process.returncode}")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    speed = median(line["pictures_per_second"] for line in lines[2:])
    half = memory[len(memory) // 2 :]  # saving the model at the end takes memory of its own: the median leaves it out
    return {
        "resident memory (MB)": median(m["VmRSS"] for m in half) / 1e3,
        "of it not of files (MB)": median(m["RssAnon"] for m in half) / 1e3,
        "time per step (ms)": 32e3 / speed,
        "time to the first ten steps (s)": first_step,
    }


def resident(pid: int) -> list[dict[str, int]]:
    """The process's memory in kB; nothing once it is ending."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(kb) for name, kb in re.findall(r"(VmRSS|RssAnon):\s+(\d+) kB", status)}
    return [found] if found else []


if __name__ == "__main__":
    main()
