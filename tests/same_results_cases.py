"""The cases of `same_results.py`: what is trained, drawn and commanded in two checkouts."""

# In the tables "{tiny}" is a file or folder of the inputs or of the old checkout's shipped models, see `places`.

# ---- training: one run of the entry script, or several in one output folder, as flags. True and False are --x and
# --no-x; None leaves a flag out.

BASE = {
    "preset": "finetune", "pretrained_model_name_or_path": "{tiny}", "train_data_dir": "{pictures}",
    "train_batch_size": 4, "max_train_steps": 4, "learning_rate": 1e-3, "lr_warmup_steps": 2, "logging_steps": 1,
    "checkpointing_steps": 2, "held_out_fraction": 0.2, "validation_steps": 2, "validation_inference_steps": 2,
    "report_to": "none",
}  # fmt: skip
EMOJI = {
    "pretrained_model_name_or_path": "{emoji64}", "unet": "tiny", "train_batch_size": 4, "max_train_steps": 2,
    "lr_warmup_steps": 1, "logging_steps": 1, "max_train_samples": 256, "validation_prompts": ["a cat"],
    "validation_steps": 2, "validation_inference_steps": 2, "report_to": "none",
}  # fmt: skip
DISTILL = {"preset": "distill", "validation_inference_steps": 2}
OWN_PICTURES: dict[str, list[dict]] = {  # what differs from BASE
    "epsilon": [{"prediction_type": "epsilon", "validation_prompts": ["a cat", "a red dog"]}],
    "v_prediction": [{"prediction_type": "v_prediction"}],
    "sample": [{"prediction_type": "sample"}],
    "min-SNR": [{"snr_gamma": 5.0}],
    "min-SNR of v": [{"snr_gamma": 5.0, "prediction_type": "v_prediction"}],
    "min-SNR of sample": [{"snr_gamma": 0.5, "prediction_type": "sample"}],
    "zero terminal SNR": [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}],
    "noise offset": [{"noise_offset": 0.1, "caption_dropout": 0.5}],
    "inpainting": [{"task": "inpaint"}],
    "text encoder": [{"train_text_encoder": True, "validation_prompts": ["a cat"]}],
    "LoRA": [{"lora_rank": 2, "lora_alpha": 3.0, "validation_prompts": ["a cat"]}],
    "new weights": [{"unet": "tiny", "beta_schedule": "squaredcos_cap_v2", "save_dtype": "fp16"}],
    "magnitude-preserving": [
        {"unet": "mp-mini", "learned_uncertainty": True, "force_weight_norm": True, "validation_prompts": ["a cat"]}
    ],
    "mp-tiny, inverse_sqrt": [
        {"unet": "mp-tiny", "learned_uncertainty": True, "lr_scheduler": "inverse_sqrt", "lr_decay_start_steps": 2}
    ],
    "forced weight norm": [{"force_weight_norm": True}],
    "distillation": [{**DISTILL, "consistency_guidance": [3.0], "validation_prompts": ["a cat"]}],
    "distillation, a range": [{**DISTILL, "validation_prompts": ["a cat"]}],
    "distillation, LoRA": [{**DISTILL, "consistency_guidance": [3.0], "lora_rank": 2}],
    "distillation, a teacher": [{**DISTILL, "consistency_teacher": "{other}", "consistency_guidance": [3.0]}],
    "distillation, guide unet": [{**DISTILL, "consistency_guide_unet": "{other}", "consistency_guidance": [3.0]}],
    "trajectories": [{**DISTILL, "consistency": "trajectories", "consistency_steps": 8}],
    "trajectories, guide unet": [
        {**DISTILL, "consistency": "trajectories", "consistency_steps": 8, "consistency_guide_unet": "{other}"}
    ],
    "consistency training": [{**DISTILL, "consistency": "training", "validation_prompts": ["a cat"]}],
    "buckets, flips, crops": [{"aspect_ratio_buckets": True, "random_flip": True, "crops_per_picture": 2}],
    "stretched": [{"center_crop": False}],
    "buckets, inpainting, no cache": [{"aspect_ratio_buckets": True, "task": "inpaint", "cache_latents": False}],
    "accumulation": [{"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}],
    "gradient checkpointing": [{"gradient_checkpointing": True, "max_grad_norm": 0.1}],
    "averages of two widths": [{"ema_sigma_rel": [0.05, 0.10], "ema_snapshot_steps": 2}],
    "no average": [{"use_ema": False}],
    "no cache": [{"cache_latents": False, "random_flip": True}],
    "captions in every step": [{"cache_text": "never"}],
    "Adafactor": [{"optimizer": "adafactor"}],
    "bf16": [{"mixed_precision": "bf16"}],
    "resumed": [
        {"max_train_steps": 2, "validation_prompts": ["a cat"]},
        {"resume_from_checkpoint": "latest", "validation_prompts": ["a cat"]},
    ],
    "resumed, averages of two widths": [
        {"max_train_steps": 2, "ema_sigma_rel": [0.05, 0.10]},
        {"resume_from_checkpoint": "latest", "ema_sigma_rel": [0.05, 0.10]},
    ],
}
TRAINING = {name: [{**BASE, **run} for run in runs] for name, runs in OWN_PICTURES.items()} | {
    "emoji": [EMOJI],
    "emoji, inpainting": [{**EMOJI, "task": "inpaint", "validation_prompts": None}],
}

# ---- drawing: a pipeline, its folder, and a call's arguments. "@x" is a thing, see `Things`; `scheduler` is a class
# and `method` another method than the call.

DRAW = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 4.0, "seeds": [3]}
TWO = {**DRAW, "prompt": ["a cat", "a house on a light blue background"], "seeds": [3, 4]}
TEXT, IMG2IMG, INPAINT, FRAMES, INVERT = (
    f"LatentDiff{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "Interpolate", "Inversion")
)
LONG = "a (red:1.4) cat beside a [green] house, " * 6
FILM = {"num_inference_steps": 4, "guidance_scale": 4.0, "num_frames": 3}
BACK = {"prompt": "a dog", "source_prompt": "a cat", "image": "@picture", "num_inference_steps": 4}
DRAWING: dict[str, tuple[str, str, dict]] = {
    "DDIM": (TEXT, "{emoji64}", TWO),
    "DDIM, eta": (TEXT, "{emoji64}", {**DRAW, "eta": 0.7}),
    "DDPM": (TEXT, "{emoji64}", {**DRAW, "scheduler": "DDPMScheduler"}),
    "no guidance": (TEXT, "{emoji64}", {**DRAW, "guidance_scale": 1.0}),
    "negative prompt": (TEXT, "{emoji64}", {**DRAW, "negative_prompt": "red"}),
    "guidance_rescale": (TEXT, "{emoji64}", {**DRAW, "guidance_rescale": 0.7}),
    "guidance_interval": (TEXT, "{emoji64}", {**DRAW, "guidance_interval": (0.3, 5.0)}),
    "guidance by noise level": (TEXT, "{emoji64}", {**DRAW, "guidance_scale": "@falling"}),
    "guide_unet": (TEXT, "{emoji64}", {**DRAW, "guidance_scale": 2.0, "guide_unet": "@guide"}),
    "long prompts": (TEXT, "{emoji64}", {**DRAW, "prompt": LONG, "long_prompts": True}),
    "prompt weights": (TEXT, "{emoji64}", {**DRAW, "prompt": "a (red:1.4) cat", "prompt_weights": True}),
    "clip_skip": (TEXT, "{emoji64}", {**DRAW, "clip_skip": 1}),
    "another size, a generator": (
        TEXT, "{emoji64}", {**DRAW, "seeds": None, "generator": "@generator", "height": 64, "width": 96},
    ),
    "few steps": (TEXT, "{emoji64-lcm}", {"prompt": ["a cat", "a dog"], "seeds": [3, 4]}),
    "few steps, img2img": (IMG2IMG, "{emoji64-lcm}", {"prompt": "a dog", "image": "@picture", "seeds": [3]}),
    "img2img": (IMG2IMG, "{emoji64}", {**DRAW, "image": "@picture", "strength": 0.6}),
    "inpaint, 4 channels": (INPAINT, "{emoji64}", {**DRAW, "image": "@picture", "mask_image": "@mask"}),
    "inpaint, 4 channels, a rim": (
        INPAINT, "{emoji64}",
        {**DRAW, "image": "@picture", "mask_image": "@mask", "mask_blur": 6, "keep_unmasked": True},
    ),
    "inpaint, 9 channels": (INPAINT, "{emoji64-inpaint}", {**DRAW, "image": "@picture", "mask_image": "@mask"}),
    "interpolate": (FRAMES, "{emoji64}", {**FILM, "prompts": ["a cat", "a dog"], "seeds": [3]}),
    "interpolate, a loop": (FRAMES, "{emoji64}", {**FILM, "prompts": "a cat", "seeds": [3, 4], "loop": True}),
    "interpolate, eta": (FRAMES, "{tiny}", {**FILM, "prompts": ["a cat", "a dog"], "seeds": [3, 4], "eta": 1.0}),
    "invert": (INVERT, "{emoji64}", {"method": "invert", "image": "@picture", "prompt": "a cat",
                                     "num_inference_steps": 4}),
    "edit by inversion": (INVERT, "{emoji64}", BACK),
    "tiny": (TEXT, "{tiny}", TWO),
    "tiny, DDPM": (TEXT, "{tiny}", {**TWO, "scheduler": "DDPMScheduler"}),
    "tiny, consistency": (TEXT, "{tiny}", {**TWO, "scheduler": "ConsistencyScheduler"}),
    "magnitude-preserving": (TEXT, "{mp}", TWO),
    "magnitude-preserving, img2img": (IMG2IMG, "{mp}", {**DRAW, "image": "@picture"}),
    "LoRA": (TEXT, "{tiny}", {**DRAW, "lora": "{lora}", "cross_attention_kwargs": {"scale": 0.7}}),
}  # fmt: skip

# ---- the command `latentdiff`, one after the other in one folder of its own; every picture that this leaves counts.

STEPS = ["--num-inference-steps", "4", "--guidance-scale", "4", "--device", "cpu"]
CLIP = ["--clip", "{emoji64-clip}", "--clip-guidance", "100"]
CATS = ["{emoji64}", "--prompts", "a cat", *STEPS]
COMMANDS: dict[str, list[list[str]]] = {
    "generate": [["generate", "{emoji64}", "--prompts", "a cat", "a dog", "--seeds", "1", "2", *STEPS,
                  "--output-dir", "drawn", "--grid", "grid.png"]],
    "generate, CLIP": [["generate", *CATS, *CLIP, "--output-dir", "drawn"]],
    "generate, guide, euler": [["generate", *CATS, "--guide-unet", "{emoji64-guide}", "--scheduler", "euler",
                                "--output-dir", "drawn"]],
    "generate, dpm++": [["generate", *CATS, "--scheduler", "dpm++", "--karras-sigmas", "--output-dir", "drawn"]],
    "generate, LoRA": [["generate", "{tiny}", "--lora", "{lora}", "--prompts", "a cat", *STEPS,
                        "--output-dir", "drawn"]],
    "redraw": [["generate", *CATS, "--output-dir", "drawn"],
               ["redraw", "drawn/000-a-cat.png", "--checkpoint", "{emoji64}", "--device", "cpu"]],
    "edit": [["edit", "{emoji64}", "--image", "{picture}", "--prompts", "a dog", *STEPS, "--output-dir", "drawn"]],
    "edit, mask": [["edit", "{emoji64-inpaint}", "--image", "{picture}", "--mask", "{mask}", "--mask-blur", "4",
                    "--keep-unmasked", "--prompts", "a dog", *STEPS, "--output-dir", "drawn"]],
    "edit, source prompt": [["edit", "{emoji64}", "--image", "{picture}", "--source-prompt", "a cat", "--prompts",
                             "a red cat", *STEPS, "--output-dir", "drawn"]],
    "interpolate": [["interpolate", "{emoji64}", "--prompts", "a cat", "a dog", "--num-frames", "3", *STEPS,
                     "--output", "film.gif"]],
}  # fmt: skip

CASES = {
    f"{kind}: {name}": (kind, case)
    for kind, cases in (("train", TRAINING), ("draw", DRAWING), ("command", COMMANDS))
    for name, case in cases.items()
}
SHIPPED = ("emoji64", "emoji64-inpaint", "emoji64-lcm", "emoji64-guide", "emoji64-clip")
