"""Checkpoints are whole or are not there, and the right one is gone on from."""

import json
import resource
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from latentdiff.models.unet import build_unet
from latentdiff.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
    save_weights_as_diffusers_does,
    saved_extra,
    step_of,
)
from latentdiff.training.ema import EMA
from latentdiff.utils.errors import ConfigError, RunStopped
from tiny import reset_accelerate, tiny_components

pytestmark = pytest.mark.usefixtures("fresh_accelerate")  # the numbers here are a CPU's


def make(folder: Path, step: int, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "unet").mkdir(parents=True)
    if whole:
        (path / "state.json").write_text(json.dumps({"step": step}))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Run:
    """A UNet in training, with what a checkpoint of it holds."""

    def __init__(self, ema: bool = True, unet: UNet2DConditionModel | None = None, accumulation: int = 1):
        self.accelerator = Accelerator(gradient_accumulation_steps=accumulation)
        self.unet = unet or tiny_components()["unet"]
        self.ema = EMA(self.unet, 0.9) if ema else None
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-2, fused=True)
        save_weights_as_diffusers_does(self.accelerator, self.unet, self.ema)
        self.unet, self.optimizer = self.accelerator.prepare(self.unet, self.optimizer)

    def step(self, done: int) -> None:
        for number, parameter in enumerate(self.unet.parameters()):
            generator = torch.Generator().manual_seed(1000 * done + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.unet, done)

    def weights(self) -> list[torch.Tensor]:
        own = [p.detach().clone() for p in self.unet.parameters()]
        return own + [p.clone() for p in self.ema.parameters] if self.ema else own


def test_what_is_loaded_goes_on_to_the_last_bit(tmp_path):
    """A resumed run would differ: other weights, another average, or an optimizer without its moments."""
    first = Run()
    for done in (1, 2):
        first.step(done)
    saved = save_checkpoint(first.accelerator, tmp_path, 2)
    first.step(3)

    second = Run(unet=tiny_components(seed=5)["unet"])
    assert load_checkpoint(second.accelerator, saved) == 2
    second.step(3)
    assert all(torch.equal(a, b) for a, b in zip(first.weights(), second.weights(), strict=True))


def test_a_checkpoint_holds_both_unets_as_diffusers_writes_them(tmp_path):
    """Nobody but this script could use a checkpoint; or the average would be saved as the weights."""
    run = Run()
    run.step(1)
    own, average = run.weights()[: len(run.ema.parameters)], run.ema.parameters
    saved = save_checkpoint(run.accelerator, tmp_path, 1)
    for name, wanted in (("unet", own), ("unet_ema", average)):
        loaded = UNet2DConditionModel.from_pretrained(tmp_path, subfolder=f"checkpoint-1/{name}")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run.unet.parameters(), own, strict=True))
    assert json.loads((saved / "state.json").read_text())["step"] == 1
    assert len(list(saved.rglob("*.safetensors"))) == 2  # not a third copy by accelerate


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    """After a full disk or a kill a half-written checkpoint would be resumed from."""
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, 1)
    monkeypatch.setattr(run.accelerator, "save_state", lambda folder: (Path(folder).mkdir(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(run.accelerator, tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not (tmp_path / "checkpoint-2").exists()
    monkeypatch.undo()
    assert save_checkpoint(run.accelerator, tmp_path, 2) in list_checkpoints(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("spoil", ["flip a byte", "cut it", "remove it", "spoil the state"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, caplog, spoil):
    """A run would go on from weights that a broken disk changed, or end where an older checkpoint is good."""
    run = Run()
    old, new = (save_checkpoint(run.accelerator, tmp_path, step) for step in (1, 2))
    assert resolve_checkpoint(tmp_path, "latest") == new
    victim = new / ("state.json" if spoil == "spoil the state" else "unet_ema/diffusion_pytorch_model.safetensors")
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    if spoil == "remove it":
        victim.unlink()
    else:
        victim.write_bytes(content[:-5] if spoil in ("cut it", "spoil the state") else content)
    assert resolve_checkpoint(tmp_path, "latest") == old
    assert str(new) in caplog.text and victim.name in caplog.text
    with pytest.raises(ConfigError, match=victim.name):
        resolve_checkpoint(tmp_path, "2")
    (old / "unet" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="every checkpoint is damaged.*unet/config.json"):
        resolve_checkpoint(tmp_path, "latest")


def test_plain_values_are_kept_beside(tmp_path):
    kept = {"losses": [0.1, torch.tensor(1 / 3).item()], "skipped_steps": 2}
    saved = save_checkpoint(Run(ema=False).accelerator, tmp_path, 1, extra=kept)
    assert saved_extra(saved) == kept
    assert saved_extra(save_checkpoint(Run(ema=False).accelerator, tmp_path, 2)) == {}


@pytest.mark.parametrize(("file", "share"), [("unet", 0.0), ("unet_ema", 0.5), ("optimizer", 0.9)])
def test_a_disk_that_fills_up_leaves_the_last_good_one(tmp_path, file, share):
    """A run would leave half a checkpoint, or have removed the good one before. A limit on files stands for the disk:
    writing past it fails, as on a full one."""
    run = Run()
    good = save_checkpoint(run.accelerator, tmp_path, 1, total_limit=1)
    files = {"optimizer": "optimizer.bin"}
    size = (good / files.get(file, f"{file}/diffusion_pytorch_model.safetensors")).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(RunStopped, match="checkpoint-2 could not be written .*checkpoint-1$") as stopped:
            save_checkpoint(run.accelerator, tmp_path, 2, total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(stopped.value).splitlines()) == 1
    assert names(tmp_path) == ["checkpoint-1"] and resolve_checkpoint(tmp_path, "latest").name == "checkpoint-1"


def test_an_output_folder_that_turned_read_only(tmp_path):
    run = Run(ema=False)
    save_checkpoint(run.accelerator, tmp_path, 1)
    (tmp_path / ".tmp-checkpoint-2").write_text("in the way, as a folder that cannot be written is")
    with pytest.raises(RunStopped, match="checkpoint-2 could not be written .*checkpoint-1$"):
        save_checkpoint(run.accelerator, tmp_path, 2)


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    """Half-written checkpoints of gigabytes would stay for ever."""
    for left in (".tmp-checkpoint-7", ".tmp-old-checkpoint-3"):
        (tmp_path / left).mkdir()
    save_checkpoint(Run(ema=False).accelerator, tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1"]


def test_the_newest_are_kept(tmp_path):
    """Sorted as words, checkpoint-10 would be older than checkpoint-9; or the new one would be removed."""
    run = Run(ema=False)
    for step in (8, 9, 10, 11):
        save_checkpoint(run.accelerator, tmp_path, step, total_limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    save_checkpoint(run.accelerator, tmp_path, 12)
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_new_run_in_an_old_folder_keeps_its_own_checkpoints(tmp_path):
    """Those of the earlier run have higher steps: each new checkpoint would be removed as soon as it was written."""
    for step in (100, 200):
        make(tmp_path, step)
    run = Run(ema=False)
    save_checkpoint(run.accelerator, tmp_path, 1, total_limit=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-200"]
    save_checkpoint(run.accelerator, tmp_path, 2, total_limit=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_half_written_ones_do_not_count(tmp_path):
    """`latest` would take what cannot be loaded."""
    make(tmp_path, 2)
    make(tmp_path, 4, whole=False)
    (tmp_path / ".tmp-checkpoint-6").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2]
    assert resolve_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
    with pytest.raises(ConfigError, match="resume_from_checkpoint: 'checkpoint-4'.*: checkpoint-2$"):
        resolve_checkpoint(tmp_path, "checkpoint-4")


def test_every_way_to_name_a_checkpoint(tmp_path):
    """Number, name or path: the run would go on from another one, or refuse to."""
    four, ten = make(tmp_path, 4), make(tmp_path, 10)
    assert resolve_checkpoint(tmp_path, "latest") == ten
    assert all(resolve_checkpoint(tmp_path, said) == four for said in ("4", "checkpoint-4", str(four), f"{four}/"))
    assert resolve_checkpoint(tmp_path / "elsewhere", str(ten)) == ten
    assert resolve_checkpoint(tmp_path, None) is None
    assert resolve_checkpoint(tmp_path / "elsewhere", "latest") is None


@pytest.mark.parametrize("wrong", ["checkpoint-5", "5", "/no/such/checkpoint-4", "unet", "", "last"])
def test_a_wrong_name_is_refused_and_the_right_ones_are_said(tmp_path, wrong):
    """A mistyped checkpoint would start the run afresh."""
    make(tmp_path, 4)
    with pytest.raises(ConfigError, match="resume_from_checkpoint.*checkpoint-4$") as refused:
        resolve_checkpoint(tmp_path, wrong)
    assert repr(wrong) in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_another_unet_or_a_missing_average_is_one_line(tmp_path):
    """Hundreds of tensor names, or averages that silently start at the initial weights."""
    saved = save_checkpoint(Run(ema=False).accelerator, tmp_path, 3)
    with pytest.raises(ConfigError, match="unet_ema is missing"):
        load_checkpoint(Run().accelerator, saved)
    other = build_unet("tiny", latent_channels=4, sample_size=4, cross_attention_dim=12, seed=0)
    with pytest.raises(ConfigError, match="another UNet") as refused:
        load_checkpoint(Run(ema=False, unet=other).accelerator, saved)
    assert len(str(refused.value).splitlines()) == 1


def test_a_resume_may_accumulate_otherwise(tmp_path):
    """accelerate restores its count of micro-batches; steps would then end in the middle of an accumulation."""
    first = Run(ema=False)
    with first.accelerator.accumulate(first.unet):
        first.step(1)
    saved = save_checkpoint(first.accelerator, tmp_path, 1)
    reset_accelerate()
    second = Run(ema=False, accumulation=2)
    load_checkpoint(second.accelerator, saved)
    ends = []
    for _ in range(4):
        with second.accelerator.accumulate(second.unet):
            ends.append(second.accelerator.sync_gradients)
    assert ends == [False, True, False, True]


@pytest.mark.parametrize("file", ["optimizer.bin", "unet/config.json"])
@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_damaged_file_of_an_early_version_is_one_line(tmp_path, file, content):
    """Those of before there were digests are not known to be damaged until they are read."""
    saved = save_checkpoint(Run(ema=False).accelerator, tmp_path, 1)
    (saved / "state.json").write_text("{}")
    (saved / file).write_bytes(content)
    assert resolve_checkpoint(tmp_path, "latest") == saved
    with pytest.raises(ConfigError, match="resume_from_checkpoint: .*checkpoint-1") as refused:
        load_checkpoint(Run(ema=False).accelerator, saved)
    assert str(refused.value).isprintable() and list_checkpoints(tmp_path) == [saved]


@pytest.mark.parametrize(
    "state", ["[]", "null", '{"sha256": [1]}', '{"extra": 3}', "[" * 100_000, '{"sha256": {"a": 1}}']
)
def test_a_state_that_is_none_is_one_line(tmp_path, state):
    saved = make(tmp_path, 4)
    (saved / "state.json").write_text(state)
    assert saved_extra(saved) == {}
    if "extra" not in state:
        with pytest.raises(ConfigError, match="resume_from_checkpoint: .*checkpoint-4"):
            resolve_checkpoint(tmp_path, "4")
