"""A run on captioned pictures: what `latentdiff train` and train_text2img.py do once they know its settings."""

from functools import partial

from ..config.train import TrainConfig
from ..models.parts import trained_model
from ..objectives.choice import objective_of
from . import loop
from .checkpoint import saved_extra
from .data import load_data
from .ema import check_same_ema
from .export import finish
from .memory import saying_what_needs_less
from .optimizers import check_same_optimizer
from .preflight import say_first_look
from .push import BackgroundPush
from .run_folder import RunFolder
from .setup import load_networks, optimizer_steps, start
from .validation import Validation


def train(config: TrainConfig) -> None:
    """Build the parts of a run on pictures, and train them; the loss is the objective's `__call__`.

    Raises:
        ConfigError: the settings do not suit what is there.
        RunStopped: the run could not go on.
    """
    accelerator = start(config)
    with saying_what_needs_less(config), RunFolder(config, accelerator) as folder:
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
        loop.train(
            loop.Run(
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
