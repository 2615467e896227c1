"""Train the small VAE of the embedded default: `accelerate launch -m latentdiff.emoji64.vae`.

A KL autoencoder as in latent diffusion (Rombach et al. 2021, arXiv 2112.10752, section 3.1), f = 4 with 4 latent
channels, without the adversarial term: L1, an L1 on differences of neighbouring pixels that keeps edges sharp, and a
small KL. It learns on every emoji that is not held out, people and symbols too, on random backgrounds. A second run
with `--decoder_of FOLDER` sharpens the decoder alone, as Stable Diffusion's ft-MSE decoder was made: latents, and all
that was trained on them, stay as they are.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL

from ..data import emoji
from ..models.latents import encode_moments, psnr
from ..models.loading import load_vae
from ..utils import randomness
from ..utils.flags import run_cli
from .pretrain import PretrainConfig, pretrain


@dataclass(frozen=True, kw_only=True)
class PretrainVAEConfig(PretrainConfig):
    """How the shipped VAE was made."""

    max_train_steps: int = 2300
    train_batch_size: int = 32
    learning_rate: float = 2e-3
    kl_weight: float = 1e-5
    """Weight of the KL term per latent dimension; keeps the posterior's deviation from vanishing."""
    edge_weight: float = 1.0
    """Weight of the L1 between differences of neighbouring pixels."""
    mse_weight: float = 0.0
    """Weight of the mean squared error, which PSNR measures, beside the L1."""
    decoder_of: str | None = None
    """Folder or Hub id whose VAE goes on training with its encoder frozen, to the last bit the same latents."""


def build_vae() -> AutoencoderKL:
    """f = 4, 4 channels, 0.65 M parameters, no attention."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=emoji.RESOLUTION,
        mid_block_add_attention=False,
    )


def load_with_frozen_encoder(path: str) -> AutoencoderKL:
    """The VAE of a folder or Hub id, in which only what comes after the latent can be trained.

    Raises:
        ConfigError: it is not there or cannot be read.
    """
    vae = load_vae(path)
    for module in (vae.encoder, vae.quant_conv):
        module.requires_grad_(False)
    return vae


def blend(pictures: torch.Tensor, ground: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 4) uint8 RGBA over (B, 3) colours in [0, 1] -> (B, 3, H, W) pixels in [-1, 1]."""
    rgba = pictures.permute(0, 3, 1, 2).float() / 255
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + ground[:, :, None, None] * (1 - alpha)) * 2 - 1


def compose(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, H, W, 4) uint8 RGBA -> (B, 3, H, W) pixels in [-1, 1]; half of them mirrored, and on drawn backgrounds:
    three in ten on white, as many on any colour at all, the rest on the named ones.
    """
    batch = len(pictures)
    named = torch.tensor(list(emoji.BACKGROUNDS.values())) / 255
    ground = named[torch.randint(len(named), (batch,), generator=generator)]
    kind = torch.rand(batch, 1, generator=generator)
    ground = torch.where(kind < 0.3, torch.rand(batch, 3, generator=generator), ground)
    pixels = blend(pictures, torch.where(kind > 0.7, 1.0, ground))
    mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels)


def vae_loss(
    vae: AutoencoderKL, pixels: torch.Tensor, generator: torch.Generator, config: PretrainVAEConfig
) -> torch.Tensor:
    """L1 + mse_weight * MSE + edge_weight * L1 of neighbour differences + kl_weight * KL per dimension -> scalar.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        generator: a CPU generator for the draw from the posterior.
    """
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
    reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    l1 = F.l1_loss(reconstruction, pixels)
    edges = sum(F.l1_loss(reconstruction.diff(dim=axis), pixels.diff(dim=axis)) for axis in (-1, -2))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    mse = F.mse_loss(reconstruction, pixels)
    return l1 + config.mse_weight * mse + config.edge_weight * edges + config.kl_weight * kl


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Fold each latent channel's measured mean and deviation into the VAE's 1x1 convolutions, set `scaling_factor`.

    Stable Diffusion's pipeline knows only the one factor. After this each channel has mean 0 and deviation 1 on
    `pixels` while pictures decode as before, and the factor is measured (it comes out near 1).
    """
    mean, _ = encode_moments(vae, pixels)
    m, s = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    # moments = quant_conv(h): mean' = (mean - m) / s, logvar' = logvar - 2 log s
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[: len(m)] /= s[:, None, None, None]
    bias[: len(m)] = (bias[: len(m)] - m) / s
    bias[len(m) :] -= 2 * s.log()
    # post_quant_conv must take z' = (z - m) / s: W z + b = (W s) z' + (W m + b)
    weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
    bias += (weight[:, :, 0, 0] * m).sum(dim=1)
    weight *= s[None, :, None, None]
    mean, std = encode_moments(vae, pixels)
    vae.register_to_config(scaling_factor=float((mean.var() + (std**2).mean()) ** -0.5))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """That of reconstructions from the posterior mean, in dB -> (B,)."""
    mean, _ = encode_moments(vae, pixels)
    return psnr(vae.decode(mean.to(vae.dtype)).sample, pixels)


def main(config: PretrainVAEConfig) -> None:
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    built = emoji.load()
    pictures = torch.from_numpy(built.pictures[built.indices(default=False)])
    held_out = torch.from_numpy(built.pictures[built.indices(default=False, held_out=True)])

    def loss_at(vae: torch.nn.Module, step: int) -> torch.Tensor:
        batch = config.train_batch_size
        first_sample = (step * accelerator.num_processes + accelerator.process_index) * batch
        rows = randomness.data_order(config.seed, first_sample, batch, len(pictures))
        generator = randomness.generator(config.seed, "compose", step, accelerator.process_index)
        pixels = compose(pictures[rows], generator).to(accelerator.device)
        return vae_loss(accelerator.unwrap_model(vae), pixels, generator, config)

    torch.manual_seed(config.seed)  # diffusers draws initial weights from the global generator
    vae = load_with_frozen_encoder(config.decoder_of) if config.decoder_of else build_vae()
    vae = pretrain(config, accelerator, vae, loss_at, Path(config.output_dir) / "vae-training")
    if accelerator.is_main_process:
        generator = randomness.generator(config.seed, "measure")
        for_scale = compose(pictures[:1024], generator).to(accelerator.device)
        if config.decoder_of is None:
            normalise_latents(vae, for_scale)
        on_any = compose(held_out, generator).to(accelerator.device)
        on_white = blend(held_out, torch.ones(len(held_out), 3)).to(accelerator.device)
        on_any, on_white = (
            torch.cat([reconstruction_psnr(vae, chunk) for chunk in p.split(64)]) for p in (on_any, on_white)
        )
        folder = Path(config.output_dir) / "vae"
        vae.save_pretrained(folder)
        print(
            f"{len(held_out)} held-out pictures: PSNR {on_any.mean():.2f} dB (worst {on_any.min():.2f}), on white "
            f"{on_white.mean():.2f}; scaling_factor {vae.config.scaling_factor:.4f}; saved in {folder}"
        )


if __name__ == "__main__":
    run_cli(main, PretrainVAEConfig)
