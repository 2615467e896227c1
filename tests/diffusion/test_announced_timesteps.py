"""Schedulers asked about timesteps that they have not announced."""

import diffusers
import pytest
import torch

from latentdiff.diffusion.scheduling_consistency import ConsistencyScheduler
from latentdiff.diffusion.scheduling_ddim import DDIMScheduler
from latentdiff.diffusion.scheduling_ddpm import DDPMScheduler
from scheduler_conformance import seeded
from tests.diffusion.test_schedulers import normal


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, ConsistencyScheduler])
@pytest.mark.parametrize("timestep", [999, 500, 101, 99, 1, 0])
def test_a_step_from_anywhere_goes_to_the_next_announced_timestep_below(scheduler_class, timestep):
    """Users, and diffusers' own tests, step from timesteps of their own: that is the same as announcing this one."""
    scheduler, told = scheduler_class(), scheduler_class()
    scheduler.set_timesteps(timesteps=[901, 601, 301, 100])
    below = [t for t in scheduler.timesteps.tolist() if t < timestep]
    told.set_timesteps(timesteps=[timestep, *below])
    for t in (timestep, torch.tensor(timestep)):
        got, wanted = (
            each.step(normal(1), t, normal(2), generator=seeded(3), return_dict=False) for each in (scheduler, told)
        )
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, ConsistencyScheduler])
@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_step_from_beyond_the_schedule_is_refused(scheduler_class, timestep):
    """Python would take -1 for the last of the table, and draw on."""
    scheduler = scheduler_class()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=f"timestep is {timestep}; it must lie in 0 … 999"):
        scheduler.step(normal(1), timestep, normal(2))


def test_before_set_timesteps_ddim_answers_as_diffusers_does():
    """Both say what to call first."""
    for kind in (DDIMScheduler, diffusers.DDIMScheduler):
        with pytest.raises(ValueError, match="set_timesteps"):
            kind().step(normal(1), 5, normal(2))
