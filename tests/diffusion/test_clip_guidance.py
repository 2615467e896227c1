"""CLIP guidance: the score is transformers' own, the change of the output that of Dhariwal & Nichol, algorithm 2."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from latentdiff import LatentDiffPipeline
from latentdiff.data import emoji
from latentdiff.diffusion.clip_guidance import ClipGuidance, square_boxes
from latentdiff.diffusion.noise_schedule import PREDICTION_TYPES, predict_x0_and_epsilon
from latentdiff.emoji64.clip import load_text_encoder
from latentdiff.emoji64.vae import blend
from latentdiff.models.parts import fingerprint
from tiny import tiny_components, tiny_tokenizer

PROMPTS = ["a cat", "red dog"]
SIZE = 16
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tiny_clip() -> CLIPModel:
    tokenizer = tiny_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {
        "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = tower | {"image_size": SIZE, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def guidance(scale=3.0, dtype=torch.float32, **options) -> ClipGuidance:
    return ClipGuidance(tiny_clip().to(dtype), tiny_tokenizer(), scale=scale, **options)


class Along(ClipGuidance):
    """A stand-in whose score is linear, scale * <direction, pixels>, so that its gradient is known."""

    direction = torch.linspace(-1, 1, 3 * 4 * 4).reshape(3, 4, 4)

    def score(self, pixels, text):
        return self.scale * (pixels * self.direction).sum(dim=(1, 2, 3))


def along(scale=3.0, **options) -> Along:
    return Along(tiny_clip(), tiny_tokenizer(), scale=scale, **options)


def drawn(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


# ---- the score ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A saved CLIP with OpenAI's mean and deviation."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder / "clip")
    tiny_tokenizer().save_pretrained(folder / "clip")
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=OPENAI_MEAN, image_std=OPENAI_STD
    )
    processor.save_pretrained(folder / "clip")
    return folder


@pytest.mark.parametrize(("side", "within"), [(SIZE, 1e-5), (48, 5e-3)])
def test_score_is_the_cosine_that_transformers_finds(clip_folder, side, within):
    """Pictures would be shown to the CLIP otherwise than it learned to see them, or texts read otherwise.

    A picture that is made smaller is rounded to whole shades by transformers, and is not here.
    """
    smooth = F.interpolate(drawn(2, 3, 5, 5), (side, side), mode="bicubic").clamp(-2, 2)
    shades = ((smooth + 2) / 4 * 255).round().to(torch.uint8)
    processor, model = CLIPImageProcessor.from_pretrained(clip_folder / "clip"), tiny_clip()
    pictures = [Image.fromarray(np.asarray(s.permute(1, 2, 0))) for s in shades]
    tokens = tiny_tokenizer()(PROMPTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        peer = model(**tokens, pixel_values=processor(pictures, return_tensors="pt").pixel_values)
    clip = ClipGuidance.from_pretrained(clip_folder, subfolder="clip", scale=2.0)
    ours = clip.score(shades / 127.5 - 1, clip.embed_text(PROMPTS, "cpu"))
    expected = 2.0 * peer.logits_per_image.diag() / model.logit_scale.exp()
    torch.testing.assert_close(ours, expected.detach(), atol=within, rtol=0)


def test_text_has_unit_length_and_does_not_depend_on_its_neighbours():
    """A prompt would guide otherwise beside a longer one."""
    clip = guidance()
    text = clip.embed_text([*PROMPTS, "a red dog " * 9], "cpu")
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(clip.embed_text(PROMPTS[:1], "cpu"), text[:1])
    assert not text.requires_grad


def test_cutouts_are_averaged():
    """Some squares would be left out or counted twice."""
    clip, pixels = guidance(cutouts=2), drawn(2, 3, 20, 24)
    text = clip.embed_text(PROMPTS, "cpu")
    boxes = [(0, 2, 20), (0, 0, 15), (0, 9, 15), (5, 0, 15), (5, 9, 15)]
    whole = guidance()
    each = [whole.score(pixels[:, :, t : t + side, l : l + side], text) for t, l, side in boxes]
    torch.testing.assert_close(clip.score(pixels, text), torch.stack(each).mean(dim=0))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (80, 48), (7, 5)])
@pytest.mark.parametrize("cutouts", [2, 3, 4])
def test_cutouts_lie_in_the_picture_and_reach_its_corners(height, width, cutouts):
    """A square would be cut off and squeezed, or a side of the picture never be looked at."""
    first, *small = square_boxes(height, width, cutouts)
    side = min(height, width)
    assert first == ((height - side) // 2, (width - side) // 2, side) and len(small) == cutouts**2
    assert all(t >= 0 and l >= 0 and t + s <= height and l + s <= width for t, l, s in small)
    corners = {(t, l) for t, l, _ in small}
    last = small[0][2]
    assert {(0, 0), (0, width - last), (height - last, 0), (height - last, width - last)} <= corners


# ---- what it does to the output -------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_unet", [True, False])
def test_closed_form_of_a_linear_network_and_a_linear_score(through_unet):
    """epsilon(x) = k x and score(x_0) = w <d, x_0> with x_0 = (x - s epsilon) / a: the gradient is w d (1 - s k) / a;
    not through the network, w d a.
    """
    k, w, abar, x = 0.4, 3.0, 0.36, drawn(2, 3, 4, 4)
    a, s = 0.6, 0.8
    clip = along(w, through_unet=through_unet)
    output = clip.guide(lambda x_t: k * x_t, x, abar, "epsilon", same, clip.embed_text(PROMPTS, "cpu"))
    gradient = w * clip.direction * ((1 - s * k) / a if through_unet else a)
    torch.testing.assert_close(output, k * x - s * gradient)


@pytest.mark.parametrize("abar", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("through_unet", [True, False])
def test_the_same_guidance_whatever_the_network_predicts(abar, through_unet):
    """A network that predicts v or x_0 would be guided by another amount than its twin that predicts epsilon."""
    clip, x, a, s = guidance(30.0, through_unet=through_unet), drawn(2, 3, SIZE, SIZE), abar**0.5, (1 - abar) ** 0.5
    kernel = 0.3 * drawn(3, 3, 3, 3, seed=1)

    def epsilon(x_t):
        return torch.tanh(F.conv2d(x_t, kernel, padding=1))

    def x_0(x_t):
        return (x_t - s * epsilon(x_t)) / a

    predict = {"epsilon": epsilon, "sample": x_0, "v_prediction": lambda x_t: a * epsilon(x_t) - s * x_0(x_t)}
    text, table, changes = clip.embed_text(PROMPTS, "cpu"), torch.tensor([abar]), {}
    for kind in PREDICTION_TYPES:
        output = clip.guide(predict[kind], x, abar, kind, same, text)
        changes[kind] = predict_x0_and_epsilon(table, output, x, 0, kind)[1] - epsilon(x).detach()
    assert changes["epsilon"].abs().max() > 1e-3
    for kind in ("sample", "v_prediction"):
        torch.testing.assert_close(changes[kind], changes["epsilon"], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("cutouts", [0, 2])
def test_gradient_by_finite_differences(cutouts):
    """The change would not be along the gradient of the score through network, decoder, resizing and CLIP."""
    double = torch.float64
    clip, abar, sigma = guidance(dtype=double, cutouts=cutouts), 0.3, 0.7**0.5
    x, direction = (drawn(2, 4, 4, 5, seed=seed, dtype=double) for seed in (0, 1))
    inner, outer = 0.3 * drawn(4, 4, 3, 3, seed=2, dtype=double), 0.3 * drawn(4, 3, 5, 5, seed=3, dtype=double)
    text = clip.embed_text(PROMPTS, "cpu")

    def predict(x_t):
        return torch.tanh(F.conv2d(x_t, inner, padding=1))

    def up(x_0):
        return F.conv_transpose2d(x_0, outer, stride=5)

    @torch.no_grad()
    def score(x_t):
        return clip.score(up((x_t - sigma * predict(x_t)) / abar**0.5), text).sum()

    change = clip.guide(predict, x, abar, "epsilon", up, text) - predict(x)
    step = 1e-5
    expected = (score(x + step * direction) - score(x - step * direction)) / (2 * step)
    torch.testing.assert_close((change * direction).sum(), -sigma * expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("scale", "abar"), [(0.0, 0.5), (3.0, 0.0)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_nothing_changes_without_a_scale_or_without_signal(scale, abar, prediction_type):
    """Switched off it would still cost or round something; at zero terminal SNR it would divide by 0."""
    clip, x = guidance(scale), drawn(2, 3, SIZE, SIZE)
    output = clip.guide(torch.sin, x, abar, prediction_type, same, clip.embed_text(PROMPTS, "cpu"))
    assert torch.equal(output, torch.sin(x))


def test_only_within_its_interval():
    """The CLIP would be asked at noise levels where it was to be left out, sigma_lo among them, sigma_hi not."""
    clip, x, table = guidance(interval=(0.5, 2.0)), drawn(2, 3, SIZE, SIZE), {}
    text = clip.embed_text(PROMPTS, "cpu")
    for sigma in (0.25, 0.5, 1.0, 2.0, 4.0):
        output = clip.guide(torch.sin, x, 1 / (1 + sigma**2), "epsilon", same, text)
        table[sigma] = not torch.equal(output, torch.sin(x))
    assert table == {0.25: False, 0.5: False, 1.0: True, 2.0: True, 4.0: False}


def test_a_small_step_raises_the_score():
    """The sampler would be pushed away from the prompt: x_0 of the guided epsilon must match it better."""
    clip, x, table = guidance(0.5), drawn(2, 3, SIZE, SIZE), torch.tensor([0.9])
    text = clip.embed_text(PROMPTS, "cpu")
    outputs = torch.zeros_like(x), clip.guide(torch.zeros_like, x, 0.9, "epsilon", same, text)
    plain, guided = (clip.score(predict_x0_and_epsilon(table, o, x, 0, "epsilon")[0], text) for o in outputs)
    assert (guided > plain).all()


def test_only_x_gathers_gradients_and_nothing_stays_behind():
    """Every step would keep its graph, or the weights of a network that is trained meanwhile would gather gradients."""
    parts, clip = tiny_components(), guidance()
    unet, vae = parts["unet"], parts["vae"]
    hidden, x, before = drawn(2, 8, 16), drawn(2, 4, 4, 4), fingerprint(clip.model)
    with torch.no_grad():  # as inside a pipeline
        output = clip.guide(
            lambda x_t: unet(x_t, 10, hidden).sample,
            x,
            0.5,
            "epsilon",
            lambda x_0: vae.decode(x_0).sample,
            clip.embed_text(PROMPTS, "cpu"),
        )
        assert not torch.equal(output, unet(x, 10, hidden).sample)
    assert output.grad_fn is None and not output.requires_grad and not x.requires_grad and x.grad is None
    parameters = [*unet.parameters(), *vae.parameters(), *clip.model.parameters()]
    assert all(p.grad is None for p in parameters) and fingerprint(clip.model) == before
    assert all(p.requires_grad for p in unet.parameters())  # as they were given


def test_half_precision():
    """A pipeline in bf16 would get fp32 back, or a gradient lost in rounding."""
    x, exact, half = drawn(2, 3, SIZE, SIZE).bfloat16(), guidance(30.0), guidance(30.0, torch.bfloat16)
    text = exact.embed_text(PROMPTS, "cpu")
    outputs = [
        clip.guide(torch.sin, x, 0.5, "epsilon", lambda x_0: x_0.bfloat16(), text) - torch.sin(x)
        for clip in (exact, half)
    ]
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    assert F.cosine_similarity(*(o.float().flatten() for o in outputs), dim=0) > 0.99
    assert half.score(x, text).dtype == torch.float32


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "scale is -1.0"),
        ({"cutouts": 1}, "cutouts is 1"),
        ({"cutouts": -2}, "cutouts is -2"),
        ({"interval": (2.0, 1.0)}, r"\(2.0, 1.0\)"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        guidance(**options)


def test_calls_that_make_no_sense():
    clip = guidance()
    text = clip.embed_text(PROMPTS, "cpu")
    with pytest.raises(ValueError, match="text has 2 rows for 3 pictures"):
        clip.score(drawn(3, 3, SIZE, SIZE), text)
    with pytest.raises(ValueError, match="prediction_type is 'eps'"):
        clip.guide(torch.sin, drawn(2, 3, SIZE, SIZE), 0.5, "eps", same, text)


def test_a_clip_without_its_preprocessor_is_not_guessed_at(clip_folder, tmp_path):
    """Pictures would be shown to it in another range of shades than it was trained on."""
    tiny_clip().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="preprocessor_config.json"):
        ClipGuidance.from_pretrained(tmp_path, scale=1.0)


# ---- what is shipped ------------------------------------------------------------------------------------------------

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
SHIPPED = CHECKPOINTS / "emoji64-clip"


def test_the_shipped_clip_reads_words_as_the_shipped_pipeline_does():
    """It would guide to something else than what the UNet was told; or not fit beside the code."""
    clip = ClipGuidance.from_pretrained(SHIPPED, scale=1.0)
    text_encoder, tokenizer = load_text_encoder(str(CHECKPOINTS / "emoji64"))
    assert fingerprint(clip.model.text_model.float()) == fingerprint(text_encoder)
    assert clip.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 10e6
    assert not list(SHIPPED.glob("*.bin")) and (SHIPPED / "README.md").is_file()


def test_the_shipped_clip_knows_pictures_that_are_blurred_too():
    """Of what the sampler is about to draw it would say nothing: 250 pictures, so chance finds 1 in 250."""
    clip, built = ClipGuidance.from_pretrained(SHIPPED, scale=1.0, dtype=torch.float32), emoji.load()
    chosen = built.indices()[::5][:250]
    pixels = blend(torch.from_numpy(built.pictures[chosen]), torch.ones(len(chosen), 3))
    text = clip.embed_text([emoji.captions(*built.rows[i])[1] for i in chosen], "cpu")
    for shown in (pixels, F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4)):
        with torch.no_grad():
            pictures = clip.model.visual_projection(clip.model.vision_model(shown).pooler_output)
        found = (text @ F.normalize(pictures, dim=-1).T).argmax(dim=1) == torch.arange(len(chosen))
        assert found.float().mean() > 0.3


@pytest.mark.parametrize("options", [{"scale": 100.0, "interval": (0.0, 5.0)}, {"scale": 300.0, "through_unet": False}])
def test_guided_pictures_match_their_prompts_better_to_the_shipped_clip(options):
    """The option would be without effect in a pipeline, or the gradient point elsewhere."""
    pipeline = LatentDiffPipeline.from_pretrained(CHECKPOINTS / "emoji64")
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a cat", "a red apple", "pizza", "a rocket", "a clock", "an umbrella"]
    clip, scores = ClipGuidance.from_pretrained(SHIPPED, **options), []
    text = clip.embed_text(prompts, "cpu")
    for guide in (None, clip):
        drawn = pipeline(
            prompts, num_inference_steps=5, guidance_scale=1.0, seeds=list(range(6)), clip_guidance=guide,
            output_type="pt",
        ).images  # fmt: skip
        with torch.no_grad():
            scores.append(clip.score(drawn * 2 - 1, text) / clip.scale)
    assert scores[1].mean() > scores[0].mean() + 0.02
