"""What a run encodes and when it does so again; pictures of several shapes and crops; folders as people have them."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from forked import Forked
from latentdiff import LatentDiffPipeline
from latentdiff.config.train import TrainConfig
from latentdiff.data import entry_store, latent_cache
from latentdiff.objectives import denoising
from latentdiff.training import data
from latentdiff.utils.errors import ConfigError, RunStopped
from tests.end_to_end.test_command_line import flags
from tests.end_to_end.test_train_text2img import losses, weights
from tiny import make_pictures, tiny_components

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SHORT = {"max_train_steps": 1, "validation_steps": 100, "checkpointing_steps": 100}


@pytest.fixture
def encoded(monkeypatch):
    """How many entries each network encodes, by the name of the function that does."""
    counts = {"encode_moments": 0, "encode_prompt": 0}

    def write(self, pieces):
        counts["encode_moments" if "mean" in pieces[0][1] else "encode_prompt"] += sum(len(keys) for keys, _ in pieces)
        real(self, pieces)

    real = entry_store.EntryStore._write
    monkeypatch.setattr(entry_store.EntryStore, "_write", write)

    def ask() -> tuple[int, int]:
        told = tuple(counts.values())
        counts.update(encode_moments=0, encode_prompt=0)
        return told

    return ask


@pytest.fixture
def own_pictures(tmp_path):
    """Six pictures of noise that a test may change."""
    return make_pictures(tmp_path / "own", 6)


@pytest.fixture
def once(train, own_pictures):
    """One step on these six."""
    return lambda **changes: train(**{"train_data_dir": str(own_pictures), **SHORT, **changes})


def test_what_is_no_matter_of_the_networks_encodes_nothing(once, encoded, tmp_path):
    """A sweep over learning rates would encode the data once for each."""
    once()
    assert encoded() == (6, 7)  # six pictures; six captions and the empty one
    for changes in (
        {"learning_rate": 1e-5, "lr_scheduler": "cosine"},
        {"max_train_steps": 2, "train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"output_dir": str(tmp_path / "elsewhere")},
        {"report_to": "tensorboard"},
        {"seed": 5, "caption_dropout": 0.5, "snr_gamma": 5.0, "prediction_type": "v_prediction"},
        {"held_out_fraction": 0.3},
        {"max_train_samples": 4},
    ):
        once(**changes)
        assert encoded() == (0, 0), changes


def test_one_changed_picture_and_one_changed_caption(once, encoded, own_pictures):
    once()
    encoded()
    Image.new("RGB", (30, 30), (1, 2, 3)).save(own_pictures / "3.png")
    once()
    assert encoded() == (1, 0)
    lines = (own_pictures / "metadata.jsonl").read_text()
    (own_pictures / "metadata.jsonl").write_text(lines.replace("picture 2 of", "portrait 2 of"))
    once()
    assert encoded() == (0, 1)
    Image.new("RGB", (30, 30), (4, 5, 6)).save(own_pictures / "one more.png")
    (own_pictures / "one more.txt").write_text("picture 1 of a cat")  # a caption that is there
    once()
    assert encoded() == (1, 0)
    (own_pictures / "one more.png").rename(own_pictures / "another name.png")
    (own_pictures / "one more.txt").rename(own_pictures / "another name.txt")
    once()
    assert encoded() == (0, 0)


def test_another_size_crop_or_network_encodes_what_it_must(once, encoded, tmp_path):
    """Stale latents would be trained on without a word."""
    once()
    encoded()
    for changes, wanted in (
        ({"resolution": 24}, (6, 0)),
        ({"center_crop": False}, (6, 0)),
        ({"random_flip": True}, (6, 0)),  # the mirror images; what was there is taken
        ({"crops_per_picture": 3}, (18, 0)),
    ):
        once(**changes)
        assert encoded() == wanted, changes
        once(**changes)
        assert encoded() == (0, 0), changes
    for part, wanted in (("vae", (6, 0)), ("text_encoder", (0, 7))):
        parts = tiny_components()
        parts[part] = tiny_components(seed=1)[part]
        LatentDiffPipeline(**parts).save_pretrained(tmp_path / part)
        once(pretrained_model_name_or_path=str(tmp_path / part))
        assert encoded() == wanted, part


def test_hidden_states_are_encoded_in_each_step_where_they_are_too_large(once, train, encoded, capsys, monkeypatch):
    """They would fill the disk; and the run must be the same either way."""
    kept = once(max_train_steps=3, cache_text="always")
    before = losses(kept), weights(kept)
    assert encoded() == (6, 7) and "7 captions, 3.58 kB: kept on disk" in capsys.readouterr().out
    # 7 captions of 8 tokens of width 16 against 6 latents of 4 x 4 x 4, mean and std, and a key of 16 bytes each
    assert 7 * 8 * 16 * 4 > 6 * (4 * 4 * 4 * 2 * 4 + 16)
    monkeypatch.setattr(data, "SMALL_CACHE", 0)
    anew = once(max_train_steps=3)
    assert encoded() == (0, 0) and "latents of 3.17 kB" in (said := capsys.readouterr().out)
    assert "3.58 kB: encoded in each step" in said
    assert (losses(anew), weights(anew)) == before
    monkeypatch.setattr(data, "SMALL_CACHE", 4000)
    once()
    assert "kept on disk" in capsys.readouterr().out
    once(cache_text="never")
    assert "encoded in each step" in capsys.readouterr().out


# ---- crops and buckets ----------------------------------------------------------------------------------------------


@pytest.fixture
def shapes(tmp_path) -> Path:
    """Wide, tall and square pictures, none of the first two of which may be cropped to a square."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for i, size in enumerate([(60, 40)] * 9 + [(40, 62)] * 5 + [(50, 50), (47, 50), (500, 20)]):
        shades = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(shades).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    return folder


@pytest.mark.parametrize("cached", [True, False])
def test_buckets_resume_to_the_last_bit(train, script, shapes, tmp_path, monkeypatch, cached):
    """A resumed run would go on with another bucket."""
    bucketed = {
        "train_data_dir": str(shapes), "aspect_ratio_buckets": True, "resolution": 48, "max_train_steps": 8,
        "checkpointing_steps": 3, "held_out_fraction": 0.2, "validation_steps": 4, "cache_latents": cached,
    }  # fmt: skip
    whole = train(output_dir=str(tmp_path / "whole"), **bucketed)
    train(max_train_steps=3, **{k: v for k, v in bucketed.items() if k != "max_train_steps"})
    resumed = train(resume_from_checkpoint="latest", **bucketed)
    assert weights(whole) == weights(resumed) and losses(whole) == losses(resumed)
    assert losses(whole, "held_out_loss")[8] == losses(resumed, "held_out_loss")[8] and len(losses(whole)) == 8


def test_the_shapes_that_are_trained(train, script, shapes, monkeypatch, capsys):
    """Pictures would be squeezed, cropped more than they must, or a step mix two sizes."""
    seen = []
    real = denoising.denoising_loss
    monkeypatch.setattr(
        denoising, "denoising_loss", lambda out, target: (seen.append(tuple(out.shape[2:])), real(out, target))[1]
    )
    train(train_data_dir=str(shapes), aspect_ratio_buckets=True, resolution=48, max_train_steps=20)
    # multiples of 8 with about the area of 48 x 48: 56 x 40 (1.4) is nearest to 60 x 40; a latent is 4 pixels wide
    assert "buckets: 48x48: 2, 40x56: 5, 56x40: 10\n" in capsys.readouterr().out
    assert set(seen) == {(12, 12), (14, 10), (10, 14)} and len(seen) == 20


def test_two_processes_build_one_cache_and_train_buckets(train, shapes, settings, tmp_path):
    """Each process would encode everything, wait for the other for ever, or train on another bucket."""
    bucketed = {"train_data_dir": str(shapes), "aspect_ratio_buckets": True, "resolution": 48, "adam_epsilon": 1e-4}
    one = train(output_dir=str(tmp_path / "one"), **bucketed)
    shutil.rmtree(tmp_path / "cache")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(launch_script())]
    other = ["--config", str(one / "train_config.yaml"), "--train_batch_size", "4"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    process = Forked([*command, *other, "--output_dir", tmp_path / "run"], env=environment, cwd=tmp_path)
    (said,) = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert losses(one) == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    stores = [store for store in (tmp_path / "cache").iterdir() if store.is_dir()]
    assert len(stores) == 2
    counts = [sum(len(shard_keys(path)) for path in store.glob("*.safetensors")) for store in stores]
    assert sorted(counts) == [17, 18]  # pictures; captions and the empty one: nothing twice


def launch_script() -> Path:
    return Path(__file__).resolve().parents[2] / "train_text2img.py"


def shard_keys(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["keys"]


@pytest.mark.parametrize("cached", [True, False])
def test_tars_train_what_their_pictures_in_a_folder_train(train, own_pictures, tmp_path, cached):
    """Another picture's bytes, or another's caption; and without a cache a run over tars must resume, too."""
    (tmp_path / "tars").mkdir()
    lines = [json.loads(line) for line in (own_pictures / "metadata.jsonl").read_text().splitlines()]
    for number, half in enumerate((lines[:4], lines[4:])):
        with tarfile.open(tmp_path / "tars" / f"shard-{number}.tar", "w") as tar:
            for line in half:
                (tmp_path / "caption").write_text(line["text"])
                tar.add(own_pictures / line["file_name"], line["file_name"])
                tar.add(tmp_path / "caption", line["file_name"].replace(".png", ".txt"))
    buffered = {"cache_latents": cached, "shuffle_buffer": 4, "train_batch_size": 4}
    folder = train(train_data_dir=str(own_pictures), output_dir=str(tmp_path / "folder"), **buffered)
    tars = {"train_data_dir": str(tmp_path / "tars"), **buffered}
    whole = train(output_dir=str(tmp_path / "whole"), **tars)
    assert losses(folder) == losses(whole) and weights(folder) == weights(whole)
    train(**tars, max_train_steps=2, checkpointing_steps=2)
    assert weights(train(**tars, resume_from_checkpoint="latest")) == weights(whole)
    anew = train(**{**tars, "shuffle_buffer": None}, output_dir=str(tmp_path / "another order"))
    assert losses(anew) != losses(whole)


# ---- folders and disks as people have them --------------------------------------------------------------------------


def test_paths_with_spaces_and_letters_of_any_script(train, tmp_path):
    """The run would not find its pictures, its cache or its checkpoints."""
    home = tmp_path / "Мои картинки — 我的图片 (1)"
    home.mkdir()
    make_pictures(home / "кошки и собаки", 5)
    (home / "кошки и собаки" / "3.png").rename(home / "кошки и собаки" / "три кота.png")
    (home / "кошки и собаки" / "три кота.txt").write_text("три кота", encoding="utf-8")
    paths = {
        "train_data_dir": str(home / "кошки и собаки"), "cache_dir": str(home / "le cache"),
        "output_dir": str(home / "ein Lauf"), "max_rejected_fraction": 0.2, "checkpointing_steps": 2,
    }  # fmt: skip
    whole = train(**paths, max_train_steps=3)
    before = weights(whole)
    assert weights(train(**paths, max_train_steps=3, resume_from_checkpoint="latest")) == before
    listed = [json.loads(line)["name"] for line in (whole / "pictures.jsonl").read_text().splitlines()]
    assert "три кота.png" in listed and len(listed) == 5
    (rejected,) = (whole / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert "3.png" in rejected
    pipeline = LatentDiffPipeline.from_pretrained(whole)
    assert pipeline("кот", num_inference_steps=1).images[0].size == (16, 16)


def test_an_output_folder_that_turns_read_only(script, train, settings, monkeypatch):
    """The run would end with a traceback, or go on for days without saving."""
    from latentdiff.training import checkpoint

    folder = Path(settings["output_dir"])
    train(max_train_steps=2, checkpointing_steps=2)
    before = sorted(path.name for path in folder.iterdir())

    def refused(accelerator, path, *args, **kwargs):
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(checkpoint.Accelerator, "save_state", refused)
    with pytest.raises(RunStopped, match=r"checkpoint-4 could not be written \(Read-only file system\).* checkpoint-2"):
        train(max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert (folder / "checkpoint-2" / "state.json").exists()
    assert set(before) <= {path.name for path in folder.iterdir()}
    monkeypatch.undo()
    train(max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint="latest")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_that_is_whole_is_enough(once, tmp_path):
    once()
    for path in [*(tmp_path / "cache").rglob("*"), tmp_path / "cache"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    once()


def test_a_picture_that_changes_during_the_run(once, own_pictures, monkeypatch):
    """Latents of the new picture would be kept under the name of the old one, for every later run."""
    real = latent_cache.Moments._keys

    def changes(self):
        Image.new("RGB", (20, 20)).save(own_pictures / "2.png")
        return real(self)

    monkeypatch.setattr(latent_cache.Moments, "_keys", changes)
    with pytest.raises(RunStopped, match="2.png has changed since the run started"):
        once()
    monkeypatch.undo()
    (own_pictures / "4.png").unlink()
    with pytest.raises(ConfigError, match="there is no such file"):
        once()


def test_two_runs_share_a_cache_at_the_same_time(settings, own_pictures, tmp_path):
    """One would read what the other has half written, or end because it is there already."""
    running = []
    for number in range(3):
        mine = {**settings, "train_data_dir": str(own_pictures), "output_dir": str(tmp_path / f"run {number}"), **SHORT}
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        running.append(Forked([launch_script(), *flags(mine)], env=environment, cwd=tmp_path))
    for process in running:
        (said,) = process.communicate(timeout=200)
        assert process.returncode == 0, said[-2000:]
    assert len({weights(tmp_path / f"run {number}") for number in range(3)}) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"crops_per_picture": 0}, "crops_per_picture: 0 is below 1"),
        ({"crops_per_picture": 2, "center_crop": False}, "stretched"),
        ({"cache_text": "always", "cache_latents": False}, "cache_text: 'always' contradicts"),
        ({"cache_text": "yes"}, "cache_text: 'yes' is not what it may be: 'auto', 'always', 'never'"),
        ({"train_data_dir": None, "aspect_ratio_buckets": True}, "aspect_ratio_buckets: is for one's own pictures"),
        ({"train_data_dir": None, "shuffle_buffer": 100}, "shuffle_buffer: is for one's own pictures"),
        ({"shuffle_buffer": 0}, "shuffle_buffer: 0 is below 1"),
        ({"train_data_dir": None, "crops_per_picture": 2}, "crops_per_picture: is for one's own pictures"),
    ],
)
def test_options_that_contradict_each_other(settings, wrong, said):
    with pytest.raises(ConfigError) as refused:
        TrainConfig(**{**settings, **wrong})
    assert said in str(refused.value)


@pytest.mark.parametrize(("size", "says"), [(None, None), ([4, 4], None), ([4, 8], "the model's pictures are 32x16")])
def test_the_size_of_the_pictures_where_the_unet_does_not_say_it_in_one_number(size, says, train, tmp_path):
    """`sample_size` may be left out, or be two numbers: it ended in a TypeError."""
    components = tiny_components()
    components["unet"].register_to_config(sample_size=size)
    LatentDiffPipeline(**components).save_pretrained(tmp_path / "model")
    changes = {**SHORT, "pretrained_model_name_or_path": str(tmp_path / "model")}
    if says is None:
        train(**changes)
    else:
        with pytest.raises(ConfigError, match=f"resolution: {says}, and training is on squares"):
            train(**changes)
        train(**changes, resolution=16)


def test_a_log_with_damaged_lines_is_gone_on_with(train, tmp_path):
    """One line that a full disk cut ended every resume."""
    folder = train(max_train_steps=2, checkpointing_steps=2)
    whole = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "log.jsonl").write_bytes(
        b"".join([b"\xff\n", b'{"st\n', b"[]\n", b'{"step": "x"}\n', *whole, b'{"step": 2'])
    )
    train(max_train_steps=3, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert (folder / "log.jsonl").read_bytes().splitlines(keepends=True)[: len(whole)] == whole
