"""The variational bound against Gaussian data, whose likelihood and whose every term are known in closed form."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from latentdiff import DDIMScheduler, DDPMScheduler, LatentDiffPipeline
from latentdiff.config.commands import Likelihood
from latentdiff.data import emoji
from latentdiff.diffusion.losses import training_target
from latentdiff.diffusion.noise_schedule import add_noise
from latentdiff.evaluation import bound as bound_terms
from latentdiff.evaluation import likelihood
from latentdiff.evaluation.bound import Bound
from latentdiff.models.latents import encode_moments, to_pixels
from latentdiff.utils.errors import ConfigError
from tiny import tiny_components

SHAPE = (4, 8, 8)
DIMENSIONS = 256
EMOJI64 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.02}
SCHEDULES = {
    "emoji64": EMOJI64,
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {**EMOJI64, "rescale_betas_zero_snr": True},
}


def schedule(**settings) -> DDPMScheduler:
    return DDPMScheduler(**{**EMOJI64, "clip_sample": False, **settings})


class GaussianData:
    """x_0 ~ N(mean, Q diag(variances) Q'), with everything that can be known of it."""

    def __init__(self, deviations, mean=0.3):
        generator = torch.Generator().manual_seed(0)
        square = torch.randn(DIMENSIONS, DIMENSIONS, generator=generator, dtype=torch.float64)
        self.q = torch.linalg.qr(square)[0]
        self.variances = torch.as_tensor(deviations, dtype=torch.float64).expand(DIMENSIONS) ** 2
        self.mean = torch.full((DIMENSIONS,), mean, dtype=torch.float64)

    def draw(self, count: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64)
        return (self.mean + (normal * self.variances.sqrt()) @ self.q.T).view(-1, *SHAPE)

    def nll(self, x_0: torch.Tensor) -> torch.Tensor:
        """-log p(x_0), (N,)."""
        along = (x_0.flatten(1) - self.mean) @ self.q
        return -Normal(0.0, self.variances.sqrt()).log_prob(along).sum(dim=1)

    def expected_x_0(self, x_t: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t], what a perfect network knows; abar (B,)."""
        signal, noise = abar[:, None].sqrt(), 1 - abar[:, None]
        gain = signal * self.variances / (signal**2 * self.variances + noise)
        along = (x_t.flatten(1) - signal * self.mean) @ self.q
        return (self.mean + (gain * along) @ self.q.T).view_as(x_t)

    def remaining_variance(self, abar: torch.Tensor) -> torch.Tensor:
        """Var[x_0 | x_t] along each axis: (T, D)."""
        return self.variances * (1 - abar[:, None]) / (abar[:, None] * self.variances + 1 - abar[:, None])

    def expected_bound(self, scheduler, variance_type: str, v: float | None = None) -> float:
        """The mean of the bound over data and noise under a perfect network: KLs of Gaussians with one mean on average.

        E KL_t = (log(p / q) + (q + w^2 Var[x_0 | x_t]) / p - 1) / 2, where q and p are the variances of the posterior
        and of the chain and w is what x_0 counts in the posterior's mean.
        """
        abar = scheduler.alphas_cumprod.double()
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        beta = (1 - abar / before)[:, None]
        left = self.remaining_variance(abar)
        q = beta * ((1 - before) / (1 - abar))[:, None]
        squared_weight = before[:, None] * (beta / (1 - abar[:, None])) ** 2
        p = {"fixed_small": q, "fixed_large": beta}[variance_type]
        terms = 0.5 * ((p / q).log() + (q + squared_weight * left) / p - 1)
        v = 1 - abar[0] if v is None else v
        decoder = 0.5 * (math.log(2 * math.pi * v) + left[0] / v)
        prior = 0.5 * (abar[-1] * (self.variances + self.mean**2 - 1) - torch.log1p(-abar[-1]))
        return float((terms[1:].sum(dim=0) + decoder + prior).sum())


class Denoiser(torch.nn.Module):
    """A network that knows the data, but for `error`, which it adds to x_0."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, data: GaussianData, scheduler, error: float = 0.0, optimal_variance: bool = False):
        super().__init__()
        self.data, self.scheduler, self.error, self.optimal_variance = data, scheduler, error, optimal_variance
        self.modes = set()

    def forward(self, x_t, timesteps, hidden):
        self.modes.add((self.training, torch.is_grad_enabled()))
        abar = self.scheduler.alphas_cumprod.double()
        x_0 = self.data.expected_x_0(x_t, abar[timesteps]) + self.error
        each = abar[timesteps].view(-1, 1, 1, 1)
        noise = (x_t - each.sqrt() * x_0) / (1 - each).sqrt()
        output = training_target(self.scheduler.config.prediction_type, x_0, noise, abar, timesteps)
        if self.optimal_variance:  # of x_{t-1} given x_t, the same along all axes
            left = self.data.remaining_variance(abar)[timesteps, 0].view(-1, 1, 1, 1)
            before = abar[timesteps.clamp(min=1) - 1].view(-1, 1, 1, 1)
            beta = 1 - each / before
            variance = beta * (1 - before) / (1 - each) + before * (beta / (1 - each)) ** 2 * left
            output = torch.cat([output, variance.expand_as(output)], dim=1)
        return SimpleNamespace(sample=output)


def measure(data: GaussianData, scheduler, x_0: torch.Tensor, error=0.0, optimal_variance=False, **how) -> Bound:
    model = Denoiser(data, scheduler, error, optimal_variance)
    how = {"timesteps_per_picture": None, "batch_size": 8000, **how}
    return likelihood.variational_bound(model, scheduler, x_0, torch.zeros(len(x_0), 1, 1), **how)


# Variances along the axes about 4, so that the likelihood is far from 0: 2.1 nats a dimension.
DATA = GaussianData(torch.linspace(1.5, 2.5, DIMENSIONS, dtype=torch.float64))
PICTURES = DATA.draw(24)


# -------------------------------------------------------------------------------------------------- the whole bound


@pytest.mark.parametrize(
    ("variance_type", "prediction_type"), [("fixed_large", "epsilon"), ("fixed_large", "v_prediction")]
)
def test_the_bound_of_gaussian_data_is_their_likelihood(variance_type, prediction_type):
    """Else the number would be none: a term left out, counted twice, or in other units."""
    scheduler = schedule(variance_type=variance_type, prediction_type=prediction_type)
    bound, truth = measure(DATA, scheduler, PICTURES), DATA.nll(PICTURES)
    assert bound.nats == pytest.approx(float(truth.mean()), rel=0.01)
    gap = bound.per_picture - truth
    assert gap.mean() > -2 * gap.std() / len(gap) ** 0.5  # it is a bound
    in_bits = float(truth.mean()) / math.log(2) / DIMENSIONS
    assert bound.bits_per_dimension == pytest.approx(in_bits, rel=0.01) and bound.variance_type == variance_type


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_the_smaller_variance_costs(name):
    """fixed_small lies 0.3 to 0.5 nats a dimension above the truth on broad data; were the variances mixed up, the two
    types would change places."""
    kind = "sample" if name == "zero terminal SNR" else "epsilon"
    scheduler = schedule(**SCHEDULES[name], prediction_type=kind)
    few = PICTURES[:8]
    bound, truth = measure(DATA, scheduler, few), float(DATA.nll(few).mean())
    entropy = float(0.5 * (2 * math.pi * math.e * DATA.variances).log().sum())
    expected_gap = DATA.expected_bound(scheduler, "fixed_small") - entropy
    assert 0.25 < expected_gap / DIMENSIONS < 0.5
    assert bound.nats - truth == pytest.approx(expected_gap, abs=0.03 * truth)
    large = measure(DATA, scheduler, few, variance_type="fixed_large")
    expected_gap = DATA.expected_bound(scheduler, "fixed_large") - entropy
    assert 0 < expected_gap < 0.001 * entropy
    assert large.nats - truth == pytest.approx(expected_gap, abs=0.03 * truth)


def test_nearly_a_point():
    """On data far narrower than the first noise the smaller variance is the right one, and the decoder's has to be
    given: Var[x_0 | x_1]."""
    data, scheduler = GaussianData(0.003), schedule()
    x_0 = data.draw(8)
    v = float(data.remaining_variance(scheduler.alphas_cumprod[:1].double())[0, 0])
    narrow, truth = measure(data, scheduler, x_0, decoder_variance=v), float(data.nll(x_0).mean())
    assert truth < -4 * DIMENSIONS and narrow.nats == pytest.approx(truth, rel=0.01)
    for other in ({"decoder_variance": v, "variance_type": "fixed_large"}, {}):  # 0.2 and 1.8 nats a dimension more
        bound = measure(data, scheduler, x_0, **other)
        expected = data.expected_bound(scheduler, bound.variance_type, bound.decoder_variance)
        assert bound.nats > truth + 0.1 * DIMENSIONS and bound.nats == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("s", [0.3, 2.0])
def test_a_learned_variance_can_be_exact(s):
    """With the variance that x_{t-1} has given x_t only the prior is off; read from the wrong channels, or from another
    timestep, it would be worse than a fixed one."""
    data, scheduler = GaussianData(s), schedule(variance_type="learned")
    x_0 = data.draw(6)
    abar = scheduler.alphas_cumprod.double()
    v = float(data.remaining_variance(abar[:1])[0, 0])
    bound = measure(data, scheduler, x_0, optimal_variance=True, decoder_variance=v)
    truth = data.nll(x_0)
    error = (bound.per_picture - truth).std() / len(x_0) ** 0.5
    assert abs(bound.nats - float(truth.mean())) < 3 * error + 0.01 * DIMENSIONS
    fixed = data.expected_bound(scheduler, "fixed_small", v) - DIMENSIONS * (math.log(s) + 1.4189385)
    assert error < 0.1 * fixed  # the assertion above would see a fixed one


def test_a_wrong_network_costs_what_it_must():
    """An error d in every x_0 adds sum of (SNR(t-1) - SNR(t)) d^2 / 2, which telescopes, and d^2 / 2v: were it not so,
    a better model could have the worse bound."""
    scheduler, d = schedule(), 0.3
    right, wrong = measure(DATA, scheduler, PICTURES[:8]), measure(DATA, scheduler, PICTURES[:8], error=d)
    snr = scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())
    more = 0.5 * DIMENSIONS * d**2 * float(snr[0] - snr[-1] + 1 / (1 - scheduler.alphas_cumprod[0]))
    below, error = right.below(wrong)
    assert below == pytest.approx(more, rel=0.01) and abs(below - more) < 4 * error


# ------------------------------------------------------------------------------------------------------- its terms


def posterior(scheduler, t: int, x_t: torch.Tensor, x_0: torch.Tensor) -> Normal:
    """q(x_{t-1} | x_t, x_0) by Bayes: the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0) as Gaussians in x_{t-1}."""
    abar, before = scheduler.alphas_cumprod.double()[[t, t - 1]]
    alpha = abar / before
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    mean = (alpha.sqrt() * x_t / (1 - alpha) + before.sqrt() * x_0 / (1 - before)) / precision
    return Normal(mean, precision**-0.5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned"])
def test_terms_are_the_divergences_of_their_gaussians(name, prediction_type, variance_type):
    """torch.distributions' own: a term would belong to another timestep, or to the wrong mean or variance."""
    scheduler = schedule(**SCHEDULES[name], prediction_type=prediction_type, variance_type=variance_type)
    process, generator = bound_terms.reverse_process(scheduler), torch.Generator().manual_seed(1)
    timesteps = torch.tensor([1, 2, 500, 998, 999])
    x_0, guess, noise = torch.randn(3, len(timesteps), 2, 3, 3, generator=generator, dtype=torch.float64)
    learned = torch.rand(noise.shape, generator=generator, dtype=torch.float64) + 0.01
    abar = scheduler.alphas_cumprod.double()
    x_t = add_noise(abar, x_0, noise, timesteps)
    each = abar[timesteps].view(-1, 1, 1, 1)
    wrong_noise = (x_t - each.sqrt() * guess) / (1 - each).sqrt()
    output = training_target(prediction_type, guess, wrong_noise, abar, timesteps)
    if variance_type == "learned":
        output = torch.cat([output, learned], dim=1)
    terms = bound_terms.denoising_term(process, output, x_0, x_t, timesteps, 0.1)
    for i, t in enumerate(timesteps.tolist()):
        # Where all is noise, an epsilon says nothing, and the chain takes the mean of centred data.
        said = torch.zeros_like(guess[i]) if prediction_type == "epsilon" and abar[t] == 0 else guess[i]
        q, p = posterior(scheduler, t, x_t[i], x_0[i]), posterior(scheduler, t, x_t[i], said)
        if variance_type != "fixed_small":
            variance = learned[i] if variance_type == "learned" else 1 - abar[t] / abar[t - 1]
            p = Normal(p.loc, variance**0.5)
        assert terms[i] == pytest.approx(float(kl_divergence(q, p).sum()), rel=1e-6), t


def test_the_ends_are_what_they_are_called():
    """The prior against torch.distributions, 0 where the last timestep is all noise; the decoder is -log of a density
    of the stated variance."""
    x_0 = PICTURES[:3]
    for settings in SCHEDULES.values():
        process = bound_terms.reverse_process(schedule(**settings))
        abar = process.alphas_cumprod[-1]
        q = Normal(abar.sqrt() * x_0, (1 - abar).sqrt())
        expected = kl_divergence(q, Normal(torch.zeros_like(x_0), 1.0)).flatten(1).sum(dim=1)
        assert bound_terms.prior_term(process, x_0) == pytest.approx(expected, rel=1e-9)
        assert abar > 0 or expected.max() == 0
    process, t = bound_terms.reverse_process(schedule(prediction_type="sample")), torch.zeros(3, dtype=torch.int64)
    terms = bound_terms.denoising_term(process, x_0 + 0.1, x_0, x_0, t, 0.04)
    assert terms == pytest.approx(-Normal(0.0, 0.2).log_prob(torch.tensor(0.1)).item() * torch.ones(3) * DIMENSIONS)


def test_the_chain_is_the_one_that_draws():
    """A scheduler that clips x_0 draws from the clipped mean: the bound would be of another model."""
    t, x_0 = torch.tensor([300]), PICTURES[:1].clamp(-1, 1)
    free, clipped = (schedule(prediction_type="sample", clip_sample=clip) for clip in (False, True))
    one, other = (
        bound_terms.denoising_term(bound_terms.reverse_process(scheduler), output, x_0, x_0, t, 1.0)
        for scheduler, output in ((free, (3 * x_0).clamp(-1, 1)), (clipped, 3 * x_0))
    )
    assert one == other > 0
    # A saved pipeline's DDIM says nothing of variances, and diffusers' scheduler is as good as ours.
    assert bound_terms.reverse_process(DDIMScheduler(**EMOJI64)).variance_type == "fixed_large"
    assert bound_terms.reverse_process(schedule()).variance_type == "fixed_small"


# ----------------------------------------------------------------------------------------------------- estimating it


@pytest.mark.parametrize("name", SCHEDULES)
def test_drawn_timesteps_stand_for_all(name):
    """An estimate would be too high or too low on average, whatever the terms are."""
    abar = schedule(**SCHEDULES[name]).alphas_cumprod
    t = torch.arange(1000, dtype=torch.float64)
    for terms in (1 / (1 + t), torch.ones_like(t), t**2):
        generator = torch.Generator().manual_seed(0)
        sums = []
        for _ in range(300):
            timesteps, weights = bound_terms.stratified_timesteps(abar, 9, generator)
            assert timesteps[0] == 0 and weights[0] == 1 and (timesteps[1:] > 0).all() and (timesteps.diff() >= 0).all()
            sums.append((terms[timesteps] * weights).sum())
        sums = torch.stack(sums)
        assert abs(sums.mean() - terms.sum()) < 4 * sums.std() / len(sums) ** 0.5


def test_an_estimate_is_as_far_off_as_it_says():
    """Its standard error would be a number without meaning: over many draws the distance from the truth, in standard
    errors, is 1 in root mean square."""
    scheduler = schedule()
    expected, away = DATA.expected_bound(scheduler, "fixed_large"), []
    for seed in range(20):
        how = {"timesteps_per_picture": 16, "variance_type": "fixed_large", "seed": seed}
        bound = measure(DATA, scheduler, DATA.draw(16, seed=seed), **how)
        assert bound.standard_error < 0.05 * expected
        away.append((bound.nats - expected) / bound.standard_error)
    assert 0.7 < torch.tensor(away).square().mean().sqrt() < 1.4


def test_it_does_not_matter_who_measures():
    """On two processes, in other batches or after other draws it would be another number."""
    scheduler, how = schedule(), {"timesteps_per_picture": 6, "seed": 3}
    torch.manual_seed(1)
    whole = measure(DATA, scheduler, PICTURES[:5], **how)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    shares = [measure(DATA, scheduler, PICTURES[i], indices=i, batch_size=5, **how) for i in ([0, 1, 2], [3, 4])]
    joined = Bound.joined(shares)
    assert torch.equal(joined.timesteps, whole.timesteps) and torch.equal(state, torch.get_rng_state())
    assert torch.allclose(joined.per_picture, whole.per_picture, rtol=1e-9)
    other = measure(DATA, scheduler, PICTURES[:5], timesteps_per_picture=6, seed=4)
    assert not torch.equal(other.timesteps, whole.timesteps) and other.nats != whole.nats


def test_the_model_is_left_as_it_was():
    """Training would go on in eval mode, or measuring keep graphs in memory."""
    for training in (True, False):
        model = Denoiser(DATA, schedule()).train(training)
        likelihood.variational_bound(model, schedule(), PICTURES[:1], torch.zeros(1, 1, 1), timesteps_per_picture=4)
        assert model.modes == {(False, False)} and model.training is training


@pytest.mark.parametrize(
    ("settings", "how", "said"),
    [
        ({}, {"decoder_variance": 0.0}, "decoder_variance is 0.0; it must be positive"),
        ({}, {"timesteps_per_picture": 1}, "1 timesteps for each picture; it must be at least 2"),
        ({"trained_betas": [0.1, 1.0, 0.1]}, {}, "alphas_cumprod must fall at every timestep"),
    ],
)
def test_what_is_no_bound_is_refused(settings, how, said):
    with pytest.raises(ValueError, match=said):
        measure(DATA, schedule(**settings), PICTURES[:1], **how)


# ------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("count", [None, 2, 7, 64])
def test_the_parts_make_the_whole(count, tmp_path):
    """The table or the file would tell another bound than was measured."""
    scheduler = schedule(**({"num_train_timesteps": 50} if count is None else {}))
    bound = measure(DATA, scheduler, PICTURES[:3], timesteps_per_picture=count)
    for groups in (bound.groups(), bound.groups(most=40)):
        assert sum(group["nats"] for group in groups) + float(bound.prior.mean()) == pytest.approx(bound.nats)
        assert groups[0]["first"] == groups[0]["last"] == 0
        if count is None:  # then no timestep stands in two groups
            assert [after["first"] - before["last"] for before, after in zip(groups, groups[1:], strict=False)] == [
                1
            ] * (len(groups) - 1)
            each = groups[-1]
            inside = bound.terms[:, each["first"] : each["last"] + 1]
            assert each["per_timestep"] == pytest.approx(float(inside.mean()))
    found = json.loads(json.dumps(bound.as_dict(), allow_nan=False))
    assert found["prior"] + found["decoder"] + found["denoising"] == pytest.approx(found["nats"])
    assert sum(found["per_picture"]) / 3 == pytest.approx(found["nats"]) and len(found["terms"]) == (count or 50)
    assert f"{bound.nats:.2f} ± {bound.standard_error:.2f} nats a picture" in str(bound)
    assert "3 pictures, " + ("all 50" if count is None else f"{count} of 1000") + " timesteps each" in str(bound)


# ----------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_measured_as_the_unet_is_trained():
    """Other latents than the UNet sees, or another's caption, would be measured."""
    pipeline = LatentDiffPipeline(**tiny_components())
    images, captions = likelihood.emoji_pictures(held_out=True, count=3)
    how = {"timesteps_per_picture": 5, "seed": 1}
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(inputs))
    bound = likelihood.bound_of_pictures(pipeline, images, captions, **how)
    mean, std = encode_moments(pipeline.vae, to_pixels(images))
    ((x_t, timesteps, text),) = seen
    abar = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    early = (timesteps == 0).nonzero()[:, 0]  # where almost nothing but the picture is seen
    assert bound.dimensions == 4 * 16 * 16 and len(early) == 3
    difference = x_t[early] - abar[early].sqrt() * mean * 0.7
    assert difference.std() == pytest.approx(float((1 - abar[0] + (0.7 * std.square().mean().sqrt()) ** 2).sqrt()), 0.1)
    for i, caption in enumerate(captions):
        expected = pipeline.encode_prompt([caption], "cpu", 1, False)[0][0]
        assert torch.allclose(text[5 * i], expected, atol=1e-5)
    assert likelihood.held_out_bound(pipeline, count=3, **how).nats == pytest.approx(bound.nats, rel=1e-5)


def test_held_out_and_trained_pictures_are_apart():
    """Pictures learnt by heart would count as new ones, or a picture stand under another's caption."""
    everything = emoji.load()
    held_out_rows = everything.indices(held_out=True)
    for held_out in (True, False):
        rows = everything.indices(held_out=held_out)
        known = {everything.composite(i).tobytes(): emoji.captions(*everything.rows[i])[1] for i in rows}
        images, captions = likelihood.emoji_pictures(held_out)
        assert [known[image.tobytes()] for image in images] == captions
        assert len(set(captions)) == len(held_out_rows)
    assert captions[:5] == likelihood.emoji_pictures(held_out=False, count=5)[1]


def test_an_inpainting_unet_is_refused():
    from latentdiff.models.unet import widen_input

    pipeline = LatentDiffPipeline(**tiny_components())
    widen_input(pipeline.unet, 9)
    with pytest.raises(ConfigError, match="the UNet takes 9 channels, the latents have 4"):
        likelihood.held_out_bound(pipeline, count=1)


def test_the_command(tiny_pipeline_folder, tmp_path, capsys):
    """Two UNets of a run could not be compared."""
    worse = tiny_components(seed=1)["unet"]
    worse.save_pretrained(tmp_path / "checkpoint-7" / "unet_ema")
    unets = (tiny_pipeline_folder / "unet", tmp_path / "checkpoint-7" / "unet_ema")
    likelihood.likelihood(
        Likelihood(
            checkpoint=str(tiny_pipeline_folder), unet=unets, count=2, timesteps=4,
            output=tmp_path / "out" / "bound.json", plot=tmp_path / "bound.png",
        )
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "bound.json").read_text())
    assert [row["unet"] for row in found["unets"]] == ["pipeline/unet", "checkpoint-7/unet_ema"]
    assert found["unets"][0]["sha256"] != found["unets"][1]["sha256"]
    pipeline = LatentDiffPipeline.from_pretrained(tiny_pipeline_folder)
    for kind, held_out in (("held_out", True), ("trained", False)):
        expected = likelihood.held_out_bound(pipeline, unet=worse, held_out=held_out, count=2, timesteps_per_picture=4)
        assert found["unets"][1][kind]["nats"] == pytest.approx(expected.nats, rel=1e-6)
    rise = found["unets"][0]["held_out"]["nats"] - found["unets"][1]["held_out"]["nats"]
    assert f"{rise:.2f} ± " in capsys.readouterr().out and (tmp_path / "bound.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"count": 0}, "--count is 0; it must be at least 1"),
        ({"timesteps": 1}, "--timesteps is 1; it must be at least 2"),
        ({"decoder_variance": -1.0}, "--decoder-variance is -1; it must be positive"),
    ],
)
def test_flags_that_make_no_sense(flags, said):
    with pytest.raises(ConfigError, match=said):
        Likelihood(checkpoint="x", **flags)


def test_a_unet_that_is_none(tiny_pipeline_folder, tmp_path):
    with pytest.raises(ConfigError, match="--unet .*: no UNet can be loaded from it"):
        likelihood.likelihood(Likelihood(checkpoint=str(tiny_pipeline_folder), unet=(tmp_path,), count=1))
