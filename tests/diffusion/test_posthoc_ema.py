"""EMA chosen after training: against the recurrence, a peer library, quadrature, and averages that were kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from latentdiff import LatentDiffImg2ImgPipeline, LatentDiffPipeline
from latentdiff.diffusion.posthoc_ema import (
    LARGEST_SIGMA_REL,
    SNAPSHOTS,
    coefficients,
    decay_at,
    gamma_of,
    inner_products,
    list_snapshots,
    plan,
    profile_error,
    reconstructions,
    sigma_rel_of,
    snapshot_path,
)
from latentdiff.training.ema import PowerEMA, save_snapshot
from tiny import tiny_components

WIDTHS = (0.05, 0.1)


def evenly(count: int, last: float = 1000.0) -> tuple[np.ndarray, np.ndarray]:
    """Steps and exponents of `count` snapshots of each of the usual two widths."""
    steps = np.arange(1, count + 1) / count * last
    return np.tile(steps, 2), np.repeat([gamma_of(sigma_rel) for sigma_rel in WIDTHS], count)


# ---- the mathematics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.01, 0.05, 0.1, 0.2, 0.28, LARGEST_SIGMA_REL])
def test_width_and_exponent_are_inverse(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


def test_exponents_of_the_paper():
    """Section 3.1 of the paper gives gamma = 16.97 for 5 % and 6.94 for 10 %; a plain mean has the widest profile."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    assert sigma_rel_of(0) == pytest.approx(np.sqrt(1 / 12))  # the deviation of a uniform distribution


def test_the_width_is_the_profiles_standard_deviation():
    """`sigma_rel` would not be what it is called."""
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000
    for sigma_rel in (0.03, 0.1, 0.25):
        profile = (gamma_of(sigma_rel) + 1) * tau ** gamma_of(sigma_rel)
        mean = (profile * tau).mean()
        assert np.sqrt((profile * (tau - mean) ** 2).mean()) == pytest.approx(sigma_rel, rel=1e-5)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.289, float("nan")])
def test_widths_that_no_average_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel: .*at most at 0.2887"):
        gamma_of(sigma_rel)


def test_the_recurrence_has_the_profiles_weights():
    """The reconstruction would be one of averages that nobody keeps."""
    gamma, weights = gamma_of(0.1), np.zeros(300)
    for step in range(1, 301):
        weights *= decay_at(step, gamma)
        weights[step - 1] += 1 - decay_at(step, gamma)
    np.testing.assert_allclose(weights, np.diff((np.arange(301) / 300) ** (gamma + 1)), atol=1e-12)


def test_inner_products_are_the_integrals():
    tau = (np.arange(2_000_000) + 0.5) / 2_000_000 * 900

    def profile(step, gamma):
        return np.where(tau <= step, (gamma + 1) * tau**gamma / step ** (gamma + 1.0), 0)

    for a, b in (((900, 3.0), (900, 8.0)), ((300, 17.0), (800, 7.0)), ((900, 0.0), (150, 7.0))):
        integral = (profile(*a) * profile(*b)).mean() * 900
        assert float(inner_products(*a, *b)) == pytest.approx(integral, rel=1e-4)
        assert float(inner_products(*b, *a)) == pytest.approx(float(inner_products(*a, *b)), rel=1e-12)


@pytest.mark.parametrize("count", [5, 20, 40])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.08, 0.15, 0.25])
@pytest.mark.parametrize("share", [1.0, 0.63])
def test_coefficients_are_those_of_ema_pytorch(count, sigma_rel, share):
    """Against another implementation of the paper, whose coefficients are not scaled to the sum of 1."""
    peer = pytest.importorskip("ema_pytorch.post_hoc_ema")
    steps, gammas = evenly(count)
    theirs = peer.solve_weights(
        *(torch.from_numpy(values) for values in (steps, gammas)),
        torch.tensor([1000.0 * share], dtype=torch.float64),
        torch.tensor([gamma_of(sigma_rel)], dtype=torch.float64),
    ).flatten()
    ours = coefficients(steps, gammas, 1000.0 * share, gamma_of(sigma_rel))
    assert ours.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(ours, theirs / theirs.sum(), rtol=0, atol=1e-6)


def test_coefficients_are_those_of_a_fit_to_the_profile():
    """The same least squares without any closed form: profiles at Gauss-Legendre points between the snapshots, on each
    of which they are smooth, fitted by numpy."""
    steps, gammas = evenly(8, last=1.0)
    nodes, node_weights = np.polynomial.legendre.leggauss(60)
    tau = np.concatenate([(i + (nodes + 1) / 2) / 8 for i in range(8)])
    root = np.sqrt(np.tile(node_weights / 16, 8))
    profiles = np.where(tau[:, None] < steps, (gammas + 1) * tau[:, None] ** gammas / steps ** (gammas + 1), 0)
    for sigma_rel in (0.03, 0.08, 0.2):
        gamma = gamma_of(sigma_rel)
        wanted = (gamma + 1) * tau**gamma
        fitted = np.linalg.lstsq(profiles * root[:, None], wanted * root)[0]
        ours = coefficients(steps, gammas, 1.0, gamma)
        np.testing.assert_allclose(ours, fitted / fitted.sum(), rtol=0, atol=1e-6)
        left = (profiles @ ours - wanted) * root
        expected = np.sqrt(left @ left / ((wanted * root) @ (wanted * root)))
        assert profile_error(steps, gammas, ours, 1.0, gamma) == pytest.approx(expected, rel=1e-6)


def test_a_kept_average_is_its_own_reconstruction():
    """A width that was tracked would come out as a mixture of others."""
    steps, gammas = evenly(20)
    found = coefficients(steps, gammas, steps[11], gammas[11])
    np.testing.assert_allclose(found, np.arange(40) == 11, atol=1e-8)
    assert profile_error(steps, gammas, found, steps[11], gammas[11]) < 1e-6


# ---- averages that were kept, and the same reconstructed ------------------------------------------------------------


class Run:
    """A UNet whose weights walk at random, with a drift, as those in training do; averages of it are kept."""

    def __init__(self, folder: Path, total: int, every: int, widths: tuple[float, ...] = (*WIDTHS, 0.08)):
        self.folder, self.unet = folder / SNAPSHOTS, tiny_components()["unet"]
        self.folder.mkdir(parents=True)
        self.averages = [PowerEMA(self.unet, sigma_rel) for sigma_rel in widths]
        generator, parameters = torch.Generator().manual_seed(0), list(self.unet.parameters())
        drift = [0.002 * torch.randn(p.shape, generator=generator) for p in parameters]
        for step in range(1, total + 1):
            with torch.no_grad():
                for parameter, towards in zip(parameters, drift, strict=True):
                    parameter += towards + 0.02 * torch.randn(parameter.shape, generator=generator)
            for average in self.averages:
                average.update(self.unet, step)
                if step % every == 0 and average.sigma_rel in WIDTHS:
                    with average.swapped_into(self.unet):
                        said = json.loads(self.unet.to_json_string())
                        save_snapshot(self.folder, "unet", step, average.sigma_rel, self.unet.state_dict(), said)

    def difference(self, sigma_rel: float, every: int) -> float:
        """Of the reconstruction from each `every`-th step to the average that was kept, relative to that."""
        snapshots = [s for s in list_snapshots(self.folder, "unet") if s.step % every == 0]
        ours = plan(snapshots, sigma_rel).tensors()
        (kept,) = (average for average in self.averages if average.sigma_rel == sigma_rel)
        names = [name for name, _ in self.unet.named_parameters()]
        off = sum(float((ours[n] - p).square().sum()) for n, p in zip(names, kept.parameters, strict=True))
        return (off / sum(float(p.square().sum()) for p in kept.parameters)) ** 0.5


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("walk"), total=400, every=10)


def test_reconstructed_is_near_what_was_tracked_and_nearer_with_more_snapshots(walk):
    """The claim of the paper: an average that nobody kept can be had afterwards."""
    five, ten, twenty, forty = (walk.difference(0.08, every) for every in (80, 40, 20, 10))
    assert twenty < 1e-2
    assert forty < twenty < ten < five


def test_a_tracked_width_comes_back(walk):
    """Reading, names, coefficients or the sum in float64 would be wrong."""
    assert walk.difference(0.05, every=20) < 1e-6


def test_an_earlier_step_is_the_average_of_then(walk):
    """`step` would be taken for another clock, or weights of later be mixed in."""
    ours = reconstructions(walk.folder, 0.1, step=200)["unet"].tensors()
    kept = UNet2DConditionModel.from_config(walk.unet.config)
    from safetensors.torch import load_file

    kept.load_state_dict(load_file(snapshot_path(walk.folder, "unet", 200, 0.1)))
    for name, tensor in kept.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


def test_what_cannot_be_reconstructed_is_said(walk, tmp_path):
    """A traceback, or weights that are nobody's."""
    with pytest.raises(ValueError, match="holds no EMA snapshots: a run with --ema_sigma_rel"):
        list_snapshots(tmp_path)
    with pytest.raises(ValueError, match="holds no EMA snapshots of the text_encoder"):
        list_snapshots(walk.folder, "text_encoder")
    for step in (401, 9, 0):
        with pytest.raises(ValueError, match=rf"step: {step} must lie in 10 … 400"):
            reconstructions(walk.folder, 0.08, step)
    with pytest.raises(ValueError, match="sigma_rel: 0.5"):
        reconstructions(walk.folder, 0.5)

    mixed = tmp_path / "mixed"
    shutil.copytree(walk.folder, mixed)
    other = UNet2DConditionModel.from_config(walk.unet.config, block_out_channels=(4, 8))
    save_snapshot(mixed, "unet", 390, 0.05, other.state_dict(), {})
    with pytest.raises(ValueError, match="step-0000390.*is of another network than"):
        reconstructions(mixed, 0.08)["unet"].tensors()
    cut = snapshot_path(mixed, "unet", 390, 0.05)
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-0000390.*damaged"):
        reconstructions(mixed, 0.08)


# ---- where a pipeline is loaded -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(walk, tmp_path_factory) -> Path:
    """A pipeline with the snapshots of its UNet's training: not to be written to."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    LatentDiffPipeline(**tiny_components() | {"unet": walk.unet}).save_pretrained(folder)
    shutil.copytree(walk.folder, folder / SNAPSHOTS)
    return folder


def equal(network: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    there = network.state_dict()
    return all(torch.equal(there[name], tensor.to(there[name].dtype)) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", [LatentDiffPipeline, LatentDiffImg2ImgPipeline])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pipeline_is_loaded_with_the_width_asked_for(saved, kind, dtype):
    """The option would be ignored, or the UNet be in another precision than the rest."""
    wanted = reconstructions(saved / SNAPSHOTS, 0.07, 350)["unet"].tensors()
    pipeline = kind.from_pretrained(saved, ema_sigma_rel=0.07, ema_step=350, dtype=dtype)
    assert {p.dtype for p in pipeline.unet.parameters()} == {dtype}
    assert equal(pipeline.unet, wanted)
    as_saved = kind.from_pretrained(saved, dtype=dtype)
    assert not equal(as_saved.unet, wanted)
    as_saved.load_ema(0.07, 350)
    assert equal(as_saved.unet, wanted)


def test_a_width_that_the_snapshots_hardly_reach_is_loaded_with_a_warning(saved, caplog):
    """Half of an average would pass for one."""
    with caplog.at_level("WARNING"):
        LatentDiffPipeline.from_pretrained(saved, ema_sigma_rel=0.08)
        assert not caplog.text
        LatentDiffPipeline.from_pretrained(saved, ema_sigma_rel=0.002)
    assert "ema_sigma_rel=0.002" in caplog.text and "% of its profile is missed" in caplog.text


def test_where_an_average_cannot_be_had_it_is_said(saved, tiny_pipeline_folder, tmp_path):
    """The saved weights would be drawn with in its place."""
    with pytest.raises(ValueError, match="holds no EMA snapshots"):
        LatentDiffPipeline.from_pretrained(tiny_pipeline_folder, ema_sigma_rel=0.08)
    with pytest.raises(ValueError, match="ema_step: has no effect"):
        LatentDiffPipeline.from_pretrained(saved, ema_step=100)
    with pytest.raises(ValueError, match="unet and ema_sigma_rel: give one"):
        LatentDiffPipeline.from_pretrained(saved, ema_sigma_rel=0.08, unet=tiny_components()["unet"])
    other = UNet2DConditionModel.from_config(tiny_components()["unet"].config, block_out_channels=(4, 8))
    LatentDiffPipeline(**tiny_components() | {"unet": other}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="of another unet than it holds"):
        LatentDiffPipeline.from_pretrained(tmp_path / "other").load_ema(0.08, source=saved)


def test_a_copy_takes_the_snapshots_along_where_that_is_asked_for(saved, tmp_path):
    """A copy would be many times as large, or the choice be lost with it."""
    pipeline = LatentDiffPipeline.from_pretrained(saved)
    pipeline.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / SNAPSHOTS).exists()
    pipeline.save_pretrained(tmp_path / "whole", ema_snapshots=True)
    wanted = LatentDiffPipeline.from_pretrained(saved, ema_sigma_rel=0.08).unet.state_dict()
    assert equal(LatentDiffPipeline.from_pretrained(tmp_path / "whole", ema_sigma_rel=0.08).unet, wanted)


def test_from_the_hub_snapshots_come_where_they_are_asked_for_alone(saved, hub, tmp_path):
    """Everybody who loads the model would fetch gigabytes that they do not use; or nobody could."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("tester/averages")
    api.upload_folder(repo_id="tester/averages", folder_path=saved)
    plain = LatentDiffPipeline.from_pretrained("tester/averages", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("unet-sigma_rel-*"))
    wanted = LatentDiffPipeline.from_pretrained(saved, ema_sigma_rel=0.08).unet.state_dict()
    assert not equal(plain.unet, wanted)
    chosen = LatentDiffPipeline.from_pretrained("tester/averages", ema_sigma_rel=0.08, cache_dir=tmp_path)
    assert equal(chosen.unet, wanted)
