"""The optimizers of the libraries take the settings they are given, and those they have not are refused."""

import sys

import pytest
import torch

from latentdiff.config.presets import PRESETS, parse_train_config
from latentdiff.config.train import TrainConfig
from latentdiff.training.optimizers import check_same_optimizer, make_optimizer, state_bytes
from latentdiff.utils.errors import ConfigError

PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "prodigy")


def config(optimizer: str, **changes) -> TrainConfig:
    if optimizer in PACKAGES:
        pytest.importorskip(PACKAGES[optimizer])
    rate = {"learning_rate": 1.0} if optimizer == "prodigy" else {"learning_rate": 0.01}
    return TrainConfig(optimizer=optimizer, **rate | changes)


def network() -> torch.nn.Module:
    """A convolution, a matrix and vectors, most of them large enough for 8 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(32, 40, 3), torch.nn.Flatten(), torch.nn.Linear(360, 24))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 32, 5, 5, generator=generator)
    return (model(inputs) - inputs.mean(dim=(1, 2, 3), keepdim=True).flatten(1)).square().mean()


def step(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> float:
    loss = loss_of(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_and_leaves_alone_what_is_frozen(name):
    model = network()
    model[0].bias.requires_grad_(False)
    before = model[0].bias.detach().clone()
    optimizer = make_optimizer(config(name), model)
    losses = [step(optimizer, model) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(model[0].bias, before)


def test_the_first_step_of_adafactor_in_closed_form():
    """`learning_rate` would be another measure than AdamW's: a share of each weight's size, or decay by itself.

    At t = 1 the second moments are the gradient's own: of a vector the step is the learning rate by sign (algorithm 4
    of arXiv 1804.04235 with alpha fixed), of a matrix G / sqrt(R C / sum(R)) of row and column sums (algorithm 2).
    """
    model = network()
    loss_of(model).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(config("adafactor", adam_weight_decay=0.1), model)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        gradient = parameter.grad
        if gradient.ndim == 1:
            update = gradient.sign()
        else:
            rows, columns = (gradient.square().sum(dim, keepdim=True) for dim in (-1, -2))
            update = gradient / (rows * columns / rows.sum(-2, keepdim=True)).sqrt()
        update = update / update.square().mean().sqrt().clamp(min=1)
        torch.testing.assert_close(parameter, old - 0.01 * 0.1 * old - 0.01 * update, rtol=1e-4, atol=1e-6)


def test_eight_bits_take_nearly_the_steps_of_adamw():
    """The moments would be kept in 32 bits, or the decays or epsilon not be those of the settings."""
    settings = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_weight_decay": 0.1, "adam_epsilon": 1e-6}
    whole, eight, start = network(), network(), network()
    one, other = (
        make_optimizer(config("adamw", **settings), whole),
        make_optimizer(config("adamw_8bit", **settings), eight),
    )
    for _ in range(5):
        step(one, whole), step(other, eight)
    for a, b, old in zip(whole.parameters(), eight.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() < 0.1 * (a - old).norm()
    assert not torch.equal(whole[0].weight, eight[0].weight)


def test_prodigy_finds_its_rate_from_any_gradient():
    """Its estimate would stay where it starts; it does not depend on the loss's scale."""
    rates = []
    for scale in (1e-3, 1e3):
        model = network()
        optimizer = make_optimizer(config("prodigy", adam_epsilon=1e-12), model)
        for _ in range(20):
            optimizer.zero_grad()
            (scale * loss_of(model)).backward()
            optimizer.step()
        rates.append(optimizer.param_groups[0]["d"])
    assert rates[0] > 10 * 1e-6 and rates[0] == pytest.approx(rates[1], rel=1e-2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_saved_goes_on_to_the_last_bit(name, tmp_path):
    """A resumed run would start without moments, with rounded ones, or with another estimate of the rate."""
    whole, resumed = network(), network()
    one, other = make_optimizer(config(name), whole), make_optimizer(config(name), resumed)
    for _ in range(3):
        step(one, whole)
    torch.save(one.state_dict(), tmp_path / "optimizer.bin")
    resumed.load_state_dict(whole.state_dict())
    other.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True))
    assert [step(one, whole) for _ in range(3)] == [step(other, resumed) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_size_of_its_state_is_what_it_keeps(name):
    """`latentdiff check` would say that a disk is large enough when it is not."""
    model = network()
    optimizer = make_optimizer(config(name), model)
    step(optimizer, model)

    def tensors(value):
        if isinstance(value, dict):
            return [t for key, item in value.items() if key not in ("step", "RMS") for t in tensors(item)]
        return [value] if isinstance(value, torch.Tensor) else []

    kept = sum(t.numel() * t.element_size() for t in tensors(optimizer.state_dict()["state"]))
    assert state_bytes(name, list(model.parameters())) == kept


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_is_named(name, monkeypatch):
    """A traceback from within, after hours of encoding."""
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    rate = 1.0 if name == "prodigy" else 1e-4
    with pytest.raises(ConfigError, match=f"optimizer: '{name}' needs .*: pip install {PACKAGES[name]}$"):
        make_optimizer(TrainConfig(optimizer=name, learning_rate=rate), network())


@pytest.mark.parametrize("changed", [{"adam_beta1": 0.8}, {"adam_beta2": 0.999}, {"adam_epsilon": 1e-10}])
def test_settings_that_adafactor_has_not_are_refused(changed):
    (name,) = changed
    with pytest.raises(ConfigError, match=f"{name}: .*adafactor"):
        TrainConfig(optimizer="adafactor", **changed)


def test_presets_go_with_every_optimizer(tmp_path):
    """Adam's values of a preset would be refused although nobody gave them, or a person's be taken for a preset's."""
    (tmp_path / "c.yaml").write_text("optimizer: adafactor\n")
    for preset in PRESETS:
        for said in (["--optimizer", "adafactor"], ["--optimizer=adafactor"], ["--config", str(tmp_path / "c.yaml")]):
            chosen = parse_train_config(["--preset", preset, *said])
            assert (chosen.optimizer, chosen.adam_epsilon) == ("adafactor", TrainConfig.adam_epsilon)
            with pytest.raises(ConfigError, match="adam_beta2"):
                parse_train_config(["--preset", preset, *said, "--adam_beta2", "0.5"])
        prodigy = ["--preset", preset, "--optimizer", "prodigy"]
        assert parse_train_config(prodigy).learning_rate == 1
        with pytest.raises(ConfigError, match="learning_rate: 0.0001 .*prodigy.* near 1"):
            parse_train_config([*prodigy, "--learning_rate", "1e-4"])
    with pytest.raises(ConfigError, match="optimizer: 'sgd'.*'adafactor'"):
        parse_train_config(["--optimizer", "sgd"])


def test_another_optimizers_checkpoint_is_refused():
    """Its state would be taken for moments that it does not hold, or end the run in a traceback."""
    settings = TrainConfig(optimizer="adafactor")
    check_same_optimizer(settings, {})
    check_same_optimizer(settings, {"optimizer": "adafactor"})
    with pytest.raises(ConfigError, match="optimizer: 'adafactor' cannot go on from a checkpoint of 'adamw'"):
        check_same_optimizer(settings, {"optimizer": "adamw"})
