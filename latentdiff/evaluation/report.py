"""An evaluation's numbers as rows of a table: for the terminal, for a file, and for the model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.errors import ConfigError
from ..utils.files import write_whole
from ..utils.model_card import fill_section, table

NUMBERS, TABLE, CURVE = "evaluation.json", "evaluation.md", "held-out.png"


def rows(values: Mapping[str, Any]) -> dict[str, str]:
    """Name -> value of every measure, and what it was measured with.

    Args:
        values: an `evaluation.Evaluation` as a dictionary, as its JSON holds it.
    """
    found = _picture_rows(values)
    if recalls := values["retrieval"]:
        for key, name in (("at_1", "R@1"), ("at_10", "R@10")):
            drawn, ceiling, floor = (f"{recalls[of][key]:.3f}" for of in ("drawn", "ceiling", "floor"))
            found[f"prompt retrieval {name}"] = (
                f"{drawn} (the emoji in another style {ceiling}, wrong captions {floor})"
            )
    if clip := values["clip_score"]:
        found[f"cosine of picture and caption, by the CLIP {_ingredient(clip['clip'])}"] = (
            f"{_with_error(clip['drawn'], clip['drawn_error'])} "
            f"(real pictures {clip['real']:.4g}, wrong captions {clip['shuffled']:.4g})"
        )
    found["PSNR of the VAE"] = f"{values['reconstruction']['psnr']:.2f} dB"
    if held_out := values["held_out"]:
        of = f"{held_out['pictures']} held-out pictures"
        found[f"denoising loss ({held_out['prediction_type']}) of {of}"] = f"{held_out['loss']:.4g}"
        low, high = held_out["over_log_snr"][0]["low"], held_out["over_log_snr"][-1]["high"]
        found[f"error of the noise at log-SNR {low:g} … {high:g}, {of}"] = _with_error(
            held_out["epsilon"], held_out["epsilon_error"]
        )
    if bound := values["likelihood"]:
        found[f"bound on -log p, {bound['pictures']} held-out pictures"] = (
            f"{_with_error(bound['nats'], bound['standard_error'])} nats, "
            f"{bound['bits_per_dimension']:.4g} bits per dimension of the latents"
        )
    return found | _conditions(values["conditions"])


def _picture_rows(values: Mapping[str, Any]) -> dict[str, str]:
    drawn, floor, vae = values["drawn"], values["floor"], values["reconstruction"]["measures"]
    found = {}
    for name, key, factor in (
        ("Fréchet distance", "frechet_distance", 1),
        ("kernel distance × 1000", "kernel_distance", 1000),
    ):
        for what, measures in (("", drawn), (" of real pictures", floor), (" of real pictures through the VAE", vae)):
            against = f"{measures['count']} against {measures['reference_count']}"
            value, error = (factor * measures[entry] for entry in (key, f"{key}_error"))
            found[f"{name}{what}, {against}"] = _with_error(value, error)
    for key in ("precision", "recall"):
        found[key] = f"{drawn[key]:.3f} (real pictures {floor[key]:.3f}, through the VAE {vae[key]:.3f})"
    return found


def _conditions(conditions: Mapping[str, Any]) -> dict[str, str]:
    how = conditions["drawing"]
    shown = [f"{conditions['count']} pictures", f"{how['scheduler']} with {how['num_inference_steps']} steps"]
    shown.append(f"guidance {how['guidance_scale']:g}")
    for name in ("guidance_interval", "guidance_rescale", "eta", "timestep_spacing", "karras_sigmas", "clip_guidance"):
        if how.get(name):
            shown.append(f"{name.replace('_', ' ')} {_plain(how[name])}")
    shown += [f"{name.replace('_', ' ')} {_ingredient(how[name])}" for name in ("guide_unet", "clip") if name in how]
    shown += [f"seed {how['seed']}", f"{how['width']}x{how['height']}", f"{how['dtype']} on {how['device']}"]
    return {
        "drawn": ", ".join(shown),
        "checkpoint": f"{_ingredient(how['checkpoint'])}, weights {conditions['weights']}",
        "judge": _ingredient(conditions["network"]),
        "real pictures": _ingredient(conditions["reference"]),
        "versions": ", ".join(f"{name} {conditions[name]}" for name in ("latentdiff", "torch", "diffusers")),
    }


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join("infinity" if end is None else f"{end:g}" for end in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ingredient(ingredient: Mapping[str, str]) -> str:
    return f"{ingredient['name']} (SHA-256 {ingredient['sha256'][:12]})"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def markdown(values: Mapping[str, Any]) -> str:
    """A page with the table and, where there is one, the held-out curve."""
    curve = f"\n![Error over noise levels]({CURVE})\n" if values["held_out"] else ""
    title = values["conditions"]["drawing"]["checkpoint"]["name"]
    return f"# {title}\n\n{table(('measure', 'value'), rows(values).items())}\n{curve}"


def read_numbers(path: Path) -> dict[str, Any]:
    """What an evaluation wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def fill_card(checkpoint: Path, evaluated: Path, values: Mapping[str, Any]) -> None:
    """Put the numbers and the curve into a checkpoint's folder, and into the model card that is there.

    Raises:
        ConfigError: it cannot be written.
    """
    card = checkpoint / "README.md"
    text = fill_section(card.read_text(encoding="utf-8"), "Metrics", table(("measure", "value"), rows(values).items()))
    try:
        for name in (NUMBERS, CURVE) if values["held_out"] else (NUMBERS,):
            shutil.copyfile(evaluated / name, checkpoint / name)
        if values["held_out"]:
            text = fill_section(text, "Error over noise levels", f"![held-out]({CURVE})")
        write_whole(card, text.encode())
    except OSError as error:
        raise ConfigError(f"{card} cannot be written: {error.strerror or error}") from None
