"""The shipped checkpoint is put together from a finished run."""

import json
import shutil

import pytest
from PIL import Image

from latentdiff.config.presets import PRESETS
from latentdiff.config.train import TrainConfig
from latentdiff.emoji64 import publish
from latentdiff.emoji64.publish import PublishConfig, main
from latentdiff.utils.errors import ConfigError


@pytest.fixture
def run(tiny_pipeline_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_pipeline_folder, folder)
    TrainConfig(**PRESETS["emoji64"], mixed_precision="bf16", train_batch_size=8, use_ema=False).save(
        folder / "train_config.yaml"
    )
    lines = [{"step": 0, "held_out_loss": 1.0}]
    lines += [{"step": step, "loss": 1 / step, "pictures_per_second": 4.0} for step in (50, 100)]
    lines += [{"step": 100, "held_out_loss": 0.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "retrieval.json").write_text(json.dumps({"count": 500, "drawn": {"r_at_1": 0.25, "r_at_10": 0.5}}))
    (folder / "checkpoint-100").mkdir()
    return folder


def test_folder_and_card(run, tmp_path, capsys):
    """The card would give another time, command or number than the run's, or the folder would not load."""
    from diffusers import StableDiffusionPipeline

    output = tmp_path / "published"
    main(PublishConfig(run=str(run), output_dir=str(output), machine="a test"))
    card = (output / "README.md").read_text()
    # 100 steps of 8 pictures at 4 a second are 200 seconds.
    assert "100 optimizer steps (800 samples) in 3 minutes on a test" in card
    assert "accelerate launch train_text2img.py --train_batch_size 8 --no-use_ema --mixed_precision bf16" in card
    assert "r_at_1 0.250, r_at_10 0.500" in card
    assert "CC-BY 4.0" in card and "CC BY-SA 4.0" in card and "cc-by-sa-4.0" in card
    assert (output / "samples.png").exists() and (output / "curves.png").exists()
    assert (output / "log.jsonl").exists() and (output / "retrieval.json").exists()
    assert not (output / "checkpoint-100").exists()
    assert StableDiffusionPipeline.from_pretrained(output).unet is not None


def test_an_evaluation_is_in_the_card(run, tmp_path, monkeypatch):
    """What `latentdiff evaluate` found of a run would be lost when it is published."""
    monkeypatch.setattr(publish, "rows", lambda values: {f"distance of {values['count']}": "1.5 ± 0.1"})
    (run / "evaluation.json").write_text(json.dumps({"count": 500}))
    Image.new("RGB", (8, 8)).save(run / "held-out.png")
    main(PublishConfig(run=str(run), output_dir=str(tmp_path / "published"), machine="a test"))
    card = (tmp_path / "published" / "README.md").read_text()
    assert "| distance of 500 | 1.5 ± 0.1 |" in card and "(held-out.png)" in card and "r_at_1 0.250" in card
    assert {"evaluation.json", "held-out.png"} <= {path.name for path in (tmp_path / "published").iterdir()}


def test_an_inpainting_run(run, tmp_path):
    """It would be published as what draws from words, without the numbers that it is there for."""
    settings = {**PRESETS["finetune"], "task": "inpaint", "pretrained_model_name_or_path": "/home/me/emoji64"}
    TrainConfig(**settings).save(run / "train_config.yaml")
    published = PublishConfig(run=str(run), output_dir=str(tmp_path / "published"), machine="a test", note="A note.")
    with pytest.raises(ConfigError, match="has no inpainting.png"):
        main(published)
    (run / "inpainting.json").write_text(json.dumps({"count": 100, "trained": {"inside": 0.125, "seam": 0.5}}))
    Image.new("RGB", (8, 8)).save(run / "inpainting.png")
    (run / "old.py").write_text("")
    main(published)
    card = (tmp_path / "published" / "README.md").read_text()
    assert "# published" in card and "- inpainting" in card and "mask_image=mask" in card and "A note." in card
    assert "trained on random masks from the weights of emoji64 for 100 optimizer steps (400 samples)" in card
    assert "| inpainting: trained | inside 0.125, seam 0.500 |" in card and "(inpainting.png)" in card
    assert "--preset finetune --task inpaint" in card and "/home" not in card
    files = {path.name for path in (tmp_path / "published").iterdir()}
    assert files >= {"inpainting.json", "inpainting.png", "curves.png"} and not any(
        name.endswith(".py") for name in files
    )


def test_unfinished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no finished model"):
        main(PublishConfig(run=str(tmp_path), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_distilled_run_is_described_as_one(run, tmp_path):
    """Else its card says that it was trained from scratch, and draws with fifty steps."""
    distilled = {**PRESETS["distill"], "pretrained_model_name_or_path": "runs/v", "consistency_teacher": "runs/teacher"}
    TrainConfig(**distilled).save(run / "train_config.yaml")
    (run / "log.jsonl").write_text('{"step": 50, "loss": 1.5, "pictures_per_second": 4.0}\n')
    main(PublishConfig(run=str(run), output_dir=str(tmp_path / "published"), machine="a test"))
    card = (tmp_path / "published" / "README.md").read_text()
    assert "a latent consistency model distilled from emoji64 for 50 optimizer steps" in card
    assert "num_inference_steps=4, guidance_scale=4.0" in card and "latent-consistency-model" in card
    command = (
        "train_text2img.py --preset distill --pretrained_model_name_or_path runs/v --consistency_teacher runs/teacher"
    )
    assert command in card
