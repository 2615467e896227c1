"""Distillation through the training script at toy size: what it learns, keeps, saves and refuses."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from latentdiff import ConsistencyScheduler, LatentDiffPipeline
from latentdiff.config.train import TrainConfig
from latentdiff.data.batches import Batch
from latentdiff.diffusion.consistency import ddim_trajectory
from latentdiff.models.unet import add_guidance_input
from latentdiff.objectives import consistency
from latentdiff.objectives.consistency import TrajectoryDistillation
from latentdiff.objectives.teacher import Teacher
from latentdiff.utils.errors import ConfigError
from tiny import tiny_components

DISTILL = {
    "consistency": "distillation",
    "caption_dropout": 0.0,
    "lr_warmup_steps": 0,
    "validation_inference_steps": 4,
}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def trained(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def latents_of(folder: Path, kind=LatentDiffPipeline, **options) -> torch.Tensor:
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    options = {"generator": torch.Generator().manual_seed(0), **options}
    return pipe(["a cat"] * 4, latents=noise, output_type="latent", **options).images


@pytest.mark.parametrize("changes", [{}, {"consistency": "trajectories"}], ids=["neighbours", "trajectories"])
def test_the_student_draws_in_a_step_what_the_teacher_draws_in_many(train, tiny_pipeline_folder, changes):
    """Else the loss falls and nothing has been learned: the student has to be nearer to the end of the teacher's guided
    trajectories than the teacher's own first guess, and that for several guidance weights."""
    before = {name: tensor.clone() for name, tensor in trained(tiny_pipeline_folder).items()}
    changes = {**DISTILL, **changes, "learning_rate": 4e-3, "use_ema": False, "consistency_steps": 10}
    folder = train(**changes, max_train_steps=120)
    after = trained(tiny_pipeline_folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for scale in (1.5, 7.0):
        wanted = latents_of(tiny_pipeline_folder, num_inference_steps=100, guidance_scale=scale)
        guess = latents_of(tiny_pipeline_folder, num_inference_steps=1, guidance_scale=scale)
        found = latents_of(folder, num_inference_steps=1, guidance_scale=scale)
        assert (found - wanted).square().mean() < 0.25 * (guess - wanted).square().mean()


def test_a_finished_folder_is_drawn_with_as_a_consistency_model(train):
    """Else it is drawn with DDIM, which blurs, or its guidance weight has no effect, or diffusers cannot load it."""
    folder = train(**DISTILL)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    pipe = LatentDiffPipeline.from_pretrained(folder)
    assert type(pipe.scheduler) is ConsistencyScheduler and pipe.scheduler.config.original_inference_steps == 50
    one, other = (latents_of(folder, num_inference_steps=2, guidance_scale=scale) for scale in (1.0, 8.0))
    assert not torch.equal(one, other)
    theirs = latents_of(folder, diffusers.StableDiffusionPipeline, num_inference_steps=2, guidance_scale=8.0)
    assert torch.equal(other, theirs)


@pytest.mark.parametrize(
    "changes",
    [
        {"consistency": "distillation"},
        {"consistency": "distillation", "consistency_guidance": (4.0,), "lora_rank": 2},
        {"consistency": "trajectories", "consistency_steps": 4, "gradient_accumulation_steps": 2},
        {"consistency": "training", "consistency_steps": 20, "caption_dropout": 0.3},
    ],
    ids=["distillation", "LoRA", "trajectories", "training"],
)
def test_a_run_goes_on_to_the_last_bit(train, tmp_path, changes):
    """Else a resume draws other guidance weights, or starts the division of the noise levels again."""
    changes = {**DISTILL, **changes, "checkpointing_steps": 2}
    whole = train(**changes, output_dir=str(tmp_path / "whole"))
    for steps in (2, 4):
        changes |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
        half = train(**changes | ({"num_train_epochs": None} if steps == 4 else {}), output_dir=str(tmp_path / "half"))
    assert losses(half) == losses(whole)
    name = "pytorch_lora_weights.safetensors"
    one, other = (load_file(f / name) if (f / name).exists() else trained(f) for f in (whole, half))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "whole"])
def test_the_lines_of_the_model_card_draw(train, tiny_pipeline_folder, lora):
    """Else whoever copies them draws with DDIM, in fifty steps, or with guidance upon guidance."""
    folder = train(**DISTILL, max_train_steps=1, consistency_guidance=(4.0,), lora_rank=2 if lora else None)
    card = (folder / "README.md").read_text()
    assert "Multistep consistency sampling, 4 steps, guidance inside it." in card
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.S)[:2]:
        block = block.replace("path/to/this/folder", str(folder))
        block = block.replace(f'"{tiny_pipeline_folder.name}"', f'"{tiny_pipeline_folder}"')  # a card names no path
        *lines, last = block.strip().splitlines()
        assert last == 'pipe("a cat", num_inference_steps=4, guidance_scale=1.0).images[0]'
        names: dict = {}
        exec("\n".join([*lines, "picture = " + last]), names)
        assert names["pipe"].num_timesteps == 4 and names["picture"].size == (16, 16)
        assert type(names["pipe"].scheduler).__name__ in ("ConsistencyScheduler", "LCMScheduler")


def test_validation_draws_without_guidance_what_has_it_inside(train, monkeypatch):
    """Else its pictures look burnt out, and nobody can tell whether the training goes well."""
    asked = []

    def draw(*_, num_inference_steps, guidance_scale, **how):
        asked.append((num_inference_steps, guidance_scale))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("latentdiff.objectives.tasks.validation_pictures", draw)
    for guidance in ((3.0,), (1.0, 3.0)):
        train(**DISTILL, max_train_steps=1, consistency_guidance=guidance, validation_prompts=("a cat",))
    assert asked == [(4, 1.0), (4, TrainConfig.validation_guidance_scale)]


def test_a_distilled_lora_is_drawn_with_by_both_libraries(train, settings):
    """Else adapters that make a model fast are of no use without this project."""
    folder = train(**DISTILL, consistency_guidance=(4.0,), consistency_steps=20, lora_rank=2)
    found = []
    for kind, scheduler in (
        (LatentDiffPipeline, ConsistencyScheduler),
        (diffusers.StableDiffusionPipeline, diffusers.LCMScheduler),
    ):
        pipe = kind.from_pretrained(settings["pretrained_model_name_or_path"])
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler.from_pretrained(folder)
        assert pipe.scheduler.config.original_inference_steps == 20
        assert pipe.scheduler.config.prediction_type == "epsilon"
        without = pipe("a cat", num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
        pipe.load_lora_weights(folder)
        picture = pipe("a cat", num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
        found.append(picture.images[0].tobytes())
        assert found[-1] != without.images[0].tobytes()
    assert found[0] == found[1]


def test_the_teacher_may_be_another_network(train, tiny_pipeline_folder, tmp_path):
    """Else what the teacher puts out is taken for what the student does, or a teacher that cannot teach it is let pass.

    With a guidance of 1 and the same weights, a student that begins at the teacher has the loss that it has without one
    named; of another prediction type it has another.
    """
    fixed = {**DISTILL, "consistency_guidance": (1.0,), "max_train_steps": 1}
    own = losses(train(**fixed, output_dir=str(tmp_path / "own")))
    assert own == losses(train(**fixed, output_dir=str(tmp_path / "a"), consistency_teacher=str(tiny_pipeline_folder)))
    pipe = LatentDiffPipeline(**tiny_components())
    for settings in ({"prediction_type": "v_prediction"}, {"beta_end": 0.02}):
        pipe.scheduler = type(pipe.scheduler).from_config(tiny_components()["scheduler"].config, **settings)
        pipe.save_pretrained(tmp_path / "teacher")
        named = {"consistency_teacher": str(tmp_path / "teacher"), "output_dir": str(tmp_path / "b")}
        if "beta_end" in settings:
            with pytest.raises(ConfigError, match="another noise schedule"):
                train(**fixed, **named)
        else:
            assert losses(train(**fixed, **named)) != own


def test_the_student_of_trajectories_answers_with_their_ends(settings, tiny_pipeline_folder, monkeypatch):
    """Else it learns to point elsewhere: a network that knows every end and every way there has no loss, in each of the
    things that a network may put out; and an error counts as that of v does, or one step would hardly be learned."""
    accelerator = Accelerator(cpu=True)
    teacher = LatentDiffPipeline.from_pretrained(tiny_pipeline_folder).unet.requires_grad_(False)
    width, generator = teacher.config.cross_attention_dim, torch.Generator().manual_seed(0)
    captions, empty = torch.randn(3, 8, width, generator=generator), torch.randn(1, 8, width, generator=generator)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=generator)
    batch = Batch(latents, noise, torch.zeros(3), captions, None, guidance_scales=torch.tensor([1.0, 2.0, 5.0]))
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = ConsistencyScheduler(original_inference_steps=4, prediction_type=kind)
        abar = scheduler.alphas_cumprod
        taught = Teacher(teacher, "epsilon", None, empty)
        monkeypatch.setattr(consistency, "load_teacher", lambda *_, taught=taught: taught)
        objective = TrajectoryDistillation(TrainConfig(consistency="trajectories", unet="pretrained"))
        objective.prepare(accelerator, scheduler, teacher, lambda rows, choices: empty, total_steps=1)
        grid = [249, 499, 749, 999]
        with torch.no_grad():
            points, end = ddim_trajectory(taught.of(batch), abar, "epsilon", noise, grid)

        def student(x_t, timesteps, text, off=0.0):
            assert torch.equal(text, captions.repeat(4, 1, 1)) and torch.equal(x_t, points.flatten(0, 1))  # noqa: B023
            assert timesteps.tolist() == [t for t in grid for _ in range(3)]  # noqa: B023
            a, s = abar[timesteps].sqrt().reshape(-1, 1, 1, 1), (1 - abar[timesteps]).sqrt().reshape(-1, 1, 1, 1)  # noqa: B023
            ends = end.repeat(4, 1, 1, 1)  # noqa: B023
            found = {"epsilon": (x_t - a * ends) / s, "sample": ends, "v_prediction": (a * x_t - ends) / s}
            return SimpleNamespace(sample=found[kind] + off)  # noqa: B023

        assert objective(student, batch, 0).max() < 1e-6
        wrong = objective(partial(student, off=0.5), batch, 0)
        as_v = {"v_prediction": torch.ones(4), "epsilon": 1 / abar[grid], "sample": 1 / (1 - abar[grid])}[kind]
        torch.testing.assert_close(wrong, (0.25 * as_v.mean()).expand(3), rtol=1e-3, atol=1e-3)


def test_a_guide_unet_leads_the_teacher(train, tiny_pipeline_folder, tmp_path):
    """Else it is read and not used. Where teacher and guide are the same network there is nothing to lead away from,
    whatever the weight, and a guide that cannot be one is refused."""

    def loss(guidance, **changes):
        changes = {**DISTILL, "consistency_guidance": (guidance,), "max_train_steps": 1, **changes}
        return losses(train(**changes, output_dir=str(tmp_path / "run")))[0]

    plain, guide = loss(1.0), str(tiny_pipeline_folder)
    assert loss(3.0) != pytest.approx(plain, rel=1e-3)
    assert loss(3.0, consistency_guide_unet=guide) == pytest.approx(plain, rel=1e-3)
    with pytest.raises(ConfigError, match="consistency_guide_unet: .*nowhere"):
        loss(3.0, consistency_guide_unet=str(tmp_path / "nowhere"))


def test_a_guidance_input_changes_nothing_until_it_is_trained():
    """Else the student does not begin as the teacher."""
    unet, text = tiny_components()["unet"], torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    latents, timesteps = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([999, 19])
    with torch.no_grad():
        before = unet(latents, timesteps, text).sample
        add_guidance_input(unet)
        after = unet(latents, timesteps, text, timestep_cond=torch.randn(2, 256)).sample
    assert torch.equal(before, after) and unet.config.time_cond_proj_dim == 256
    peer = diffusers.UNet2DConditionModel(**{k: v for k, v in unet.config.items() if not k.startswith("_")})
    assert peer.state_dict().keys() == unet.state_dict().keys()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"consistency_steps": 20}, "consistency_steps: has no effect"),
        ({"consistency": "distillation"}, "consistency: 'distillation' of new weights"),
        ({"consistency": "training", "consistency_guidance": (2.0,)}, "consistency_guidance: has no effect"),
        ({"consistency_guide_unet": "x"}, "consistency_guide_unet: has no effect"),
        ({"consistency": "trajectories"}, "consistency: 'trajectories' of new weights"),
        ({"consistency": "training", "consistency_guide_unet": "x"}, "consistency_guide_unet: has no effect"),
        ({"consistency": "training", "consistency_teacher": "x"}, "consistency_teacher: has no effect"),
        ({"consistency": "training", "snr_gamma": 5.0}, "snr_gamma: weighs"),
        ({"consistency": "training", "consistency_steps": 5}, "consistency_steps: 5"),
        ({**DISTILL, "unet": "pretrained", "consistency_guidance": (4.0, 2.0)}, "consistency_guidance: "),
        ({**DISTILL, "unet": "pretrained", "consistency_guidance": (0.5,)}, "consistency_guidance: "),
        ({**DISTILL, "unet": "pretrained", "lora_rank": 2}, "consistency_guidance: a range"),
        ({**DISTILL, "unet": "pretrained", "prediction_type": "v_prediction"}, "prediction_type: a student"),
        ({**DISTILL, "unet": "pretrained", "train_text_encoder": True}, "train_text_encoder: "),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, named):
    """Else an option is taken and not used, or a run fails after hours."""
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**changes)
