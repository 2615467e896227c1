"""Words, and pictures for IP-Adapters, as the hidden states that a UNet attends to.

Prompts may be longer than what the text encoder reads at a time, and parts of them weighted, "a (red:1.3) apple"; both
only when asked for.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models import ImageProjection
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers

from latentdiff.utils.tokens import token_limit

logger = logging.get_logger(__name__)

_MARKS = re.compile(r"\\[()]|\(|:\s*(?P<weight>\d*\.?\d+)\s*\)|\)|[^\\():]+|.", re.DOTALL)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""A prompt as parts with their weights: "a (red:1.3) apple" -> [("a ", 1.0), ("red", 1.3), (" apple", 1.0)].

    Weights inside one another multiply. Parentheses without a number stay what they are, as do those written \( and \).
    """
    parts: list[tuple[str, float]] = []
    opened: list[int] = []  # where in `parts` each "(" stands that has not been closed
    for mark in _MARKS.finditer(prompt):
        text, weight = mark.group(), mark.group("weight")
        if weight is not None and opened:
            start = opened.pop()
            parts[start:] = [(inner, w * float(weight)) for inner, w in parts[start + 1 :]]
            continue
        if text == "(":
            opened.append(len(parts))
        elif text == ")" and opened:
            opened.pop()
        parts.append((text.removeprefix("\\") if text in (r"\(", r"\)") else text, 1.0))
    merged: list[tuple[str, float]] = []
    for text, weight in parts:
        if merged and merged[-1][1] == weight:
            text = merged.pop()[0] + text
        merged.append((text, weight))
    return merged


def cut_between_words(ends_word: Sequence[bool], room: int) -> Iterator[slice]:
    """Slices of at most `room` tokens that end where a word does, or inside a word that is longer than that."""
    start = 0
    while start < len(ends_word):
        end = min(start + room, len(ends_word))
        while end < len(ends_word) and end > start and not ends_word[end - 1]:
            end -= 1
        end = end if end > start else start + room
        yield slice(start, end)
        start = end


class Pieces(NamedTuple):
    """A text's tokens in n pieces that the text encoder can read, each between its two marks and padded to L."""

    input_ids: torch.Tensor  # (n, L) int64
    attention_mask: torch.Tensor  # (n, L) int64
    weights: torch.Tensor  # (n, L) float32; 1 for marks and padding


@contextlib.contextmanager
def _text_lora_scale(text_encoder: torch.nn.Module | None, scale: float | None):
    """Run the text encoder's LoRA layers at `scale`; undone at the end, also after an error."""
    if scale is None or text_encoder is None:
        yield
        return
    scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(text_encoder, scale)


class PromptEmbedding:
    """`encode_prompt` for a pipeline that has `tokenizer`, `text_encoder`, `image_encoder` and `unet`."""

    def _embed_prompts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        num_images_per_prompt: int,
        prompt_weights: bool,
        long_prompts: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`encode_prompt`, with what a call has told for all of its steps."""
        return self.encode_prompt(
            prompt,
            self._execution_device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            lora_scale=(self.cross_attention_kwargs or {}).get("scale"),
            clip_skip=self.clip_skip,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
        )

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        prompt_weights: bool = False,
        long_prompts: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the text encoder's hidden states for the prompts and for what guidance leads away from.

        Args:
            prompt: one prompt or B of them; None if `prompt_embeds` (B, tokens, width) are given.
            negative_prompt: one for every prompt or B of them; None is the empty text.
            lora_scale: strength of the text encoder's LoRA layers.
            clip_skip: take the hidden states this many layers before the last (of the prompt, not of the negative one).
            prompt_weights: read "(word:1.3)" as a weight: the hidden state z of each of its tokens becomes
                z_0 + 1.3 (z - z_0), z_0 being that of the empty text in the same place. Else it is text like any other.
            long_prompts: encode what is longer than the text encoder reads in pieces, cut between words. Their hidden
                states follow one another, of every text as many as of the longest: a picture then depends a little on
                the texts beside it. Else the rest is cut off and logged.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, each (B * num_images_per_prompt, tokens, width), those of one
            prompt side by side. Without guidance the second is what was passed in.

        Raises:
            ValueError: not as many negative prompts as prompts; text given but no text encoder; `prompt_embeds` of a
                length that no negative text can have.
        """
        with _text_lora_scale(self.text_encoder, lora_scale):
            texts, negative_texts = [], []
            length, most = self._max_tokens, None if long_prompts else 1
            if prompt_embeds is None:
                prompts = [prompt] if isinstance(prompt, str) else prompt
                texts = [self._pieces(text, length, most, prompt_weights) for text in prompts]
            elif self._max_tokens and prompt_embeds.shape[1] < self._max_tokens:
                length = prompt_embeds.shape[1]
            elif self._max_tokens:
                most = prompt_embeds.shape[1] // self._max_tokens
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                count = len(texts) if prompt_embeds is None else len(prompt_embeds)
                negatives = self._negative_prompts(negative_prompt, count)
                negative_texts = [self._pieces(text, length, most, prompt_weights) for text in negatives]
            count = max([len(pieces.input_ids) for pieces in texts + negative_texts], default=1)
            if texts:
                prompt_embeds = self._encode(texts, count, device, clip_skip)
            if negative_texts:
                negative_prompt_embeds = self._encode(negative_texts, max(count, most or 1), device)
        if do_classifier_free_guidance:
            self._check_same_length(prompt_embeds, negative_prompt_embeds)

        dtype = next((m.dtype for m in (self.text_encoder, self.unet) if m is not None), prompt_embeds.dtype)
        prompt_embeds = prompt_embeds.to(device=device, dtype=dtype)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device=device, dtype=dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    @property
    def _max_tokens(self) -> int | None:
        return None if self.tokenizer is None else token_limit(self.tokenizer, self.text_encoder)

    @staticmethod
    def _check_same_length(prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor | None) -> None:
        if negative_prompt_embeds is not None and prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ValueError(
                f"prompt_embeds {tuple(prompt_embeds.shape)} and negative_prompt_embeds "
                f"{tuple(negative_prompt_embeds.shape)} differ in shape"
            )

    def _pieces(self, text: str, length: int, most: int | None, weighted: bool) -> Pieces:
        """A text's tokens in pieces of `length`, `most` of them at the most; what that cuts off is logged."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text_encoder or no tokenizer: pass prompt_embeds, and for guidance_scale above 1"
                " negative_prompt_embeds too"
            )
        tokenizer = self.tokenizer
        text = self.maybe_convert_prompt(text, tokenizer)  # a textual inversion of several vectors
        ids, weights = [], []
        for part, weight in parse_weights(text) if weighted else [(text, 1.0)]:
            ids += tokenizer(part, add_special_tokens=False, verbose=False).input_ids
            weights += [weight] * (len(ids) - len(weights))
        ends_word = [token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
        room = length - 2  # between the marks of beginning and end
        parts = list(cut_between_words(ends_word, room)) or [slice(0, 0)]
        if most is not None and len(parts) > most:
            parts[most - 1 :] = [slice(parts[most - 1].start, parts[most - 1].start + room)]
            rest = tokenizer.decode(ids[parts[-1].stop :])
            logger.warning(f"{length} tokens are the most the text encoder reads; cut from {text!r}: {rest!r}")
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        padding = [room - len(ids[part]) for part in parts]
        return Pieces(
            torch.tensor([[start, *ids[p], end] + [pad] * n for p, n in zip(parts, padding, strict=True)]),
            torch.tensor([[1] * (length - n) + [0] * n for n in padding]),
            torch.tensor([[1, *weights[p]] + [1] * (n + 1) for p, n in zip(parts, padding, strict=True)]).float(),
        )

    def _encode(
        self, texts: list[Pieces], count: int, device: torch.device, clip_skip: int | None = None
    ) -> torch.Tensor:
        """(len(texts), count * L, width): hidden states after the final norm; short texts filled up with empty ones."""
        empty = self._pieces("", texts[0].input_ids.shape[1], 1, weighted=False)
        filled = [
            [torch.cat([own, *[nothing] * (count - len(own))]) for own, nothing in zip(text, empty, strict=True)]
            for text in texts
        ]
        ids, mask, weights = (torch.cat(column) for column in zip(*filled, strict=True))
        hidden = self._run_text_encoder(ids, mask, device, clip_skip)
        if (weights != 1).any():
            nothing = self._run_text_encoder(empty.input_ids, empty.attention_mask, device, clip_skip)
            hidden = torch.lerp(nothing, hidden, weights[..., None].to(hidden))  # exact where the weight is 1
        return hidden.reshape(len(texts), -1, hidden.shape[-1])

    def _run_text_encoder(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, device: torch.device, clip_skip: int | None
    ) -> torch.Tensor:
        needs_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        output = self.text_encoder(
            input_ids.to(device),
            attention_mask=attention_mask.to(device) if needs_mask else None,
            output_hidden_states=clip_skip is not None,
        )
        if clip_skip is None:
            return output[0]
        # Inner layers come without the final norm. transformers 5 has it on the model itself, 4 one level down.
        text_model = getattr(self.text_encoder, "text_model", self.text_encoder)
        return text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])

    @staticmethod
    def _negative_prompts(negative_prompt: str | list[str] | None, batch_size: int) -> list[str]:
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt or ""] * batch_size
        if len(negative_prompt) != batch_size:
            raise ValueError(
                f"{len(negative_prompt)} negative prompts for {batch_size} prompts: pass 1 or {batch_size}"
            )
        return negative_prompt

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: PipelineImageInput | None,
        ip_adapter_image_embeds: list[torch.Tensor] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> list[torch.Tensor]:
        """Return one batch of image features per loaded IP-Adapter, the unconditional half first under guidance.

        Raises:
            ValueError: images and features both; not as many images as IP-Adapters.
        """
        if ip_adapter_image is not None and ip_adapter_image_embeds is not None:
            raise ValueError("pass ip_adapter_image or ip_adapter_image_embeds, not both")
        if ip_adapter_image_embeds is None:
            images = ip_adapter_image if isinstance(ip_adapter_image, list) else [ip_adapter_image]
            layers = self.unet.encoder_hid_proj.image_projection_layers
            if len(images) != len(layers):
                raise ValueError(f"ip_adapter_image: {len(images)} images for {len(layers)} IP-Adapters")
            ip_adapter_image_embeds = [
                self._encode_image(image, device, isinstance(layer, ImageProjection), do_classifier_free_guidance)
                for image, layer in zip(images, layers, strict=True)
            ]
        batches = []
        for embeds in ip_adapter_image_embeds:
            halves = embeds.chunk(2) if do_classifier_free_guidance else (embeds,)
            batches.append(torch.cat([torch.cat([half] * num_images_per_prompt) for half in halves]).to(device))
        return batches

    def _encode_image(
        self, image: PipelineImageInput, device: torch.device, pooled: bool, with_uncond: bool
    ) -> torch.Tensor:
        """CLIP features of `image`, (1, ...); with_uncond puts those of no image before them, (2, ...)."""
        if not isinstance(image, torch.Tensor):
            image = self.feature_extractor(image, return_tensors="pt").pixel_values
        image = image.to(device=device, dtype=next(self.image_encoder.parameters()).dtype)
        if pooled:
            embeds = self.image_encoder(image).image_embeds
            uncond = torch.zeros_like(embeds)
        else:
            embeds = self.image_encoder(image, output_hidden_states=True).hidden_states[-2]
            uncond = self.image_encoder(torch.zeros_like(image), output_hidden_states=True).hidden_states[-2]
        return torch.stack([uncond, embeds]) if with_uncond else embeds[None]

    def _check_prompts(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt: str | list[str] | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> None:
        check_text("prompt", prompt, prompt_embeds, required=True)
        check_text("negative_prompt", negative_prompt, negative_prompt_embeds, required=False)
        if prompt_embeds is not None:
            self._check_same_length(prompt_embeds, negative_prompt_embeds)
        if not self.do_classifier_free_guidance and (negative_prompt or negative_prompt_embeds is not None):
            logger.warning(f"without guidance (guidance_scale={self.guidance_scale}) the negative prompt has no effect")


def check_text(name: str, text: str | list[str] | None, embeds: torch.Tensor | None, required: bool) -> None:
    if text is not None and embeds is not None:
        raise ValueError(f"pass {name} or {name}_embeds, not both")
    if text is None and embeds is None and required:
        raise ValueError(f"pass {name} or {name}_embeds")
    if text is not None and not isinstance(text, str):
        if not isinstance(text, list) or not all(isinstance(item, str) for item in text):
            raise ValueError(f"{name} must be a text or a list of texts, not {text!r}")
        if not text:
            raise ValueError(f"{name} is an empty list: pass at least one text")
