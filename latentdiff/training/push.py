"""`latentdiff push` and `latentdiff pull`: a saved pipeline to the Hub and from it; and a run's own pushes.

While a run trains, the averaged weights of its checkpoints go to the Hub from a thread of their own.
A push that fails is said in one line and hurts nothing: the next checkpoint is pushed in its place, and the finished
model at the end. The thread handles files alone. It builds no network, since the libraries change settings of the whole
process while they load one, under which the run would draw other numbers.
"""

import os
import shutil
import threading
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..config.commands import Pull, Push
from ..config.train import TrainConfig
from ..diffusion.posthoc_ema import SNAPSHOTS
from ..diffusion.scheduling_ddpm import DDPMScheduler
from ..models.lora import has_lora
from ..models.parts import FrozenParts
from ..objectives.choice import objective_of
from ..pipelines.portable_saving import write_code
from ..utils.errors import ConfigError, first_line
from ..utils.hub import PushError, open_repo, pull_folder, push_folder
from .card import repo_name
from .export import as_pipeline, pushed_files, settle_configurations


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class BackgroundPush:
    """One push at a time; a checkpoint that comes while another is still on its way is not pushed.

    Args:
        config: of the run.
        parts, unet, scheduler: what the pushed folder is made of; what is trained of it is replaced by each
            checkpoint's.

    Raises:
        PushError: the run is to push, and there is no token or it may not write there: better known now than at the
            end.
    """

    def __init__(self, config: TrainConfig, parts: FrozenParts, unet: UNet2DConditionModel, scheduler: DDPMScheduler):
        self._config, self._is_lora = config, has_lora(unet)
        self._thread: threading.Thread | None = None
        folder = Path(config.output_dir) / ".tmp-push"
        self._weights, self._model = folder / "weights", folder / "model"
        if config.push_to_hub:
            open_repo(repo_name(config), config.hub_private)
            shutil.rmtree(folder, ignore_errors=True)  # of a killed run
            pipeline = as_pipeline(parts, unet, scheduler)
            if not self._is_lora:
                pipeline.save_pretrained(self._model)
            elif objective_of(config).draws_in_few_steps:  # adapters go with the scheduler that they were distilled for
                pipeline.scheduler.save_pretrained(self._model)

    def start(self, checkpoint: Path, step: int) -> None:
        """Begin to push what `checkpoint` holds."""
        if not self._config.push_to_hub or (self._thread and self._thread.is_alive()):
            return
        shutil.rmtree(self._weights, ignore_errors=True)
        for name in ("unet", "text_encoder"):
            averaged = checkpoint / f"{name}_ema"
            folder = averaged if averaged.is_dir() else checkpoint / name
            if folder.is_dir():  # the text encoder is trained in some runs only
                # The checkpoint may be removed before the push is through.
                shutil.copytree(folder, self._weights / name, copy_function=_link)
        self._thread = threading.Thread(target=self._push, args=(step,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the push that is on its way is through or has failed; what it needed is removed."""
        if self._thread:
            self._thread.join()
        shutil.rmtree(self._model.parent, ignore_errors=True)

    def _push(self, step: int) -> None:
        try:
            if self._is_lora:
                folder = self._weights / "unet"
                if self._model.is_dir():
                    shutil.copytree(self._model, folder, dirs_exist_ok=True)
            else:
                folder = self._model
                self._assemble()
            name, private = repo_name(self._config), self._config.hub_private
            push_folder(folder, name, private=private, commit_message=f"Step {step}")
        except PushError as error:
            tqdm.write(f"step {step}: {error}; the next checkpoint will be pushed instead")
        except Exception as error:  # whatever it is, it is not worth the run
            tqdm.write(f"step {step}: not pushed ({type(error).__name__}); the next checkpoint will be pushed instead")

    def _assemble(self) -> None:
        for folder in self._weights.iterdir():
            shutil.rmtree(self._model / folder.name)
            shutil.copytree(folder, self._model / folder.name)
        settle_configurations(self._model)
        if self._config.save_dtype == "fp16":
            for path in self._model.rglob("*.safetensors"):
                halved = {name: t.half() if t.is_floating_point() else t for name, t in load_file(path).items()}
                save_file(halved, path, metadata={"format": "pt"})


def push(command: Push) -> None:
    """Push a folder with the code that draws from it where latentdiff is not installed, and say where it is."""
    if not (command.folder / "model_index.json").is_file():
        raise ConfigError(f"{command.folder} holds no model_index.json: give the folder of a whole saved pipeline")
    if command.ema_snapshots and not any(command.folder.glob(f"{SNAPSHOTS}/*.safetensors")):
        raise ConfigError(f"--ema-snapshots: {command.folder} holds none; a run with --ema_sigma_rel writes them")
    try:
        write_code(command.folder)
    except OSError as error:
        raise ConfigError(f"{command.folder} cannot be written ({first_line(error)}): its code is put there") from None
    url = push_folder(
        command.folder,
        command.repo_id,
        private=command.private,
        revision=command.revision,
        commit_message=command.message,
        files=pushed_files(command.folder, command.ema_snapshots),
    )
    print(url)


def pull(command: Pull) -> None:
    """Load a model into a folder, and say where it is."""
    folder = command.output_dir or Path(command.repo_id.split("/")[-1])
    print(pull_folder(command.repo_id, folder, command.revision))
