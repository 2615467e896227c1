"""Train the small CLIP of the embedded default: `accelerate launch -m latentdiff.emoji64.clip`.

Contrastive language-image pretraining (Radford et al. 2021, arXiv 2103.00020, figure 3) on the emoji that are not held
out, with a byte-level BPE tokenizer of its own. Its text half conditions the UNet. Two captions are drawn for each
picture and contrasted with the picture and with each other, so that paraphrases meet; a batch shows each emoji in
several styles and colours, so that those words must be heard too.

A second run with `--text_encoder_of FOLDER` gives a finished text encoder eyes: locked-image tuning (Zhai et al. 2021,
arXiv 2111.07991) with the towers exchanged. Prompts mean what they meant, and the CLIP can guide the sampler.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from ..data import emoji
from ..models.parts import freeze
from ..models.whole import load_network, load_tokenizer, loading
from ..utils import randomness
from ..utils.errors import ConfigError
from ..utils.flags import run_cli
from ..utils.weight_files import only_variant, write_earlier_names
from .pretrain import PretrainConfig, pretrain
from .vae import blend

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 20
VIEWS = 4  # pictures of one emoji in a batch


@dataclass(frozen=True, kw_only=True)
class PretrainCLIPConfig(PretrainConfig):
    """How the shipped text encoder was made."""

    max_train_steps: int = 700
    train_batch_size: int = 128
    learning_rate: float = 1e-3
    vocab_size: int = 2048
    """Size of the byte-level BPE vocabulary."""
    text_encoder_of: str | None = None
    """Folder or Hub id whose text encoder and tokenizer stay as they are, to the last bit: trained are a vision tower
    and the projections. 1,000 steps or more are worth their while."""
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision of the saved CLIP."""

    def __post_init__(self):
        if self.text_encoder_of is not None and self.vocab_size != PretrainCLIPConfig.vocab_size:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; with text_encoder_of it must be left out, the tokenizer is given"
            )


def train_tokenizer(texts: list[str], vocab_size: int) -> CLIPTokenizer:
    """A CLIP tokenizer (lower case, byte-level BPE, end-of-word marks) whose merges come from `texts`."""
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # room for the two marks
        initial_alphabet=alphabet,
        # Every byte exists with and without the end-of-word mark, else a rare letter at a word's end would be lost. In
        # this order: left to the trainer, their numbers, and so the merges, would be others in every process.
        special_tokens=[byte + "</w>" for byte in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = bpe.get_vocab()
    tokens = sorted(trained, key=trained.get) + [START, END]
    merges = [tuple(pair) for pair in _merges(bpe)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_LENGTH)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def load_text_encoder(path: str) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Text encoder and tokenizer of a Stable-Diffusion-shaped folder or Hub id, in fp32.

    Raises:
        ConfigError: one of them is not there or cannot be read, or they do not belong together.
    """
    with loading(f"text_encoder_of: no text encoder could be loaded from {path!r}"):
        variant = only_variant(Path(path, "text_encoder"))
        encoder = load_network(CLIPTextModel, path, "text_encoder", variant=variant).float()
        tokenizer = load_tokenizer(CLIPTokenizer, path, "tokenizer")
    if len(tokenizer) != encoder.config.vocab_size:
        raise ConfigError(
            f"text_encoder_of: in {path!r} the tokenizer has {len(tokenizer)} tokens and the text encoder "
            f"{encoder.config.vocab_size}; there must be as many"
        )
    return encoder, tokenizer


def build_around(text_encoder: CLIPTextModel) -> CLIPModel:
    """A CLIP with this text tower, frozen, new projections and a new vision tower, 128 wide over 8x8 patches."""
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": emoji.RESOLUTION, "patch_size": 8, "hidden_act": "gelu", "projection_dim": 128,
    }  # fmt: skip
    text = text_encoder.config.to_dict()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    model.set_attn_implementation("eager")  # of 65 tokens: in bf16 on a CPU, a step in 0.6 of the time of the fused one
    model.text_model.load_state_dict(text_encoder.state_dict())
    freeze(model.text_model)
    return model


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A text tower 192 wide and a vision tower 128 wide over 16x16 patches, both four layers deep."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 6, "max_position_embeddings": MAX_LENGTH, "hidden_act": "gelu", "projection_dim": 128,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": emoji.RESOLUTION, "patch_size": 16, "hidden_act": "gelu", "projection_dim": 128,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts -> (B, L) token ids, cut at 20 and padded to the longest: the mask is causal, padding changes nothing."""
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids


def draw_batch(built: emoji.EmojiSet, by_concept: list[list[int]], rows: torch.Tensor, generator: torch.Generator):
    """VIEWS pictures of each concept in `rows` on drawn colours, each with two of its captions.

    A third of them are on white. Pairs of emoji and colour that are held out are never drawn.

    Returns:
        pixels (B, 3, 64, 64) in [-1, 1] and two lists of B captions.
    """
    indices, colours, first, second = [], [], [], []
    for row in rows.tolist():
        for _ in range(VIEWS):
            index, colour = draw_view(built, by_concept[row], generator)
            said = emoji.captions(*built.rows[index], colour)
            indices.append(index)
            colours.append(emoji.BACKGROUNDS[colour])
            first.append(said[_randint(len(said), generator)])
            second.append(said[_randint(len(said), generator)])
    pictures = torch.from_numpy(built.pictures[indices])
    return blend(pictures, torch.tensor(colours) / 255), first, second


def draw_view(built: emoji.EmojiSet, of_concept: list[int], generator: torch.Generator) -> tuple[int, str]:
    """One of a concept's pictures, and the name of a background that is not held out for it: a third are white."""
    index = of_concept[_randint(len(of_concept), generator)]
    free = _free_colours(built.rows[index][0])
    return index, "white" if _randint(3, generator) == 0 else free[_randint(len(free), generator)]


@cache
def _free_colours(concept: emoji.Concept) -> tuple[str, ...]:
    return tuple(colour for colour in emoji.COLOURS if not concept.pair_held_out(colour))


def _randint(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (1,), generator=generator))


def contrastive_loss(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross entropy over cosine similarities of matching rows, a and b (B, D) -> scalar."""
    logits = scale * F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def clip_loss(model: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Picture against either caption, and caption against caption -> scalar.

    Args:
        pixels: (B, 3, 64, 64) in [-1, 1].
        ids: (2B, L) token ids; rows b and B + b are captions of picture b.
    """
    pictures = model.visual_projection(model.vision_model(pixels).pooler_output)
    texts = model.text_projection(model.text_model(ids).pooler_output)
    one, two = texts.chunk(2)
    scale = model.logit_scale.exp().clamp(max=100)
    pairs = ((pictures, one), (pictures, two), (one, two))
    return sum(contrastive_loss(a, b, scale) for a, b in pairs) / len(pairs)


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, built: emoji.EmojiSet, indices: list[int]) -> float:
    """Share of pictures on white that their caption "a cat, twemoji style" finds first among all of `indices`."""
    said = [emoji.captions(*built.rows[i])[1] for i in indices]
    pixels = blend(torch.from_numpy(built.pictures[indices]), torch.ones(len(indices), 3)).to(model.device)
    pictures = torch.cat([model.get_image_features(x).pooler_output for x in pixels.split(256)])
    texts = model.get_text_features(tokenize(tokenizer, said).to(model.device)).pooler_output
    similarity = F.normalize(texts, dim=-1) @ F.normalize(pictures, dim=-1).T
    return float((similarity.argmax(dim=1).cpu() == torch.arange(len(indices))).float().mean())


# ---- eyes for a finished text encoder -------------------------------------------------------------------------------


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures as a sampler sees them on its way: moved and scaled, half of them blurred, half noisy, (B, 3, H, W).

    Up to an eighth of the side to each side and 15 % of the size; a Gaussian blur of up to 3 pixels' deviation, as what
    a network predicts from much noise is blurred; white noise of a deviation up to 0.3. What moves in at the border
    repeats the border.
    """
    batch, channels, height, width = pixels.shape

    def drawn(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator)

    def half_of_the_time(strength: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand(batch, generator=generator) < 0.5, strength, 0)

    zoom, none = drawn(1 / 1.15, 1.15), torch.zeros(batch)
    matrix = torch.stack([zoom, none, drawn(-0.25, 0.25), none, zoom, drawn(-0.25, 0.25)], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    blur = half_of_the_time(drawn(0.3, 3.0))
    offsets = torch.arange(-6, 7)
    kernel = torch.exp(-0.5 * (offsets / blur.clamp(min=1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)[:, None]
    planes = F.pad(moved, (6, 6, 6, 6), mode="replicate").reshape(1, -1, height + 12, width + 12)
    planes = F.conv2d(planes, kernel[:, :, None, :], groups=batch * channels)
    blurred = F.conv2d(planes, kernel[:, :, :, None], groups=batch * channels).reshape(pixels.shape)

    noise = half_of_the_time(drawn(0.0, 0.3))[:, None, None, None]
    return blurred + noise * torch.randn(pixels.shape, generator=generator)


class LockedTextBatches:
    """Pictures, and the frozen text tower's word on every caption that may be said: each is encoded once, at the start.

    So a picture can be contrasted with a caption of every emoji there is, not only with those of its batch.
    """

    def __init__(self, built: emoji.EmojiSet, by_concept: list[list[int]], text_model, tokenizer: CLIPTokenizer):
        self.built, self.by_concept = built, by_concept
        said = {c: None for views in by_concept for i in views for g in emoji.BACKGROUNDS
                for c in emoji.captions(*built.rows[i], g)}  # fmt: skip
        said = sorted(said, key=len)  # of one length there is little to pad
        self._row = {caption: row for row, caption in enumerate(said)}
        with torch.no_grad():
            chunks = [said[i : i + 256] for i in range(0, len(said), 256)]
            ids = (tokenize(tokenizer, chunk).to(text_model.device) for chunk in chunks)
            self._pooled = torch.cat([text_model(i).pooler_output.float() for i in ids])

    def draw(self, concepts: torch.Tensor, generator: torch.Generator):
        """VIEWS pictures of each of these concepts with a caption each, and a caption for each of all the others.

        Returns:
            pixels (B, 3, 64, 64), augmented; pooled texts (B + N, D), the first B those of the pictures; and whether
            caption j is true of picture i without being its own, (B, B) bool.
        """
        here = concepts.tolist()
        elsewhere = sorted(set(range(len(self.by_concept))) - set(here))
        views = [draw_view(self.built, self.by_concept[c], generator) for c in [*here] * VIEWS]
        others = [draw_view(self.built, self.by_concept[c], generator) for c in elsewhere]
        true = [emoji.captions(*self.built.rows[index], colour) for index, colour in views]
        of_others = [emoji.captions(*self.built.rows[index], colour) for index, colour in others]
        own, other = ([said[_randint(len(said), generator)] for said in group] for group in (true, of_others))
        also_true = torch.tensor([[i != j and caption in said for j, caption in enumerate(own)]
                                  for i, said in enumerate(true)])  # fmt: skip
        pictures = torch.from_numpy(self.built.pictures[[index for index, _ in views]])
        ground = torch.tensor([emoji.BACKGROUNDS[colour] for _, colour in views]) / 255
        pooled = self._pooled[[self._row[caption] for caption in own + other]]
        return augment(blend(pictures, ground), generator), pooled, also_true


def locked_text_loss(
    model: CLIPModel, pixels: torch.Tensor, pooled: torch.Tensor, also_true: torch.Tensor
) -> torch.Tensor:
    """As `contrastive_loss` of pictures and captions, with more captions than pictures -> scalar.

    Args:
        pixels: (B, 3, 64, 64) in [-1, 1].
        pooled: (B + N, D) of the text tower; row b is that of picture b, the last N of other pictures.
        also_true: (B, B) bool; a caption j that is true of picture i, too, is no wrong answer to it.
    """
    count = len(pixels)
    pictures = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output).float(), dim=-1)
    texts = F.normalize(model.text_projection(pooled).float(), dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * pictures @ texts.T
    among = logits[:, :count].masked_fill(also_true, -torch.inf)
    target = torch.arange(count, device=pixels.device)
    picture_to_text = F.cross_entropy(torch.cat([among, logits[:, count:]], dim=1), target)
    return (picture_to_text + F.cross_entropy(among.T, target)) / 2


# ---- both runs ------------------------------------------------------------------------------------------------------


def main(config: PretrainCLIPConfig) -> None:
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    built = emoji.load()
    by_concept: dict[str, list[int]] = {}
    for i in built.indices(default=False):
        if built.rows[i][0].category in emoji.CATEGORIES:
            by_concept.setdefault(built.rows[i][0].key, []).append(i)
    concepts = list(by_concept.values())
    train = _train_both_towers if config.text_encoder_of is None else _train_vision
    model, tokenizer = train(config, accelerator, built, concepts)
    if accelerator.is_main_process:
        share = retrieval(model, tokenizer, built, built.indices())
        folder = Path(config.output_dir)
        _save(config, model, tokenizer, folder)
        print(f"caption finds its picture first among {len(built.indices())}: {share:.3f}; saved in {folder}")


def _train_both_towers(config, accelerator, built, concepts) -> tuple[CLIPModel, CLIPTokenizer]:
    every = [
        c for views in concepts for i in views for g in emoji.BACKGROUNDS for c in emoji.captions(*built.rows[i], g)
    ]
    tokenizer = train_tokenizer(every, config.vocab_size)

    def loss_at(model: torch.nn.Module, step: int) -> torch.Tensor:
        rows, generator = _draws(config, accelerator, step, len(concepts))
        pixels, first, second = draw_batch(built, concepts, rows, generator)
        ids = tokenize(tokenizer, first + second).to(accelerator.device)
        return clip_loss(accelerator.unwrap_model(model), pixels.to(accelerator.device), ids)

    torch.manual_seed(config.seed)  # transformers draws initial weights from the global generator
    model = pretrain(config, accelerator, build_clip(tokenizer), loss_at, Path(config.output_dir) / "clip-training")
    return model, tokenizer


def _train_vision(config, accelerator, built, concepts) -> tuple[CLIPModel, CLIPTokenizer]:
    text_encoder, tokenizer = load_text_encoder(config.text_encoder_of)
    with accelerator.autocast():
        batches = LockedTextBatches(built, concepts, text_encoder.to(accelerator.device), tokenizer)

    def loss_at(model: torch.nn.Module, step: int) -> torch.Tensor:
        rows, generator = _draws(config, accelerator, step, len(concepts))
        batch = (tensor.to(accelerator.device) for tensor in batches.draw(rows, generator))
        return locked_text_loss(accelerator.unwrap_model(model), *batch)

    torch.manual_seed(config.seed)  # transformers draws initial weights from the global generator
    model = build_around(text_encoder)
    model = pretrain(config, accelerator, model, loss_at, Path(config.output_dir) / "clip-training")
    return model, tokenizer


def _draws(config, accelerator, step: int, concepts: int) -> tuple[torch.Tensor, torch.Generator]:
    """The rows of the concepts that this process shows at a step, and the generator for all else."""
    count = config.train_batch_size // VIEWS
    first_sample = (step * accelerator.num_processes + accelerator.process_index) * count
    rows = randomness.data_order(config.seed, first_sample, count, concepts)
    return rows, randomness.generator(config.seed, "compose", step, accelerator.process_index)


def _save(config, model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The CLIP with what it takes to use it and, where that was trained, its text half for a pipeline."""
    if config.text_encoder_of is None:
        text_encoder = CLIPTextModel(model.config.text_config)
        text_encoder.load_state_dict(model.text_model.state_dict())
        text_encoder.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
    if config.save_dtype == "fp16":
        model.half()
    model.save_pretrained(folder / "clip")  # both towers: the vision half judges and guides
    tokenizer.save_pretrained(folder / "clip")
    size = {"height": emoji.RESOLUTION, "width": emoji.RESOLUTION}
    processor = CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder / "clip")
    for saved in (path for path in folder.iterdir() if path.is_dir()):
        write_earlier_names(saved)


if __name__ == "__main__":
    run_cli(main, PretrainCLIPConfig)
