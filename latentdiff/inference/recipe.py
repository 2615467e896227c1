"""A picture's recipe: everything that it follows from, kept in the PNG itself and read back without trusting the file.

Two of the PNG's text chunks hold it: "latentdiff" as JSON, from which the picture can be drawn again, and "parameters"
in the words of AUTOMATIC1111's page, which viewers of such pictures show.
"""

import io
import json
import os
import types
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from PIL import Image, PngImagePlugin

from ..config.sampling import SCHEDULERS, Sampling
from ..utils.errors import ConfigError, printable
from ..utils.files import file_sha256, folder_sha256, write_whole

CHUNK = "latentdiff"
MAX_RECIPE = 2**19  # characters of JSON that are looked at
MAX_TEXT = 2**15  # of all prompts together, of which JSON makes twelve times as many at the worst
# What a recipe may ask for, so that a file from somewhere cannot keep a machine busy for days.
MAX_SIDE = 8192
MAX_STEPS = 10_000
MAX_BATCH = 1024
MAX_PIXELS = 2**28  # of all pictures that are drawn at a time
MAX_SEED = 2**63 - 1
MAX_FRAMES = 10_000
MAX_NAME = 200

Kind = Literal["text2img", "img2img", "inpaint", "invert", "interpolate"]
# The shipped checkpoints before their text encoders' weights had the names that all releases of transformers read, by
# what they are since: the same numbers, and so the same pictures.
_SAME_WEIGHTS = {
    "dce2ef75a6c191bc7b291cd1b8e604edaece35d9e6359e6b93e1af9ef411cd08": (
        "4c8804e5b69fb7d209bdf1a3d4bcab6fa846e19b56376bbf363aa8f3ddf4ca66"  # emoji64
    ),
    "9ab760840b50611e2b7eee2cc3dd9a562cac6a991466355f5042a16a4e25da6a": (
        "9e817748c738125b6ebaeafebb62406ba742e55dc535d04c4ae023209318b5f5"  # emoji64-lcm
    ),
    "2cc36e9a1991bbfe06fb0ecd675ba045b39648238c7d46d77642790ac5ea424e": (
        "b79f0246167de0cf7b21d70ebb238ee6af9ce69391bf3c02abdf6c85a1801771"  # emoji64-inpaint
    ),
    "5a099f914f959005dd0e0dd113846ca3d71a8ebdef46b874edadc8b35250890c": (
        "d33f8fcabb274353d47c29fee7310437eddb04385df75737b329f30683a0b541"  # emoji64-clip
    ),
}
SAMPLERS = {names.class_name: names.sampler for names in SCHEDULERS.values()}


class RecipeError(ConfigError):
    """A picture without a recipe, or with one that cannot be followed."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """A file or folder that a picture is made with.

    Raises:
        RecipeError: a name of several lines, or a hash that is none.
    """

    name: str
    """A file's or folder's own name or a Hub id; never where it lies on somebody's machine."""
    sha256: str
    """Of a file's bytes, or as `folder_sha256`."""

    def __post_init__(self) -> None:
        if not self.name.isprintable() or not 0 < len(self.name) <= MAX_NAME:
            raise RecipeError(f"the name {self.name[:MAX_NAME]!r} must be one line of at most {MAX_NAME} characters")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise RecipeError(f"the hash of {self.name!r} is no SHA-256")
        object.__setattr__(self, "sha256", _SAME_WEIGHTS.get(self.sha256, self.sha256))


@dataclass(frozen=True, kw_only=True)
class Recipe(Sampling):
    """What one picture, or one interpolation, follows from. None: this kind of picture has no such thing.

    Of the options of sampling nothing is open, and the scheduler is named by its class; its settings are the
    checkpoint's but for the spacing and the noise levels.

    Raises:
        RecipeError: a value that is out of its range, or that this kind of picture lacks or has no use for.
    """

    kind: Kind
    prompt: str
    seed: int
    """The picture starts from the noise of a CPU generator with this seed, and each step draws from it, too."""
    num_inference_steps: int = field()
    guidance_scale: float = field()
    scheduler: str = field()
    guidance_interval: tuple[float, float | None] | None = None
    """(sigma_lo, sigma_hi); None in the second place: no upper end."""
    height: int
    width: int
    guide_unet: Ingredient | None = None
    clip: Ingredient | None = None
    clip_guidance: float | None = None
    """Scale of the guidance by `clip`."""
    image: Ingredient | None = None
    """The picture that is edited."""
    strength: float | None = None
    mask: Ingredient | None = None
    mask_blur: int | None = None
    """Pixels around the mask over which the painting passes into the picture."""
    keep_unmasked: bool | None = None
    source_prompt: str | None = None
    """What the edited picture shows, for an edit through its own noise."""
    prompts: tuple[str, ...] | None = None
    """The stations of an interpolation after `prompt`."""
    seeds: tuple[int, ...] | None = None
    """The noise of the stations after `seed`, one for each."""
    frames: int | None = None
    loop: bool | None = None
    columns: int | None = None
    """Frames that are shown in a row."""
    batch_size: int = 1
    """Pictures drawn at a time, copies of which are needed to draw this one again to the last bit: a network's sums are
    rounded in another order in a batch of another size."""
    checkpoint: Ingredient
    single_file_config: Ingredient | None = None
    """Whose configurations and tokenizer a checkpoint in a single file was read with, where that was chosen."""
    ema_sigma_rel: float | None = None
    """Relative width of the average of the weights, where it was chosen when they were loaded (arXiv 2312.02696)."""
    lora: Ingredient | None = None
    """LoRA weights on the checkpoint's networks."""
    dtype: str
    device: str
    """Kind of device, such as "cpu"."""
    version: str
    """Of latentdiff."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RecipeError(f"{name} is {value}; it must lie in {low:g} … {high:g}")
        texts = (self.prompt, self.negative_prompt, self.source_prompt or "", *(self.prompts or ()))
        if (length := sum(map(len, texts))) > MAX_TEXT:
            raise RecipeError(f"the prompts have {length} characters; {MAX_TEXT} are the most")
        if (pixels := self.width * self.height * self.batch_size) > MAX_PIXELS:
            raise RecipeError(
                f"{self.batch_size} pictures of {self.width}x{self.height} have {pixels} pixels; "
                f"{MAX_PIXELS} are the most at a time"
            )
        if not all(0 <= seed <= MAX_SEED for seed in self.seeds or ()):
            raise RecipeError(f"seeds are {self.seeds}; each must lie in 0 … {MAX_SEED:g}")
        for name in ("scheduler", "dtype", "device", "version"):
            value = getattr(self, name)
            if not value.isprintable() or len(value) > MAX_NAME:
                raise RecipeError(f"{name} must be one line of at most {MAX_NAME} characters")
        own = _OF_KIND[self.kind]
        for name in sorted(set().union(*_OF_KIND.values())):
            if (getattr(self, name) is not None) != (name in own):
                raise RecipeError(f"{self.kind} {'needs' if name in own else 'has no use for'} {name}")
        if (self.clip is None) != (self.clip_guidance is None):
            raise RecipeError("clip and clip_guidance go together")
        if len(self.prompts or ()) != len(self.seeds or ()):
            raise RecipeError(f"{len(self.prompts or ())} prompts and {len(self.seeds or ())} seeds: must be as many")

    def to_json(self) -> str:
        """One line of JSON, what is None left out."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read what `to_json` wrote, whoever wrote it.

        Raises:
            RecipeError: not JSON, too long, a key that is not known or missing, a value of another type or range.
        """
        if len(text) > MAX_RECIPE:
            raise RecipeError(f"it has {len(text)} characters; {MAX_RECIPE} are the most that are read")
        try:
            values = json.loads(text)
            json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # half a character, or nan, is no JSON
        except (ValueError, RecursionError):
            raise RecipeError("it is not JSON") from None
        return _dataclass_of(cls, values, "it")

    def parameters(self) -> str:
        """The recipe as AUTOMATIC1111's page writes it: prompt, negative prompt, and a line of "name: value"."""
        sampler = SAMPLERS.get(self.scheduler, self.scheduler) + (" Karras" if self.karras_sigmas else "")
        settings = {
            "Steps": self.num_inference_steps,
            "Sampler": sampler,
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.checkpoint.sha256[:10],
            "Model": self.checkpoint.name,
            "Denoising strength": None if self.strength is None else f"{self.strength:g}",
            "Eta": f"{self.eta:g}" if self.eta else None,
            "CFG Rescale phi": f"{self.guidance_rescale:g}" if self.guidance_rescale else None,
            "Version": f"latentdiff {self.version}",
        }
        line = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
        negative = [f"Negative prompt: {self.negative_prompt}"] if self.negative_prompt else []
        return "\n".join([" -> ".join((self.prompt, *(self.prompts or ()))), *negative, line])


_RANGES = (
    ("seed", 0, MAX_SEED),
    ("num_inference_steps", 1, MAX_STEPS),
    ("height", 1, MAX_SIDE),
    ("width", 1, MAX_SIDE),
    ("eta", 0, 1),
    ("guidance_rescale", 0, 1),
    ("strength", 0, 1),
    ("clip_guidance", 0, MAX_SEED),
    ("mask_blur", 0, MAX_SIDE),
    ("frames", 2, MAX_FRAMES),
    ("columns", 2, MAX_FRAMES),
    ("batch_size", 1, MAX_BATCH),
    ("ema_sigma_rel", 0, 1),
)
# What belongs to some kinds of picture only.
_OF_KIND: dict[str, tuple[str, ...]] = {
    "text2img": (),
    "img2img": ("image", "strength"),
    "inpaint": ("image", "mask", "strength", "mask_blur", "keep_unmasked"),
    "invert": ("image", "strength", "source_prompt"),
    "interpolate": ("prompts", "seeds", "frames", "loop", "columns"),
}


def _quoted(value: Any) -> str:
    """A value for the line of settings, in quotes where it holds what separates them."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


# ---- reading what may be anything


def _dataclass_of(kind: type, values: Any, where: str) -> Any:
    """A dataclass from JSON's dictionary: every key known, every value of its type, nothing missing."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where} is not a dictionary")
    known, required = get_type_hints(kind), {f.name for f in fields(kind) if _is_required(f)}
    for problem, names in (("an unknown", values.keys() - known.keys()), ("no", required - values.keys())):
        if names:
            raise RecipeError(f"{where} has {problem} {sorted(names)[0][:MAX_NAME]!r}")
    return kind(**{name: _typed(value, known[name], name) for name, value in values.items()})


def _is_required(one: Any) -> bool:
    return one.default is one.default_factory  # both are dataclasses' MISSING


def _typed(value: Any, kind: Any, name: str) -> Any:
    """The value as its annotation says, an integer for a float and a list for a tuple; else a RecipeError."""
    choices, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _typed(value, choices[0], name)
    if origin is tuple and isinstance(value, list):
        kinds = [choices[0]] * len(value) if choices[-1] is Ellipsis else choices
        if len(kinds) == len(value):
            return tuple(_typed(*pair, name) for pair in zip(value, kinds, strict=True))
    elif kind is Ingredient:
        return _dataclass_of(kind, value, name)
    elif origin is Literal and isinstance(value, str) and value in choices:
        return value
    elif kind is float and type(value) in (int, float) and abs(value) <= MAX_SEED:
        return float(value)
    elif kind in (str, int, bool) and type(value) is kind:
        return value
    what = ", ".join(choices) if origin is Literal else getattr(kind, "__name__", kind)
    raise RecipeError(f"its {name} is not what it must be: {what}")


# ---- files


def save_png(image: Image.Image, path: str | os.PathLike, recipe: Recipe) -> None:
    """Write a PNG that carries its recipe; a file that is there is replaced whole or not at all."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(CHUNK, recipe.to_json())
    chunks.add_text("parameters", recipe.parameters())
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=chunks)
    write_whole(path, stream.getvalue())


def read_recipe(path: str | os.PathLike) -> Recipe:
    """The recipe in a PNG; its pixels are not decoded.

    Raises:
        RecipeError: no such file, no PNG, no recipe in it, or one that cannot be followed.
    """
    if Path(path).exists() and not Path(path).is_file():  # at a pipe it would wait
        raise RecipeError(f"{path} cannot be read as a PNG: it is no file")
    try:
        with warnings.catch_warnings(action="error"), Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(CHUNK)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError):
        raise RecipeError(f"{path} cannot be read as a PNG, the kind of file that carries a recipe") from None
    if not isinstance(text, str):
        raise RecipeError(f"{path} carries no recipe: latentdiff did not draw it, or a program took the recipe out")
    try:
        return Recipe.from_json(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: its recipe cannot be followed: {error}") from None


def file_ingredient(path: str | os.PathLike) -> Ingredient:
    """A file by its name and the SHA-256 of its bytes."""
    return Ingredient(name=printable(Path(path).name)[:MAX_NAME] or "?", sha256=file_sha256(path))


def folder_ingredient(folder: str | os.PathLike, hub_id: str | None = None, weights: bool = True) -> Ingredient:
    """A saved pipeline or model by its Hub id or its folder's last name, and its hash, with or without that of its
    weights; or a model in a single file."""
    if os.path.isfile(folder):
        return file_ingredient(folder)
    name = hub_id or Path(folder).resolve().name
    return Ingredient(name=printable(name)[:MAX_NAME] or "?", sha256=folder_sha256(folder, weights))
