"""Our schedulers meet every measure of the suite; what docs/schedulers.md says of diffusers' is still so."""

import re
from pathlib import Path

import diffusers
import pytest
import torch

import scheduler_conformance
from latentdiff.diffusion.noise_schedule import PREDICTION_TYPES, TIMESTEP_SPACINGS
from latentdiff.diffusion.scheduling_ddim import DDIMScheduler
from latentdiff.diffusion.scheduling_ddpm import DDPMScheduler
from scheduler_conformance import (
    SCHEDULERS,
    ZERO_SNR,
    ancestral_moments,
    distance_from_announced,
    inversion_error,
    levels_of,
    main,
    moments_error,
    oracle_cases,
    oracle_error,
    order_cell,
    order_of_convergence,
    summary,
    wrongly_announced,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedulers.md"
FAULTS = dict(re.findall(r"### ([^\n]+)\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
OURS = pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
SPACINGS = pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)


def table() -> dict[str, list[str]]:
    """The page's table: label -> a cell for each scheduler."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]
    return {label: cells for label, *cells in rows}


# ---- ours ---


@SPACINGS
@OURS
def test_as_many_timesteps_as_asked_for_are_announced(scheduler_class, spacing):
    """Else a run has a step too many, or the network is asked about a timestep that it was not trained on."""
    assert wrongly_announced(scheduler_class, range(1, 1001), timestep_spacing=spacing) == []


def test_a_timestep_that_is_evaluated_twice_is_not_wrong():
    """Else Heun's method, whose steps look at the network twice, is accused of announcing too many."""
    assert wrongly_announced(diffusers.HeunDiscreteScheduler, [1, 2, 7, 50], timestep_spacing="trailing") == []
    assert wrongly_announced(diffusers.HeunDiscreteScheduler, [50, 61], timestep_spacing="trailing") == [61]


@SPACINGS
@OURS
def test_the_announced_timesteps_are_visited(scheduler_class, spacing):
    """Else the network is told one noise level and shown another."""
    for steps in (1, 4, 7, 30, 61, 333):
        error = distance_from_announced(scheduler_class, steps, timestep_spacing=spacing)
        # Each step of DDPM rounds the mixture of old and new noise once more.
        assert error < (1e-6 if scheduler_class is DDIMScheduler else 1e-4), steps


@SPACINGS
@OURS
def test_an_oracle_recovers_x0(scheduler_class, spacing):
    """Else the sampler itself loses the picture, however good the network: at any count of steps, dividing T or not."""
    for case in oracle_cases(spacing, counts=(1, 4, 7, 10, 30, 61)):
        for eta in (0.0, 1.0) if scheduler_class is DDIMScheduler else (0.0,):
            assert oracle_error(scheduler_class, eta=eta, **case) < 1e-5, (case, eta)


@SPACINGS
@OURS
def test_ancestral_sampling_has_the_moments_of_ddpm(scheduler_class, spacing):
    """Else DDIM with eta = 1 adds too much noise or too little, and so is not the sampler that DDPM is."""
    for steps in (7, 30):
        assert moments_error(scheduler_class, steps, 20_000, timestep_spacing=spacing) < 4


@OURS
def test_ancestral_sampling_from_zero_snr_has_the_moments_of_ddpm(scheduler_class):
    """Else the first step, where sqrt(abar) is 0, spoils what the others draw."""
    assert moments_error(scheduler_class, 50, 20_000, **ZERO_SNR) < 4


def test_the_moments_approach_those_of_the_data():
    """Else the closed form that samplers are held to is of another process: with 1000 steps DDPM draws the data."""
    mean, variance = ancestral_moments(levels_of(True), list(range(999, -1, -1)))
    assert mean == pytest.approx(scheduler_conformance.MEAN, abs=1e-3)
    assert variance == pytest.approx(scheduler_conformance.DEVIATION**2, rel=0.03)


@SPACINGS
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_inversion_and_sampling_return_to_the_start(prediction_type, spacing):
    """Else an inverted picture is drawn again as another, whatever the number of steps: the error must fall as 1/N,
    and as 1/N^2 where each step is made twice."""
    options = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    once = [inversion_error(DDIMScheduler, n, **options) for n in (10, 50, 250)]
    twice = [inversion_error(DDIMScheduler, n, repeats=2, **options) for n in (10, 50, 250)]
    assert once[0] < 0.25 and once[1] < 0.05 and once[2] < 0.01
    assert twice[0] < 0.08 and twice[1] < 0.003 and twice[2] < 0.00013
    # Five times the steps: 5 and 25 times as near, for steps that are short enough.
    assert once[1] / once[2] == pytest.approx(5, rel=0.05)
    assert twice[1] / twice[2] == pytest.approx(25, rel=0.1)


@pytest.mark.parametrize(
    ("scheduler_class", "order"),
    [
        (DDIMScheduler, 1),
        (diffusers.DDIMScheduler, 1),
        (diffusers.EulerDiscreteScheduler, 1),
        (diffusers.HeunDiscreteScheduler, 2),
        (diffusers.DPMSolverMultistepScheduler, 2),
        (diffusers.UniPCMultistepScheduler, 3),
    ],
)
def test_the_order_of_convergence_is_what_theory_says(scheduler_class, order):
    """Else a sampler converges more slowly than the method that it is called by, or the measure is off."""
    assert order_of_convergence(scheduler_class) == pytest.approx(order, abs=0.1)


# ---- diffusers' ---


@pytest.mark.parametrize("title", FAULTS)
def test_the_reproduction_of_a_fault_reproduces_it(title):
    """The page would accuse diffusers of a fault that it does not have, or no longer."""
    torch.manual_seed(0)  # the page's lines draw their noise from the global generator
    exec(FAULTS[title], {})


def test_every_fault_has_a_reproduction():
    headings = re.findall(r"^### (.+)$", PAGE.read_text(), re.MULTILINE)
    assert len(headings) > 10 and list(FAULTS) == headings


@pytest.mark.parametrize(
    ("spacing", "steps", "distance"),
    [("trailing", 7, 0.09), ("trailing", 30, 0.07), ("linspace", 4, 1.5), ("linspace", 10, 0.7)],
)
def test_diffusers_ddim_misses_the_timesteps_it_announces(spacing, steps, distance):
    """Else a measure that ours pass would pass anything, or the page is out of date."""
    assert distance_from_announced(diffusers.DDIMScheduler, steps, timestep_spacing=spacing) > distance


def test_diffusers_ddim_with_eta_one_is_not_ddpm_on_linspace_grids():
    """Else a measure that ours pass would pass anything, or the page is out of date."""
    assert moments_error(diffusers.DDIMScheduler, 10, 20_000, timestep_spacing="linspace") > 20


def test_the_table_is_of_the_installed_diffusers():
    """The numbers would be of another version: `python benchmarks/scheduler_conformance.py` writes them anew."""
    assert f"\ndiffusers {diffusers.__version__}, torch" in PAGE.read_text()


def test_the_table_says_what_is_measured():
    """The page would show a table of another code: of its rows, those that are quickly measured again."""
    rows = table()
    assert len(rows[""]) == len(SCHEDULERS)
    assert rows[""][1] == "latentdiff DDIM" and rows[""][-1] == "diffusers UniPCMultistep"
    assert all("**" not in cell for cells in rows.values() for cell in cells[:2])
    assert list(scheduler_conformance.ROWS) == [label for label in rows if label not in ("", "---")]
    for scheduler_class, order, announced in zip(
        SCHEDULERS, rows["order of convergence"], rows["announced wrongly, trailing"], strict=True
    ):
        if order != "–":
            assert float(order_cell(scheduler_class)) == pytest.approx(float(order), abs=0.02)
        assert scheduler_conformance.announced_cell(scheduler_class, "trailing") == announced


# ---- the command ---


@pytest.fixture
def one_row(monkeypatch):
    monkeypatch.setattr(scheduler_conformance, "ROWS", {"order of convergence": order_cell})


def test_the_command_prints_the_table_of_a_named_scheduler(one_row, capsys):
    """Else no scheduler but those of the page can be put through the suite."""
    main(["latentdiff.DDIMScheduler", "diffusers.DDPMScheduler"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "|  | latentdiff DDIM | diffusers DDPM |",
        "| --- | --- | --- |",
        "| order of convergence | 1.00 | – |",
    ]


@pytest.mark.parametrize("name", ["diffusers.Nothing", "diffusers.UNet2DModel"])
def test_a_name_that_is_no_scheduler_is_named(name, capsys):
    with pytest.raises(SystemExit):
        main([name])
    assert f"{name} is not a scheduler's class" in capsys.readouterr().err


def test_the_command_rewrites_the_table_and_nothing_else(one_row, tmp_path, monkeypatch):
    """Else what was written by hand is lost, or the old table stays."""
    monkeypatch.setattr(scheduler_conformance, "SCHEDULERS", [DDIMScheduler])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nan old table\n<!-- end of table -->\nafter\n")
    main([], page)
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->\ndiffusers") and text.endswith("|\n<!-- end of table -->\nafter\n")
    assert "1.00" in text and "old" not in text


def test_a_cell_tells_how_many_cases_are_wrong_and_by_how_much():
    """Else one bad case hides among good ones, or NaN behind a number."""
    inf = float("inf")
    assert summary([2e-7, 1e-6]) == "1e-06"
    assert summary([2e-7, 0.5, 0.25]) == "**2 of 3**: 0.5"
    assert summary([2e-7, 0.5, inf]) == "**2 of 3**: 0.5, no number in 1"
    assert summary([inf, inf]) == "**2 of 2**: no number in 2"


def test_nan_is_an_infinite_error():
    """Else a sampler that draws NaN passes, for no comparison with NaN is true."""
    nan = torch.full((2,), float("nan"))
    assert scheduler_conformance.max_difference(nan, nan) == float("inf")
