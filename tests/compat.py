"""A saved folder, read by other releases of transformers and diffusers: `make compat`, or

    python tests/compat.py
    python tests/compat.py checkpoints/emoji64-lcm runs/mine

Each release gets an environment of its own under runs/, where pip puts what is missing there: torch is this one's. In
each plain StableDiffusionPipeline draws one picture in 4 steps under guidance, and so it does here. It fails where a
picture differs by more than 1e-5, a release cannot load the folder, or its packages are not to be had.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from environments import NoPackages, make_environment

ROOT = Path(__file__).resolve().parent.parent
WHERE = ROOT / "runs" / "environments"
MOST = 1e-5
# transformers before 5 has another tokenizer, and before 5.6 other names of a text encoder's weights; diffusers from
# 0.37 needs a huggingface_hub that transformers 4 does not take.
RELEASES = {
    "4.57": ("transformers==4.57.*", "diffusers<0.37"),
    "5.5": ("transformers==5.5.*", "diffusers>=0.37"),
    "newest": ("transformers", "diffusers"),
}
CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import diffusers, torch, transformers
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
pipe = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
how = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
picture = pipe("a cat, twemoji style", generator=torch.Generator().manual_seed(0), **how).images
print(json.dumps([transformers.__version__, diffusers.__version__, picture.ravel().tolist()]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", default=["checkpoints/emoji64"], help="saved pipelines")
    folders = [str(Path(folder).resolve()) for folder in parser.parse_args().folders]
    os.chdir(ROOT)
    failures = []
    pythons = {}
    for release, packages in RELEASES.items():
        try:
            pythons[release] = make_environment(WHERE / f"transformers-{release}", *packages)
        except NoPackages as error:
            failures.append(f"{' and '.join(packages)} cannot be had here:\n{error}")
    for folder in folders:
        print(os.path.relpath(folder))
        own = draw(sys.executable, folder)
        print(f"  here: transformers {own[0]}, diffusers {own[1]}")
        for release, python in pythons.items():
            try:
                transformers, diffusers, picture = draw(python, folder)
            except subprocess.CalledProcessError as error:
                failures.append(f"transformers {release} cannot draw with {folder}:\n{error.stderr.strip()[-1000:]}")
                continue
            apart = max(abs(a - b) for a, b in zip(picture, own[2], strict=True))
            print(f"  transformers {transformers}, diffusers {diffusers}: largest pixel difference {apart:.1e}")
            if not apart <= MOST:
                failures.append(f"transformers {transformers} draws another picture with {folder}")
    if failures:
        sys.exit("\n".join(failures))


def draw(python: str | Path, folder: str) -> list:
    """Releases of transformers and diffusers, and the picture's values, as that Python has them."""
    # offline: nothing is looked for elsewhere than in the folder
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = [python, "-c", CHILD, folder]
    done = subprocess.run(run, check=True, capture_output=True, text=True, env=environment, cwd=WHERE.parent)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
