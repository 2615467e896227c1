"""`latentdiff evaluate`: every number with what it rests on, the same after a stop and from several processes."""

# ruff: noqa: F401, F811 - the fixtures of other files

import json
import os
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from forked import Forked
from latentdiff import ConsistencyScheduler, LatentDiffPipeline, cli
from latentdiff.data import emoji
from latentdiff.data.pictures import EmojiPictures
from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.evaluation import efficientnet_lite, retrieval
from latentdiff.evaluation import evaluate as evaluation
from latentdiff.evaluation import features as feature_networks
from latentdiff.evaluation.distances import frechet_distance
from latentdiff.evaluation.evaluate import averaged_weights
from latentdiff.evaluation.features import extract_features
from latentdiff.evaluation.reference import own_questions
from latentdiff.evaluation.report import fill_card, markdown, read_numbers, rows
from latentdiff.inference.loading import load_pipeline
from latentdiff.inference.recipe import read_recipe
from latentdiff.models.latents import to_pixels
from latentdiff.utils.files import folder_sha256
from tests.diffusion.test_clip_guidance import clip_folder
from tests.evaluation.test_features import dino_folder
from tests.evaluation.test_retrieval import Thumbnail, toy_set
from tests.test_cli import fails


def run(checkpoint: Path, folder: Path, *flags, steps=2, count=8) -> dict:
    """What the command wrote as JSON."""
    always = ("--num-inference-steps", steps, "--count", count, "--batch-size", "3", "--device", "cpu")
    cli.main([str(word) for word in ("evaluate", checkpoint, *always, "--output-dir", folder, *flags)])
    return json.loads((folder / "evaluation.json").read_text())


def on_toys(monkeypatch, pictures: emoji.EmojiSet, cache: Path) -> None:
    """Toy emoji for the real ones, and a toy judge."""
    monkeypatch.setenv("LATENTDIFF_CACHE", str(cache))
    monkeypatch.setattr(emoji, "load", lambda: pictures)
    monkeypatch.setattr(feature_networks, "load", lambda name, device: Thumbnail())


@pytest.fixture(scope="module")
def evaluated(tiny_pipeline_folder, toy_set, clip_folder, tmp_path_factory):
    """One evaluation with everything in it: the checkpoint, the folder it wrote, the numbers."""
    folder = tmp_path_factory.mktemp("evaluated")
    checkpoint = folder / "run"
    shutil.copytree(tiny_pipeline_folder, checkpoint)
    (checkpoint / "README.md").write_text("---\nlicense: other\n---\n\n# A\n\n## Use\n\nSo.\n\n## Training\n\nThus.\n")
    (checkpoint / "train_config.yaml").write_text("ema_decay: 0.5\n")
    flags = ["--clip-score", clip_folder / "clip", "--guidance-scale", "3", "--guidance-interval", "0.5", "inf"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        on_toys(monkeypatch, toy_set, folder / "cache")
        found = run(checkpoint, folder / "out", *flags, "--seed", "7", "--likelihood", "--fill-card")
        held_out = int(EmojiPictures().held_out.sum())
    return checkpoint, folder / "out", found, held_out


@pytest.fixture
def evaluate(tiny_pipeline_folder, toy_set, tmp_path, monkeypatch):
    """Run the command on the tiny checkpoint, toy emoji and a toy judge, without the held-out curve."""
    on_toys(monkeypatch, toy_set, tmp_path / "cache")
    monkeypatch.setattr(evaluation, "held_out_curve", lambda *_, **__: None)
    return partial(run, tiny_pipeline_folder, tmp_path / "out")


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "pictures").iterdir())}


def test_every_number_and_what_it_rests_on(evaluated, toy_set, clip_folder):
    """A number without its conditions cannot be compared with any other."""
    checkpoint, folder, found, held_out = evaluated
    how = found["conditions"]
    assert (how["count"], how["weights"], how["latentdiff"]) == (8, "EMA of decay 0.5", "0.1.0")
    assert (how["torch"], how["network"]) == (torch.__version__, {"name": "thumbnail", "sha256": "0" * 64})
    expected = {
        "scheduler": "DDIMScheduler", "num_inference_steps": 2, "guidance_scale": 3.0, "guidance_interval": [0.5, None],
        "seed": 7, "width": 16, "height": 16, "dtype": "float32", "device": "cpu", "batch_size": 3,
    }  # fmt: skip
    assert {name: how["drawing"][name] for name in expected} == expected
    assert how["drawing"]["checkpoint"] == {"name": "run", "sha256": folder_sha256(checkpoint)}
    real = [toy_set.composite(i) for i in toy_set.indices(held_out=None)]
    digest = feature_networks.sha256_of(map(feature_networks.picture_key, real))
    assert how["reference"]["sha256"] == digest and "120 pictures" in how["reference"]["name"]

    pictures = [Image.open(path) for path in sorted((folder / "pictures").iterdir())]
    features = [extract_features(Thumbnail(), images) for images in (pictures, real)]
    assert found["drawn"]["frechet_distance"] == pytest.approx(frechet_distance(*features), rel=1e-6)
    assert (found["drawn"]["count"], found["drawn"]["reference_count"], found["floor"]["count"]) == (8, 120, 8)
    assert found["retrieval"]["floor"]["at_1"] <= 0.5 and set(found["retrieval"]) == {"drawn", "ceiling", "floor"}
    assert found["held_out"]["pictures"] == held_out == found["likelihood"]["pictures"]
    assert found["likelihood"]["nats"] > 0


def test_the_clip_is_asked_about_each_picture_and_its_caption(evaluated, toy_set, clip_folder):
    """The cosine would be that of another picture's caption, or wrong captions be right ones."""
    _, folder, found, _ = evaluated
    clip = ClipGuidance.from_pretrained(clip_folder / "clip", scale=1.0)
    paths = sorted((folder / "pictures").iterdir())
    pixels = to_pixels([Image.open(path) for path in paths])
    text = clip.embed_text([read_recipe(path).prompt for path in paths], "cpu")
    real = [toy_set.composite(toy_set.rows.index(row)) for row in retrieval.training_queries(toy_set)[:8]]
    with torch.no_grad():
        expected = {
            "drawn": clip.score(pixels, text), "real": clip.score(to_pixels(real), text),
            "shuffled": clip.score(pixels, text.roll(-1, 0)),
        }  # fmt: skip
    for name, cosines in expected.items():
        assert found["clip_score"][name] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert found["clip_score"]["drawn_error"] == pytest.approx(expected["drawn"].std().item() / 8**0.5, rel=1e-3)
    assert found["clip_score"]["clip"]["sha256"] == folder_sha256(clip_folder / "clip")


def test_the_vae_alone_is_measured(evaluated, toy_set):
    """The floor of every distance would be another's: PSNR by its definition, over the pictures that were asked for."""
    checkpoint, _, found, _ = evaluated
    vae = load_pipeline(str(checkpoint), "cpu").vae
    psnrs, decoded = [], []
    for row in retrieval.training_queries(toy_set)[:8]:
        picture = np.asarray(toy_set.composite(toy_set.rows.index(row))) / 255
        with torch.no_grad():
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() * 2 - 1
            again = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        decoded.append(again)
        psnrs.append(-10 * np.log10(np.square((again[0].permute(1, 2, 0).numpy() + 1) / 2 - picture).mean()))
    assert found["reconstruction"]["psnr"] == pytest.approx(np.mean(psnrs), rel=1e-4)
    real = extract_features(Thumbnail(), [toy_set.composite(i) for i in toy_set.indices(held_out=None)])
    expected = frechet_distance(Thumbnail().features(torch.cat(decoded)), real)
    assert found["reconstruction"]["measures"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)


def test_the_table_names_every_measure(evaluated):
    """A measure would be found and never shown, or one that was not asked for break the table."""
    _, folder, found, _ = evaluated
    shown = rows(found)
    assert shown["Fréchet distance, 8 against 120"].startswith(f"{found['drawn']['frechet_distance']:.4g} ± ")
    assert shown["recall"].startswith(f"{found['drawn']['recall']:.3f} (real pictures {found['floor']['recall']:.3f}")
    assert "guidance 3, guidance interval 0.5 to infinity, seed 7" in shown["drawn"]
    page = (folder / "evaluation.md").read_text()
    assert all(f"| {value} |" in page for value in shown.values()) and "(held-out.png)" in page
    assert min(Image.open(folder / "held-out.png").size) > 300
    less = rows(found | {"held_out": None, "retrieval": None, "clip_score": None, "likelihood": None})
    assert len(less) == len(shown) - 6
    assert "held-out" not in markdown(found | {"held_out": None, "likelihood": None})


def test_the_model_card_gets_the_numbers(evaluated):
    """Somebody who finds the model would not find what it is worth; or the rest of the card be lost."""
    checkpoint, folder, found, _ = evaluated
    for _ in range(2):
        card = (checkpoint / "README.md").read_text()
        assert card.count("## Metrics") == card.count("Fréchet distance, 8 against 120") == 1
        assert card.startswith("---\nlicense: other") and card.endswith("## Training\n\nThus.\n")
        assert card.index("So.") < card.index("## Metrics") < card.index("## Training")
        assert "![held-out](held-out.png)" in card and "weights EMA of decay 0.5" in card
        fill_card(checkpoint, folder, found)  # again
    assert read_numbers(checkpoint / "evaluation.json") == found
    assert (checkpoint / "held-out.png").read_bytes() == (folder / "held-out.png").read_bytes()


def test_what_was_stopped_goes_on(evaluate, tmp_path, monkeypatch):
    """Hours of drawing would be lost; or the numbers of a resumed evaluation be others."""
    first, before = evaluate(), drawn(tmp_path / "out")
    assert len(before) == 8 and read_recipe(tmp_path / "out" / "pictures" / sorted(before)[5]).seed == 5
    lost = sorted(before)[4]
    (tmp_path / "out" / "pictures" / lost).unlink()
    asked = []
    draw = evaluation.draw_recipes

    def counted(*words, wanted):
        asked.append(wanted)
        return draw(*words, wanted=wanted)

    monkeypatch.setattr(evaluation, "draw_recipes", counted)
    assert evaluate() == first and drawn(tmp_path / "out") == before and asked == [{4}]
    # More are added to those that are there.
    more = evaluate(count=12)
    assert asked[-1] == {8, 9, 10, 11} and more["drawn"]["count"] == 12
    assert before.items() <= drawn(tmp_path / "out").items()


def test_pictures_of_other_settings_are_not_mistaken(evaluate, tmp_path, capsys):
    """The numbers of one sampler would be quoted as another's."""
    evaluate()
    with pytest.raises(SystemExit):
        evaluate(steps=3)
    assert "is there and holds a picture of another num inference steps: --overwrite" in capsys.readouterr().err
    assert evaluate("--overwrite", steps=3)["conditions"]["drawing"]["num_inference_steps"] == 3


def test_the_average_of_the_weights_is_quoted(tiny_pipeline_folder, tmp_path):
    """Numbers of another average than was drawn with would stand in the table."""
    assert averaged_weights(tiny_pipeline_folder, None) == "as saved"
    assert averaged_weights(tiny_pipeline_folder, 0.08) == "EMA of sigma_rel 0.08, reconstructed"
    for settings, said in (
        ("max_train_steps: 7", "EMA of decay 0.999"),
        ("ema_sigma_rel: [0.05, 0.1]", "EMA of sigma_rel 0.05"),
        ("use_ema: false", "no average"),
    ):
        (tmp_path / "train_config.yaml").write_text(settings)
        assert averaged_weights(tmp_path, None) == said


def test_a_consistency_model_has_no_denoising_loss(tiny_pipeline_folder, toy_set, tmp_path, monkeypatch, capsys):
    """Its answers at strong noise are whole pictures, whose squared error would be quoted as a bad denoiser's."""
    on_toys(monkeypatch, toy_set, tmp_path / "cache")
    pipe = LatentDiffPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.scheduler = ConsistencyScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "few")
    found = run(tmp_path / "few", tmp_path / "out")
    assert found["held_out"] is None and found["conditions"]["drawing"]["scheduler"] == "ConsistencyScheduler"
    said = fails(capsys, "evaluate", tmp_path / "few", "--output-dir", tmp_path / "other", "--likelihood")
    assert "--likelihood: " in said and not (tmp_path / "other" / "pictures").exists()


def test_pictures_of_ones_own(evaluate, pictures, tmp_path):
    """Captions of another picture, or emoji's measures for what is none."""
    found = evaluate("--data", pictures)
    assert found["retrieval"] is None and found["conditions"]["reference"]["name"] == "pics, 12 pictures"
    assert found["floor"]["count"] == 6
    questions = own_questions(pictures, 8, (16, 16), tmp_path / "out")
    assert questions.held_out.held_out.sum() == 12
    for caption, own in zip(questions.captions, questions.own, strict=True):
        assert questions.held_out.name(own) == f"{caption.split()[1]}.png"
    assert len(set(questions.own)) == 8 and sorted(questions.own) != list(questions.own)
    assert questions.images[0].size == (16, 16) and len(questions.images) == 12
    recipes = [read_recipe(tmp_path / "out" / "pictures" / name) for name in drawn(tmp_path / "out")]
    assert [recipe.prompt for recipe in recipes] == list(questions.captions)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--count", "3"), "count is 3; it must be from 4 to"),
        (("--count", "100000"), "count is 100000; it must be from 4 to"),
        (("--count", "0"), "--count is 0; it must be at least 1"),
        (("--network", "resnet"), "network: 'resnet' is unknown; it may be 'efficientnet-lite0'"),
        (("--data", "nowhere"), "--data nowhere: no such folder"),
        (("--clip-score", "nowhere"), "--clip-score nowhere: no such folder"),
        (("--clip-score", "."), "--clip-score .: no CLIP can be loaded from it"),
        (("--fill-card",), "has no README.md, the card to fill"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line_and_found_before_drawing(
    flags,
    said,
    tiny_pipeline_folder,
    toy_set,
    tmp_path,
    monkeypatch,
    capsys,
):
    """Who mistypes the CLIP's folder would hear of it after hours of drawing."""
    monkeypatch.setattr(emoji, "load", lambda: toy_set)
    monkeypatch.setattr(efficientnet_lite, "load", lambda device: Thumbnail())
    monkeypatch.setattr(evaluation, "draw_recipes", lambda *_, **__: pytest.fail("it draws"))
    assert said in fails(capsys, "evaluate", tiny_pipeline_folder, "--output-dir", tmp_path / "out", *flags)


def test_two_processes_find_what_one_does(tiny_pipeline_folder, pictures, dino_folder, tmp_path, monkeypatch):
    """Each process would draw all pictures, or count its own alone; sums be taken in another order."""
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    flags = ["evaluate", tiny_pipeline_folder, "--data", pictures, "--network", dino_folder, "--count", "8"]
    flags += ["--num-inference-steps", "1", "--batch-size", "3", "--device", "cpu", "--output-dir"]
    words = [str(word) for word in flags]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "LATENTDIFF_CACHE": str(tmp_path / "2")}
    two = Forked([*launch, "-m", "latentdiff.cli", *words, tmp_path / "two"], env={**os.environ, **environment})
    (said,) = two.communicate(timeout=300)
    assert two.returncode == 0, said[-3000:]
    cli.main([*words, str(tmp_path / "one")])
    assert drawn(tmp_path / "two") == drawn(tmp_path / "one") and said.count("# pipeline") == 1
    found = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert found[0]["conditions"] == found[1]["conditions"]
    assert numbers(found[1]) == pytest.approx(numbers(found[0]), rel=1e-4)


def numbers(values) -> list[float]:
    """All of them, at any depth, in order."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return [number for value in values for number in numbers(value)]
    return [values] if isinstance(values, (int, float)) else []
