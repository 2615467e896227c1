"""Train a latent text-to-image diffusion model: `accelerate launch train_text2img.py`.

Without arguments: the embedded emoji at 64x64, from scratch, on the shipped VAE and text encoder. With
`--train_data_dir FOLDER` your own captioned pictures; with `--preset finetune --pretrained_model_name_or_path MODEL`
any Stable-Diffusion-shaped model goes on from its own weights. `--help` lists every setting.
"""

from latentdiff.config.presets import run_training
from latentdiff.config.train import TrainConfig
from latentdiff.models.parts import networks_of, trained_model
from latentdiff.training.checkpoint import (
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
    save_weights_as_diffusers_does,
    saved_extra,
)
from latentdiff.training.data import load_data
from latentdiff.training.deepspeed import is_zero
from latentdiff.training.ema import EMASnapshots, check_same_ema, make_ema
from latentdiff.training.export import finish
from latentdiff.training.log import Progress, RunLog
from latentdiff.training.objectives import make_objective
from latentdiff.training.optimizers import check_same_optimizer, make_optimizer, make_weight_norm
from latentdiff.training.preflight import say_first_look
from latentdiff.training.push import BackgroundPush
from latentdiff.training.setup import learning_rate_at, load_networks, optimizer_steps, start
from latentdiff.training.stopping import DivergenceWatch, StopSignals
from latentdiff.training.validation import Validation


def main(config: TrainConfig) -> None:
    accelerator, output_dir = start(config)
    checkpoint = resolve_checkpoint(output_dir, config.resume_from_checkpoint)
    carried = saved_extra(checkpoint) if checkpoint else {}
    check_same_optimizer(config, carried)
    check_same_ema(config, carried)
    parts, unet, scheduler = load_networks(config)
    model = trained_model(parts, unet)
    optimizer = make_optimizer(config, model)
    pushes = BackgroundPush(config, parts, unet, scheduler) if accelerator.is_main_process else None
    data = load_data(config, accelerator, parts, unet, scheduler)
    if accelerator.is_main_process:
        say_first_look(config, parts, unet, data)
    total_steps = optimizer_steps(config, data.batches)
    learning_rate = learning_rate_at(config, total_steps)
    objective = make_objective(config, accelerator, scheduler, unet, data, total_steps)

    model, optimizer = accelerator.prepare(model, optimizer)
    weight_norm = make_weight_norm(
        config, networks_of(accelerator.unwrap_model(model))["unet"], is_zero=is_zero(accelerator)
    )
    ema = make_ema(config, accelerator.unwrap_model(model))
    save_weights_as_diffusers_does(accelerator, accelerator.unwrap_model(model), ema)
    first_step = load_checkpoint(accelerator, checkpoint) if checkpoint else 0
    snapshots = EMASnapshots(config, accelerator, ema, first_step, total_steps)
    log = RunLog(config, accelerator, first_step)
    validation = Validation(config, accelerator, parts, scheduler, data, ema, log)
    progress = Progress(config, accelerator, log, first_step, total_steps, carried.get("losses", []))
    watch = DivergenceWatch(accelerator, data.batches, carried.get("skipped_steps", 0))

    if first_step == 0:
        validation(accelerator.unwrap_model(model), 0)
    model.train()
    with progress, StopSignals(accelerator) as stop:
        for step in range(first_step, total_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            for micro_step in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(model):
                    loss = objective(model, data.batches.at(step, micro_step), step).mean()
                    accelerator.backward(loss)
                    progress.add(loss)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            if weight_norm is not None:
                weight_norm.restore()
            done = step + 1  # optimizer steps: the one clock that users see
            watch.add(done, grad_norm)
            if ema is not None:
                ema.update(accelerator.unwrap_model(model), done)
            stops = stop.requested(done) and done < total_steps
            saves = done % config.checkpointing_steps == 0 or stops
            validates = done % config.validation_steps == 0 or done == total_steps
            if saves or validates or snapshots.due(done) or done % config.logging_steps == 0:
                watch.check()
            progress.step(done, learning_rate=learning_rate(step), **watch.measures)
            if validates:
                validation(accelerator.unwrap_model(model), done)
            if snapshots.due(done):
                snapshots.write(accelerator.unwrap_model(model), done)
            if saves:  # after validation and snapshots: a run killed between the two would go on without them
                extra = {"losses": progress.pending, "skipped_steps": watch.skipped_steps}
                extra |= {"optimizer": config.optimizer, "ema_sigma_rel": config.ema_sigma_rel}
                saved = save_checkpoint(accelerator, output_dir, done, config.checkpoints_total_limit, extra)
                if pushes and done < total_steps:
                    pushes.start(saved, done)
            if stops:
                stop.leave(done)

    if pushes:
        pushes.wait()
    finish(config, accelerator, parts, accelerator.unwrap_model(model), ema, scheduler)


if __name__ == "__main__":
    run_training(main)
