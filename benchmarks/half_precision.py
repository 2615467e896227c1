"""Half precision against fp32, side by side in one run: pictures, seconds and memory of every way to draw.

    python benchmarks/half_precision.py --output benchmarks/results/half_precision.json

Text to image, image to image and inpainting, on the shipped checkpoint and on a pipeline of Stable Diffusion 1.5's
shapes with random weights (at 512x512: a GPU's work). Both precisions start from the same weights and noise.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import latentdiff
from latentdiff import DDIMScheduler, LatentDiffImg2ImgPipeline, LatentDiffInpaintPipeline, LatentDiffPipeline
from latentdiff.utils.files import packaged_checkpoint

PROMPTS = ["a red apple", "a smiling face", "a house", "a rocket on a yellow background"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    shapes: tuple[Literal["emoji64", "sd15"], ...] = ("emoji64", "sd15")
    """The shipped checkpoint, and Stable Diffusion 1.5's shapes."""
    dtype: Literal["fp16", "bf16"] = "fp16"
    """The half precision."""
    device: str = "cuda"
    """As torch names it."""
    num_inference_steps: int = 25
    """DDIM steps."""
    batch_size: int = 1
    """Pictures at a time."""
    output: str | None = None
    """JSON file for the numbers."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to draw, of one pipeline, in both precisions."""

    shapes: str
    pipeline: str
    largest_difference: float
    """Of any pixel's channel, in [0, 1]."""
    mean_difference: float
    seconds_fp32: float
    """Per picture."""
    seconds_half: float
    speedup: float
    peak_gib_half: float | None
    """Memory of the device, where it counts it."""


def emoji64() -> LatentDiffPipeline:
    """The shipped checkpoint in fp32."""
    return LatentDiffPipeline.from_pretrained(packaged_checkpoint())


def sd15() -> LatentDiffPipeline:
    """Stable Diffusion 1.5's shapes with random weights; the words are those of the shipped tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(packaged_checkpoint(), subfolder="tokenizer")
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    width = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **width, **marks)
    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(latent_channels=4, down_block_types=down, up_block_types=up, sample_size=512, **blocks)
    return LatentDiffPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
    )


def ways(pipeline: LatentDiffPipeline) -> dict[str, Callable[..., torch.Tensor]]:
    """Each way to draw with one pipeline's networks: settings -> pixels (B, 3, H, W) in [0, 1]."""
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).ellipse([side // 4, side // 4, side * 3 // 4, side * 3 // 4], fill=(220, 60, 40))
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rectangle([0, 0, side // 2, side], fill=255)
    img2img, inpaint = (kind.from_pipe(pipeline) for kind in (LatentDiffImg2ImgPipeline, LatentDiffInpaintPipeline))
    for one in (pipeline, img2img, inpaint):
        one.set_progress_bar_config(disable=True)
    return {
        "text2img": lambda prompts, **options: pipeline(prompts, **options).images,
        "img2img": lambda prompts, **options: img2img(prompts, image=picture, strength=0.7, **options).images,
        "inpaint": lambda prompts, **options: inpaint(prompts, image=picture, mask_image=mask, **options).images,
    }


def timed(draw: Callable[..., torch.Tensor], device: torch.device, **options) -> tuple[torch.Tensor, float]:
    """(pixels float32 on the CPU, seconds per picture), after a call that warms up."""
    draw(**{**options, "num_inference_steps": 2})
    _wait(device)
    started = time.perf_counter()
    pixels = draw(**options)
    _wait(device)
    return pixels.float().cpu(), (time.perf_counter() - started) / len(pixels)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(shapes: str, settings: Settings) -> list[Row]:
    """Every way to draw with one pipeline."""
    device = torch.device(settings.device)
    pipeline = {"emoji64": emoji64, "sd15": sd15}[shapes]().to(device)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(settings.batch_size)]
    options = {
        "prompts": prompts, "seeds": list(range(len(prompts))), "guidance_scale": 4.0, "output_type": "pt",
        "num_inference_steps": settings.num_inference_steps,
    }  # fmt: skip
    full = {name: timed(draw, device, **options) for name, draw in ways(pipeline).items()}
    pipeline = pipeline.to(DTYPES[settings.dtype])
    rows = []
    for name, draw in ways(pipeline).items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        (exact, slow), (pixels, fast) = full[name], timed(draw, device, **options)
        if not torch.isfinite(pixels).all():
            raise SystemExit(f"{shapes} {name}: pixels in {settings.dtype} are not finite")
        difference = (pixels - exact).abs()
        rows.append(
            Row(
                shapes=shapes,
                pipeline=name,
                largest_difference=difference.max().item(),
                mean_difference=difference.mean().item(),
                seconds_fp32=slow,
                seconds_half=fast,
                speedup=slow / fast,
                peak_gib_half=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
            )
        )
    return rows


def main(settings: Settings) -> None:
    cuda = settings.device.startswith("cuda")
    machine = torch.cuda.get_device_name(settings.device) if cuda else f"{platform.machine()} CPU"
    print(f"{settings.dtype} against fp32 on {machine}, DDIM {settings.num_inference_steps} steps, guidance 4")
    print(f"{'shapes':9}{'pipeline':10}{'largest':>9}{'mean':>9}{'s fp32':>9}{'s half':>9}{'ratio':>7}")
    rows = []
    for shapes in settings.shapes:
        for row in measure(shapes, settings):
            rows.append(row)
            print(
                f"{row.shapes:9}{row.pipeline:10}{row.largest_difference:9.4f}{row.mean_difference:9.5f}"
                f"{row.seconds_fp32:9.3f}{row.seconds_half:9.3f}{row.speedup:7.2f}",
                flush=True,
            )
    if settings.output:
        versions = {"torch": torch.__version__, "latentdiff": latentdiff.__version__}
        asked = {name: value for name, value in asdict(settings).items() if name != "output"}
        result = {**asked, "machine": machine, **versions, "rows": [asdict(row) for row in rows]}
        Path(settings.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
