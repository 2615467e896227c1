"""Train a latent text-to-image diffusion model: `accelerate launch train_text2img.py`.

Without arguments: the embedded emoji at 64x64, from scratch, on the shipped VAE and text encoder. With
`--train_data_dir FOLDER` your own captioned pictures; with `--preset finetune --pretrained_model_name_or_path MODEL`
any Stable-Diffusion-shaped model goes on from its own weights. `--help` lists every setting.
"""

from functools import partial

from latentdiff.config.presets import run_training
from latentdiff.config.train import TrainConfig
from latentdiff.models.parts import trained_model
from latentdiff.objectives.choice import objective_of
from latentdiff.training.checkpoint import saved_extra
from latentdiff.training.data import load_data
from latentdiff.training.ema import check_same_ema
from latentdiff.training.export import finish
from latentdiff.training.loop import Run, train
from latentdiff.training.optimizers import check_same_optimizer
from latentdiff.training.preflight import say_first_look
from latentdiff.training.push import BackgroundPush
from latentdiff.training.run_folder import RunFolder
from latentdiff.training.setup import load_networks, optimizer_steps, start
from latentdiff.training.validation import Validation


def main(config: TrainConfig) -> None:
    """Build the parts of a run on pictures, and train them; the loss is the objective's `__call__`."""
    accelerator = start(config)
    with RunFolder(config, accelerator) as folder:
        carried = saved_extra(folder.checkpoint) if folder.checkpoint else {}
        check_same_optimizer(config, carried)
        check_same_ema(config, carried)
        parts, unet, scheduler = load_networks(config)
        pushes = BackgroundPush(config, parts, unet, scheduler) if accelerator.is_main_process else None
        data = load_data(config, accelerator, parts, unet, scheduler)
        if accelerator.is_main_process:
            say_first_look(config, parts, unet, data)
        total_steps = optimizer_steps(config, data.batches)
        objective = objective_of(config)
        objective.prepare(accelerator, scheduler, unet, data.hidden_states, total_steps)
        folder.save_settings()
        train(
            Run(
                config=config,
                accelerator=accelerator,
                folder=folder,
                model=trained_model(parts, unet),
                objective=objective,
                batches=data.batches,
                total_steps=total_steps,
                validation=partial(Validation, config, accelerator, parts, scheduler, data),
                finish=partial(finish, config, accelerator, parts, scheduler),
                pushes=pushes,
            )
        )


if __name__ == "__main__":
    run_training(main)
