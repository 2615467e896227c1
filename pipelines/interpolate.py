"""Interpolation: the frames on a path from one picture of a latent diffusion model to the next, by prompt and by noise.

Noise goes along an arc (slerp: Shoemake 1985, "Animating rotation with quaternion curves", SIGGRAPH), prompts along a
line.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.diffusion.guidance import GuidanceScale
from latentdiff.pipelines.guided_sampling import StepCallback
from latentdiff.pipelines.latent_pipeline import LatentPipeline

_SMALLEST_SINE = 1e-4  # of the angle between two tensors; below it the arc between them is a line


def slerp(start: torch.Tensor, end: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(sin((1 - t) Omega) start + sin(t Omega) end) / sin(Omega), Omega being the angle between the two.

    Independent noise in many dimensions has nearly one length, and the network knows no other: half of the way along a
    line it would be 0.71 of that, along the arc it stays. Exact at t = 0 and t = 1.

    Args:
        start, end: (B, …), each row one vector; a line where they are parallel.
        weight: t, (B,) in [0, 1].
    """
    a, b = start.flatten(1).float(), end.flatten(1).float()
    # Of the sum and the difference of the two directions, which also small angles can be told from.
    u, v = torch.nn.functional.normalize(a), torch.nn.functional.normalize(b)
    omega = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    t = weight.to(omega)
    straight = omega.sin() < _SMALLEST_SINE
    sine = omega.sin().masked_fill(straight, 1)
    at_start = torch.where(straight, 1 - t, ((1 - t) * omega).sin() / sine)
    at_end = torch.where(straight, t, (t * omega).sin() / sine)
    return (at_start[:, None] * a + at_end[:, None] * b).reshape(start.shape).to(start.dtype)


def lerp(start: torch.Tensor, end: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1 - t) start + t end for start, end: (B, …) and t = weight: (B,); exact at t = 0 and t = 1."""
    t = weight.to(start).reshape(-1, *[1] * (start.ndim - 1))
    return (1 - t) * start + t * end


class Path(NamedTuple):
    """Where each of F frames lies: `weight` (F,) of the way from station `start` (F,) to station `end` (F,)."""

    start: torch.Tensor
    end: torch.Tensor
    weight: torch.Tensor

    def part(self, rows: slice) -> "Path":
        return Path(*(column[rows] for column in self))


def path_of(num_stations: int, num_frames: int, loop: bool = False) -> Path:
    """Frames spread evenly over the stations, each of which is one of them.

    From the first station to the last; in a loop on to the first again, of which the second frame is left out. Where
    they cannot be spread evenly, one leg has a frame more than another.
    """
    legs, last = (num_stations, num_frames) if loop else (num_stations - 1, num_frames - 1)
    at = np.rint(np.arange(legs + 1) * last / legs).astype(int)  # the frame of each station
    frames = np.arange(num_frames)
    start = np.searchsorted(at, frames, side="right") - 1
    end = np.minimum(start + 1, legs)  # the last station leads nowhere
    weight = (frames - at[start]) / np.maximum(at[end] - at[start], 1)
    return Path(torch.tensor(start), torch.tensor(end % num_stations), torch.tensor(weight))


class LatentDiffInterpolatePipeline(LatentPipeline, DiffusionPipeline):
    """Interpolation pipeline; see `LatentPipeline` for its components.

    A frame at a station, where one prompt and one seed have all the weight, is the picture that `LatentDiffPipeline`
    draws of them.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | list[str] | None = None,
        seeds: int | list[int] = 0,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: GuidanceScale | None = None,
        negative_prompt: str | list[str] | None = None,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        *,
        batch_size: int = 4,
        loop: bool = False,
        guidance_interval: tuple[float, float] | None = None,
        guide_unet: UNet2DConditionModel | None = None,
        clip_guidance: ClipGuidance | None = None,
        prompt_weights: bool = False,
        long_prompts: bool = False,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draw the frames between pictures.

        Args:
            prompts, seeds: the stations of the path, K of them, at least two (in a loop too): one prompt and one seed
                for each, or one of either for all. What lies between two stations has a mixture of their hidden states,
                on a line since attention reads these through linear maps, and of their noise, on an arc (`slerp`).
                Samplers whose steps draw noise too (eta > 0, DDPM, …) draw a frame's from the seed of the station that
                it comes from: with several seeds such a film jumps at each station, with one it is smooth.
            num_frames: frames in all, K or more, spread evenly between the stations, each of which is one of them.
            negative_prompt: what guidance leads away from, one for all or one for each prompt; or
                `negative_prompt_embeds`.
            latents: the stations' first noise (K, channels, height / factor, width / factor), or one for all, in place
                of drawing it: of a picture that `LatentDiffInversionPipeline.invert` has read, for example.
            prompt_embeds, negative_prompt_embeds: the stations' (K, tokens, width) in place of `prompts`.
            callback_on_step_end: called after each step of each batch of frames; steps count anew in each. With
                `pipeline._interrupt = True` no other batch is begun, and the frames so far are returned.
            batch_size: how many frames are drawn at a time, which bounds the memory and changes no picture.
            loop: go on from the last station to the first. The frame that would repeat the first one is left out.

        The other arguments, and what is returned: see `LatentDiffPipeline`.

        Raises:
            ValueError: an argument that cannot work, with its name, its value and what it may be.
        """
        self._begin(clip_skip, cross_attention_kwargs)
        num_inference_steps, guidance_scale = self.usual_drawing(num_inference_steps, guidance_scale)
        guidance = (
            guidance_scale, guidance_rescale, guidance_interval, guide_unet, negative_prompt, negative_prompt_embeds
        )  # fmt: skip
        self._set_guidance(*guidance)
        height, width = self.picture_size(height, width, latents)
        self._check_prompts(prompts, prompt_embeds, negative_prompt, negative_prompt_embeds)
        callback_inputs = callback_on_step_end_tensor_inputs
        self._check_options(height, width, output_type, 1, clip_skip, callback_inputs)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        seeds = [seeds] if isinstance(seeds, int) else seeds
        columns = {"prompts": prompt_embeds if prompts is None else prompts, "seeds": seeds, "latents": latents}
        path = self._path({k: v for k, v in columns.items() if v is not None}, num_frames, batch_size, loop)
        device = self._execution_device

        prompt_embeds, negative_prompt_embeds = self._embed_prompts(
            prompts, negative_prompt, prompt_embeds, negative_prompt_embeds, 1, prompt_weights, long_prompts
        )
        dtype = prompt_embeds.dtype

        images, flags = [], []
        for first in range(0, num_frames, batch_size):
            part = path.part(slice(first, first + batch_size))
            count = len(part.weight)
            self._set_guidance(*guidance)  # anew, since a callback may have changed it
            chosen = self._set_timesteps(num_inference_steps, device, timesteps, sigmas)
            generator, noise, step_noise = self._between_noise(part, seeds, latents, height, width, dtype, device)
            step_kwargs = self._step_kwargs(eta=eta, generator=generator)
            if step_kwargs.get("eta", 1) > 0 and self._step_kwargs(variance_noise=None):
                step_kwargs = functools.partial(self._noisy_step_kwargs, eta, step_noise)
            batch_latents = self.prepare_latents(
                count, self.unet.config.in_channels, height, width, dtype, device, generator, noise
            )
            conditions = self._conditions(
                count,
                device,
                dtype,
                ip_adapter_image,
                ip_adapter_image_embeds,
                guide_unet,
                clip_guidance,
                prompts and _of(prompts, part.start),
            )
            if clip_guidance is not None:
                end = clip_guidance.embed_text(_of(prompts, part.end), device)
                conditions = dataclasses.replace(conditions, clip_text=slerp(conditions.clip_text, end, part.weight))
            batch_latents = self._denoise(
                batch_latents,
                chosen,
                _between(prompt_embeds, part),
                None if negative_prompt_embeds is None else _between(negative_prompt_embeds, part),
                conditions,
                step_kwargs,
                callback_on_step_end,
                callback_inputs,
            )
            drawn, flagged = self._decode(batch_latents, generator, output_type)
            images.append(drawn)
            flags += flagged or []
            if self.interrupt:
                break
        self.maybe_free_model_hooks()
        images, flags = _joined(images), flags or None
        if not return_dict:
            return images, flags
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)

    @staticmethod
    def _path(columns: dict[str, Sequence], num_frames: int, batch_size: int, loop: bool) -> Path:
        """The path through the stations that the columns describe, each with one entry for all or K of them."""
        stations = max(len(column) for column in columns.values())
        for name, column in columns.items():
            if len(column) not in (1, stations):
                raise ValueError(f"{name}: {len(column)} of them for {stations} stations: pass 1 or {stations}")
        if stations < 2:
            raise ValueError(
                "there is nothing between one prompt with one seed: pass several prompts, seeds or latents"
            )
        if not isinstance(num_frames, int) or num_frames < stations:
            raise ValueError(f"num_frames={num_frames}: it must be {stations} or more, the number of stations")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be a positive integer")
        return path_of(stations, num_frames, loop)

    def _noisy_step_kwargs(self, eta: float, draw: Callable[[], torch.Tensor]) -> dict[str, Any]:
        return self._step_kwargs(eta=eta, variance_noise=draw())

    def _between_noise(
        self,
        part: Path,
        seeds: list[int],
        latents: torch.Tensor | None,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[list[torch.Generator], torch.Tensor, Callable[[], torch.Tensor]]:
        """(what the steps of the F frames draw with, their first noise (F, C, h, w), what draws that of each step).

        The noise of a station is what its seed's generator gives first, as in text to image, and goes on from there.
        That of steps lies on the arc from station to station, too; a scheduler that only takes generators has the one
        of the station before, and its films jump where the next seed takes over.
        """
        factor = self.vae_scale_factor
        shape = (len(part.weight), self.unet.config.in_channels, height // factor, width // factor)
        generator, ends = (
            [torch.Generator("cpu").manual_seed(seed) for seed in _of(seeds, rows)] for rows in (part.start, part.end)
        )

        def draw() -> torch.Tensor:
            start, end = (self._normal(shape, drawn_with, dtype, device) for drawn_with in (generator, ends))
            return slerp(start, end, part.weight)

        if latents is not None:
            return generator, _between(latents.to(device=device, dtype=dtype), part, slerp), draw
        return generator, draw(), draw


def _of(column: Sequence, rows: torch.Tensor) -> list:
    """The entries of some stations; one entry is every station's."""
    return [column[row if len(column) > 1 else 0] for row in rows.tolist()]


def _between(tensor: torch.Tensor, part: Path, mix=lerp) -> torch.Tensor:
    """The stations' tensor (K, …), or (1, …) for all, at each frame: (F, …)."""
    start, end = (torch.stack(_of(tensor, rows)) for rows in (part.start, part.end))
    return mix(start, end, part.weight)


def _joined(images: list) -> list | np.ndarray | torch.Tensor:
    """Batches of pictures of any output type as one."""
    if isinstance(images[0], torch.Tensor):
        return torch.cat(images)
    if isinstance(images[0], np.ndarray):
        return np.concatenate(images)
    return [image for batch in images for image in batch]
