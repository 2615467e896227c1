"""DDPMScheduler and DDIMScheduler: equal to diffusers' where those are right; the rest of what they promise.

What holds for any scheduler, and is measured of diffusers' too, is in test_scheduler_conformance.py.
"""

import itertools

import diffusers
import pytest
import torch

from latentdiff.diffusion.noise_schedule import PREDICTION_TYPES, TIMESTEP_SPACINGS
from latentdiff.diffusion.scheduling_ddim import DDIMScheduler
from latentdiff.diffusion.scheduling_ddpm import DDPMScheduler
from scheduler_conformance import levels_of, oracle, seeded, walk

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SHAPE = (2, 3, 4, 4)
BOTH = pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
THEIRS = {DDPMScheduler: diffusers.DDPMScheduler, DDIMScheduler: diffusers.DDIMScheduler}


def normal(seed: int, shape=SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def options(scheduler) -> dict:
    """The config without what diffusers notes down for itself."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def visited(scheduler, limit: int = 12) -> list[int]:
    """Up to `limit` of the announced timesteps, the first and the last among them."""
    steps = scheduler.timesteps.tolist()
    return steps if len(steps) <= limit else steps[: limit // 2] + steps[-limit // 2 :]


def assert_same_steps(ours, theirs, num_inference_steps: int, model_channels: int = 3, **kwargs) -> None:
    """Steps both on the same random inputs, with equal generators, and compares everything that they return."""
    ours.set_timesteps(num_inference_steps)
    theirs.set_timesteps(num_inference_steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    our_generator, their_generator = seeded(5), seeded(5)
    undefined = ours.config.prediction_type == "epsilon" or kwargs.get("eta") == 1.0
    for t in visited(ours):
        if ours.alphas_cumprod[t] == 0 and undefined:
            continue  # diffusers gives NaN there; the tests of zero SNR say what ours gives
        sample = normal(t)
        output = 0.5 * normal(t + 1, (2, model_channels, 4, 4))
        got = ours.step(output, t, sample, generator=our_generator, **kwargs)
        wanted = theirs.step(output, t, sample, generator=their_generator, **kwargs)
        for name in ("prev_sample", "pred_original_sample"):
            assert got[name].shape == sample.shape
            assert torch.allclose(got[name], wanted[name], atol=1e-6, rtol=1e-6), (t, name)
    assert torch.equal(our_generator.get_state(), their_generator.get_state())


# ---- equality with diffusers ---

CASES = [
    {"prediction_type": prediction_type, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero_snr}
    for prediction_type, spacing, zero_snr in itertools.product(PREDICTION_TYPES, TIMESTEP_SPACINGS, [False, True])
]
BOUNDS = [
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.8},
    {"thresholding": True, "sample_max_value": 1.5},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ddpm_equals_diffusers(case):
    """Else a checkpoint would draw another picture here than in diffusers."""
    for bound, steps in zip(itertools.cycle(BOUNDS), (4, 10, 50, 1000, 7, 30), strict=False):
        config = SD | case | bound
        assert_same_steps(DDPMScheduler(**config), diffusers.DDPMScheduler(**config), steps)


@pytest.mark.parametrize("case", [c for c in CASES if c["timestep_spacing"] != "linspace"], ids=str)
def test_ddim_equals_diffusers_where_the_steps_divide_the_training_steps(case):
    """Else a checkpoint would draw another picture here than in diffusers."""
    variants = itertools.product(BOUNDS, [0.0, 0.6, 1.0], [False, True])
    for (bound, eta, clipped), steps in zip(variants, itertools.cycle((4, 10, 50, 1000)), strict=False):
        config = SD | case | bound
        ours, theirs = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
        assert_same_steps(ours, theirs, steps, eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_options_equal_diffusers(set_alpha_to_one, steps_offset):
    """Else Stable Diffusion's own config (offset 1, alpha not set to one) ends elsewhere."""
    config = SD | {"set_alpha_to_one": set_alpha_to_one, "steps_offset": steps_offset}
    ours, theirs = DDIMScheduler(**config), diffusers.DDIMScheduler(**config)
    assert_same_steps(ours, theirs, 50)
    for t, prev_t in ((981, 961), (1, -1)):
        assert ours._get_variance(t, prev_t) == pytest.approx(theirs._get_variance(t, prev_t).item(), abs=1e-7)


def test_ddim_takes_given_noise_as_diffusers_does():
    """Else cycle-style editing, which hands in its own noise, gets other noise."""
    ours, theirs = DDIMScheduler(**SD), diffusers.DDIMScheduler(**SD)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    arguments = {"eta": 0.7, "variance_noise": normal(3)}
    got = ours.step(normal(1), 500, normal(2), **arguments).prev_sample
    assert torch.allclose(got, theirs.step(normal(1), 500, normal(2), **arguments).prev_sample, atol=1e-6)


@pytest.mark.parametrize("steps", [None, 10, 1000])
@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", "other"]
)
def test_ddpm_variance_types_equal_diffusers(variance_type, steps):
    """Else an improved-DDPM checkpoint is sampled with the wrong noise. None: on the training grid, unset."""
    config = SD | {"variance_type": variance_type}
    ours, theirs = DDPMScheduler(**config), diffusers.DDPMScheduler(**config)
    if steps is not None:
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
    learned = variance_type.startswith("learned")
    for t in visited(ours):
        output = normal(t + 1, (2, 6 if learned else 3, 4, 4))
        if variance_type == "learned":
            output[:, 3:] = output[:, 3:].abs()
        got = ours.step(output, t, normal(t), generator=seeded(t)).prev_sample
        wanted = theirs.step(output, t, normal(t), generator=seeded(t)).prev_sample
        assert torch.allclose(got, wanted, atol=1e-6, rtol=1e-6)
        if variance_type in ("fixed_small", "fixed_large"):
            assert ours._get_variance(t) == pytest.approx(theirs._get_variance(t).item(), abs=1e-7)


def test_ddpm_fixed_large_log_is_fixed_large():
    """Else the root of a negative logarithm is taken, which is NaN (and is, in diffusers)."""
    outcome = {}
    for variance_type in ("fixed_large", "fixed_large_log"):
        scheduler = DDPMScheduler(**SD, variance_type=variance_type)
        outcome[variance_type] = scheduler.step(normal(1), 500, normal(2), generator=seeded(3)).prev_sample
    assert torch.equal(outcome["fixed_large"], outcome["fixed_large_log"])
    theirs = diffusers.DDPMScheduler(**SD, variance_type="fixed_large_log")
    assert theirs.step(normal(1), 500, normal(2), generator=seeded(3)).prev_sample.isnan().all()


@BOTH
def test_add_noise_and_velocity_equal_diffusers(scheduler_class):
    """Else training here and training there are of different networks."""
    ours, theirs = scheduler_class(**SD), THEIRS[scheduler_class](**SD)
    arguments = (normal(1), normal(2), torch.tensor([3, 999]))
    assert torch.allclose(ours.add_noise(*arguments), theirs.add_noise(*arguments), atol=1e-6)
    assert torch.allclose(ours.get_velocity(*arguments), theirs.get_velocity(*arguments), atol=1e-6)
    img2img = (normal(1), normal(2), torch.tensor([500]))  # one timestep for the whole batch
    assert torch.allclose(ours.add_noise(*img2img), theirs.add_noise(*img2img), atol=1e-6)


# ---- where rounding or a division by zero would show ---


def test_zero_snr_with_eta_one_is_finite():
    """Else rounding puts 1 - abar - sigma^2 below 0 at the first step, and every picture is NaN, as in diffusers."""
    config = SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    for steps in range(2, 101):
        scheduler = DDIMScheduler(**config)
        scheduler.set_timesteps(steps)
        drawn = scheduler.step(normal(1), 999, normal(2), eta=1.0, generator=seeded(0)).prev_sample
        assert drawn.isfinite().all(), steps


@BOTH
def test_epsilon_at_zero_snr_is_finite(scheduler_class):
    """Else x_0 = 0/0 at the first step turns the picture into NaN."""
    scheduler = scheduler_class(**SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    result = scheduler.step(normal(1), 999, normal(2), generator=seeded(0))
    assert result.prev_sample.isfinite().all() and result.pred_original_sample.isfinite().all()


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_last_ddpm_step_adds_no_noise(variance_type):
    """Else a trailing grid, which ends above 0, leaves visible noise in the finished picture."""
    scheduler = DDPMScheduler(**SD, timestep_spacing="trailing", variance_type=variance_type)
    scheduler.set_timesteps(10)
    result = scheduler.step(normal(1), 99, normal(2), generator=seeded(0))
    assert torch.allclose(result.prev_sample, result.pred_original_sample, atol=1e-6)


def test_ddim_with_eta_one_is_ddpm():
    """Else one of the two is not the sampler that the DDIM paper relates them by (section 4.1)."""
    config = SD | {"timestep_spacing": "trailing"}
    ddim, ddpm = DDIMScheduler(**config), DDPMScheduler(**config)
    ddim.set_timesteps(7)
    ddpm.set_timesteps(7)
    for t in ddpm.timesteps.tolist():
        ancestral = ddpm.step(normal(1), t, normal(2), generator=seeded(t)).prev_sample
        assert torch.allclose(
            ddim.step(normal(1), t, normal(2), eta=1.0, generator=seeded(t)).prev_sample, ancestral, atol=1e-4
        )


# ---- inversion ---


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_inversion_step_undoes_a_step(case, set_alpha_to_one):
    """Else a real picture, turned into noise and drawn again, is another picture at any number of steps."""
    scheduler = DDIMScheduler(**SD, **case, set_alpha_to_one=set_alpha_to_one)
    for steps in (1, 4, 7, 50):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            output, x_t = normal(1, dtype=torch.float64), normal(2, dtype=torch.float64)
            if scheduler.alphas_cumprod[t] == 0 and case["prediction_type"] == "epsilon":
                x_t = output  # pure noise, and the network sees that it is
            arrived = scheduler.step(output, t, x_t)
            back = scheduler.inversion_step(output, t, arrived.prev_sample, model_input=x_t)
            # v is taken apart by sqrt(abar)^2 + sqrt(1 - abar)^2 = 1, which the table holds to float32
            tolerance = 1e-6 if case["prediction_type"] == "v_prediction" else 1e-10
            assert torch.allclose(back.prev_sample, x_t, atol=tolerance), (steps, t)
            x_0, wanted = back.pred_original_sample, arrived.pred_original_sample
            assert torch.allclose(x_0, wanted, atol=20 * tolerance), (steps, t)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_repeated_inversion_step_becomes_exact(prediction_type):
    """Else iterating with the present estimate of x_t does not converge on the x_t that sampling came from."""
    scheduler = DDIMScheduler(**SD, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    t, sample = scheduler.timesteps[10], normal(2, dtype=torch.float64)

    def network(x_t: torch.Tensor) -> torch.Tensor:
        return oracle(scheduler, levels_of(), torch.tanh(x_t))(x_t, t)

    errors, x_t = [], None
    for _ in range(60):
        output = network(sample if x_t is None else x_t)
        x_t = scheduler.inversion_step(output, t, sample, model_input=x_t).prev_sample
        errors.append((scheduler.step(network(x_t), t, x_t).prev_sample - sample).abs().max().item())
    assert errors[0] > 1e-3 and errors[-1] < 1e-6


def test_an_inversion_step_keeps_half_precision_and_gives_a_tuple_when_asked():
    """Else a pipeline in fp16 becomes fp32 on the way up, or callers with return_dict=False get something else."""
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(10)
    arguments = (normal(1, dtype=torch.float16), 500, normal(2, dtype=torch.float16))
    output = scheduler.inversion_step(*arguments)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == torch.float16
    for got, wanted in zip(scheduler.inversion_step(*arguments, return_dict=False), output.values(), strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="timestep is 1001"):
        scheduler.inversion_step(normal(1), 1001, normal(2))


# ---- timesteps ---


@BOTH
def test_custom_timesteps_are_walked_as_given(scheduler_class):
    """Else an uneven grid (align-your-steps) is stepped as if it were even."""
    scheduler = scheduler_class(**SD)
    scheduler.set_timesteps(timesteps=[999, 845, 730, 13])
    assert scheduler.timesteps.tolist() == [999, 845, 730, 13]
    assert scheduler.num_inference_steps == 4
    assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps] == [845, 730, 13, -1]
    scheduler.set_timesteps(10)
    assert scheduler.previous_timestep(900) == 800


def test_ddpm_without_set_timesteps_walks_the_training_grid():
    """Else a DDPM fresh from training, or from a config, cannot be sampled at all its steps."""
    scheduler = DDPMScheduler(num_train_timesteps=10)
    assert scheduler.timesteps.tolist() == list(range(9, -1, -1))
    assert [scheduler.previous_timestep(t) for t in (9, 1, 0)] == [8, 0, -1]


@BOTH
def test_a_slice_of_the_timesteps_can_be_walked(scheduler_class):
    """Else img2img, which starts in the middle of the grid, is refused or ends elsewhere."""
    scheduler = scheduler_class(**SD)
    scheduler.set_timesteps(30)
    x_0, timesteps = normal(1, dtype=torch.float64), scheduler.timesteps[20:]
    sample = scheduler.add_noise(x_0, normal(2, dtype=torch.float64), timesteps[:1])
    sample = walk(scheduler, oracle(scheduler, levels_of(), x_0), sample, timesteps, generator=seeded(0))
    assert torch.allclose(sample, x_0, atol=1e-5)


# ---- the contract of a diffusers scheduler ---


@BOTH
def test_config_round_trip_with_diffusers(scheduler_class, tmp_path):
    """Else a saved scheduler means something else when it is loaded, here or by diffusers."""
    scheduler = scheduler_class(
        **SD, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, steps_offset=1
    )
    scheduler.save_pretrained(tmp_path)
    theirs = THEIRS[scheduler_class].from_pretrained(tmp_path)
    ours = scheduler_class.from_pretrained(tmp_path)
    assert torch.equal(theirs.betas, scheduler.betas) and torch.equal(ours.betas, scheduler.betas)
    assert options(ours) == options(theirs) == options(scheduler)
    assert options(scheduler_class.from_config(theirs.config)) == options(scheduler)


@BOTH
def test_constructor_has_the_names_and_defaults_of_diffusers(scheduler_class):
    """Else a config that leaves something out means two things."""
    ours, theirs = scheduler_class(), THEIRS[scheduler_class]()
    assert options(ours) == options(theirs)
    assert torch.equal(ours.timesteps, theirs.timesteps) and len(ours) == len(theirs) == 1000
    assert ours.order == 1 and ours.init_noise_sigma == 1.0 and ours.num_inference_steps is None
    assert ours.scale_model_input(normal(1), 3).equal(normal(1))
    assert "EulerDiscreteScheduler" in ours._compatibles and diffusers.EulerDiscreteScheduler in ours.compatibles
    assert diffusers.EulerDiscreteScheduler.from_config(ours.config).betas.equal(ours.betas)


@BOTH
def test_tuple_and_output_class_agree(scheduler_class):
    """Else callers with return_dict=False get something else."""
    scheduler = scheduler_class(**SD)
    scheduler.set_timesteps(10)
    output = scheduler.step(normal(1), 500, normal(2), generator=seeded(0))
    prev_sample, pred_original_sample = scheduler.step(
        normal(1), 500, normal(2), generator=seeded(0), return_dict=False
    )
    assert torch.equal(output.prev_sample, prev_sample)
    assert torch.equal(output.pred_original_sample, pred_original_sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BOTH
def test_half_precision_stays_half_and_is_no_worse_than_diffusers(scheduler_class, dtype):
    """Else half-precision sampling loses bits that it need not lose, or silently becomes float32."""
    ours, theirs = scheduler_class(**SD), THEIRS[scheduler_class](**SD)
    error = {"ours": 0.0, "theirs": 0.0}
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    for t in ours.timesteps.tolist()[10:]:
        output, sample = normal(t, dtype=dtype), normal(t + 1, dtype=dtype)
        exact = ours.step(output.double(), t, sample.double(), generator=seeded(t))
        for name, scheduler in (("ours", ours), ("theirs", theirs)):
            result = scheduler.step(output, t, sample, generator=seeded(t))
            assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
            difference = result.pred_original_sample.double() - exact.pred_original_sample
            error[name] += difference.abs().mean().item()
    assert error["ours"] <= error["theirs"]


@BOTH
def test_nothing_is_drawn_from_the_global_generator(scheduler_class):
    """Else pictures depend on whatever else the program drew, or on their neighbours in the batch."""
    scheduler = scheduler_class(**SD)
    scheduler.set_timesteps(10)
    kwargs = {"eta": 1.0} if scheduler_class is DDIMScheduler else {}
    before = torch.get_rng_state()
    first = scheduler.step(normal(1), 500, normal(2), generator=[seeded(7), seeded(8)], **kwargs).prev_sample
    scheduler.step(normal(1), 500, normal(2), generator=seeded(0), **kwargs)
    assert torch.equal(torch.get_rng_state(), before)
    alone = scheduler.step(normal(1)[1:], 500, normal(2)[1:], generator=seeded(8), **kwargs).prev_sample
    assert torch.equal(first[1:], alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_a_step_on_the_gpu_does_not_wait_for_it(scheduler_class):
    """Else every sampling step stalls the device, and timesteps kept on the host gain nothing."""
    scheduler = scheduler_class(**SD)
    scheduler.set_timesteps(10)
    output, sample = normal(1).cuda(), normal(2).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    timesteps = torch.tensor([1, 2], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = scheduler.step(output, 500, sample, generator=generator).prev_sample
        noisy = scheduler.add_noise(sample, output, timesteps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.is_cuda and noisy.is_cuda
    assert torch.allclose(noisy.cpu(), scheduler.add_noise(normal(2), normal(1), timesteps.cpu()), atol=1e-6)


# ---- errors ---


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: type(s)(prediction_type="noise"), ["prediction_type", "noise", "v_prediction"]),
        (lambda s: type(s)(timestep_spacing="even"), ["timestep_spacing", "even", "linspace"]),
        (lambda s: type(s)(beta_schedule="sine"), ["beta_schedule", "sine", "squaredcos_cap_v2"]),
        (lambda s: s.set_timesteps(1001), ["num_inference_steps", "1001", "1000"]),
        (lambda s: s.set_timesteps(0), ["num_inference_steps", "0"]),
        (lambda s: s.set_timesteps(), ["num_inference_steps", "timesteps"]),
        (lambda s: s.set_timesteps(3, timesteps=[3, 2, 1]), ["num_inference_steps=3", "timesteps=[3, 2, 1]"]),
        (lambda s: s.set_timesteps(timesteps=[5, 7]), ["timesteps", "descending", "[5, 7]"]),
        (lambda s: s.set_timesteps(timesteps=[]), ["timesteps", "[]"]),
        (lambda s: s.set_timesteps(timesteps=[1000, 7]), ["timesteps", "1000", "999"]),
        (lambda s: s.step(normal(1), 1001, normal(2)), ["timestep is 1001", "0 … 999"]),
    ],
)
@BOTH
def test_bad_arguments_are_named(scheduler_class, call, words):
    """Else a user reads that something is wrong, not what, nor what it may be."""
    scheduler = scheduler_class(**SD)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError) as error:
        call(scheduler)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_arguments_of_one_scheduler_are_named():
    """Else a missing learned variance, an eta without meaning or noise from two sources is taken as it comes."""
    ddim, ddpm = DDIMScheduler(**SD), DDPMScheduler(**SD, variance_type="learned_range")
    with pytest.raises(ValueError, match="set_timesteps"):
        ddim.step(normal(1), 500, normal(2))
    ddim.set_timesteps(10)
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        ddim.step(normal(1), 500, normal(2), eta=1.5)
    with pytest.raises(ValueError, match="variance_noise"):
        ddim.step(normal(1), 500, normal(2), eta=0.5, generator=seeded(0), variance_noise=normal(3))
    with pytest.raises(ValueError, match=r"learned_range.*6 channels"):
        ddpm.step(normal(1), 500, normal(2))
