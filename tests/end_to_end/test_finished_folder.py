"""What a run ends with and publishes, and the data that it ends with all the same."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from hub_server import TOKEN, USER
from latentdiff import LatentDiffPipeline
from latentdiff.config.presets import run_training
from latentdiff.training import push
from latentdiff.utils.hub import PushError
from tests.data.test_pictures import hostile_folder
from tests.end_to_end.test_train_text2img import draws, losses, parameters, weights
from tiny import make_pictures, reset_accelerate, tiny_components

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


def test_saved_in_half_precision_it_loads_in_full(train, tmp_path):
    """A model of half the size would not load by default, or hold other numbers than the rounded ones."""
    full = train(output_dir=str(tmp_path / "full"), max_train_steps=1)
    half = train(output_dir=str(tmp_path / "half"), max_train_steps=1, save_dtype="fp16")
    assert len(weights(half)) < 0.6 * len(weights(full))
    assert draws(half).shape == (16, 16, 3)
    for a, b in zip(parameters(half), parameters(full), strict=True):
        assert torch.equal(a.float(), b.half().float())


def test_a_model_of_a_variant_trains_into_a_folder_of_another_run(train, tiny_pipeline_folder, tmp_path):
    """A mirror of half the size would be no model, and who loads what became of it would get what was there before."""
    base, run = tmp_path / "base", tmp_path / "run"
    LatentDiffPipeline.from_pretrained(tiny_pipeline_folder).save_pretrained(base, variant="fp16", max_shard_size="9KB")
    former = train(max_train_steps=1, lora_rank=2)
    LatentDiffPipeline(**tiny_components(seed=1)).save_pretrained(former, variant="fp16", max_shard_size="9KB")
    how = {"pretrained_model_name_or_path": str(base), "max_train_steps": 1, "checkpointing_steps": 1}
    assert train(**how, train_text_encoder=True) == former == run
    plain = train(max_train_steps=1, train_text_encoder=True, output_dir=str(tmp_path / "plain"))
    for part in ("unet", "text_encoder"):
        pairs = zip(parameters(run, part), parameters(plain, part), strict=True)
        assert all(torch.equal(*pair) for pair in pairs) and len([*(run / part).glob("*.safetensors")]) == 1
    assert not (run / "pytorch_lora_weights.safetensors").exists() and draws(run).shape == (16, 16, 3)
    for saved in (run / "text_encoder", run / "checkpoint-1" / "text_encoder"):
        assert all(name.startswith("text_model.") for name in load_file(saved / "model.safetensors"))
    assert (run / "tokenizer" / "merges.txt").is_file()


def test_pushed_is_the_model_and_not_the_run(hub, train, tiny_pipeline_folder):
    """Gigabytes of optimizer states, and paths of the machine, would be published."""
    run = train(
        push_to_hub=True,
        hub_model_id=f"{USER}/cats",
        hub_private=True,
        checkpointing_steps=2,
        validation_prompts=("a cat",),
        validation_inference_steps=1,
        report_to="tensorboard",
    )
    (run / ".tmp-checkpoint-6").mkdir()
    pushed = set(hub.files(f"{USER}/cats"))
    assert f"{USER}/cats" in hub.private
    assert {"model_index.json", "unet/config.json", "pipeline.py", "README.md", "scheduler/scheduler_config.json"} <= (
        pushed
    )
    assert "validation/step-0000004.png" in pushed
    assert not [path for path in pushed if path.startswith(("checkpoint-", ".tmp-", "logs/"))]
    weights = [*run.glob("*/*.safetensors"), *run.glob("checkpoint-*/*/*.safetensors")]
    assert len(weights) > 3
    assert {oct(path.stat().st_mode & 0o777) for path in weights} == {oct((run / "README.md").stat().st_mode & 0o777)}
    paths = [str(tiny_pipeline_folder).encode(), str(run.parent).encode()]
    for path, content in hub.files(f"{USER}/cats").items():
        assert TOKEN.encode() not in content and not any(place in content for place in paths), path
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    card = hub.files(f"{USER}/cats")["README.md"].decode()
    assert "validation/step-0000004.png" in card and f'from_pretrained("{USER}/cats")' in card


class AtOnce:
    """A thread that does its work when it is started."""

    def __init__(self, target, args, daemon):
        self._work = lambda: target(*args)

    def start(self) -> None:
        self._work()

    def is_alive(self) -> bool:
        return False

    def join(self) -> None:
        """There is nothing to wait for."""


DISTILLED_LORA = {"lora_rank": 2, "consistency": "distillation", "consistency_guidance": (4.0,)}


@pytest.mark.parametrize("trained", [{}, {"lora_rank": 2}, DISTILLED_LORA, {"train_text_encoder": True}])
def test_checkpoints_are_pushed_while_the_run_goes_on(hub, train, tmp_path, monkeypatch, capsys, trained):
    """A run would wait for the Hub, end when it cannot be reached, or push other weights than the average's."""
    real, steps = push.push_folder, []

    def sometimes(folder, name, **options):
        steps.append(options.get("commit_message"))
        if len(steps) == 1:
            raise PushError("not pushed to x: the Hub is away")
        return real(folder, name, **options)

    monkeypatch.setattr(push, "push_folder", sometimes)
    monkeypatch.setattr(push, "threading", SimpleNamespace(Thread=AtOnce))
    changes, lora_rank = {"checkpointing_steps": 1, "save_dtype": "fp16", **trained}, trained.get("lora_rank")
    plain = train(output_dir=str(tmp_path / "plain"), **changes)
    run = train(output_dir=str(tmp_path / "run"), push_to_hub=True, hub_model_id=f"{USER}/cats", **changes)
    assert steps == ["Step 1", "Step 2", "Step 3"]
    assert "step 1: not pushed to x: the Hub is away" in capsys.readouterr().out
    assert losses(run) == losses(plain) and not (run / ".tmp-push").exists()
    file = "pytorch_lora_weights.safetensors" if lora_rank else "unet/diffusion_pytorch_model.safetensors"
    assert hub.files(f"{USER}/cats")[file] == (run / file).read_bytes()
    # what stood there after step 3, the commit before the last
    *_, third, _ = [files for files in hub.commits.values() if file in files]
    average = load_file(run / "checkpoint-3" / "unet_ema" / Path(file).name)
    pushed = load(third[file])
    half = {name: tensor if lora_rank else tensor.half() for name, tensor in average.items()}
    assert all(torch.equal(pushed[name], half[name]) for name in half) and pushed.keys() == half.keys()
    assert third.get("scheduler_config.json") == (
        (run / "scheduler_config.json").read_bytes() if "consistency" in trained else None
    )
    if not lora_rank:
        for name, content in third.items():
            (tmp_path / "third" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "third" / name).write_bytes(content)
        assert draws(tmp_path / "third").shape == (16, 16, 3)
    if "train_text_encoder" in trained:
        average = load_file(run / "checkpoint-3" / "text_encoder_ema" / "model.safetensors")
        pushed = load(third["text_encoder/model.safetensors"])
        assert all(torch.equal(pushed[name], average[name].half()) for name in average)


def test_a_disk_without_links_is_no_reason_to_end_a_run(tmp_path, monkeypatch):
    """On some file systems a file has only one name; the push would end the training with an OSError."""
    (tmp_path / "weights").write_text("w")

    def refused(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(push.os, "link", refused)
    push._link(str(tmp_path / "weights"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_text() == "w"


def test_a_run_that_may_not_push_says_so_before_it_trains(hub, train, tmp_path, monkeypatch):
    """After days of training the token would turn out to be missing."""
    with pytest.raises(PushError, match="may not write there"):
        train(push_to_hub=True, hub_model_id="somebody-else/cats")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match="HF_TOKEN"):
        train(push_to_hub=True, hub_model_id=f"{USER}/cats")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_saved_settings_start_the_same_run_again(script, train, tmp_path):
    """train_config.yaml would lack something that decides the run."""
    first = train(seed=3, caption_dropout=0.5, random_flip=True)
    reset_accelerate()
    run_training(script.main, ["--config", str(first / "train_config.yaml"), "--output_dir", str(tmp_path / "second")])
    assert losses(first) == losses(tmp_path / "second") and weights(first) == weights(tmp_path / "second")


def test_a_data_set_by_name(train, settings, pictures, tmp_path):
    """`--dataset_name` with a path would train on other pictures than `--train_data_dir` with the same one."""
    by_folder = train(output_dir=str(tmp_path / "folder"))
    by_name = train(output_dir=str(tmp_path / "name"), train_data_dir=None, dataset_name=str(pictures))
    assert losses(by_folder) == losses(by_name)


def test_sixty_hostile_files_train(train, tmp_path):
    """What one file can do to a run: end it, or make its loss not a number."""
    usable, unusable = hostile_folder(tmp_path / "pics")
    run = train(train_data_dir=str(tmp_path / "pics"), max_rejected_fraction=1.0, max_train_steps=-(-len(usable) // 8))
    assert len((run / "rejected.jsonl").read_text(encoding="utf-8").splitlines()) == len(unusable)
    assert all(np.isfinite(loss) for loss in losses(run).values())


def test_one_broken_picture_does_not_end_the_run(train, tmp_path):
    """A long run would die of one bad file, or skip it in silence."""
    folder = make_pictures(tmp_path / "some", 12)
    (folder / "5.png").write_bytes(b"broken")
    run = train(train_data_dir=str(folder), max_rejected_fraction=0.1, max_train_steps=1)
    (line,) = (run / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "5.png" and list(losses(run)) == [1]


def test_emoji_from_new_weights(train):
    """The way without arguments: the embedded pictures and a UNet with new weights."""
    run = train(train_data_dir=None, unet="tiny", resolution=64, max_train_samples=1, max_train_steps=1)
    assert list(losses(run)) == [1] and list(losses(run, "held_out_loss")) == [0, 1]
    card = (run / "README.md").read_text()
    assert "license: cc-by-sa-4.0" in card and "OpenMoji" in card and "Twemoji" in card
