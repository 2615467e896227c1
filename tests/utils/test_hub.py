"""Publishing: model cards that say what is needed, and pushes that arrive whole or fail in one line, token unseen."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard, hf_hub_download

from hub_server import TOKEN, USER
from latentdiff import LatentDiffPipeline
from latentdiff.utils.errors import ConfigError
from latentdiff.utils.hub import PushError, push_folder
from latentdiff.utils.model_card import fill_section, model_card
from stranger import stranger_draws

CODE = {"pipeline.py", "noise_schedule.py", "scheduling_ddim.py", "scheduling_ddpm.py"}
PARTS = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints"


def picture(pipe) -> torch.Tensor:
    """What `stranger_draws` draws: (1, 3, H, W)."""
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=4, generator=seed, output_type="pt").images


def assert_whole(files) -> None:
    """The repository has the code and every component, and an index that diffusers understands."""
    assert set(files) >= CODE | {"model_index.json"}
    assert {path.split("/")[0] for path in files if "/" in path} == PARTS
    assert b"StableDiffusionPipeline" in files["model_index.json"]


# ---- pushing --------------------------------------------------------------------------------------------------------


def test_push_folder_arrives_and_loads_everywhere(hub, tiny_pipeline_folder, tmp_path):
    """Else what was published is not what was trained, or loads only for people who have latentdiff."""
    repo_id = f"{USER}/tiny"
    url = push_folder(tiny_pipeline_folder, repo_id, commit_message="first")
    assert url.startswith(f"{hub.url}/{repo_id}/commit/")
    assert_whole(hub.files(repo_id))
    on_disk = {str(p.relative_to(tiny_pipeline_folder)) for p in tiny_pipeline_folder.rglob("*") if p.is_file()}
    assert set(hub.files(repo_id)) == on_disk

    expected = picture(LatentDiffPipeline.from_pretrained(tiny_pipeline_folder))
    for pipeline_class in (LatentDiffPipeline, StableDiffusionPipeline):
        pipe = pipeline_class.from_pretrained(repo_id, cache_dir=tmp_path / pipeline_class.__name__)
        assert torch.equal(picture(pipe), expected)
    assert torch.equal(stranger_draws(repo_id), expected)


def test_pipeline_pushes_itself_whole(hub, tiny_pipeline_folder, tmp_path):
    """Else a pushed pipeline lacks the code that its index and its card promise, or loses its own model card."""
    pipe = LatentDiffPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.push_to_hub(f"{USER}/one")
    assert_whole(hub.files(f"{USER}/one"))
    pushed = LatentDiffPipeline.from_pretrained(f"{USER}/one", cache_dir=tmp_path / "cache")
    assert torch.equal(picture(pushed), picture(pipe))

    model_card("Two", license="mit").save(tmp_path / "two" / "README.md")
    pipe.save_pretrained(tmp_path / "two", push_to_hub=True, private=True, commit_message="with its card")
    assert_whole(hub.files(f"{USER}/two"))
    assert b"# Two" in hub.files(f"{USER}/two")["README.md"] == (tmp_path / "two" / "README.md").read_bytes()
    assert f"{USER}/two" in hub.private


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in huggingface_hub's LFS upload
def test_push_goes_to_a_branch_and_through_lfs(hub, tmp_path):
    """Else `revision` is accepted and main is written, or large files do not arrive."""
    (tmp_path / "weights.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "note.txt").write_text("a note")
    hub.lfs_suffix = ".safetensors"
    push_folder(tmp_path, f"{USER}/branched", revision="trial", private=True)
    assert hub.files(f"{USER}/branched") == {}
    assert hub.files(f"{USER}/branched", "trial")["weights.safetensors"] == b"weights" * 1000
    assert len(hub.lfs_objects) == 1 and f"{USER}/branched" in hub.private
    note = hf_hub_download(f"{USER}/branched", "note.txt", revision="trial", token=TOKEN, cache_dir=tmp_path / "cache")
    assert Path(note).read_text() == "a note"
    (tmp_path / "note.txt").write_text("another")
    push_folder(tmp_path, f"{USER}/branched", revision="trial")  # an existing branch is written to again
    assert hub.files(f"{USER}/branched", "trial")["note.txt"] == b"another"


def failure(*args, **kwargs) -> str:
    with pytest.raises(PushError) as caught:
        push_folder(*args, **kwargs)
    assert isinstance(caught.value, ConfigError)  # the command line prints its message alone
    # neither a cause nor a context that a traceback would print
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_failed_pushes_say_why_in_one_line(hub, tmp_path, monkeypatch):
    """Else a run that took days ends in a traceback from inside a library."""
    assert "is not a folder" in failure(tmp_path / "none", f"{USER}/x")
    assert "not know this token (401)" in failure(tmp_path, f"{USER}/x", token="hf_stale")
    assert "may not write there (403)" in failure(tmp_path, "somebody-else/x")
    assert "no repository name" in failure(tmp_path, "not a name")
    monkeypatch.delenv("HF_TOKEN")
    assert "set HF_TOKEN" in failure(tmp_path, f"{USER}/x")
    assert not hub.repos


@pytest.mark.parametrize("token", ["hf_stale", "hf_two\nlines", "hf_ünicode"])
def test_the_token_is_in_no_message(hub, tmp_path, token):
    """Else a log that is shared to ask for help gives away the right to write."""
    message = failure(tmp_path, f"{USER}/x", token=token)
    assert token not in message and repr(token)[1:-1] not in message
    assert token.split("\n")[0] not in message.replace("<token>", "")


def test_a_token_that_the_server_repeats_is_masked(hub, tmp_path, monkeypatch):
    """Else a proxy's error page, which may quote the request, puts the token into the log."""
    from hub_server import _Handler

    def repeat(handler):
        handler._answer(500, {"error": f"cannot serve {handler.headers['Authorization']}"})

    monkeypatch.setattr(_Handler, "create", repeat)
    message = failure(tmp_path, f"{USER}/x")
    assert "500" in message and "<token>" in message and TOKEN not in message


def test_no_network_is_named(hub, tmp_path, monkeypatch):
    """Else offline mode, or a Hub that does not answer, looks like a fault of the folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached" in failure(tmp_path, f"{USER}/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in failure(tmp_path, f"{USER}/x")


# ---- the model card -------------------------------------------------------------------------------------------------


def full_card() -> ModelCard:
    return model_card(
        "emoji64",
        license="cc-by-sa-4.0",
        repo_id="someone/emoji64",
        description="Emoji at 64 x 64 pixels.",
        samples={"samples/a cat.png": "a cat", "samples/dog.png": "a dog | twemoji style"},
        training_command="accelerate launch train_text2img.py --seed 0",
        sampler="DDIM, 50 steps, guidance 5",
        data={"twemoji": "CC-BY 4.0, Twitter"},
        metrics={"KID, 1,000 pictures": 0.0123456, "R@1": "0.31 (ceiling 0.30, floor 0.001)"},
        curves=["curves/loss.png"],
        limits=["It draws emoji only."],
        base_model="someone/base",
        datasets=["someone/pictures"],
        tags=["emoji"],
    )


def test_model_card_front_matter(tmp_path):
    """Else the Hub files the model under no library, task or licence, and does not find its pictures."""
    full_card().save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-sa-4.0", "diffusers", "text-to-image")
    assert data.language == "en" and data.base_model == "someone/base" and data.datasets == ["someone/pictures"]
    assert {"emoji", "latentdiff"} <= set(data.tags)
    assert data.widget[0] == {"text": "a cat", "output": {"url": "samples/a cat.png"}}


def test_model_card_body():
    """Else a reader cannot load the model, see what it draws, train it again or know whose pictures it learned from."""
    text = full_card().text
    titles = ["Samples", "Use", "Sampler", "Metrics", "Training", "Curves", "Data, licences and credits", "Limits"]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == titles
    assert "![](samples/a%20cat.png)" in text and "a dog \\| twemoji style" in text
    for line in (
        'pipe = LatentDiffPipeline.from_pretrained("someone/emoji64")',
        'pipe = StableDiffusionPipeline.from_pretrained("someone/emoji64")',
        'custom_pipeline="someone/emoji64", trust_remote_code=True',
        "accelerate launch train_text2img.py --seed 0",
        "| twemoji | CC-BY 4.0, Twitter |",
        "| KID, 1,000 pictures | 0.01235 |",
        "![loss](curves/loss.png)",
        "- It draws emoji only.",
    ):
        assert line in text, line


def test_model_card_of_little_has_no_empty_sections():
    """Else a card shows headings with nothing under them."""
    text = str(model_card("bare", license="mit"))
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# bare", "## Use"]
    assert "null" not in text and "None" not in text


@pytest.mark.parametrize("takes_guidance", [True, False])
def test_the_card_of_a_consistency_model_names_the_classes_that_draw_with_it(takes_guidance):
    """diffusers' class for such models ends in a TypeError where the guidance weight is no input of the UNet."""
    text = model_card("fast", license="mit", draws_in_few_steps=True, takes_guidance=takes_guidance).text
    assert ("`LatentConsistencyModelPipeline` draws the same" in text) == takes_guidance
    assert ("this one takes none" in text) != takes_guidance
    shipped = (SHIPPED / "emoji64-lcm" / "README.md").read_text()
    assert takes_guidance or text[text.index("diffusers' `Latent") :].rstrip() in shipped
    assert "LatentConsistency" not in model_card("f", license="mit", draws_in_few_steps=True, lora_of="base").text


@pytest.mark.parametrize("path", ["/home/someone/cat.png", "../cat.png"])
def test_model_card_refuses_pictures_from_elsewhere(path):
    """Else the card points at a file that only its author has."""
    with pytest.raises(ValueError, match=Path(path).name):
        model_card("bare", license="mit", samples={path: "a cat"})


def test_a_section_is_replaced_or_put_before_training():
    """Numbers would stand twice in a card, or other sections be lost with the old ones."""
    card = "# A\n\n## Use\n\nSo.\n\n## Metrics\n\nold\n\n### more\n\nold\n\n## Training\n\nThus.\n"
    new = "# A\n\n## Use\n\nSo.\n\n## Metrics\n\na \\1\n\n## Training\n\nThus.\n"
    assert fill_section(card, "Metrics", "a \\1") == fill_section(new, "Metrics", "a \\1") == new
    without = "# A\n\n## Use\n\nSo.\n\n## Training\n\nThus.\n"
    assert fill_section(without, "Metrics", "a \\1") == new
    assert fill_section("# A\n", "Metrics", "b") == "# A\n\n## Metrics\n\nb\n"
