"""The held-out loss is one number of the weights alone, and drawing pictures leaves the run as it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image

from latentdiff import DDPMScheduler, LatentDiffInpaintPipeline, LatentDiffPipeline
from latentdiff.data.masks import masked_examples
from latentdiff.diffusion.losses import denoising_loss
from latentdiff.models.parts import fingerprint
from latentdiff.models.unet import widen_input
from latentdiff.objectives.tasks import inpainted_pictures, validation_pictures
from latentdiff.training.ema import EMA
from latentdiff.training.held_out import TIMESTEPS_PER_PICTURE, HeldOutLoss
from latentdiff.utils.grid import labelled_grid
from tiny import tiny_components


def noise_picture(row: int, crop: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(row).integers(0, 256, (16, 16, 3), np.uint8))


def held_out_loss(count: int = 6, held_out=(1, 4), steps: int = 1000, size_of=None, **settings) -> HeldOutLoss:
    sizes = np.array(size_of or [0] * count)
    pictures = SimpleNamespace(
        held_out=np.array([row in held_out for row in range(count)]), size_of=sizes, image=noise_picture
    )

    def moments(rows):
        (size,) = set(sizes[rows].tolist())
        mean = torch.tensor(rows, dtype=torch.float32)[:, None, None, None].expand(-1, 4, 4, 4 + size)
        return mean, torch.zeros_like(mean)

    def states(rows, choices):
        said = [10 * row + choice + 1 for row, choice in zip(rows, choices, strict=True)]
        return torch.tensor(said, dtype=torch.float32)[:, None, None].expand(-1, 8, 16) / 100

    config = SimpleNamespace(scaling_factor=0.5, shift_factor=None)
    return HeldOutLoss(pictures, moments, states, vae_config=config, num_train_timesteps=steps, **settings)


class Spy(torch.nn.Module):
    """A UNet that keeps what it is asked."""

    def __init__(self):
        super().__init__()
        self.device, self.asked, self.modes = torch.device("cpu"), [], []

    def forward(self, noisy, timesteps, hidden):
        self.asked.append((noisy, timesteps, hidden))
        self.modes.append((self.training, torch.is_grad_enabled()))
        return SimpleNamespace(sample=torch.zeros_like(noisy[:, :4]))


SCHEDULER = DDPMScheduler(clip_sample=False)


def asked(loss: HeldOutLoss, **settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spy = Spy()
    loss(spy, SCHEDULER, **settings)
    return tuple(torch.cat(tensors) for tensors in zip(*spy.asked, strict=True))


def test_the_same_question_at_every_call():
    """A change of the loss would be another draw of noise and timesteps, not a better model."""
    torch.manual_seed(1)
    loss = held_out_loss()
    first, again = asked(loss), asked(loss)
    torch.manual_seed(2)
    anew = asked(held_out_loss())
    in_pieces = asked(loss, batch_size=3)
    for other in (again, anew, in_pieces):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_inpainting_is_measured_with_the_same_masks_at_every_call():
    """A mask that leaves more open would look like a worse model; and other noise or timesteps than text to image is
    measured at would change that loss, too."""
    vae = tiny_components()["vae"].requires_grad_(False)
    loss = held_out_loss(inpainting_vae=vae)
    seen, timesteps, hidden = asked(loss, batch_size=5)
    torch.manual_seed(3)
    again = asked(held_out_loss(inpainting_vae=vae))
    assert all(torch.equal(a, b) for a, b in zip((seen, timesteps, hidden), again, strict=True))
    assert seen.shape[1] == 9
    noisy, *plain = asked(held_out_loss())
    assert torch.equal(seen[:, :4], noisy) and torch.equal(timesteps, plain[0]) and torch.equal(hidden, plain[1])
    # Each picture's conditions stand beside its own latents: two pictures in turn, whatever the timestep.
    conditions = seen[:, 4:]
    for of in (0, 1):
        assert torch.equal(conditions[of::2], conditions[of : of + 1].expand(TIMESTEPS_PER_PICTURE, -1, -1, -1))
    assert not torch.equal(conditions[0, 1:], conditions[1, 1:])


@pytest.mark.parametrize("held_out", [(1, 4), tuple(range(125))])
def test_timesteps_are_stratified(held_out):
    """The loss at a few timesteps that happened to be drawn would stand for all: there is one in each equal part."""
    _, timesteps, _ = asked(held_out_loss(125, held_out))
    count = TIMESTEPS_PER_PICTURE * len(held_out)
    assert len(timesteps) == count
    strata = (timesteps * count) // 1000
    assert sorted(strata.tolist()) == list(range(count))
    # Each picture has late and early ones: by chance alone one half of T for all eight has probability 2 ** -7.
    first_picture = timesteps[:: len(held_out)]
    assert first_picture.min() < 500 <= first_picture.max()


def test_only_held_out_pictures_under_their_own_words():
    """What was trained on would be measured, or a picture under another's caption."""
    noisy, timesteps, hidden = asked(held_out_loss())
    rows = (hidden[:, 0, 0] * 100).round().long() // 10
    assert set(rows.tolist()) == {1, 4} and all(rows.bincount(minlength=6)[[1, 4]] == TIMESTEPS_PER_PICTURE)
    assert ((hidden[:, 0, 0] * 100).round().long() % 10 == 1).all()  # the first caption, never the empty one
    # x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps with x_0 = 0.5 * row: what is left after x_0 is noise of unit deviation.
    abar = SCHEDULER.alphas_cumprod[timesteps][:, None, None, None]
    noise = (noisy - abar.sqrt() * 0.5 * rows[:, None, None, None]) / (1 - abar).sqrt()
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 0.15


def test_the_value_is_the_mean_squared_error():
    """A network that says zero has as its loss the mean square of the noise, whatever the batch size."""
    loss = held_out_loss()
    ((_, noise, *_),) = loss._groups
    expected = float(denoising_loss(torch.zeros_like(noise), noise).mean())
    assert loss(Spy(), SCHEDULER) == pytest.approx(expected, rel=1e-6)
    assert loss(Spy(), SCHEDULER, batch_size=5) == pytest.approx(expected, rel=1e-6)


def test_pictures_of_several_sizes():
    """Pictures of another shape than the first would be left out, or their timesteps not be spread evenly."""
    spy, loss = Spy(), held_out_loss(size_of=[0, 1, 0, 0, 3, 0], held_out=(0, 1, 3, 4))
    loss(spy, SCHEDULER)
    assert [tuple(noisy.shape) for noisy, *_ in spy.asked] == [
        (16, 4, 4, 4), (8, 4, 4, 5), (8, 4, 4, 7)
    ]  # fmt: skip
    timesteps = torch.cat([timesteps for _, timesteps, _ in spy.asked])
    assert sorted((timesteps * 32 // 1000).tolist()) == list(range(32))


def test_no_gradients_and_the_mode_comes_back():
    """Validation would keep graphs in memory, or training go on in eval mode."""
    for training in (True, False):
        spy = Spy().train(training)
        held_out_loss()(spy, SCHEDULER)
        assert set(spy.modes) == {(False, False)} and spy.training is training


def test_without_held_out_pictures_there_is_none():
    assert held_out_loss(held_out=()).pictures == 0
    assert held_out_loss(20, range(20), max_pictures=3).pictures == 3


def draw(pipeline, prompts=("a cat", "a dog"), seed: int = 0):
    return np.asarray(validation_pictures(pipeline, prompts, seed=seed, num_inference_steps=2, guidance_scale=3.0))


def test_pictures_come_from_the_same_noise_and_leave_the_weights():
    """Two validations could not be compared, or training would go on from other weights, mode or random numbers."""
    pipeline = LatentDiffPipeline(**tiny_components())
    pipeline.unet.train()
    before, state = fingerprint(pipeline.unet), torch.get_rng_state()
    first, second = draw(pipeline), draw(pipeline)
    assert np.array_equal(first, second) and not np.array_equal(first, draw(pipeline, seed=7))
    assert pipeline.unet.training and fingerprint(pipeline.unet) == before
    assert torch.equal(state, torch.get_rng_state())


def test_a_prompt_keeps_its_picture_when_others_are_added():
    """Picture i is drawn from the noise of seed + i, as the pipeline itself draws it."""
    pipeline = LatentDiffPipeline(**tiny_components())
    pipeline.set_progress_bar_config(disable=True)
    grid = draw(pipeline, ["a cat", "a dog"], seed=5)
    generator = torch.Generator().manual_seed(6)
    alone = pipeline("a dog", num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
    # labelled_grid: 16 pixels are enlarged to 128, after margins of 8
    cell = grid[8 : 8 + 128, 8 + 136 : 8 + 136 + 128].astype(int)
    wanted = np.asarray(alone.resize((128, 128), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(cell - wanted).max() <= 1


def test_own_weights_are_back_after_a_validation_with_the_average():
    """diffusers' example validated under the average and went on training from it."""
    pipeline = LatentDiffPipeline(**tiny_components())
    ema = EMA(pipeline.unet, 0.9)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.add_(0.05)
    own, plain = fingerprint(pipeline.unet), draw(pipeline)
    with ema.swapped_into(pipeline.unet):
        averaged = draw(pipeline)
    assert fingerprint(pipeline.unet) == own and np.array_equal(draw(pipeline), plain)
    assert np.array_equal(averaged, draw(LatentDiffPipeline(**tiny_components())))
    assert not np.array_equal(averaged, plain)


def examples(count: int, held_out=()):
    pictures = SimpleNamespace(
        held_out=np.array([row in held_out for row in range(count)]),
        captions=[[f"picture {row}", "another"] for row in range(count)],
        image=noise_picture,
    )
    return masked_examples(pictures, count=4)


def test_examples_are_of_both_kinds_and_always_the_same():
    """Two validations could not be compared; or what is learnt by heart be taken for what is learnt."""
    names = [example.caption for example in examples(10, held_out=(3, 7, 8, 9))]
    assert names == ["picture 3", "picture 7", "picture 0", "picture 1"]
    assert [example.caption for example in examples(10)] == [f"picture {row}" for row in range(4)]
    assert len(examples(5, held_out=(1, 2, 3, 4))) == 4 and len(examples(2)) == 2
    torch.manual_seed(4)
    for one, other in zip(examples(10), examples(10), strict=True):
        assert one.mask.tobytes() == other.mask.tobytes() and one.image.size == one.mask.size
        shown, mask, image = (np.asarray(picture) for picture in (one.masked, one.mask, one.image))
        assert set(np.unique(mask)) == {0, 255}
        assert (shown[mask == 255] == 128).all() and np.array_equal(shown[mask == 0], image[mask == 0])


def test_inpainted_pictures_stand_beside_what_they_were():
    """The grid would show other pictures than the pipeline draws, or the run go on in another mode."""
    parts = tiny_components()
    widen_input(parts["unet"], 9)
    with torch.no_grad():
        parts["unet"].conv_in.weight.normal_(generator=torch.Generator().manual_seed(0))
    parts["unet"].train()
    pipeline = LatentDiffInpaintPipeline(**parts)
    before, state = fingerprint(parts["unet"]), torch.get_rng_state()
    how = {"num_inference_steps": 2, "guidance_scale": 3.0}
    grid = inpainted_pictures(pipeline, examples(2), seed=5, **how)
    assert parts["unet"].training and fingerprint(parts["unet"]) == before
    assert torch.equal(state, torch.get_rng_state())
    parts["unet"].eval()
    cells, labels = [], []
    for i, example in enumerate(examples(2)):
        drawn = pipeline(
            f"picture {i}", image=example.image, mask_image=example.mask, width=16, height=16,
            generator=torch.Generator().manual_seed(5 + i), **how,
        ).images[0]  # fmt: skip
        cells += [example.masked, drawn, example.image]
        labels += [f"picture {i}", "drawn", "as it was"]
    assert np.array_equal(np.asarray(grid), np.asarray(labelled_grid(cells, labels, columns=3)))


def test_pictures_that_are_not_finite_do_not_end_a_run(train, monkeypatch, capsys):
    """A VAE that overflows in fp16 would end in its first validation a run whose loss is finite."""
    real = AutoencoderKL.decode

    def spoil(self, z, **how):
        pixels = real(self, z, return_dict=False)[0] * (float("nan") if z.any() else 1)  # zeros are tried at the start
        return (pixels,) if how.get("return_dict") is False else DecoderOutput(sample=pixels)

    monkeypatch.setattr(AutoencoderKL, "decode", spoil)
    folder = train(max_train_steps=2, validation_steps=1, validation_prompts=("a cat",), checkpointing_steps=2)
    assert "step 1: no pictures: the VAE put out inf or nan" in "".join(capsys.readouterr())
    assert not (folder / "validation").exists() and (folder / "model_index.json").exists()
