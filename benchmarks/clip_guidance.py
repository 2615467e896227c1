"""Does CLIP guidance draw better what the prompt says? The CLIP's own opinion, and that of an independent network.

    python benchmarks/clip_guidance.py

The same captions from the same noise, drawn without and with CLIP guidance. The CLIP's cosine must rise, since it is
what the sampler climbs; whether the pictures are better is for prompt retrieval to say (`latentdiff retrieval`).
"""

import argparse
import time
from functools import partial

import torch

from latentdiff import LatentDiffPipeline
from latentdiff.data import emoji
from latentdiff.diffusion.clip_guidance import ClipGuidance
from latentdiff.evaluation import features, retrieval
from latentdiff.models.latents import to_pixels

# Scale, through the network or not, noise levels.
SETTINGS = ((0.0, True, None), (30.0, True, (0.0, 5.0)), (100.0, True, (0.0, 5.0)), (100.0, False, None),
            (300.0, False, None))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="checkpoints/emoji64", help="the pipeline's folder or Hub id")
    parser.add_argument("--clip", default="checkpoints/emoji64-clip", help="the CLIP's folder or Hub id")
    parser.add_argument("--count", type=int, default=100, help="pictures, each of another caption")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    pipeline = LatentDiffPipeline.from_pretrained(arguments.checkpoint).to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    settings = retrieval.DrawSettings(
        num_inference_steps=arguments.steps, guidance_scale=arguments.guidance_scale, batch_size=20
    )
    pictures, network = emoji.load(), features.load(device=arguments.device)
    galleries = retrieval.build_galleries(network, pictures)
    asked = retrieval.training_queries(pictures)[: arguments.count]
    captions = [retrieval.plain_caption(*row) for row in asked]
    judge = ClipGuidance.from_pretrained(arguments.clip, scale=1.0).to(arguments.device)
    for scale, through_unet, interval in SETTINGS:
        clip = ClipGuidance(
            judge.model, judge.tokenizer, scale=scale, through_unet=through_unet, interval=interval,
            image_mean=judge.image_mean, image_std=judge.image_std,
        )  # fmt: skip
        started = time.perf_counter()
        drawn = retrieval.draw(partial(pipeline, clip_guidance=clip if scale else None), captions, settings)
        seconds = (time.perf_counter() - started) / len(drawn)
        recall = galleries.recall(features.extract_features(network, drawn), asked)
        with torch.no_grad():
            text = judge.embed_text(captions, arguments.device)
            cosine = judge.score(to_pixels(drawn).to(arguments.device), text).mean()
        way = f"{'through' if through_unet else 'not through'} the UNet, noise levels {interval or 'all'}"
        print(f"scale {scale:<5g} {way:<46} cosine {cosine:.3f}  {recall}  {seconds:.2f} s a picture", flush=True)


if __name__ == "__main__":
    main()
