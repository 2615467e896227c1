"""The model card of a saved folder: the README.md that the Hub shows."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

PICTURES_PER_ROW = 4
_WITH_GUIDANCE_INPUT = "diffusers' `LatentConsistencyModelPipeline` draws the same pictures."
_WITHOUT_GUIDANCE_INPUT = (
    "diffusers' `LatentConsistencyModelPipeline` hands the guidance weight to the UNet, and this one takes none "
    "(`time_cond_proj_dim` is null): draw with the classes above."
)


def model_card(
    name: str,
    *,
    license: str,
    repo_id: str | None = None,
    description: str = "",
    samples: Mapping[str, str] | None = None,
    prompt: str = "a cat",
    training_command: str = "",
    sampler: str = "",
    data: Mapping[str, str] | None = None,
    metrics: Mapping[str, float | str] | None = None,
    curves: Sequence[str] = (),
    limits: Sequence[str] = (),
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    lora_of: str | None = None,
    inpaints: bool = False,
    call: Mapping[str, object] | None = None,
    draws_in_few_steps: bool = False,
    takes_guidance: bool = False,
) -> ModelCard:
    """Build the README.md of a saved folder; `.save(folder / "README.md")` writes it. What is not given has no section.

    Args:
        license: the Hub's identifier, such as "apache-2.0" or "cc-by-sa-4.0".
        repo_id: where the folder will live, for the lines that load it.
        prompt: what the lines that show its use draw.
        samples: picture file -> its prompt. This and `curves` (picture files) are paths inside the folder.
        sampler: in words, with steps and guidance: what drew the samples and what the metrics were measured with.
        data: each data set -> its licence and credit.
        metrics: name -> value; a name should say the number of pictures and the network that judges them.
        base_model: the Hub model that training started from; None from scratch.
        datasets: Hub data sets, by id.
        lora_of: the folder holds LoRA weights alone, for this model.
        inpaints: the model paints what a mask leaves open.
        call: what else is passed where a picture is drawn.
        draws_in_few_steps: it is a consistency model, or makes one of another model (LoRA).
        takes_guidance: the guidance weight is an input of its UNet.

    Raises:
        ValueError: a picture's path that is not inside the folder.
    """
    samples = dict(samples or {})
    for path in (*samples, *curves):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path}: pictures of a model card must lie in its folder, as relative paths")
    use = _usage(repo_id or "path/to/this/folder", prompt, lora_of, inpaints, call or {}, draws_in_few_steps)
    if draws_in_few_steps and not lora_of:
        use = f"{use}\n\n{_WITH_GUIDANCE_INPUT if takes_guidance else _WITHOUT_GUIDANCE_INPUT}"
    sections = {
        "Samples": _picturetable(samples),
        "Use": use,
        "Sampler": sampler,
        "Metrics": table(("measure", "value"), (metrics or {}).items()),
        "Training": _code("bash", training_command) if training_command else "",
        "Curves": "\n\n".join(f"![{PurePosixPath(path).stem}]({quote(path)})" for path in curves),
        "Data, licences and credits": table(("data", "licence and credit"), (data or {}).items()),
        "Limits": "\n".join(f"- {limit}" for limit in limits),
    }
    is_it = {"lora": lora_of, "inpainting": inpaints, "latent-consistency-model": draws_in_few_steps}
    kinds = [kind for kind, is_one in is_it.items() if is_one]
    front = ModelCardData(
        language="en",
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["latentdiff", "diffusers", "stable-diffusion", "text-to-image", *kinds, *tags],
        base_model=base_model,
        datasets=list(datasets) or None,
        widget=[{"text": prompt, "output": {"url": path}} for path, prompt in samples.items()] or None,
    )
    body = [f"# {name}", description, *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n")


def _usage(
    source: str,
    prompt: str,
    lora_of: str | None,
    inpaints: bool,
    call_with: Mapping[str, object],
    draws_in_few_steps: bool,
) -> str:
    """The three ways to load the folder, or the two to load LoRA weights, which all draw the same picture."""
    source, prompt, base = (json.dumps(text, ensure_ascii=False) for text in (source, prompt, lora_of))
    options = "".join(f", {name}={value!r}" for name, value in call_with.items())
    kind, carried, helper, call = "", source, "", f"pipe({prompt}{options}).images[0]"
    if inpaints:
        kind, carried, helper = "Inpaint", '"inpaint"', "\nfrom diffusers.utils import load_image"
        call = (
            'picture, mask = load_image("picture.png"), load_image("mask.png")  # white is painted\n'
            f"pipe({prompt}, image=picture, mask_image=mask{options}).images[0]"
        )
    ways = [
        ("With latentdiff", "latentdiff", f"LatentDiff{kind}Pipeline", ""),
        ("With diffusers alone", "diffusers", f"StableDiffusion{kind}Pipeline", ""),
        (
            "With diffusers, and the pipeline and schedulers that this folder carries",
            "diffusers",
            "DiffusionPipeline",
            f", custom_pipeline={carried}, trust_remote_code=True",
        ),
    ]
    blocks = []
    for title, package, pipeline, options in ways[:2] if lora_of else ways:
        loaded = base if lora_of else source
        # A LoRA's model has a scheduler of its own, and the LoRA the one that it was distilled for.
        scheduler = {"latentdiff": "ConsistencyScheduler", "diffusers": "LCMScheduler"}[package]
        sets_scheduler = bool(lora_of and draws_in_few_steps)
        imports = f"{pipeline}, {scheduler}" if sets_scheduler else pipeline
        load = f"from {package} import {imports}{helper}\n\npipe = {pipeline}.from_pretrained({loaded}{options})"
        load += f"\npipe.load_lora_weights({source})" if lora_of else ""
        load += f"\npipe.scheduler = {scheduler}.from_pretrained({source})" if sets_scheduler else ""
        blocks.append(f"{title}:\n\n" + _code("python", f"{load}\n{call}"))
    return "\n\n".join(blocks)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def fill_section(card: str, title: str, text: str) -> str:
    """A model card's text with what stands under a heading replaced; where there is none, it comes before training."""
    section = f"## {title}\n\n{text}\n\n"
    for pattern in (
        rf"(?ms)^## {re.escape(title)}\n.*?(?=^## |\Z)",
        r"(?m)^(?=## (?:Training|Curves|Data,|Limits))|\Z",
    ):
        if found := re.search(pattern, card):
            return (card[: found.start()].rstrip() + "\n\n" + section + card[found.end() :]).rstrip() + "\n"
    return card


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; nothing without rows."""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    rule = "|" + " --- |" * len(head)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *lines]) if lines else ""


def _cell(value: object) -> str:
    return " ".join((f"{value:.4g}" if isinstance(value, float) else str(value)).split()).replace("|", "\\|")


def _picturetable(samples: Mapping[str, str]) -> str:
    """Pictures in rows, each over its prompt."""
    items, tables = list(samples.items()), []
    for start in range(0, len(items), PICTURES_PER_ROW):
        row = items[start : start + PICTURES_PER_ROW]
        pictures = [f"![]({quote(path)})" for path, _ in row]
        tables.append(table(pictures, [[prompt for _, prompt in row]]))
    return "\n\n".join(tables)
