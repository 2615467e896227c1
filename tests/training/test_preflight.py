"""What `latentdiff check` finds is there, and what it does not warn of is not."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from latentdiff import cli
from latentdiff.config.train import TrainConfig
from latentdiff.training import preflight
from latentdiff.training.preflight import check
from tiny import reset_accelerate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


@pytest.fixture
def settings(tiny_pipeline_folder, tmp_path) -> dict:
    (tmp_path / "pics").mkdir()
    for i in range(6):
        shades = np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(shades).save(tmp_path / "pics" / f"{i}.png")
        (tmp_path / "pics" / f"{i}.txt").write_text("a cat")
    return {
        "pretrained_model_name_or_path": str(tiny_pipeline_folder), "unet": "pretrained", "train_batch_size": 2,
        "train_data_dir": str(tmp_path / "pics"), "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"), "max_train_steps": 10, "held_out_fraction": 0.2,
    }  # fmt: skip


def said(settings: dict, **changes) -> list[str]:
    lines = []
    check(TrainConfig(**{**settings, **changes}), say=lines.append)
    return lines


def line(lines: list[str], start: str) -> str:
    (found,) = [text for text in lines if re.match(f"(warning: )?{start}", text)]
    return found


def test_everything_is_looked_at_and_only_the_list_of_it_is_left(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "POOR_PSNR", 0.0)  # the toy VAE has random weights
    lines = said(settings)
    assert not [text for text in lines if text.startswith("warning")] and lines[-1] == "ready to train"
    numbers = re.search(r"pictures: (\d+) to train on, (\d+) held out", line(lines, "pictures")).groups()
    assert sum(map(int, numbers)) == 6
    assert "1 different ones, all within the tokenizer's 8 tokens" in line(lines, "captions")
    assert "10 steps" in line(lines, "time") and "cpu" in line(lines, "memory") and line(lines, "disk")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["pictures.jsonl"]


def test_what_is_left_out_is_named(settings, tmp_path, monkeypatch):
    """ "Ready to train" would be said of a folder whose pictures lie there unread."""
    monkeypatch.setattr(preflight, "POOR_PSNR", 0.0)
    (tmp_path / "pics" / "photo.jxl").write_bytes(b"x")
    (tmp_path / "pics" / "photo.txt").write_text("a photo")
    (tmp_path / "pics" / "lost.txt").write_text("a lost one")
    lines = said(settings, max_rejected_fraction=0.5)
    found = line(lines, "left out")
    assert found.startswith(
        "warning: left out: 2 files are not used; the first is photo.jxl: .jxl is no kind of picture"
    )
    assert lines[-1] == "it can train; 1 warning above" and "rejected.jsonl" in found


def test_inpainting_is_timed_with_its_masks(settings, monkeypatch):
    """The check would time another step than the run's, or refuse a run that trains."""
    monkeypatch.setattr(preflight, "POOR_PSNR", 0.0)
    seen = []
    forward = UNet2DConditionModel.forward
    monkeypatch.setattr(
        UNet2DConditionModel,
        "forward",
        lambda self, sample, *args: seen.append(sample.shape) or forward(self, sample, *args),
    )
    assert said(settings, task="inpaint")[-1] == "ready to train"
    assert seen == [(1, 4, 4, 4)] + [(2, 9, 4, 4)] * (preflight.STEPS_TIMED + 1)  # at first the model is tried as it is


def test_warnings_and_their_count(settings, tmp_path, monkeypatch):
    """Each would be found out after days: cut captions, small pictures, a poor VAE, a disk too small."""
    (tmp_path / "pics" / "3.txt").write_text("a cat and then a dog and then a red cat")
    Image.new("RGB", (15, 40), "red").save(tmp_path / "pics" / "4.png")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    lines = said(settings)
    cut = line(lines, "captions")
    assert "1 of 2 are cut at the tokenizer's 8 tokens" in cut and "'a cat and then a dog and then a red cat'" in cut
    assert cut.endswith("a red cat'") and "loses" in cut
    assert "1 are smaller" in line(lines, "pictures: 1 are")
    assert "1 kB free" in line(lines, "disk")
    warnings = [text for text in lines if text.startswith("warning")]
    assert len(warnings) == 4 and lines[-1] == "it can train; 4 warnings above"  # the fourth is the random VAE


@pytest.mark.parametrize("precision, has, warned", [("bf16", False, True), ("bf16", True, False), ("no", False, False)])
def test_a_precision_that_the_processor_lacks_is_named(settings, monkeypatch, precision, has, warned):
    """Else a run that was meant to be faster takes days."""
    monkeypatch.setitem(preflight.SLOW_ON_CPUS, "bf16", lambda: has)
    lines = said(settings, mixed_precision=precision)
    assert any("mixed_precision bf16: this processor has no instructions" in text for text in lines) == warned


def test_the_psnr_is_that_of_the_pictures(settings, monkeypatch):
    """A VAE that gives back grey has a PSNR that can be computed by hand."""
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: SimpleNamespace(sample=torch.zeros(len(z), 3, 16, 16)))
    for path in Path(settings["train_data_dir"]).glob("*.png"):
        Image.new("RGB", (16, 16), (255, 255, 255)).save(path)
    # An error of 1/2 everywhere: -10 log10(1/4) = 6.02 dB
    found = line(said(settings), "VAE: .* dB")
    assert found.startswith("warning: VAE: 6.0 dB PSNR on 6 of these pictures, worst 6.0")


@pytest.mark.parametrize("spoil", [lambda w: w * 1e6, lambda w: w * float("nan")], ids=["large", "nan"])
def test_a_vae_that_overflows_in_fp16_is_named(settings, tiny_pipeline_folder, tmp_path, spoil):
    """SDXL's does: pictures would be black on a GPU in fp16."""
    shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    assert "within fp16" in line(said(settings), "VAE: its largest")
    with torch.no_grad():
        vae.encoder.conv_in.weight.copy_(spoil(vae.encoder.conv_in.weight))
    vae.save_pretrained(tmp_path / "model" / "vae")
    found = line(said(settings, pretrained_model_name_or_path=str(tmp_path / "model")), "VAE: its largest")
    assert found.startswith("warning") and "keep it in fp32 or bf16" in found


@pytest.mark.parametrize("changes", [{}, {"use_ema": False}, {"lora_rank": 4}, {"train_text_encoder": True}])
def test_the_size_of_a_checkpoint_is_what_one_takes(script, settings, tmp_path, changes):
    config = TrainConfig(**{**settings, **changes, "max_train_steps": 1, "checkpointing_steps": 1,
                            "validation_prompts": (), "report_to": "none"})  # fmt: skip
    script.main(config)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    tensors = [t for file in checkpoint.rglob("*.safetensors") for t in load_file(file).values()]
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"].values()
    tensors += [t for state in optimizer for name, t in state.items() if name != "step"]
    taken = sum(t.numel() * t.element_size() for t in tensors)
    reset_accelerate()
    disk = line(said(settings, **changes), "disk")
    number, unit = re.search(r"checkpoints of ([\d.]+) (\w+)", disk).groups()
    assert float(number) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(taken, rel=0.01)


def test_the_disk_is_reckoned_by_the_steps_that_are_taken(settings):
    """Where epochs decide, a run of five steps would be refused the disk of a thousand, or the other way round."""
    changes = {"checkpoints_total_limit": None, "checkpointing_steps": 1, "held_out_fraction": 0.0}
    changes |= {"ema_sigma_rel": (0.05, 0.1), "ema_snapshot_steps": 1}
    epochs = said(settings, max_train_steps=1000, num_train_epochs=2, **changes)  # of six pictures in steps of two
    reset_accelerate()
    steps = said(settings, max_train_steps=6, **changes)
    needed = [re.search(r"(checkpoints of .* in all);", line(lines, "disk"))[1] for lines in (epochs, steps)]
    assert needed[0] == needed[1]


def test_on_the_command_line(settings, capsys, tmp_path):
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    cli.main(["check", *flags])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(("ready to train", "it can train"))
    with pytest.raises(SystemExit) as end:
        cli.main(["check", *flags, "--resolution", "17"])
    assert end.value.code == 2 and "resolution" in capsys.readouterr().err
    assert not (tmp_path / "run" / "train_config.yaml").exists()
