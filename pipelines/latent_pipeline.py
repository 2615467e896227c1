"""What every pipeline here is made of: Stable Diffusion's components, prompts, the sampling loop, decoding, saving.

A pipeline is a file of its own with one class, `class X(LatentPipeline, DiffusionPipeline)`, whose `__call__` says in
what order these are used. This class is no DiffusionPipeline itself, since diffusers looks for the only one in a file.
"""

import os
import sys
from collections.abc import Callable

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.models import AutoencoderKL, ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import LCMScheduler, SchedulerMixin
from diffusers.utils import logging
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from latentdiff.diffusion.guidance import GuidanceScale
from latentdiff.diffusion.latent_scale import scale_latents, unscale_latents
from latentdiff.diffusion.posthoc_ema import reconstructions, snapshots_folder
from latentdiff.diffusion.scheduling_consistency import ConsistencyScheduler
from latentdiff.diffusion.unet_inputs import is_for_inpainting, trained_size
from latentdiff.pipelines.guided_sampling import GuidedSampling
from latentdiff.pipelines.portable_saving import PortableSaving, adopt_scheduler
from latentdiff.pipelines.prompt_embedding import PromptEmbedding
from latentdiff.utils.images import upright_rgb
from latentdiff.utils.weight_files import only_variant

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ROUGH_PROFILE = 0.1  # an average chosen after training is warned of where more than this of its profile is missed
_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")


# What diffusers' `AutoPipelineFor….from_pipe` makes of one of these pipelines, by where it looks that up.
_AUTO_PIPELINES = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": "LatentDiffPipeline",
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": "LatentDiffImg2ImgPipeline",
    "AUTO_INPAINT_PIPELINES_MAPPING": "LatentDiffInpaintPipeline",
}


def _link_auto_pipelines() -> None:
    """Have diffusers' auto pipelines know these, where both are there; to load them for it would take a second."""
    auto, package = (sys.modules.get(name) for name in ("diffusers.pipelines.auto_pipeline", "latentdiff"))
    if auto is not None and package is not None:
        for mapping, pipeline in _AUTO_PIPELINES.items():
            getattr(auto, mapping, {}).setdefault("latentdiff", getattr(package, pipeline))


class NotFinite(ValueError):
    """What was drawn is inf or nan, which would be saved as a black picture."""


class LatentPipeline(
    PromptEmbedding,
    GuidedSampling,
    PortableSaving,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """The parts of a pipeline over Stable Diffusion's components, with this project's DDIM and DDPM schedulers.

    It loads any Stable Diffusion folder, and saves one that diffusers' own pipelines load. Every other diffusers
    scheduler works as well, passed in or set as `pipe.scheduler`. Any component may be None as long as a call does not
    need it.

    Args:
        vae: encodes and decodes latents; their scale is that of `latent_scale`.
        text_encoder, tokenizer: give the hidden states (B, tokens, width) that the UNet attends to.
        unet: predicts what `scheduler.config.prediction_type` says, called as diffusers' UNet2DConditionModel is.
        scheduler: diffusers' own DDIM and DDPM are replaced by ours, see `adopt_scheduler`.
        safety_checker, feature_extractor: optional; a checker needs the extractor.
        image_encoder: optional, for IP-Adapters.
        requires_safety_checker: kept in the saved index; a missing checker is logged if it is True.

    Raises:
        ValueError: a safety checker without a feature extractor.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = False,
    ):
        super().__init__()
        _link_auto_pipelines()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs a feature_extractor: pass one, or safety_checker=None")
        if safety_checker is None and requires_safety_checker:
            logger.warning("requires_safety_checker is True but there is no safety_checker: pictures are not filtered")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=None if scheduler is None else adopt_scheduler(scheduler),
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def usual_drawing(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: GuidanceScale | None = None,
        scheduler: type[SchedulerMixin] | None = None,
    ) -> tuple[int, GuidanceScale]:
        """(steps, guidance weight) as given, and where one is not, what suits the model: 50 and 7.5.

        A consistency model needs 4 steps. Its teacher's guidance is inside it, so that more would burn the pictures
        out, unless the weight is an input of the UNet.

        Args:
            scheduler: that is drawn with; by default the pipeline's.
        """
        steps, scale = 50, 7.5
        if issubclass(scheduler or type(self.scheduler), ConsistencyScheduler | LCMScheduler):
            steps = min(4, self.scheduler.config.get("original_inference_steps", 4))
            scale = 1.0 if self.guidance_embedding_dim is None else scale
        return (
            steps if num_inference_steps is None else num_inference_steps,
            scale if guidance_scale is None else guidance_scale,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        ema_sigma_rel: float | None = None,
        ema_step: int | None = None,
        **kwargs,
    ) -> "LatentPipeline":
        """A saved pipeline as diffusers loads it, with the average of another length if that is wanted.

        A folder that holds weights of one variant only, such as "fp16", loads without naming it.

        Args:
            pretrained_model_name_or_path: a folder, or a model on the Hub.
            ema_sigma_rel, ema_step: as `load_ema` takes them; without, the weights are those that were saved.
            kwargs: all that `DiffusionPipeline.from_pretrained` takes, such as `dtype` and `revision`.

        Raises:
            ValueError: as `load_ema`, or a network is passed in whose place the average would take.
        """
        if ema_sigma_rel is None and ema_step is not None:
            raise ValueError("ema_step: has no effect without ema_sigma_rel")
        if ema_sigma_rel is not None and (passed := {"unet", "text_encoder"} & kwargs.keys()):
            raise ValueError(f"{passed.pop()} and ema_sigma_rel: give one of them")
        if kwargs.get("variant") is None and (variant := only_variant(pretrained_model_name_or_path)):
            kwargs["variant"] = variant
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if ema_sigma_rel is not None:
            hub = {name: value for name, value in kwargs.items() if name in _OF_THE_HUB}
            pipeline.load_ema(ema_sigma_rel, ema_step, source=pretrained_model_name_or_path, **hub)
        return pipeline

    def load_ema(
        self, sigma_rel: float, step: int | None = None, *, source: str | os.PathLike | None = None, **hub
    ) -> None:
        """Give the networks that a run trained their average of another length (arXiv 2312.02696), in place.

        It is made of the snapshots that a run with `--ema_sigma_rel` keeps; from the Hub they are fetched once. The
        networks keep their device and dtype.

        Args:
            sigma_rel: relative width of the average, its standard deviation as a share of the training so far: above 0
                and at most at 0.2887.
            step: the optimizer step at which it ends; by default the run's last.
            source: folder or model on the Hub with the snapshots; by default what this was loaded from.
            hub: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            ValueError: there are no snapshots, they are damaged or of other networks, or such a width or step is not to
                be had of them.
        """
        source = self.name_or_path if source is None else source
        for name, average in reconstructions(snapshots_folder(source, **hub), sigma_rel, step).items():
            if average.profile_error > ROUGH_PROFILE:
                logger.warning(
                    f"ema_sigma_rel={sigma_rel}: the snapshots reach this width but roughly, "
                    f"{average.profile_error:.0%} of its profile is missed"
                )
            try:
                getattr(self, name).load_state_dict(average.tensors())
            except RuntimeError:  # names and shapes of hundreds of tensors
                raise ValueError(f"{source}: its EMA snapshots are of another {name} than it holds") from None

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "LatentPipeline":
        """A pipeline of this kind on the components of another; `kwargs` take the place of some of them.

        As in diffusers, but for what is not asked for: that one casts all components, also in `pipeline`, to float32.
        """
        if {"dtype", "torch_dtype", "custom_pipeline"} & kwargs.keys():
            # diffusers hands on only what is of the very class that is named above, and UNets are of several.
            return super().from_pipe(pipeline, **{"unet": pipeline.components.get("unet"), **kwargs})
        expected, optional = cls._get_signature_keys(cls)
        components = {name: part for name, part in pipeline.components.items() if name in expected}
        settings = {name: pipeline.config[name] for name in optional if name in pipeline.config}
        return cls(**{**components, **settings, **kwargs})

    def compile(self, regional: bool = False, **options) -> None:
        """torch.compile for what takes the time: the UNet and the VAE's decoder. The first call then takes longer.

        Both stay in place, with the same names of weights, for every pipeline that shares them.

        Args:
            regional: of the UNet only the transformer block that repeats in it, which starts much sooner.
            options: as `torch.compile` takes them, such as mode="reduce-overhead" or dynamic=True.
        """
        (self.unet.compile_repeated_blocks if regional else self.unet.compile)(**options)
        self.vae.decoder.compile(**options)

    # Pictures in

    def _check_options(
        self,
        height: int,
        width: int,
        output_type: str,
        num_images_per_prompt: int,
        clip_skip: int | None,
        callback_inputs: list[str],
    ) -> None:
        factor = self.vae_scale_factor
        if height % factor or width % factor or min(height, width) <= 0:
            raise ValueError(f"height={height}, width={width}: both must be positive multiples of {factor}")
        self._check_unet()
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: it must be one of {', '.join(OUTPUT_TYPES)}")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: it must be a positive integer")
        layers = getattr(getattr(self.text_encoder, "config", None), "num_hidden_layers", None)
        if clip_skip is not None and layers is not None and not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip={clip_skip}: the text encoder has {layers} layers to skip")
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            allowed = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs={unknown}: a callback can have {allowed}")

    @property
    def _latent_channels(self) -> int:
        """C, the channels of the latents."""
        return self.unet.config.in_channels if self.vae is None else self.vae.config.latent_channels

    def _unet_inputs(self) -> dict[int, str]:
        """By the number of channels that a UNet may take here, what they are."""
        return {self._latent_channels: "the latents"}

    def _check_unet(self) -> None:
        takes, possible = self.unet.config.in_channels, self._unet_inputs()
        if takes not in possible:
            needed = " or ".join(f"{count} ({what})" for count, what in possible.items())
            inpaints = is_for_inpainting(takes, self._latent_channels)
            hint = "; it is one for inpainting: use LatentDiffInpaintPipeline" if inpaints else ""
            raise ValueError(f"this UNet takes {takes} channels, {type(self).__name__} gives it {needed}{hint}")
        if hasattr(self.unet, "check_schedule"):
            self.unet.check_schedule(self.scheduler.config)

    def picture_size(
        self, height: int | None, width: int | None, latents: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """Height and width in pixels: as asked for, else of the given latents, else what the UNet was trained at."""
        if height is not None and width is not None:
            return height, width
        if latents is not None:
            size = tuple(side * self.vae_scale_factor for side in latents.shape[-2:])
        else:
            vae_config = None if self.vae is None else self.vae.config
            size = trained_size(self.unet.config, vae_config, self.vae_scale_factor)
        if size is None:
            raise ValueError("neither the unet's nor the vae's config has a sample_size: give height and width")
        return (size[0] if height is None else height, size[1] if width is None else width)

    def _given_latents(self, image: PipelineImageInput) -> torch.Tensor | None:
        """`image` as (N, C, h, w) if it is latents: a tensor, or a list of them, that has their channels."""
        images = list(image) if isinstance(image, list | tuple) else [image]
        channels = self._latent_channels
        tensors = [one for one in images if isinstance(one, torch.Tensor) and one.ndim in (3, 4)]
        of_latents = [one for one in tensors if one.shape[-3] == channels]
        if not images or len(of_latents) < len(images) or channels == 3:  # three channels are a picture's colours
            return None
        return torch.cat([one.reshape(-1, *one.shape[-3:]) for one in images])

    def _pixels(self, image: PipelineImageInput, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """Pictures as (N, 3, H, W) float32 in [-1, 1], of their own size (cut to the VAE's factor) or resized.

        Args:
            image: a PIL picture or a list of them; (N, H, W, 3) or (H, W, 3) arrays or (N, 3, H, W) or (3, H, W)
                tensors in [0, 1]. As in training a PIL picture is turned as its EXIF says, and lies on white.

        Raises:
            ValueError: no pictures, not of three channels, not of one size, or arrays of 0 to 255.
        """
        if image is None or (isinstance(image, list | tuple) and not image):
            raise ValueError("image: pass a picture to start from, or several")
        if isinstance(image, list | tuple):
            sizes = {one.size if isinstance(one, Image.Image) else tuple(one.shape) for one in image}
            if len(sizes) > 1 and (height is None or width is None):
                raise ValueError(
                    f"image: pictures of sizes {sorted(sizes)} do not fit into a batch: make them one size"
                )
            image = [upright_rgb(one) if isinstance(one, Image.Image) else one for one in image]
        elif isinstance(image, Image.Image):
            image = upright_rgb(image)
        _check_shades("image", image)
        pixels = self.image_processor.preprocess(image, height=height, width=width).to(torch.float32)
        if pixels.shape[1] != 3:
            raise ValueError(f"image: pictures have 3 channels, not {pixels.shape[1]}")
        return pixels

    @staticmethod
    def _rows(name: str, count: int, num_prompts: int, num_images_per_prompt: int) -> torch.Tensor:
        """Which of `count` things goes with each of the B drawn pictures, (B,) int64: those of one prompt together.

        Raises:
            ValueError: neither one for all nor one for each prompt or picture.
        """
        pictures = num_prompts * num_images_per_prompt
        if count not in (1, num_prompts, pictures):
            may_be = " or ".join(str(n) for n in sorted({1, num_prompts, pictures}))
            raise ValueError(
                f"{name}: {count} of them for {num_prompts} prompts and {pictures} pictures: pass {may_be}"
            )
        return torch.arange(count).repeat_interleave(pictures // count)

    def _encode_pixels(
        self,
        pixels: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        rows: torch.Tensor | None = None,
        drawn: bool | None = None,
    ) -> torch.Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), drawn from the VAE's posterior.

        A list of B generators draws each its own, of a picture that is encoded by itself, so that it does not depend on
        the others. One generator draws N.

        Args:
            rows: (B,), the picture that each of the latents is of; by default each is once there.
            drawn: False gives the posterior's mean; by default it is drawn if there is a generator.
        """
        pixels = pixels.to(device=self._execution_device, dtype=self.vae.dtype)
        parts = pixels.split(1) if isinstance(generator, list) else [pixels]
        posteriors = [self.vae.encode(part).latent_dist for part in parts]
        mean, std = (torch.cat([getattr(one, name) for one in posteriors]) for name in ("mean", "std"))
        rows = torch.arange(len(mean)) if rows is None else rows
        if isinstance(generator, list):
            mean, std, rows = mean[rows], std[rows], torch.arange(len(rows))
        if drawn or (drawn is None and generator is not None):
            mean = mean + std * self._normal(tuple(mean.shape), generator, mean.dtype, mean.device)
        return scale_latents(mean[rows], self.vae.config)

    # Pictures out

    def _finish(
        self,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        retouch: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """What a call returns for its last latents (B, C, h, w); the models go back to where offloading keeps them.

        Args:
            retouch: what is done to the decoded pixels (B, 3, H, W) in [-1, 1].
        """
        images, flagged = self._decode(latents, generator, output_type, retouch)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _decode(
        self,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        retouch: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[PipelineImageInput, list[bool] | None]:
        """Latents (B, C, h, w) to pictures of `output_type`, with the safety checker's verdicts if there is one."""
        if output_type == "latent":
            return latents, None
        raw = unscale_latents(latents, self.vae.config).to(self.vae.dtype)  # many keep the VAE in fp32
        pixels = self.vae.decode(raw, return_dict=False, generator=generator)[0]
        _check_finite(latents, pixels)
        pixels = pixels if retouch is None else retouch(pixels)
        pixels, flagged = self.run_safety_checker(pixels, latents.dtype)
        denormalize = [True] * len(pixels) if flagged is None else [not flag for flag in flagged]
        return self.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=denormalize), flagged

    def run_safety_checker(self, pixels: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, list[bool] | None]:
        """Return `pixels` (B, 3, H, W in [-1, 1]), blacked out where flagged, and the flags; None without a checker."""
        if self.safety_checker is None:
            return pixels, None
        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        clip_input = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(pixels.device, dtype)
        return self.safety_checker(images=pixels, clip_input=clip_input)


def _check_shades(name: str, images: PipelineImageInput) -> None:
    """Raise a ValueError for arrays and tensors of 0 to 255, which would be taken for white."""
    for one in images if isinstance(images, list | tuple) else [images]:
        if not isinstance(one, Image.Image) and one.size and float(one.max()) > 1.001:
            raise ValueError(f"{name}: arrays and tensors must lie in [0, 1]; this one goes up to {float(one.max()):g}")


def _check_finite(latents: torch.Tensor, pixels: torch.Tensor) -> None:
    """Raise a NotFinite that says where a picture's numbers stopped being any."""
    if torch.isfinite(pixels).all():
        return
    if not torch.isfinite(latents).all():
        raise NotFinite("the picture is not finite: the UNet put out inf or nan; try float32, or other weights")
    reason = "it overflows in float16: keep the VAE in float32 or bfloat16" if pixels.dtype == torch.float16 else ""
    raise NotFinite(f"the VAE put out inf or nan of finite latents{': ' * bool(reason)}{reason}")
