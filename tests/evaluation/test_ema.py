"""`latentdiff reconstruct-ema`, `sweep-ema` and `push --ema-snapshots`, after real runs at toy size."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel

from hub_server import USER
from latentdiff import LatentDiffPipeline, cli
from latentdiff.diffusion.posthoc_ema import SNAPSHOT_METADATA, SNAPSHOTS, reconstructions
from latentdiff.evaluation import ema
from latentdiff.training.ema import save_snapshot
from tests.evaluation.test_retrieval import Thumbnail, noise_artist, toy_set  # noqa: F401 - the fixture of another file
from tests.test_cli import fails

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's
TRACKED = {"ema_sigma_rel": (0.05, 0.1), "ema_snapshot_steps": 1}


@pytest.fixture
def run(train) -> Path:
    """Four steps, a third of the pictures held out, which the first width is measured on at the end."""
    return train(**TRACKED, held_out_fraction=0.3)


def network_equals(network: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    there = network.state_dict()
    return there.keys() == tensors.keys() and all(torch.equal(there[name], tensors[name]) for name in there)


def test_a_reconstructed_unet_loads_everywhere_and_is_the_pipelines(run, capsys):
    """It would be read with random weights, or be another one than `ema_sigma_rel` loads."""
    cli.main(["reconstruct-ema", str(run), "--sigma-rel", "0.08"])
    folder = run / "unet-ema-0.080"
    assert str(folder) in capsys.readouterr().out
    wanted = LatentDiffPipeline.from_pretrained(run, ema_sigma_rel=0.08).unet
    assert network_equals(UNet2DConditionModel.from_pretrained(folder), wanted.state_dict())
    assert json.loads((folder / "config.json").read_text()) == json.loads((run / "unet" / "config.json").read_text())
    drawn = ["generate", str(run), "--prompts", "a cat", "--num-inference-steps", "1"]
    cli.main([*drawn, "--guide-unet", str(folder), "--output-dir", str(run / "drawn")])

    cli.main(["reconstruct-ema", str(run), "--sigma-rel", "0.0625", "--step", "3"])
    earlier = UNet2DConditionModel.from_pretrained(run / "unet-ema-0.0625-step-3")
    assert network_equals(earlier, reconstructions(run / SNAPSHOTS, 0.0625, 3)["unet"].tensors())
    cli.main(["reconstruct-ema", str(run), "--sigma-rel", "0.2", "--output", str(run / "mine")])
    assert network_equals(
        UNet2DConditionModel.from_pretrained(run / "mine"), reconstructions(run / SNAPSHOTS, 0.2)["unet"].tensors()
    )


def test_a_text_encoder_that_was_trained_comes_with_it(train):
    """A UNet would be drawn with beside the text encoder of another average."""
    run = train(**TRACKED, train_text_encoder=True)
    cli.main(["reconstruct-ema", str(run), "--sigma-rel", "0.08", "--output", str(run / "both")])
    pipeline = LatentDiffPipeline.from_pretrained(run, ema_sigma_rel=0.08)
    assert network_equals(UNet2DConditionModel.from_pretrained(run / "both/unet"), pipeline.unet.state_dict())
    encoder = CLIPTextModel.from_pretrained(run / "both/text_encoder")
    assert network_equals(encoder, pipeline.text_encoder.state_dict())
    with safe_open(run / "both/text_encoder/model.safetensors", "pt") as file:  # as all releases read it
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    saved = LatentDiffPipeline.from_pretrained(run).text_encoder
    assert not network_equals(encoder, saved.state_dict())


def test_what_cannot_be_made_is_one_line(run, tiny_pipeline_folder, capsys):
    """A traceback, or a download that was not meant."""
    wide = ["--sigma-rel", "0.08"]
    assert "holds no EMA snapshots" in fails(capsys, "reconstruct-ema", tiny_pipeline_folder, *wide)
    assert "holds no EMA snapshots" in fails(capsys, "sweep-ema", tiny_pipeline_folder)
    assert "no such folder" in fails(capsys, "reconstruct-ema", "./nowhere", *wide)
    assert "sigma_rel: 0.4 must lie above 0" in fails(capsys, "sweep-ema", run, "--sigma-rel", "0.4")
    assert "step: 9 must lie in 1 … 4" in fails(capsys, "reconstruct-ema", run, *wide, "--step", "9")
    assert "--sigma-rel is missing" in fails(capsys, "reconstruct-ema", run)
    assert "--sigma-rel is empty" in fails(capsys, "sweep-ema", run, "--sigma-rel")
    (run / "in the way").write_text("a file")
    assert "cannot be written" in fails(capsys, "reconstruct-ema", run, *wide, "--output", run / "in the way" / "x")


def test_the_sweep_measures_what_the_run_measured(run, capsys):
    """The curve would be of other pictures, noise or weights than the run's own number."""
    cli.main(["sweep-ema", str(run), "--sigma-rel", "0.1", "0.08", "0.05"])
    shown = capsys.readouterr().out
    sweep = json.loads((run / "ema_sweep.json").read_text())
    rows = {row["sigma_rel"]: row for row in sweep["widths"]}
    assert list(rows) == [0.05, 0.08, 0.1]
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (at_the_end,) = (line["held_out_loss"] for line in logged if line["step"] == 4 and "held_out_loss" in line)
    assert rows[0.05]["held_out_loss"] == pytest.approx(at_the_end, rel=1e-5)
    assert [row["tracked"] for row in rows.values()] == [True, False, True]
    best = min(row["held_out_loss"] for row in rows.values())
    for row in rows.values():
        assert row["behind_best"] == pytest.approx(row["held_out_loss"] - best, abs=1e-9)
        assert (row["behind_best_error"] == 0) == (row["held_out_loss"] == best)
    assert (
        "| **0.05** |" in shown and "| 0.08 |" in shown and shown.strip() == (run / "ema_sweep.md").read_text().strip()
    )
    assert Image.open(run / "ema_sweep.png").width > 300
    assert sweep["conditions"] | {"step": 4, "snapshots": 8, "drawn": None} == sweep["conditions"]


def test_drawn_pictures_are_measured_once(run, monkeypatch, toy_set, capsys):  # noqa: F811
    """Hours of drawing would be done again after an interruption, or old numbers stand for other settings."""
    calls = []

    def noise(pipeline, prompts, settings):
        calls.append(next(pipeline.unet.parameters()).detach().clone())
        return [noise_artist(prompt, torch.Generator().manual_seed(i)) for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(ema.emoji, "load", lambda: toy_set)
    monkeypatch.setattr(ema.features, "load", lambda network, device: Thumbnail())
    monkeypatch.setattr(ema, "draw", noise)
    sweep = ["sweep-ema", str(run), "--count", "8", "--guidance-scale", "3"]
    cli.main([*sweep, "--sigma-rel", "0.05", "0.1"])
    assert len(calls) == 2 and not torch.equal(*calls)
    cli.main([*sweep, "--sigma-rel", "0.05", "0.08", "0.1"])
    assert len(calls) == 3  # 0.08 alone
    widths = json.loads((run / "ema_sweep.json").read_text())["widths"]
    assert all(row["pictures"]["drawn"]["count"] == 8 for row in widths)
    assert "KID x 1000" in capsys.readouterr().out
    cli.main([*sweep, "--sigma-rel", "0.05", "--seed", "1"])
    assert len(calls) == 4
    said = json.loads((run / "ema_sweep.json").read_text())["conditions"]["drawn"]
    assert (said["count"], said["seed"], said["guidance_scale"], said["network"]) == (8, 1, 3.0, "thumbnail")
    assert "count is 3" in fails(capsys, *sweep[:2], "--count", "3")


def test_nothing_to_measure_is_said(train, capsys):
    run = train(**TRACKED)
    assert "held no pictures out; give --count" in fails(capsys, "sweep-ema", run)


def test_snapshots_are_pushed_where_that_is_asked_for(run, hub, tmp_path, capsys):
    """A push would be many times as large as the model, or the choice be for this machine alone."""
    cli.main(["reconstruct-ema", str(run), "--sigma-rel", "0.08"])
    cli.main(["push", str(run), f"{USER}/plain"])
    left_out = [name for name in hub.files(f"{USER}/plain") if name.startswith((SNAPSHOTS, "unet-ema"))]
    assert not left_out and "unet/config.json" in hub.files(f"{USER}/plain")
    cli.main(["push", str(run), f"{USER}/whole", "--ema-snapshots"])
    assert len([name for name in hub.files(f"{USER}/whole") if name.startswith(SNAPSHOTS)]) == 8
    cli.main(["reconstruct-ema", f"{USER}/whole", "--sigma-rel", "0.08", "--output", str(tmp_path / "fetched")])
    fetched = UNet2DConditionModel.from_pretrained(tmp_path / "fetched")
    assert network_equals(fetched, reconstructions(run / SNAPSHOTS, 0.08)["unet"].tensors())
    shutil.rmtree(run / SNAPSHOTS)
    assert "--ema-snapshots: " in fails(capsys, "push", run, f"{USER}/whole", "--ema-snapshots")


def test_averages_of_a_magnitude_preserving_unet(train):
    """Its averages have shorter filters than it was trained with, and its class is none of diffusers'."""
    run = train(**TRACKED, unet="mp-mini", resolution=16)
    cli.main(["reconstruct-ema", str(run), "--sigma-rel", "0.08"])
    pipeline = LatentDiffPipeline.from_pretrained(run, ema_sigma_rel=0.08)
    wanted = pipeline.unet.state_dict()
    assert network_equals(type(pipeline.unet).from_pretrained(run / "unet-ema-0.080"), wanted)
    assert not network_equals(LatentDiffPipeline.from_pretrained(run).unet, wanted)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=1, output_type="pt", height=16, width=16).images
    assert torch.isfinite(image).all()
    guided = ["generate", str(run), "--prompts", "a cat", "--num-inference-steps", "1", "--height", "16"]
    guided += ["--width", "16", "--guide-unet", str(run / "unet-ema-0.080"), "--output-dir", str(run / "drawn")]
    cli.main(guided)


@pytest.mark.parametrize("network", ["../../../x", "/tmp/x", "vae", "", None, ["unet"]])
def test_a_snapshot_names_no_place(network, tiny_pipeline_folder, tmp_path, capsys):
    """A run from somewhere would write anywhere on the disk, beside what was asked for."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline_folder / "unet")
    (tmp_path / "a" / "b" / SNAPSHOTS).mkdir(parents=True)
    for step, name in ((1, "unet"), (2, network)):
        path = save_snapshot(tmp_path / "a" / "b" / SNAPSHOTS, "unet", step, 0.1, unet.state_dict(), {})
        said = {"network": name, "step": step, "sigma_rel": 0.1, "config": {}}
        save_file(unet.state_dict(), path, {SNAPSHOT_METADATA: json.dumps(said)})
    said = fails(
        capsys, "reconstruct-ema", tmp_path / "a" / "b", "--sigma-rel", "0.1", "--output", tmp_path / "a" / "o"
    )
    assert "is no EMA snapshot" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["a", "b", SNAPSHOTS, *ema_files(tmp_path)])


def ema_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.safetensors") if path.parent.name == SNAPSHOTS]
