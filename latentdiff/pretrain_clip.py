"""Train the small CLIP of the embedded default: `accelerate launch -m latentdiff.pretrain_clip`.

Contrastive language-image pretraining (Radford et al. 2021, arXiv 2103.00020, figure 3) on the emoji that are not held
out, with a byte-level BPE tokenizer of its own. Its text half conditions the UNet. Two captions are drawn for each
picture and contrasted with the picture and with each other, so that paraphrases meet; a batch shows each emoji in
several styles and colours, so that those words must be heard too.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from . import emoji, random_streams
from .cli_errors import run_cli
from .pretrain import PretrainConfig, pretrain
from .pretrain_vae import blend

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
            index = by_concept[row][_randint(len(by_concept[row]), generator)]
            concept, style = built.rows[index]
            free = [c for c in emoji.COLOURS if not concept.pair_held_out(c)]
            colour = "white" if _randint(3, generator) == 0 else free[_randint(len(free), generator)]
            said = emoji.captions(concept, style, colour)
            indices.append(index)
            colours.append(emoji.BACKGROUNDS[colour])
            first.append(said[_randint(len(said), generator)])
            second.append(said[_randint(len(said), generator)])
    pictures = torch.from_numpy(built.pictures[indices])
    return blend(pictures, torch.tensor(colours) / 255), first, second


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


def main(config: PretrainCLIPConfig) -> None:
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    built = emoji.load()
    by_concept: dict[str, list[int]] = {}
    for i in built.indices(default=False):
        if built.rows[i][0].category in emoji.CATEGORIES:
            by_concept.setdefault(built.rows[i][0].key, []).append(i)
    concepts = list(by_concept.values())
    every = [
        c for views in concepts for i in views for g in emoji.BACKGROUNDS for c in emoji.captions(*built.rows[i], g)
    ]
    tokenizer = train_tokenizer(every, config.vocab_size)

    def loss_at(model: torch.nn.Module, step: int) -> torch.Tensor:
        count = config.train_batch_size // VIEWS
        first_sample = (step * accelerator.num_processes + accelerator.process_index) * count
        rows = random_streams.data_order(config.seed, first_sample, count, len(concepts))
        generator = random_streams.generator(config.seed, "compose", step, accelerator.process_index)
        pixels, first, second = draw_batch(built, concepts, rows, generator)
        ids = tokenize(tokenizer, first + second).to(accelerator.device)
        return clip_loss(accelerator.unwrap_model(model), pixels.to(accelerator.device), ids)

    torch.manual_seed(config.seed)  # transformers draws initial weights from the global generator
    model = pretrain(config, accelerator, build_clip(tokenizer), loss_at, Path(config.output_dir) / "clip-training")
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        model.save_pretrained(folder / "clip")  # both towers: the vision half judges and guides
        text_encoder = CLIPTextModel(model.config.text_config)
        text_encoder.load_state_dict(model.text_model.state_dict())
        text_encoder.save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
        share = retrieval(model, tokenizer, built, built.indices())
        print(f"caption finds its picture first among {len(built.indices())}: {share:.3f}; saved in {folder}")


if __name__ == "__main__":
    run_cli(main, PretrainCLIPConfig)
