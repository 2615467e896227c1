"""DDIM inversion (Song et al. 2020, arXiv 2010.02502, section 4.3): the noise that a picture would be drawn from, and
the picture drawn again from there under changed words.

One step up asks the network about the x_t that it is looking for. Asked about x_{t-1} instead, as is usual, it errs a
little each time; asked again about each estimate it gets, it is led to the x_t that leads back (fixed-point iterations:
Pan et al. 2023, arXiv 2309.04907; Garibi et al. 2024, arXiv 2403.14602).
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import BaseOutput, logging

from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.diffusion.guidance import GuidanceScale
from latentdiff.diffusion.scheduling_ddim import DDIMScheduler
from latentdiff.pipelines.guided_sampling import StepCallback
from latentdiff.pipelines.latent_pipeline import LatentPipeline
from latentdiff.pipelines.prompt_embedding import check_text

logger = logging.get_logger(__name__)


@dataclass
class InversionOutput(BaseOutput):
    """latents: (N, C, h, w), what the pictures would be drawn from: `latents=` of the other pipelines."""

    latents: torch.Tensor


class LatentDiffInversionPipeline(LatentPipeline, DiffusionPipeline):
    """Pictures into noise, and edits by changed words; see `LatentPipeline` for its components.

    Only DDIM's steps can be run upwards: at a call, any other scheduler is replaced by our DDIM with its noise levels.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput = None,
        source_prompt: str | list[str] | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        guidance_scale: GuidanceScale = 4.0,
        negative_prompt: str | list[str] | None = None,
        num_fixed_point_iterations: int = 2,
        prompt_embeds: torch.Tensor | None = None,
        source_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        *,
        guidance_interval: tuple[float, float] | None = None,
        guide_unet: UNet2DConditionModel | None = None,
        clip_guidance: ClipGuidance | None = None,
        prompt_weights: bool = False,
        long_prompts: bool = False,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Edit pictures by words: up into noise under `source_prompt`, and from there drawn under `prompt`.

        On the way up there is no guidance. On the way down it leads away from `source_prompt`, unless told otherwise:
        whatever its weight, a picture comes back where the words stay the same (Miyake et al. 2023, arXiv 2305.16807),
        and it is their difference that is made larger.

        Args:
            prompt: what is to be seen; or `prompt_embeds` (B, tokens, width).
            image: the pictures, as for `LatentDiffImg2ImgPipeline`, or their latents.
            source_prompt: what is seen in `image`, by default the empty text; or `source_prompt_embeds`. Of pictures
                and of each kind of text there is one for all that is drawn, or one for each.
            strength: in (0, 1], how far up the pictures go, and so how much of them may change: the last `strength`
                share of the steps is taken, upwards and downwards.
            guidance_scale: as in text to image, on the way down.
            negative_prompt: what guidance leads away from in place of `source_prompt`; or `negative_prompt_embeds`.
            num_fixed_point_iterations: how often each step upwards is corrected, see `invert`.
            clip_skip: for all of these texts.
            callback_on_step_end: called on the way down. `pipeline._interrupt = True` ends the way up as well.

        Nothing is drawn by lot, so that there are no seeds. The other arguments, and what is returned: see
        `LatentDiffPipeline`.

        Raises:
            ValueError: an argument that cannot work, with its name, its value and what it may be.
        """
        self._begin(clip_skip, cross_attention_kwargs)
        guidance = (
            guidance_scale, guidance_rescale, guidance_interval, guide_unet, negative_prompt, negative_prompt_embeds
        )  # fmt: skip
        self._set_guidance(*guidance)
        self._check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        check_text("source_prompt", source_prompt, source_prompt_embeds, required=False)
        _check_iterations(num_fixed_point_iterations)
        columns = _columns(
            {"prompt": prompt, "source_prompt": source_prompt, "negative_prompt": negative_prompt},
            {"prompt": prompt_embeds, "source_prompt": source_prompt_embeds, "negative_prompt": negative_prompt_embeds},
        )
        callback_inputs = callback_on_step_end_tensor_inputs
        latents = self._read(image, output_type, clip_skip, callback_inputs)
        batch_size = _batch_size({**columns, "image": latents})
        inverted = max(len(latents), len(columns["source_prompt"]))  # a picture goes up once for all of its edits
        self._use_ddim()
        device, dtype = self._execution_device, latents.dtype

        counts = {"prompt": batch_size, "source_prompt": inverted, "negative_prompt": batch_size}
        embeds = self._embed(
            {name: _of_each(column, counts[name]) for name, column in columns.items()},
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
        )
        timesteps = self._set_timesteps(num_inference_steps, device, strength=strength)
        self._set_guidance(1.0, 0.0, None, None, None, None)
        source = embeds["source_prompt"]
        latents = self._ascend(_of_each(latents, inverted), timesteps, source, None, num_fixed_point_iterations)
        latents = _of_each(latents, batch_size)
        self._set_guidance(*guidance)
        if not self.interrupt:
            prompts = _of_each(columns["prompt"], batch_size) if prompt_embeds is None else None
            conditions = self._conditions(
                batch_size, device, dtype, guide_unet=guide_unet, clip_guidance=clip_guidance, prompts=prompts
            )
            latents = self._denoise(
                latents,
                timesteps,
                embeds["prompt"],
                embeds.get("negative_prompt", _of_each(source, batch_size)),
                conditions,
                {},
                callback_on_step_end,
                callback_inputs,
            )
        return self._finish(latents, None, output_type, return_dict)

    @torch.no_grad()
    def invert(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: GuidanceScale = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_fixed_point_iterations: int = 2,
        strength: float = 1.0,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        *,
        guidance_interval: tuple[float, float] | None = None,
        prompt_weights: bool = False,
        long_prompts: bool = False,
    ) -> InversionOutput | tuple[torch.Tensor]:
        """The noise from which DDIM, called with the same arguments, draws the pictures.

        Args:
            image: the pictures, as for `LatentDiffImg2ImgPipeline`, or their latents.
            prompt: what is seen in them, one for all or one for each, by default the empty text; or `prompt_embeds`.
            guidance_scale: that of the drawing to come. With more than 1 the iterations close in more slowly, if
                at all, and the pictures come back less exactly.
            num_fixed_point_iterations: how often the network is asked once more at each step, about the estimate that
                its last answer led to. 0 is DDIM inversion as it is known. On the shipped checkpoint, in 25 steps and
                without guidance, 0, 1, 2 and 3 bring pixels back to within 0.039, 0.008, 0.002 and 0.001 of 1 (root
                mean square); what the VAE itself loses is 0.04.
            strength: in (0, 1], how far up, as for `__call__`; below 1 the latents still have something of the picture.

        The other arguments: see `LatentDiffPipeline`.

        Raises:
            ValueError: an argument that cannot work, with its name, its value and what it may be.
        """
        self._begin(clip_skip, cross_attention_kwargs)
        if prompt is None and prompt_embeds is None:
            prompt = ""
        self._set_guidance(
            guidance_scale, guidance_rescale, guidance_interval, None, negative_prompt, negative_prompt_embeds
        )
        self._check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
        _check_iterations(num_fixed_point_iterations)
        latents = self._read(image, clip_skip=clip_skip)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch_size = _batch_size({"prompt": prompt_embeds if prompts is None else prompts, "image": latents})
        self._use_ddim()
        device = self._execution_device
        embeds = self._embed_prompts(
            prompts, negative_prompt, prompt_embeds, negative_prompt_embeds, 1, prompt_weights, long_prompts
        )
        embeds = [one if one is None else _of_each(one, batch_size) for one in embeds]
        timesteps = self._set_timesteps(num_inference_steps, device, strength=strength)
        latents = self._ascend(_of_each(latents, batch_size), timesteps, *embeds, num_fixed_point_iterations)
        self.maybe_free_model_hooks()
        return InversionOutput(latents=latents) if return_dict else (latents,)

    def _ascend(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        num_fixed_point_iterations: int,
    ) -> torch.Tensor:
        """`_denoise` run upwards: from x_0 to x_t at the first of the timesteps, both (B, C, h, w)."""
        conditions = self._conditions(len(latents), latents.device, latents.dtype)
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        timesteps = timesteps.flip(0)
        for t, sigma in zip(self.progress_bar(timesteps), self._noise_levels(timesteps.tolist()), strict=True):
            x_t = latents
            for _ in range(1 + num_fixed_point_iterations):
                output = self._predict(x_t, t, sigma, prompt_embeds, conditions)
                x_t = self.scheduler.inversion_step(output, t, latents, model_input=x_t, return_dict=False)[0]
            latents = x_t
            if self.interrupt:
                break
        return latents

    def _read(
        self,
        image: PipelineImageInput,
        output_type: str = "latent",
        clip_skip: int | None = None,
        callback_inputs: list[str] | tuple[str, ...] = (),
    ) -> torch.Tensor:
        """Pictures, or their latents, as latents (N, C, h, w): the mean of what the VAE thinks, without noise."""
        latents = self._given_latents(image)
        pixels = self._pixels(image) if latents is None else None
        height, width = self.picture_size(None, None, latents) if pixels is None else pixels.shape[-2:]
        self._check_options(height, width, output_type, 1, clip_skip, callback_inputs)
        latents = self._encode_pixels(pixels) if latents is None else latents
        return latents.to(device=self._execution_device, dtype=self.unet.dtype)

    def _embed(self, columns: dict[str, list[str] | torch.Tensor], **options) -> dict[str, torch.Tensor]:
        """Each column's hidden states (its length, tokens, width), made in one go so that all have the same length."""
        texts, embeds = None, None
        if all(isinstance(column, list) for column in columns.values()):
            texts = [text for column in columns.values() for text in column]
        else:
            shapes = {name: tuple(column.shape[1:]) for name, column in columns.items()}
            if len(set(shapes.values())) > 1:
                raise ValueError(f"embeddings of several shapes cannot be mixed: {shapes}")
            embeds = torch.cat(list(columns.values()))
        embeds, _ = self.encode_prompt(texts, self._execution_device, 1, False, prompt_embeds=embeds, **options)
        return dict(zip(columns, embeds.split([len(column) for column in columns.values()]), strict=True))

    def _use_ddim(self) -> None:
        """Raises ValueError where the scheduler is not DDIM and says too little to make one of, or cannot be undone."""
        if not isinstance(self.scheduler, DDIMScheduler):
            name = type(self.scheduler).__name__
            if name not in DDIMScheduler._compatibles:
                raise ValueError(f"{name} cannot be run upwards: set pipe.scheduler to a DDIMScheduler")
            logger.warning(f"{name} cannot be run upwards: DDIM takes its place, with the same noise levels")
            self.scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)
        for name in ("clip_sample", "thresholding"):
            if self.scheduler.config[name]:
                raise ValueError(f"{name}=True in the scheduler: steps that cut x_0 off cannot be undone")


def _check_iterations(num_fixed_point_iterations: int) -> None:
    if not isinstance(num_fixed_point_iterations, int) or num_fixed_point_iterations < 0:
        raise ValueError(f"num_fixed_point_iterations={num_fixed_point_iterations}: it must be 0 or a positive integer")


def _columns(texts: dict[str, str | list[str] | None], embeds: dict[str, torch.Tensor | None]) -> dict[str, Any]:
    """Texts as lists, or their embeddings: a source always, by default the empty text, and what else is given."""
    given = {name: column for name, column in embeds.items() if column is not None}
    if not given:
        texts = {**texts, "source_prompt": texts["source_prompt"] or ""}
        return {name: [text] if isinstance(text, str) else text for name, text in texts.items() if text is not None}
    if any(text is not None for text in texts.values()) or "source_prompt" not in given:
        raise ValueError("pass prompt and source_prompt as texts, or prompt_embeds and source_prompt_embeds, not a mix")
    return given


def _batch_size(columns: dict[str, list[str] | torch.Tensor]) -> int:
    """B, where there is one of each thing, or B of it."""
    batch_size = max(len(column) for column in columns.values())
    for name, column in columns.items():
        if len(column) not in (1, batch_size):
            raise ValueError(f"{name}: {len(column)} of them for {batch_size} pictures: pass 1 or {batch_size}")
    return batch_size


def _of_each(column: list[str] | torch.Tensor, count: int) -> list[str] | torch.Tensor:
    """`count` of what there is one of, or `count` of."""
    if len(column) == count:
        return column
    return column * count if isinstance(column, list) else column.expand(count, *column.shape[1:])
