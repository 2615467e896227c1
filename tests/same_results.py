"""Do two checkouts of the project compute the same? `python tests/same_results.py OLD_CHECKOUT NEW_CHECKOUT`

For a change that should move code and change nothing: whatever is trained, drawn and written has to be the same to the
last bit. Each case of `same_results_cases.py` runs once in either checkout, with one thread on the CPU; what it leaves
becomes names with numbers, or with the SHA-256 of tensors and pixels, and every name is compared.

Only what is there for users is used, since everything else may have moved: the entry script with its flags, the names
that `latentdiff` itself has, the command `latentdiff`, and files. Networks, pictures and checkpoints come from the old
checkout, so that both start from the same bytes. `--only PART …` runs the cases whose names contain one of these. The
embedded emoji are built in LATENTDIFF_CACHE where that is set, and else anew.
"""

import argparse
import configparser
import contextlib
import hashlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from same_results_cases import BASE, CASES, SHIPPED

# ---- the parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="folder of what is compared with")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT", help="folder of what was changed")
    parser.add_argument("--only", nargs="+", metavar="PART", help="the cases whose names contain one of these")
    parsed = parser.parse_args()
    names = [name for name in CASES if not parsed.only or any(part in name for part in parsed.only)]
    if not names:
        parser.error(f"--only: no case is called so; there are {', '.join(CASES)}")
    old, new = parsed.old.resolve(), parsed.new.resolve()
    with tempfile.TemporaryDirectory(prefix="same-results-") as folder:
        run_child("inputs", old, old, Path(folder), [])
        found = [
            run_child(which, checkout, old, Path(folder), names) for which, checkout in (("old", old), ("new", new))
        ]
    sys.exit(not compare(names, *found))


def run_child(task: str, checkout: Path, old: Path, folder: Path, names: list[str]) -> dict[str, dict]:
    """What a process that has only `checkout`'s code finds: by the name of a case, names and values."""
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.setdefault("LATENTDIFF_CACHE", str(folder / "cache"))
    environment |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("PYTHONPATH", None)
    arguments = json.dumps(
        {"task": task, "checkout": str(checkout), "old": str(old), "folder": str(folder), "names": names}
    )
    # In an empty folder: what stands in the present one is no part of either checkout.
    (folder / task).mkdir()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", arguments]
    log = folder / f"{task}.log"
    with open(log, "w") as file:
        done = subprocess.run(command, env=environment, cwd=folder / task, stdout=file, stderr=file)
    if done.returncode:
        sys.exit(f"{log.read_text()[-3000:]}\n{checkout}: the process ended with status {done.returncode}")
    print(f"{task}: {checkout}, {time.monotonic() - started:.0f} s", flush=True)
    return json.loads((folder / f"{task}.json").read_text())


def compare(names: list[str], old: dict[str, dict], new: dict[str, dict]) -> bool:
    """Print a line for each case, and for each value that differs; whether all are equal."""
    width, all_equal = max(map(len, names)), True
    for name in names:
        a, b = old[name], new[name]
        differing = [key for key in sorted({*a, *b}) if key not in a or key not in b or a[key] != b[key]]
        failed = "failed" in a or "failed" in b or not a
        equal = not differing and not failed
        all_equal = all_equal and equal
        print(f"{name:{width}}  {'equal' if equal else 'FAILED' if failed else 'DIFFERENT'}  {len(a)} values")
        for key in ("failed",) if failed else differing:
            print(f"    {key}: {a.get(key, 'is not there')} | {b.get(key, 'is not there')}")
    print("all equal" if all_equal else "NOT all equal")
    return all_equal


# ---- the child


def child(task: str, checkout: Path, old: Path, folder: Path, names: list[str]) -> None:
    """Take the code of `checkout`, do what is asked for, and leave what was found in a file."""
    take_code_of(checkout)
    import conftest  # its own Hub on the loopback address, and a home without tokens
    import torch

    torch.set_num_threads(1)
    inputs = places(old, folder)
    found = {}
    if task == "inputs":
        make_inputs(checkout, inputs, conftest)
    for name in names:
        kind, case = CASES[name]
        output = Path.cwd() / name.replace(": ", "-").replace(" ", "-").replace(",", "")
        conftest.reset_accelerate()
        torch.manual_seed(0)
        try:
            found[name] = {"train": train, "draw": draw, "command": command}[kind](case, checkout, inputs, output)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            mistake = (
                error.__context__ if isinstance(error, SystemExit) else error
            )  # said on stderr, and left out there
            found[name] = {"failed": repr(mistake)}
    check_origin(checkout)
    (folder / f"{task}.json").write_text(json.dumps(found))


def take_code_of(checkout: Path) -> None:
    """Have `latentdiff` be that checkout's, whichever one the environment has installed.

    What an editable install puts in the way of imports is taken out. Of a package that lies elsewhere than its name
    says, setup.cfg knows the folder.
    """
    settings = configparser.ConfigParser()
    settings.read(checkout / "setup.cfg")
    mapped = settings.get("options", "package_dir", fallback="").strip().splitlines()
    folders = dict(line.replace(" ", "").split("=") for line in mapped)
    folders = {"latentdiff": "latentdiff"} | folders

    class Finder:
        @staticmethod
        def find_spec(name: str, path=None, target=None):
            if name not in folders:
                return None
            package = checkout / folders[name]
            return importlib.util.spec_from_file_location(
                name, package / "__init__.py", submodule_search_locations=[str(package)]
            )

    sys.meta_path[:] = [
        one for one in sys.meta_path if "__editable__" not in getattr(one, "__module__", type(one).__module__)
    ]
    sys.meta_path.insert(0, Finder)


def check_origin(checkout: Path) -> None:
    """Every module of the project that was loaded lies in that checkout."""
    of_project = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "latentdiff"}
    assert of_project
    for name, module in of_project.items():
        assert Path(module.__file__).resolve().is_relative_to(checkout), f"{name} comes from {module.__file__}"


def places(old: Path, folder: Path) -> dict[str, Path]:
    """What the tables' "{…}" stand for."""
    made = {name: folder / "inputs" / name for name in ("tiny", "other", "mp", "lora", "pictures")}
    pictures = {name: folder / "inputs" / f"{name}.png" for name in ("picture", "mask")}
    return made | pictures | {name: old / "checkpoints" / name for name in SHIPPED}


def make_inputs(checkout: Path, inputs: dict[str, Path], conftest) -> None:
    """Networks of random weights, pictures of noise of three shapes, a picture with its mask, and a LoRA."""
    import numpy as np
    import torch
    from PIL import Image

    from latentdiff import LatentDiffPipeline, MPUNet2DConditionModel

    def noise(seed: int, *size: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))

    LatentDiffPipeline(**conftest.tiny_components()).save_pretrained(inputs["tiny"])
    LatentDiffPipeline(**conftest.tiny_components(seed=1)).save_pretrained(inputs["other"])
    torch.manual_seed(2)
    levels = {"block_out_channels": (8, 16), "attention_levels": (True, False), "attention_head_dim": 4}
    unet = MPUNet2DConditionModel(sample_size=4, cross_attention_dim=16, **levels)
    for name, parameter in unet.named_parameters():
        if name.endswith("gain"):  # which are zero at first, and nothing would be seen of the network
            torch.nn.init.constant_(parameter, 0.5)
    LatentDiffPipeline(**{**conftest.tiny_components(), "unet": unet.eval()}).save_pretrained(inputs["mp"])

    inputs["pictures"].mkdir()
    shapes = [(20, 24), (32, 16), (17, 33)]
    for i in range(12):
        noise(i, *shapes[i % 3]).save(inputs["pictures"] / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i} of a cat"}) for i in range(12)]
    (inputs["pictures"] / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    noise(99, 8, 8).resize((64, 64), Image.Resampling.BICUBIC).save(inputs["picture"])
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:56] = 255
    Image.fromarray(mask).save(inputs["mask"])
    run_script(checkout, inputs, {**BASE, "lora_rank": 2, "learning_rate": 0.1}, inputs["lora"])


def train(runs: list[dict], checkout: Path, inputs: dict[str, Path], output: Path) -> dict[str, object]:
    import conftest

    for settings in runs:
        conftest.reset_accelerate()
        run_script(checkout, inputs, settings, output)
    return result(output)


def result(output: Path) -> dict[str, object]:
    """What a run has left: every line of the log, every tensor file by its tensors, pictures by their pixels, and what
    says how the model is drawn with. Checkpoints, averages' snapshots and validation pictures are among them."""
    found = {}
    for line in (output / "log.jsonl").read_text().splitlines():
        values = json.loads(line)
        values.pop("pictures_per_second", None)
        step = values.pop("step")
        found |= {f"step {step} {name}": value for name, value in values.items()}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.suffix == ".safetensors":
            found[name] = digest_of_tensors(path)
        elif path.suffix == ".png":
            found[name] = digest_of_pixels(path)
        elif path.name in ("model_index.json", "scheduler_config.json", "config.json", "README.md"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "optimizer.bin":
            found[name] = digest_of_optimizer(path)
    return found


def run_script(checkout: Path, inputs: dict[str, Path], settings: dict, output: Path) -> None:
    """The entry script in this process, with settings as flags."""
    cache = Path.cwd() / "latents"  # of this checkout alone, shared by its cases: encoding is compared too
    words = []
    for name, value in {**settings, "output_dir": str(output), "cache_dir": str(cache)}.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(one).format(**inputs) for one in values)]
    with arguments(["train_text2img.py", *words]):
        runpy.run_path(str(checkout / "train_text2img.py"), run_name="__main__")


def draw(case: tuple[str, str, dict], checkout: Path, inputs: dict[str, Path], output: Path) -> dict[str, object]:
    import latentdiff

    kind, folder, call = case
    things = Things(inputs)
    call = {name: things[value[1:]] if str(value).startswith("@") else value for name, value in call.items()}
    pipeline = getattr(latentdiff, kind).from_pretrained(folder.format(**inputs))
    pipeline.set_progress_bar_config(disable=True)
    if scheduler := call.pop("scheduler", None):
        pipeline.scheduler = getattr(latentdiff, scheduler).from_config(pipeline.scheduler.config)
    if lora := call.pop("lora", None):
        pipeline.load_lora_weights(lora.format(**inputs))
    if method := call.pop("method", None):
        return {"latents": digest(getattr(pipeline, method)(**call).latents)}
    images = pipeline(**call, output_type="np").images
    return {"pixels": digest(images), "their mean": float(images.mean())}


class Things:
    """What the table of drawings names with "@"."""

    def __init__(self, inputs: dict[str, Path]):
        self._inputs = inputs

    def __getitem__(self, name: str) -> object:
        import torch
        from diffusers import UNet2DConditionModel
        from PIL import Image

        return {
            "picture": lambda: Image.open(self._inputs["picture"]).convert("RGB"),
            "mask": lambda: Image.open(self._inputs["mask"]),
            "guide": lambda: UNet2DConditionModel.from_pretrained(self._inputs["emoji64-guide"]).eval(),
            "generator": lambda: torch.Generator().manual_seed(7),
            "falling": lambda: lambda sigma: 1 + 4 / (1 + sigma),
        }[name]()


def command(runs: list[list[str]], checkout: Path, inputs: dict[str, Path], output: Path) -> dict[str, object]:
    from latentdiff.cli import main as latentdiff_main

    output.mkdir()
    with contextlib.chdir(output):
        for words in runs:
            latentdiff_main([word.format(**inputs) for word in words])
    files = (path for path in sorted(output.rglob("*")) if path.suffix in (".png", ".gif"))
    return {path.relative_to(output).as_posix(): digest_of_pixels(path) for path in files}


# ---- small parts


@contextlib.contextmanager
def arguments(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def digest(array) -> str:
    """SHA-256 of an array's or a tensor's shape, type and bytes."""
    import numpy as np

    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes()).hexdigest()


def digest_of_tensors(path: Path) -> str:
    """Of the tensors by their names: the file's header may say other things about them. A text encoder's begin as all
    releases of transformers read them, or, in folders of a version before 0.2, as those since 5.6 do."""
    from safetensors.numpy import load_file

    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    return hashlib.sha256("".join(f"{name} {digest(tensors[name])}\n" for name in sorted(tensors)).encode()).hexdigest()


def digest_of_optimizer(path: Path) -> str:
    import torch

    state = torch.load(path, weights_only=True)["state"]
    tensors = [t for _, entry in sorted(state.items()) for _, t in sorted(entry.items())]
    return hashlib.sha256("".join(digest(torch.as_tensor(t)) for t in tensors).encode()).hexdigest()


def digest_of_pixels(path: Path) -> str:
    """Of every frame."""
    import numpy as np
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        frames = [digest(np.asarray(frame.convert("RGB"))) for frame in ImageSequence.Iterator(image)]
    return hashlib.sha256("".join(frames).encode()).hexdigest()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        given = SimpleNamespace(**json.loads(sys.argv[2]))
        child(given.task, Path(given.checkout), Path(given.old), Path(given.folder), given.names)
    else:
        main()
