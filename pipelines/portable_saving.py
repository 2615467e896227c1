"""Saving a pipeline so that anybody can load it: a Stable Diffusion folder that carries its own code.

Plain diffusers finds its own class names in the index; somebody who wants this project's pipelines and has only
diffusers names one of the files beside the weights as `custom_pipeline=`.
"""

import functools
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import diffusers
import torch
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.peft_utils import recurse_remove_peft_layers

from latentdiff.diffusion.noise_schedule import make_betas
from latentdiff.diffusion.posthoc_ema import copy_snapshots
from latentdiff.diffusion.scheduling_consistency import ConsistencyScheduler
from latentdiff.diffusion.scheduling_ddim import DDIMScheduler
from latentdiff.diffusion.scheduling_ddpm import DDPMScheduler
from latentdiff.diffusion.unet_inputs import is_for_inpainting
from latentdiff.utils.weight_files import SAVING, move_saved, write_earlier_names

logger = logging.get_logger(__name__)

# By what takes their place where only diffusers is installed.
_OUR_SCHEDULERS = {
    diffusers.DDIMScheduler: DDIMScheduler,
    diffusers.DDPMScheduler: DDPMScheduler,
    diffusers.LCMScheduler: ConsistencyScheduler,
}
# StableDiffusionPipeline sets these two in any scheduler it is given, whatever the scheduler's config file says.
_STABLE_DIFFUSION_SETTINGS = {"steps_offset": 1, "clip_sample": False}

# What may be named as `custom_pipeline=`, by its file in a saved folder ("pipeline.py" is what a folder's own name
# means there), with the file in the package.
PIPELINES = {
    "pipeline.py": "text2img.py",
    "img2img.py": "img2img.py",
    "inpaint.py": "inpaint.py",
    "interpolate.py": "interpolate.py",
    "invert.py": "invert.py",
}
# An import of a file that travels, of the same room or of another; a saved folder has no rooms.
_OWN_IMPORT = re.compile(r"^from (?:latentdiff\.\w+)?\.(\w+) import", re.MULTILINE)
# The whole of such an import, in a network's module.
_WHOLE_RELATIVE_IMPORT = re.compile(
    r"^from \.(?:\.(?P<room>\w+)\.)?(?P<module>\w+) import (?:\([^)]*\)|[^\n(]*)\n", re.MULTILINE
)

# UNets that diffusers has not, by the name of their class; none where only a saved folder's code is there.
OWN_UNETS: dict[str, type] = {}


def adopt_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler that a pipeline uses for `scheduler`: ours for diffusers' own DDIM, DDPM and LCM.

    `steps_offset` and `clip_sample` get the values that StableDiffusionPipeline forces on every scheduler, so that both
    pipelines draw the same picture; a value that has to change for it is logged.
    """
    changes = {k: v for k, v in _STABLE_DIFFUSION_SETTINGS.items() if scheduler.config.get(k, v) != v}
    for name, value in changes.items():
        logger.warning(
            f"{type(scheduler).__name__}: {name}={scheduler.config[name]} becomes {value}, as in Stable Diffusion"
        )
    scheduler_class = _OUR_SCHEDULERS.get(type(scheduler), type(scheduler))
    if scheduler_class is type(scheduler) and not changes:
        return scheduler
    return scheduler_class.from_config(scheduler.config, **changes)


@functools.cache
def code_files() -> dict[str, str]:
    """The code that travels with the weights, by its file's name in that flat folder, as it was at the first call: the
    pipelines, and all that they import of this project.

    Of somebody who loaded it from there, only the files that their pipeline is made of.
    """
    sources, wanted = {}, dict(PIPELINES)
    while wanted:
        name, in_package = wanted.popitem()
        if path := _find(name, in_package):
            sources[name] = _OWN_IMPORT.sub(r"from .\1 import", path.read_text(encoding="utf-8"))
            needed = (f"{module}.py" for module in _OWN_IMPORT.findall(sources[name]))
            wanted |= {file: file for file in needed if file not in sources}
    return {name: _naming_all_it_needs(name, sources) for name in sorted(sources)}


def write_code(folder: str | os.PathLike) -> None:
    """Put `code_files` into a saved folder; what is there of them is replaced."""
    for name, source in code_files().items():
        Path(folder, name).write_text(source, encoding="utf-8")


def _find(name: str, in_package: str) -> Path | None:
    """Beside this file (in the package's `pipelines`, or a flat folder), or in another room beside the schedules'."""
    here, diffusion = Path(__file__).parent, Path(inspect.getfile(make_betas)).parent
    candidates = (here / in_package, here / name, diffusion / name, diffusion.parent / "utils" / name)
    return next((path for path in candidates if path.is_file()), None)


def _naming_all_it_needs(name: str, sources: dict[str, str]) -> str:
    """The source of a pipeline with an import of each file that it needs only by way of another one.

    From a local folder diffusers takes the files that a pipeline's own lines import, not what those import in turn.
    """
    if name not in PIPELINES:
        return sources[name]
    named = _OWN_IMPORT.findall(sources[name])
    needed = list(dict.fromkeys(named))
    for module in needed:  # grows as it goes
        needed += [m for m in _OWN_IMPORT.findall(sources[f"{module}.py"]) if m not in needed]
    missing = sorted(set(needed) - set(named))
    if not missing:
        return sources[name]
    lines = [f"from .{module} import __name__ as _  # noqa: E402, F401" for module in missing]
    why = "# diffusers brings along only what this very file imports."
    return "\n".join([sources[name].rstrip("\n"), "", why, *lines, ""])


def carried_class(network: object) -> type | None:
    """The class of a network that diffusers has not, and whose code therefore goes along with its weights."""
    kind = type(getattr(network, "_orig_mod", network))  # without what torch.compile wraps around it
    return kind if kind.__module__.split(".")[0] in ("latentdiff", "diffusers_modules") else None


@functools.cache
def network_code(kind: type) -> str:
    """The source of a network's class as one file: what its module imports beside itself is put in the import's place.

    diffusers brings along of a repository only the one file that stands beside the weights, by the name that the index
    gives.
    """
    path = Path(inspect.getfile(sys.modules[kind.__module__]))

    def whole(source: str) -> str:
        return _WHOLE_RELATIVE_IMPORT.sub(lambda found: whole(imported(**found.groupdict())), source)

    def imported(room: str | None, module: str) -> str:
        folder = path.parent if room is None else path.parents[1] / room
        return (folder / f"{module}.py").read_text(encoding="utf-8")

    return whole(path.read_text(encoding="utf-8"))


def _module_name(kind: type) -> str:
    return kind.__module__.rsplit(".", 1)[-1]


def keep_code(network: object) -> None:
    """Read what `save_pretrained` will write beside a network now: what a long run saves at its end is then the code
    that it ran, whatever has become of the files since."""
    code_files()
    if kind := carried_class(network):
        network_code(kind)


def _merged(network: torch.nn.Module) -> torch.nn.Module:
    """A copy with its adapters, as they are switched on and scaled, in the weights; with the names that adapters give
    them diffusers would save weights that load as random numbers, and transformers the adapters alone."""
    network = deepcopy(getattr(network, "_orig_mod", network))
    for layer in [module for module in network.modules() if hasattr(module, "merged_adapters")]:  # peft's
        if not layer.disable_adapters and set(layer.active_adapters) - set(layer.merged_adapters):
            layer.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config
    network._hf_peft_config_loaded = False  # by which both libraries tell what they save
    return network


def _settle_files(folder: Path) -> None:
    """Weights that others may read as they may the index, by name and by the umask, where safetensors has neither."""
    for part in (path for path in folder.iterdir() if path.is_dir()):
        write_earlier_names(part)
        for weights in part.glob("*.safetensors"):
            shutil.copymode(folder / "model_index.json", weights)


class PortableSaving:
    """`save_pretrained` and the index for a DiffusionPipeline over Stable Diffusion's components."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        ema_snapshots: bool = False,
    ) -> None:
        """Save a Stable Diffusion folder that also carries these pipelines and their schedulers as code.

        Stable Diffusion's own pipelines and this project's load it; diffusers alone loads this project's from it, given
        `custom_pipeline=` (the same folder for text to image, else a file's name such as "img2img") and
        `trust_remote_code=True`. With `push_to_hub` the whole folder, with the README.md in it, goes to `repo_id` (by
        default the folder's name); the next four arguments are for that.

        It is written aside and then moved, so that nothing is lost where saving fails, and what another model left
        there (weights whole, in shards or pickled, of the same variant) is not read in its place. LoRA weights that are
        loaded are saved as part of the others, as they act now. All releases of transformers read the weights' names.

        Args:
            ema_snapshots: take along the snapshots that lie where this was loaded from, each as large as a network in
                fp32, so that `ema_sigma_rel` can be chosen where the copy is loaded.

        Raises:
            ValueError: there are no snapshots to take along.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        saved = super(PortableSaving, self._without_adapters())
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=save_directory) as aside:
            saved.save_pretrained(aside, safe_serialization, variant, max_shard_size)
            if kind := carried_class(self.unet):
                Path(aside, "unet", f"{_module_name(kind)}.py").write_text(network_code(kind), encoding="utf-8")
            _settle_files(Path(aside))
            move_saved(Path(aside), Path(save_directory))
        write_code(save_directory)
        if ema_snapshots:
            copy_snapshots(self.name_or_path, save_directory)
        if push_to_hub:
            # Of what diffusers can push, only the index takes all that lies beside it along and replaces no README.md.
            hub = {"private": private, "token": token, "commit_message": commit_message, "create_pr": create_pr}
            repo_id = repo_id or Path(save_directory).resolve().name
            self.save_config(str(save_directory), push_to_hub=True, repo_id=repo_id, **hub)

    def _without_adapters(self) -> "PortableSaving":
        """This pipeline, or one whose networks have in their weights what LoRA adds to them here."""
        networks = {name: network for name, network in self.components.items() if getattr(network, "peft_config", None)}
        if not networks:
            return self
        return self.from_pipe(self, **{name: _merged(network) for name, network in networks.items()})

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        """As in diffusers; a UNet of `OWN_UNETS` is taken from there, so that no code of the folder needs trust."""
        config = super().load_config(*args, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        if kind := OWN_UNETS.get((index.get("unet") or (None, None))[1]):
            index["unet"] = [kind.__module__, kind.__name__]
        return config

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write model_index.json in diffusers' names alone, so that it loads where latentdiff is not installed."""
        index = json.loads(self.to_json_string())
        # A UNet that takes mask and masked picture beside the latents can do nothing but inpaint.
        unet = None if self.unet is None else self.unet.config
        inpaints = unet is not None and is_for_inpainting(unet.in_channels, unet.out_channels)
        index["_class_name"] = "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
        index.pop("_name_or_path", None)  # where these weights were loaded from is nobody else's path
        if kind := carried_class(self.unet):
            index["unet"] = [_module_name(kind), kind.__name__]
        for theirs, ours in _OUR_SCHEDULERS.items():
            if type(self.scheduler).__name__ in (theirs.__name__, ours.__name__):
                index["scheduler"] = ["diffusers", theirs.__name__]
        Path(json_file_path).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
