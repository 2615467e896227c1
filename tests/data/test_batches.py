"""What is drawn follows from the seed, the step and the global sample index, and from nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentdiff.data import batches as module
from latentdiff.data.batches import Batch, Batches
from latentdiff.models.latents import encode_moments, to_pixels

CONFIG = SimpleNamespace(scaling_factor=0.5, shift_factor=None)


class Toy:
    """Rows, moments and hidden states that show where they come from: everything of row r is r.

    A mirror image adds 10 to its row's moments, crop c adds 100 c. Row r's captions are 10 r + 1, 10 r + 2 and
    10 r + 3, the empty one is 0. Rows of size s have latents of 3 + s columns.
    """

    def __init__(self, count: int = 10, held_out=(), repeats=None, size_of=None, crops: int = 1):
        self.captions = [[str(10 * row + choice) for choice in (1, 2, 3)] for row in range(count)]
        self.caption_counts = np.full(count, 3)
        self.repeats = np.array(repeats or [1] * count)
        self.held_out = np.array([row in held_out for row in range(count)])
        self.size_of = np.array(size_of or [0] * count)
        self.sizes, self.crops = [None] * (self.size_of.max() + 1), crops

    def name(self, row):
        return f"{row}.png"

    def image(self, row, crop):
        """Of the latents' shape, times the VAE's factor of 4."""
        shades = np.random.default_rng([row, crop]).integers(0, 256, (12, 4 * (3 + self.size_of[row]), 3), np.uint8)
        return Image.fromarray(shades)

    def moments(self, rows, crops, flips):
        (size,) = set(self.size_of[rows].tolist())
        shown = [row + 100 * crop + 10 * flip for row, crop, flip in zip(rows, crops, flips, strict=True)]
        mean = torch.tensor(shown, dtype=torch.float32)[:, None, None, None].expand(-1, 2, 3, 3 + size)
        return mean, torch.full_like(mean, 0.25)

    def hidden_states(self, rows, choices):
        said = [10 * row + choice + 1 if choice >= 0 else 0 for row, choice in zip(rows, choices, strict=True)]
        return torch.tensor(said).view(-1, 1, 1)


class Source:
    """Such a function, as what it stands for: read from a cache or not."""

    def __init__(self, function, kept: bool):
        self._function, self.kept, self.asked = function, kept, []

    def __call__(self, *args):
        self.asked.append(args)
        return self._function(*args)


OPTIONS = {
    "vae_config": CONFIG,
    "num_train_timesteps": 1000,
    "seed": 0,
    "caption_dropout": 0.1,
    "random_flip": False,
    "micro_batch": 8,
    "guidance_range": (2.0, 6.0),
}


def batches(toy: Toy | None = None, kept: bool = True, **settings) -> Batches:
    toy = toy or Toy()
    moments, hidden_states = Source(toy.moments, kept), Source(toy.hidden_states, kept)
    return Batches(toy, moments, hidden_states, **OPTIONS | settings)


def captions(batch: Batch) -> list[int]:
    return batch.encoder_hidden_states.flatten().tolist()


FIELDS = ("latents", "noise", "timesteps", "encoder_hidden_states", "guidance_scales")


def test_captions_are_those_of_the_hidden_states():
    """A text encoder that is trained too would read other captions than a frozen one, or the dropped ones."""
    toy = Toy()
    frozen = batches(toy, caption_dropout=0.5)
    trained = Batches(toy, Source(toy.moments, True), None, **OPTIONS | {"caption_dropout": 0.5})
    for step in range(3):
        batch, same = trained.at(step), frozen.at(step)
        assert batch.encoder_hidden_states is None and same.captions is None
        assert [int(said or 0) for said in batch.captions] == captions(same)
        for field in ("latents", "noise", "timesteps"):
            assert torch.equal(getattr(batch, field), getattr(same, field))


@pytest.mark.parametrize(
    ("processes", "accumulation", "micro_batch"), [(1, 1, 8), (2, 1, 4), (4, 1, 2), (1, 2, 4), (2, 2, 2), (8, 1, 1)]
)
@pytest.mark.parametrize(("flip", "noise_offset"), [(False, 0.0), (True, 0.1)])
def test_the_same_step_on_any_number_of_processes_and_micro_batches(
    processes, accumulation, micro_batch, flip, noise_offset
):
    """A run on two GPUs would train on other noise, or twice on the same, than a run on one."""
    one = batches(random_flip=flip, noise_offset=noise_offset)
    for step in (0, 3):
        whole = one.at(step)
        shares = [
            batches(
                random_flip=flip,
                noise_offset=noise_offset,
                micro_batch=micro_batch,
                accumulation=accumulation,
                processes=processes,
                process=process,
            ).at(step, micro_step)
            for micro_step in range(accumulation)
            for process in range(processes)
        ]
        for field in FIELDS:
            assert torch.equal(torch.cat([getattr(share, field) for share in shares]), getattr(whole, field)), field


def test_guidance_scales_are_even_over_their_range():
    """A student of latent consistency distillation would never be told some of what it is asked for later."""
    drawn = torch.cat([batches().at(step).guidance_scales for step in range(40)])
    ranks = (torch.arange(320) + 0.5) / 320
    gap = ((drawn.sort().values - 2) / 4 - ranks).abs().max()  # Kolmogorov and Smirnov's, 1.63 / sqrt(n) at 1 %
    assert gap < 1.63 / 320**0.5 and drawn.unique().numel() == 320
    assert batches(guidance_range=None).at(0).guidance_scales is None


def test_offset_noise_shifts_whole_channels():
    """Each number would be shifted on its own, which is only more noise, or all pictures alike."""
    plain, offset = batches().at(0).noise, batches(noise_offset=0.5).at(0).noise
    shift = offset - plain  # (8, 2, 3, 3)
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift))
    many = torch.cat([batches(noise_offset=0.5).at(step).noise - batches().at(step).noise for step in range(60)])
    shifts = many[:, :, 0, 0].flatten()  # 960 draws of deviation 0.5: the mean within 4 of its own deviations
    assert shifts.mean().abs() < 4 * 0.5 / 960**0.5 and abs(shifts.std() - 0.5) < 4 * 0.5 / (2 * 960) ** 0.5


def test_a_step_names_the_pictures_of_all_processes():
    """A step that fails would be blamed on the wrong pictures."""
    half = batches(micro_batch=4, processes=2, process=1)
    rows = half.rows_at(5)
    assert rows == batches().rows_at(5) and len(rows) == 8
    assert half.at(5).latents.shape[0] == 4 and half.name(rows[0]) == f"{rows[0]}.png"


def test_a_step_can_be_asked_for_in_any_order():
    """A resumed run would see other batches than an uninterrupted one."""
    forwards, backwards = batches(), batches()
    wanted = [forwards.at(step) for step in range(5)]
    for step in reversed(range(5)):
        again = backwards.at(step)
        assert all(torch.equal(getattr(again, field), getattr(wanted[step], field)) for field in FIELDS)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_read_ahead_is_what_comes_next(accumulation):
    """A step would train on the data of another, or every step wait for the disk."""
    toy, settings = Toy(), {"accumulation": accumulation, "micro_batch": 4, "random_flip": True}
    ahead, anew = batches(toy, **settings), batches(toy, kept=False, **settings)
    turns = [(step, micro_step) for step in range(5) for micro_step in range(accumulation)]
    for turn in turns:
        ours, theirs = ahead.at(*turn), anew.at(*turn)
        assert all(torch.equal(getattr(ours, field), getattr(theirs, field)) for field in FIELDS)
    ahead._reader.shutdown()
    assert len(ahead._moments.asked) == len(turns) + 1  # each once, and the one that would come next
    assert len(anew._moments.asked) == len(turns)


def test_steps_and_seeds_differ():
    """The same noise would come back at every step, or seed 0 would be no seed."""
    first, second, other = batches().at(0), batches().at(1), batches(seed=1).at(0)
    for field in ("noise", "timesteps"):
        assert not torch.equal(getattr(first, field), getattr(second, field))
        assert not torch.equal(getattr(first, field), getattr(other, field))
    assert not torch.equal(first.noise[0], first.noise[1])


def rows_of(batch: Batch) -> torch.Tensor:
    """latents = (row + 0.25 * noise) * 0.5, so the mean over 18 numbers is within 0.5 * 0.5 of row / 2."""
    return (batch.latents.mean(dim=(1, 2, 3)) / CONFIG.scaling_factor).round().long()


def test_latents_are_drawn_from_the_posterior_and_scaled_once():
    """The posterior's mean alone would be trained on, or the noise to be predicted would be in the latent."""
    drawn = [batches().at(step) for step in range(300)]
    rows = torch.cat([rows_of(batch) for batch in drawn])
    latents, noise = torch.cat([b.latents for b in drawn]), torch.cat([b.noise for b in drawn])
    posterior = (latents / 0.5 - rows[:, None, None, None]) / 0.25
    # 300 * 8 * 18 = 43,200 standard normal numbers: mean within 5 / sqrt(n), variance within 5 sqrt(2 / n).
    count = posterior.numel()
    assert abs(posterior.mean()) < 5 / count**0.5 and abs(posterior.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((posterior * noise).mean()) < 5 / count**0.5
    assert abs(noise.mean()) < 5 / count**0.5 and abs(noise.var() - 1) < 5 * (2 / count) ** 0.5


def test_every_epoch_has_every_trained_row_as_often_as_it_repeats_and_no_held_out_one():
    """Held-out rows would be trained on, or some rows more often than others."""
    toy = Toy(10, held_out={2, 5}, repeats=[3, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    drawn = batches(toy, micro_batch=5)
    assert drawn.epoch_length == 10
    for epoch in range(3):
        seen = torch.cat([rows_of(drawn.at(2 * epoch)), rows_of(drawn.at(2 * epoch + 1))]).tolist()
        assert sorted(seen) == [0, 0, 0, 1, 3, 4, 6, 7, 8, 9]


def test_timesteps_cover_all_of_the_schedule_evenly():
    """The strongest or the weakest noise would never be trained."""
    drawn = torch.cat([batches(num_train_timesteps=10).at(step).timesteps for step in range(1000)])
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    # 8,000 draws, 800 expected each, standard deviation sqrt(8000 * 0.1 * 0.9) = 26.8
    assert (counts - 800).abs().max() < 5 * 26.8


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_share_of_dropped_captions(probability):
    """Guidance would have nothing to push away from, or too few words to follow."""
    said = [c for step in range(1000) for c in captions(batches(caption_dropout=probability).at(step))]
    share = said.count(0) / len(said)
    assert abs(share - probability) <= 5 * (probability * (1 - probability) / len(said)) ** 0.5


def test_captions_are_dropped_anew_in_every_epoch():
    """Drawn once for all, the same tenth of the pictures would stay without captions for the whole run."""
    drawn = batches(caption_dropout=0.5, micro_batch=10)  # one step is an epoch
    dropped = {row: [] for row in range(10)}
    for step in range(30):
        batch = drawn.at(step)
        for row, caption in zip(rows_of(batch).tolist(), captions(batch), strict=True):
            dropped[row].append(caption == 0)
    # A row kept or dropped in all 30 epochs has probability 2 ** -29.
    assert all(0 < sum(epochs) < 30 for epochs in dropped.values())


def test_every_caption_of_a_picture_is_its_own_and_each_has_its_turn():
    """A picture would be trained under another's words, or only ever under its first."""
    seen = {row: set() for row in range(10)}
    for step in range(60):
        batch = batches(caption_dropout=0.0).at(step)
        for row, caption in zip(rows_of(batch).tolist(), captions(batch), strict=True):
            assert caption // 10 == row
            seen[row].add(caption % 10)
    # 48 draws for each row: one of three missing has probability 3 * (2 / 3) ** 48 = 1e-8.
    assert all(said == {1, 2, 3} for said in seen.values())


def test_flips_take_the_mirrored_row_half_of_the_time():
    """Pictures would always or never be mirrored."""
    rows = torch.cat([rows_of(batches(random_flip=True).at(step)) for step in range(250)])
    assert rows.max() >= 10
    share = (rows >= 10).float().mean()
    assert abs(share - 0.5) < 5 * (0.25 / len(rows)) ** 0.5
    assert torch.cat([rows_of(batches().at(step)) for step in range(50)]).max() < 10


def test_captions_do_not_depend_on_the_flip():
    """Switching flips on would change the order, the words or the noise as well."""
    plain, flipped = batches().at(2), batches(random_flip=True).at(2)
    assert torch.equal(rows_of(plain), rows_of(flipped) % 10)
    assert all(torch.equal(getattr(plain, field), getattr(flipped, field)) for field in FIELDS[1:])


def test_every_crop_has_its_turn():
    """Only one of the crops that were encoded would be trained on; and choosing it would change the noise."""
    shown = torch.cat([rows_of(batches(Toy(crops=3)).at(step)) for step in range(60)])
    counts = (shown // 100).bincount()
    # 480 draws, 160 expected of each crop, standard deviation sqrt(480 * 2 / 9) = 10.3
    assert len(counts) == 3 and (counts - 160).abs().max() < 5 * 10.3
    plain, cropped = batches().at(4), batches(Toy(crops=3)).at(4)
    assert torch.equal(rows_of(plain), rows_of(cropped) % 100)
    assert all(torch.equal(getattr(plain, field), getattr(cropped, field)) for field in FIELDS[1:])


@pytest.mark.parametrize(("processes", "accumulation", "micro_batch"), [(2, 1, 4), (4, 1, 2), (1, 2, 4)])
def test_pictures_of_several_sizes_on_any_number_of_processes(processes, accumulation, micro_batch):
    """A step of two sizes cannot be computed; and a step that differs between processes trains on something else."""
    toy = Toy(30, size_of=[0] * 17 + [1] * 9 + [2] * 4)
    for step in range(12):
        whole = batches(toy).at(step)
        shares = [
            batches(toy, micro_batch=micro_batch, accumulation=accumulation, processes=processes, process=process).at(
                step, micro_step
            )
            for micro_step in range(accumulation)
            for process in range(processes)
        ]
        for field in FIELDS:
            assert torch.equal(torch.cat([getattr(share, field) for share in shares]), getattr(whole, field))


# ---- inpainting -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Of Toy's two latent channels, on a quarter of the pictures' sides."""
    return AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=2,
        norm_num_groups=2,
        scaling_factor=CONFIG.scaling_factor,
    ).requires_grad_(False)


@pytest.mark.parametrize(
    ("processes", "accumulation", "micro_batch"), [(1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2), (8, 1, 1)]
)
def test_masks_and_masked_pictures_on_any_number_of_processes(vae, processes, accumulation, micro_batch):
    """Two GPUs would learn from other masks than one, or inpainting from other noise and words than text to image."""
    toy = Toy(30, size_of=[0] * 20 + [1] * 10)
    settings = {"random_flip": True, "inpainting_vae": vae}
    for step in (0, 3):
        plain, whole = batches(toy, random_flip=True).at(step), batches(toy, **settings).at(step)
        shares = [
            batches(
                toy,
                micro_batch=micro_batch,
                accumulation=accumulation,
                processes=processes,
                process=process,
                **settings,
            ).at(step, micro_step)
            for micro_step in range(accumulation)
            for process in range(processes)
        ]
        assert plain.conditions is None
        for field in FIELDS:
            assert torch.equal(torch.cat([getattr(share, field) for share in shares]), getattr(plain, field)), field
        conditions = torch.cat([share.conditions for share in shares])
        assert conditions.shape == (8, 3, *whole.latents.shape[2:])
        # Of another number of pictures at a time a convolution's last bits differ.
        torch.testing.assert_close(conditions, whole.conditions, rtol=0, atol=1e-6)


def test_masks_are_new_at_every_step_and_for_every_sample(vae):
    """One mask for all, or for a picture in all epochs, would be learnt by heart."""
    drawn = batches(inpainting_vae=vae, micro_batch=10)  # one step is an epoch
    masks = torch.cat([drawn.at(step).conditions[:, 0] for step in range(10)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    # At 3 x 3 many are alike, but of 100 the share that are all open is a quarter, and of what is left few are equal.
    assert len(masks.flatten(1).unique(dim=0)) > 25
    again = batches(inpainting_vae=vae, micro_batch=10)
    assert torch.equal(again.at(7).conditions[:, 0], masks[70:80])  # a resume asks for this step first


def test_what_is_masked_is_the_crop_and_the_mirror_image_that_is_trained_on(vae, monkeypatch):
    """The known part would be another picture than the one to be drawn around it."""
    monkeypatch.setattr(module, "random_masks", lambda generators, size: torch.zeros(8, 1, *size[::-1]))
    monkeypatch.setattr(Batches, "_normal", lambda self, stream, step, shape: torch.zeros(shape))
    toy = Toy(10, crops=3)
    batch = batches(toy, inpainting_vae=vae, random_flip=True).at(1)
    shown = (batch.latents[:, 0, 0, 0] / CONFIG.scaling_factor).long().tolist()  # row + 100 crop + 10 flip
    assert len({number // 10 % 10 for number in shown}) == 2 and len({number // 100 for number in shown}) == 3
    for number, condition in zip(shown, batch.conditions, strict=True):
        pixels = to_pixels([toy.image(number % 10, number // 100)])
        mean, _ = encode_moments(vae, pixels.flip(-1) if number // 10 % 10 else pixels)
        assert condition[0].abs().max() == 0
        torch.testing.assert_close(condition[1:], mean[0] * CONFIG.scaling_factor, rtol=0, atol=1e-6)


def test_pixels_are_read_ahead_with_the_rest(vae):
    """Every step would wait until its pictures are decoded; or the masks read ahead be those of another step."""
    ahead, anew = batches(inpainting_vae=vae), batches(kept=False, inpainting_vae=vae)
    for step in range(4):
        assert torch.equal(ahead.at(step).conditions, anew.at(step).conditions)
    ((turn, future),) = ahead._ahead.items()
    assert turn == (4, 0) and future.result().pixels.shape == (8, 3, 12, 12)
