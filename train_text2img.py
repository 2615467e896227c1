"""Train a latent text-to-image diffusion model: `accelerate launch train_text2img.py`.

Without arguments: the embedded emoji at 64x64, from scratch, on the shipped VAE and text encoder. With
`--train_data_dir FOLDER` your own captioned pictures; with `--preset finetune --pretrained_model_name_or_path MODEL`
any Stable-Diffusion-shaped model goes on from its own weights. `--help` lists every setting. Where latentdiff is
installed, `latentdiff train` and `accelerate launch -m latentdiff.train` do the same.
"""

from latentdiff.config.presets import run_training
from latentdiff.config.train import TrainConfig


def main(config: TrainConfig) -> None:
    """Train as the settings say."""
    from latentdiff.training.text2img import train  # torch is loaded once the settings are known to be good

    train(config)


if __name__ == "__main__":
    run_training(main)
