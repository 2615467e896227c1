"""CLIP guidance: the sampler is pushed towards pictures that a CLIP finds to match the prompt.

Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2) with the similarity of a CLIP for the
classifier's log-probability (GLIDE, Nichol et al. 2021, arXiv 2112.10741, section 2.4). GLIDE trained a CLIP on noisy
pictures; here any CLIP looks at the x_0 that the network predicts, decoded, and the gradient goes back to x_t. This
file travels with the weights, so of this project it imports only what travels, too.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_processing_utils import BaseImageProcessor

from latentdiff.diffusion.guidance import check_guidance_interval
from latentdiff.diffusion.noise_schedule import PREDICTION_TYPES, at_least_float32, check_choice, predict_x0_and_epsilon

CUTOUT_SHARE = 0.75  # side of a cutout, of the side of the largest square in the picture


class ClipGuidance:
    """A CLIP that guides sampling towards the prompt; one serves any number of pipelines and calls.

    Args:
        model: any transformers CLIPModel; it is frozen and put in eval mode. Its weights may be fp16 or bf16: the score
            is taken in fp32 at least.
        tokenizer: the one that `model` was trained with.
        scale: what multiplies the cosine similarity; 0 changes nothing.
        cutouts: 0 shows the CLIP the largest centred square alone; n >= 2 shows it n x n more squares of three quarters
            of that side, evenly spread over the picture, and averages. They are always the same squares: nothing is
            drawn.
        through_unet: True has the gradient flow through the network, as GLIDE's does. False takes dx_0/dx_t =
            sqrt(abar), which the best denoiser of white noise of unit variance has, as latents are scaled to be: only
            the decoder and the CLIP are differentiated, which is cheaper and bears larger scales.
        interval: (sigma_lo, sigma_hi): only while sigma_lo < sigma <= sigma_hi, with the noise level sigma =
            sqrt((1 - abar) / abar); elsewhere the CLIP is not run. Through the network it is well to leave out the
            highest levels: errors of epsilon count sigma times in x_0, and those of its gradient too. None is all.
        image_mean, image_std: per channel, of pixels in [0, 1], as in the CLIP's preprocessor_config.json. The default
            leaves pixels in [-1, 1].

    Raises:
        ValueError: negative `scale`, `cutouts` that is neither 0 nor at least 2, or an empty `interval`.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        *,
        scale: float,
        cutouts: int = 0,
        through_unet: bool = True,
        interval: tuple[float, float] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        if scale < 0:
            raise ValueError(f"scale is {scale}; it must not be negative")
        if cutouts < 0 or cutouts == 1:
            raise ValueError(f"cutouts is {cutouts}; it must be 0 or at least 2")
        check_guidance_interval(interval)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.scale, self.cutouts, self.through_unet, self.interval = scale, cutouts, through_unet, interval
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        scale: float,
        cutouts: int = 0,
        through_unet: bool = True,
        interval: tuple[float, float] | None = None,
        subfolder: str = "",
        model: CLIPModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        **options: Any,
    ) -> "ClipGuidance":
        """The CLIP of a folder or Hub id, with its tokenizer and the mean and deviation of its preprocessor's config.

        `options`, such as `revision`, `token` and `dtype`, go to transformers; a `model` or `tokenizer` that is given
        takes the place of the folder's. Only safetensors are read. Raises OSError where a part is missing.
        """
        path, where = str(pretrained_model_name_or_path), {"subfolder": subfolder, **options}
        model = model or CLIPModel.from_pretrained(path, use_safetensors=True, **where)
        for only_of_weights in ("dtype", "torch_dtype", "variant"):
            where.pop(only_of_weights, None)
        tokenizer = tokenizer or CLIPTokenizer.from_pretrained(path, **where)
        processor, _ = BaseImageProcessor.get_image_processor_dict(path, **where)
        return cls(
            model,
            tokenizer,
            scale=scale,
            cutouts=cutouts,
            through_unet=through_unet,
            interval=interval,
            image_mean=processor["image_mean"],
            image_std=processor["image_std"],
        )

    def to(self, device: torch.device | str) -> "ClipGuidance":
        """Move the CLIP, and return this."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def embed_text(self, prompts: list[str], device: torch.device | str) -> torch.Tensor:
        """Prompts -> (B, D) float32 of length 1, the text for `guide`; each is cut at the tokenizer's limit."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        # The towers are called one by one: what get_text_features returns depends on the version of transformers.
        pooled = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(at_least_float32(self.model.text_projection(pooled)), dim=-1)

    def score(self, pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """scale * cosine similarity -> (B,) float32, differentiable in `pixels`.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], of any size and floating dtype.
            text: (B, D) from `embed_text`, a row for each picture.

        Raises:
            ValueError: not as many rows as pictures.
        """
        if len(pixels) != len(text):
            raise ValueError(f"text has {len(text)} rows for {len(pixels)} pictures; each picture needs its own")
        views = self._views(at_least_float32(pixels))
        pooled = self.model.vision_model(views.flatten(0, 1).to(self.model.dtype)).pooler_output
        features = F.normalize(at_least_float32(self.model.visual_projection(pooled)), dim=-1)
        similarity = features.unflatten(0, views.shape[:2]) @ text.unsqueeze(-1)  # (B, views, 1)
        return self.scale * similarity.mean(dim=(1, 2))

    def _views(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, views, 3, size, size), as the CLIP takes them."""
        size = self.model.config.vision_config.image_size
        views = []
        for top, left, side in square_boxes(*pixels.shape[-2:], self.cutouts):
            view = pixels[..., top : top + side, left : left + side]
            if side != size:
                view = F.interpolate(view, (size, size), mode="bicubic", antialias=True)
            views.append(view)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return ((torch.stack(views, dim=1) + 1) / 2 - mean) / std

    def guide(
        self,
        predict: Callable[[torch.Tensor], torch.Tensor],
        model_input: torch.Tensor,
        alpha_cumprod: float,
        prediction_type: str,
        decode: Callable[[torch.Tensor], torch.Tensor],
        text: torch.Tensor,
    ) -> torch.Tensor:
        """The network's output at x_t, changed as if epsilon' = epsilon - sqrt(1 - abar) grad_{x_t} score.

        With x_t = a x_0 + s epsilon, a = sqrt(abar), s = sqrt(1 - abar), g = grad_{x_t} score, the same change is
            epsilon: -s g        sample (x_0): +(s^2 / a) g        v_prediction: -(s / a) g
        Where a = 0 nothing is known of x_0, and nothing is changed.

        Args:
            predict: x_t (B, …) -> the network's output (B, …), classifier-free guidance included; it is called once.
            model_input: x_t, of unit variance at every noise level, in the network's dtype.
            alpha_cumprod: abar_t in [0, 1]; outside of `interval` the output is returned as it is.
            prediction_type: what the network's output means, one of `noise_schedule.PREDICTION_TYPES`.
            decode: x_0 (B, …), at least float32 -> pixels (B, 3, H, W) in [-1, 1], differentiable.
            text: (B, D) from `embed_text`.

        Returns:
            (B, …) in the dtype of the output, without a graph. No parameter gathers a gradient.

        Raises:
            ValueError: an unknown `prediction_type`, or not as many rows of `text` as pictures.
        """
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        abar = float(alpha_cumprod)
        if not self._acts_at(abar):
            return predict(model_input)
        signal, sigma = abar**0.5, (1 - abar) ** 0.5
        x_t = model_input.detach().requires_grad_(self.through_unet)
        with torch.set_grad_enabled(self.through_unet):
            output = predict(x_t)
        with torch.enable_grad():
            table = torch.tensor([abar], dtype=torch.float64)  # of one timestep, 0
            x_0, _ = predict_x0_and_epsilon(table, output, x_t, 0, prediction_type)
            if not self.through_unet:
                x_0 = x_0.detach().requires_grad_()
            score = self.score(decode(x_0), text).sum()
            (gradient,) = torch.autograd.grad(score, x_t if self.through_unet else x_0)
        if not self.through_unet:
            gradient = signal * gradient
        change = {"epsilon": -sigma, "sample": sigma**2 / signal, "v_prediction": -sigma / signal}[prediction_type]
        return (output.detach() + change * at_least_float32(gradient)).to(output.dtype)

    def _acts_at(self, abar: float) -> bool:
        if abar == 0 or self.scale == 0:
            return False
        return self.interval is None or self.interval[0] < ((1 - abar) / abar) ** 0.5 <= self.interval[1]


def square_boxes(height: int, width: int, cutouts: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of the largest centred square, then of cutouts x cutouts smaller ones, evenly spread."""
    side = min(height, width)
    boxes = [((height - side) // 2, (width - side) // 2, side)]
    small = max(1, round(CUTOUT_SHARE * side))
    for i in range(cutouts):
        for j in range(cutouts):
            top, left = (round(k * (length - small) / (cutouts - 1)) for k, length in ((i, height), (j, width)))
            boxes.append((top, left, small))
    return boxes
