"""Typed, frozen settings of a training run, their presets, and the checks that refuse what makes no sense."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import yaml


class ConfigError(Exception):
    """A user's mistake: its message is one clear line that names the thing, the value it had and what it may be.

    No ValueError: tyro would take that for a flag it could not parse, and draw its own box around the message.
    """


class RunStopped(Exception):
    """A run that cannot go on, by no fault of its settings: its message is one clear line."""


def cache_folder() -> Path:
    """Where the built emoji and everything encoded is kept: $LATENTDIFF_CACHE, else the user's cache folder."""
    base = os.environ.get("LATENTDIFF_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "latentdiff"


def packaged_checkpoint() -> str:
    """The shipped checkpoint beside the package in a checkout; a plain relative path elsewhere."""
    beside = Path(__file__).resolve().parent.parent / "checkpoints" / "emoji64"
    return os.path.relpath(beside) if beside.is_dir() else "checkpoints/emoji64"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a latent text-to-image model. Without arguments: the embedded emoji, 64x64, from scratch."""

    # ---- model
    task: Literal["text2img", "inpaint"] = "text2img"
    """"inpaint" trains the UNet to paint what a mask leaves open: it also sees the mask and the masked picture, as in
    Stable Diffusion's inpainting model. The masks are random; a pretrained UNet gets the inputs that it lacks."""
    pretrained_model_name_or_path: str = field(default_factory=packaged_checkpoint)
    """Folder or Hub id of a Stable-Diffusion-shaped model: VAE, text encoder and tokenizer come from it."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    variant: str | None = None
    """Variant of its weight files, e.g. fp16."""
    unet: str = "emoji64"
    """"pretrained" to go on with the model's own UNet; else a preset with new weights, or the path of a config.json."""

    lora_rank: int | None = None
    """Train adapters of this rank (LoRA) on the attention of a pretrained UNet, and save them alone."""
    lora_alpha: float | None = None
    """Their strength, as alpha / rank; by default the rank."""
    train_text_encoder: bool = False
    """Train the text encoder with the UNet: captions are encoded in every step rather than once, and the text encoder
    is averaged and saved as the UNet is."""
    gradient_checkpointing: bool = False
    """Compute the activations of what is trained a second time in the backward pass instead of keeping them: less
    memory, a slower step, the same results."""

    # ---- data
    train_data_dir: str | None = None
    """A folder of pictures with a .txt beside each, or with a metadata.jsonl or .csv of `file_name` and `text`, or of
    WebDataset tars; without it and without `dataset_name` the embedded emoji are trained."""
    dataset_name: str | None = None
    """A data set on the Hub, or the path of one (parquet, arrow, or a folder as above)."""
    dataset_config_name: str | None = None
    """Its configuration."""
    dataset_split: str = "train"
    """Its split."""
    image_column: str = "image"
    """Column of the pictures."""
    caption_column: str = "text"
    """Column of the captions: a string, or a list of which one is drawn each time."""
    max_train_samples: int | None = None
    """Use only the first so many pictures."""
    max_rejected_fraction: float = 0.01
    """The run stops before training where more of the pictures than this cannot be used."""
    resolution: int | None = None
    """Side of the square pictures in pixels; by default what the UNet and the VAE are made for."""
    center_crop: bool = True
    """Crop what does not fit after resizing the shorter side; else stretch the picture."""
    crops_per_picture: int = 1
    """How many crops of each picture are encoded, at places drawn once, of which one is drawn each time; 1 is the
    middle."""
    random_flip: bool = False
    """Mirror pictures at random."""
    aspect_ratio_buckets: bool = False
    """Keep about the shape of each picture, up to 2:1, instead of making it a square: the area of the square is kept,
    and the pictures of a step are of one shape."""
    shuffle_buffer: int | None = None
    """Draw the order of the pictures within windows of this many that lie one behind the other instead of among all,
    for tars that are read without a cache from a disk that is slow at random; best tens of thousands."""
    held_out_fraction: float = 0.0
    """Share of one's own pictures kept from training to measure the held-out loss; the emoji have a fixed split."""
    cache_dir: str | None = None
    """Where latents and hidden states are kept, for any number of runs; by default latentdiff's cache folder."""
    cache_latents: bool = True
    """Run the frozen networks once, before training; off: in every step (slower, the same losses)."""
    cache_text: Literal["auto", "always", "never"] = "auto"
    """Whether captions are encoded once, too, or in each step: "auto" keeps their hidden states where these are smaller
    than the latents or than 2 GiB."""

    # ---- objective
    caption_dropout: float = 0.1
    """Probability of training a sample without its caption, drawn anew each time; what guidance needs."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet puts out: the noise, v (arXiv 2202.00512) or the latents. By default what a pretrained UNet was
    trained for, and "epsilon" with new weights."""
    noise_offset: float = 0.0
    """Deviation of one number more per picture and channel that is added to the noise, so that brightness and colour of
    the whole picture are learnt; usual values are about 0.1."""
    snr_gamma: float | None = None
    """min-SNR weighting of the loss (arXiv 2303.09556), for networks of the usual size 5, the paper's value. Background
    and shape are decided at an SNR below 0.1, where errors of the picture hardly count in the plain epsilon loss: a
    small network learns to follow words much sooner with a value as low as that."""

    consistency: Literal["distillation", "trajectories", "training"] | None = None
    """Make a consistency model, which draws in one to eight steps: "distillation" of a pretrained UNet, the teacher,
    under guidance (arXiv 2310.04378); "trajectories" to learn its whole ones, each sample of a batch at all of their
    steps; or "training" on the pictures without a teacher (arXiv 2310.14189)."""
    consistency_steps: int = 50
    """Into how many steps its noise levels are divided, between neighbours of which it learns to answer alike, or the
    steps of a trajectory, of which 8 to 10 are enough; without a teacher they grow to that number from 10."""
    consistency_teacher: str | None = None
    """Folder or Hub id of the teacher's pipeline, where the student begins from another UNet, which may be smaller or
    have another prediction type; by default it is the pretrained model itself."""
    consistency_guide_unet: str | None = None
    """Folder of a worse UNet for the teacher's guidance to lead away from instead of the empty caption (autoguidance,
    arXiv 2406.02507)."""
    consistency_guidance: tuple[float, ...] = (1.0, 8.0)
    """The teacher's guidance: one value for good, with which pictures are then drawn at guidance 1; or the ends of a
    range, from which the student takes any as an input."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """Noise schedule of a UNet with new weights, the last being the cosine one; a pretrained UNet keeps its own."""
    beta_start: float = 0.00085
    """Its first beta."""
    beta_end: float = 0.02
    """Its last beta: larger than Stable Diffusion's, since at 16x16 the mean of a latent, which is the background's
    colour, would otherwise still show through the strongest noise, and sampling starts from pure noise."""
    rescale_betas_zero_snr: bool = False
    """Rescale the schedule, a pretrained one too, so that its last step is pure noise (zero terminal SNR, arXiv
    2305.08891), for v_prediction or sample; pictures are then drawn from the last step on."""

    # ---- optimisation
    seed: int = 0
    """Of everything that is drawn."""
    train_batch_size: int = 32
    """Pictures per process and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    max_train_steps: int = 20_000
    """Optimizer steps."""
    num_train_epochs: int | None = None
    """Passes over the data; where given, it decides the number of optimizer steps."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "prodigy"] = "adamw"
    """What takes the steps. Beside AdamW, which keeps 8 bytes of each weight: its moments in 8 bits (2 bytes, needs
    bitsandbytes); Adafactor (arXiv 1804.04235; sums over rows and columns instead of moments: next to nothing of a
    matrix, 3 bytes of a 3x3 convolution's weight); Prodigy (arXiv 2306.06101; estimates the learning rate itself, 16
    bytes, needs prodigyopt)."""
    learning_rate: float = 1e-4
    """Peak of the learning rate; with Prodigy, a factor on its own estimate, 1 in every preset."""
    lr_scheduler: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"] = (
        "constant_with_warmup"
    )
    """Course of the learning rate over the optimizer steps; "inverse_sqrt" is constant up to `lr_decay_start_steps` and
    falls with the root of the step from there on."""
    lr_decay_start_steps: int = 1000
    """The optimizer step from which on lr_scheduler inverse_sqrt falls."""
    lr_warmup_steps: int = 200
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = 0.9
    """Decay of the first moment; Adafactor has none."""
    adam_beta2: float = 0.99
    """Decay of the second moment; Adafactor's follows the step."""
    adam_weight_decay: float = 0.0
    """Weight decay, of every optimizer, as a factor on the learning rate."""
    adam_epsilon: float = 1e-8
    """Epsilon beside the second moment's root; Adafactor has none that matters. A low `snr_gamma` makes gradients so
    small (1e-8 in the middle of the UNet, at 0.02) that the usual value would halve the steps there."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""
    learned_uncertainty: bool = False
    """Let a new magnitude-preserving UNet learn how large its error is at each noise level, and divide the loss by it,
    so that all levels count the same (arXiv 2312.02696, appendix B.2)."""
    force_weight_norm: bool = False
    """Bring every filter back to the length it began with after each optimizer step, so that the learning rate alone
    decides how fast it turns (arXiv 2312.02696, section 2.3); a magnitude-preserving UNet always does."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights, and save and validate with it."""
    ema_decay: float = 0.999
    """Its decay per optimizer step."""
    ema_sigma_rel: tuple[float, ...] = ()
    """Average with power functions of these relative widths instead, such as 0.05 0.10 (arXiv 2312.02696): their length
    is a share of the run so far. Pictures and the finished model have the first; from snapshots of all in
    `ema_snapshots` any other is made afterwards: `latentdiff reconstruct-ema`, `latentdiff sweep-ema`."""
    ema_snapshot_steps: int | None = None
    """Optimizer steps between these snapshots, which are of every width, each as large as the model in fp32; by default
    a twentieth of the run. 20 of 0.05 and of 0.10 each gave the weights of 0.08 to a relative 1e-5 of what was kept
    beside them; they reach 0.03 to 0.25 to a few percent of the profile, and shorter widths need more snapshots."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the UNet's forward pass; weights, losses and averages stay in fp32."""
    dynamo_backend: str | None = None
    """Compile the UNet's blocks with this backend of torch.compile, such as inductor, which takes its time at first."""

    # ---- results
    output_dir: str = "runs/emoji64"
    """Checkpoints, logs, pictures and the finished model."""
    checkpointing_steps: int = 1000
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = 2
    """How many checkpoints are kept."""
    resume_from_checkpoint: str | None = None
    """A checkpoint's step or path, or "latest"."""
    validation_prompts: tuple[str, ...] = ("a cat", "a red apple", "a rocket", "a house on a light blue background")
    """Drawn at each validation under the averaged weights, always from the same noise. With task inpaint, pictures of
    the data are inpainted instead."""
    validation_steps: int = 1000
    """Optimizer steps between validations: pictures and held-out loss."""
    validation_inference_steps: int = 25
    """DDIM steps of the validation pictures."""
    validation_guidance_scale: float = 4.0
    """Guidance of the validation pictures."""
    report_to: str = "tensorboard"
    """Tracker, as accelerate names it; "none" for no tracker."""
    logging_steps: int = 50
    """Optimizer steps between logged losses."""
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision of the finished model's weights."""
    push_to_hub: bool = False
    """Push the averaged weights of every checkpoint while the run goes on, and the finished model at its end."""
    hub_model_id: str | None = None
    """Repository to push to; by default the name of the output folder."""
    hub_private: bool = False
    """Make a new repository private."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)
        if self.train_data_dir and self.dataset_name:
            raise ConfigError("train_data_dir and dataset_name: give one of them")
        if self.train_data_dir and not Path(self.train_data_dir).is_dir():
            raise ConfigError(f"train_data_dir: {self.train_data_dir!r} is no folder")
        if self.uses_emoji and self.held_out_fraction:
            raise ConfigError("held_out_fraction: is for one's own pictures; the embedded emoji have a fixed split")
        for name in ("aspect_ratio_buckets", "crops_per_picture"):
            if self.uses_emoji and getattr(self, name) != getattr(TrainConfig, name):
                raise ConfigError(f"{name}: is for one's own pictures; the embedded emoji are all square")
        if self.shuffle_buffer is not None and self.uses_emoji:
            raise ConfigError("shuffle_buffer: is for one's own pictures; the embedded emoji are in memory")
        if self.crops_per_picture > 1 and not self.center_crop:
            raise ConfigError("crops_per_picture: has no effect on pictures that are stretched (--no-center_crop)")
        if self.cache_text == "always" and not self.cache_latents:
            raise ConfigError("cache_text: 'always' contradicts --no-cache_latents, which keeps nothing on disk")
        if self.cache_text == "always" and self.train_text_encoder:
            raise ConfigError("cache_text: 'always' contradicts --train_text_encoder, under which captions change")
        betas = (self.beta_start, self.beta_end)
        if self.beta_schedule == "squaredcos_cap_v2" and betas != (TrainConfig.beta_start, TrainConfig.beta_end):
            raise ConfigError("beta_start and beta_end: have no effect with beta_schedule squaredcos_cap_v2")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps != TrainConfig.lr_warmup_steps:
            raise ConfigError("lr_warmup_steps: has no effect with lr_scheduler constant; take constant_with_warmup")
        decay_start = self.lr_decay_start_steps
        if self.lr_scheduler != "inverse_sqrt" and decay_start != TrainConfig.lr_decay_start_steps:
            raise ConfigError(f"lr_decay_start_steps: has no effect with lr_scheduler {self.lr_scheduler}")
        if self.force_weight_norm and self.lora_rank is not None:
            raise ConfigError("force_weight_norm: has no effect with lora_rank, under which no filter is trained")
        if self.learned_uncertainty:
            _check_uncertainty(self)
        _check_consistency(self)
        if self.task == "inpaint" and self.validation_prompts not in (TrainConfig.validation_prompts, ()):
            raise ConfigError("validation_prompts: have no effect with task inpaint, which paints pictures of the data")
        _check_optimizer(self)
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ConfigError("lora_alpha: has no effect without --lora_rank")
        if self.lora_rank is not None:
            _check_lora(self)
        if self.ema_sigma_rel or self.ema_snapshot_steps is not None:
            _check_power_ema(self)
        if self.hub_model_id and not self.push_to_hub:
            raise ConfigError("hub_model_id: has no effect without --push_to_hub")

    @property
    def uses_emoji(self) -> bool:
        """Whether the embedded data set is trained rather than pictures of one's own."""
        return not (self.train_data_dir or self.dataset_name)

    @property
    def has_teacher(self) -> bool:
        """Whether the UNet is trained to answer as another does at the end of its trajectories."""
        return self.consistency in ("distillation", "trajectories")

    @property
    def samples_per_step(self) -> int:
        """Pictures per optimizer step on one process."""
        return self.train_batch_size * self.gradient_accumulation_steps

    def save(self, path: Path) -> None:
        """Write every setting as YAML; `--config PATH` starts the same run again."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        path.write_text(yaml.safe_dump(plain, sort_keys=False))


# Settings of Adam's moments that Adafactor has not.
ADAFACTOR_LACKS = ("adam_beta1", "adam_beta2", "adam_epsilon")


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer == "adafactor":
        for name in ADAFACTOR_LACKS:
            if getattr(config, name) != getattr(TrainConfig, name):
                raise ConfigError(
                    f"{name}: {getattr(config, name)} has no effect with optimizer adafactor; leave it out"
                )
    if config.optimizer == "prodigy" and config.learning_rate < 0.1:
        raise ConfigError(
            f"learning_rate: {config.learning_rate} is a factor on the rate that optimizer prodigy estimates; give one "
            "near 1, at least 0.1"
        )


def _check_power_ema(config: TrainConfig) -> None:
    if not config.ema_sigma_rel:
        raise ConfigError("ema_snapshot_steps: has no effect without --ema_sigma_rel")
    for sigma_rel in config.ema_sigma_rel:
        if not 0 < sigma_rel <= 0.2886:  # just below 12^-1/2, the plain mean of all weights: a wider one there is not
            raise ConfigError(f"ema_sigma_rel: {sigma_rel} must lie above 0 and at most at 0.2886; 0.05 0.10 is usual")
    if len({f"{sigma_rel:g}" for sigma_rel in config.ema_sigma_rel}) < len(config.ema_sigma_rel):
        raise ConfigError("ema_sigma_rel: names a width twice, to six digits")
    if not config.use_ema:
        raise ConfigError("ema_sigma_rel: has no effect with --no-use_ema")
    if config.ema_decay != TrainConfig.ema_decay:
        raise ConfigError(
            f"ema_decay: {config.ema_decay} has no effect with ema_sigma_rel; leave it at {TrainConfig.ema_decay}"
        )
    if config.lora_rank is not None:
        raise ConfigError("ema_sigma_rel: is for whole networks; the average of adapters (lora_rank) has ema_decay")


def _check_consistency(config: TrainConfig) -> None:
    guidance = config.consistency_guidance
    of_teacher = ("consistency_teacher", "consistency_guide_unet", "consistency_guidance")
    if config.consistency is None:
        for name in ("consistency_steps", *of_teacher):
            if getattr(config, name) != getattr(TrainConfig, name):
                raise ConfigError(f"{name}: has no effect without --consistency")
        return
    for name in ("snr_gamma", "learned_uncertainty"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}: weighs the denoising loss, which is not what consistency {config.consistency} has"
            )
    if config.consistency == "training":
        for name in of_teacher:
            if getattr(config, name) != getattr(TrainConfig, name):
                raise ConfigError(f"{name}: has no effect with consistency 'training', which has no teacher")
        if config.consistency_steps < 10:
            raise ConfigError(f"consistency_steps: {config.consistency_steps} is below 10, at which it begins")
        return
    if config.unet != "pretrained" and config.consistency_teacher is None:
        raise ConfigError(
            f"consistency: {config.consistency!r} of new weights (unet {config.unet!r}) needs consistency_teacher"
        )
    if config.prediction_type is not None and config.unet == "pretrained" and config.consistency == "distillation":
        raise ConfigError(
            "prediction_type: a student that begins from a pretrained UNet and learns from its own answers keeps that "
            "one's"
        )
    if config.train_text_encoder:
        raise ConfigError(
            f"train_text_encoder: consistency {config.consistency!r} has a teacher that reads as the student does"
        )
    if not 1 <= len(guidance) <= 2 or min(guidance) < 1 or sorted(set(guidance)) != list(guidance):
        raise ConfigError(f"consistency_guidance: {guidance} is neither a value of at least 1 nor two ascending ones")
    if config.lora_rank is not None and len(guidance) == 2:
        raise ConfigError("consistency_guidance: a range is an input of its own, which adapters (lora_rank) cannot add")


def _check_uncertainty(config: TrainConfig) -> None:
    if config.unet == "pretrained":
        raise ConfigError("learned_uncertainty: is for new weights; a pretrained UNet goes on with what it has")
    if config.snr_gamma is not None:
        raise ConfigError(
            f"snr_gamma: {config.snr_gamma} contradicts learned_uncertainty, which weighs noise levels itself; say None"
        )


def _check_lora(config: TrainConfig) -> None:
    if config.unet != "pretrained":
        raise ConfigError(f"lora_rank: adapters stand on a pretrained UNet; unet is {config.unet!r}, not 'pretrained'")
    if config.prediction_type is not None or config.rescale_betas_zero_snr:
        raise ConfigError(
            "lora_rank: only the adapters are saved, so what they are used with keeps its own noise schedule; "
            "leave out prediction_type and rescale_betas_zero_snr"
        )
    if config.train_text_encoder:
        raise ConfigError("lora_rank: adapters are trained on the UNet alone; leave out train_text_encoder")
    if config.lora_alpha is not None and config.lora_alpha <= 0:
        raise ConfigError(f"lora_alpha: {config.lora_alpha} is not above 0")


def _check_types(config: TrainConfig) -> None:
    """The command line checks its own values; those of a file or of a program are checked here."""
    for name, kind in get_type_hints(TrainConfig).items():
        value, choices = getattr(config, name), get_args(kind)
        if not _is_a(value, kind):
            may_be = ", ".join(map(repr, choices)) if get_origin(kind) is Literal else getattr(kind, "__name__", kind)
            raise ConfigError(f"{name}: {value!r} is not what it may be: {may_be}")


def _is_a(value, kind) -> bool:
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        return value in choices
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, choices[0]) for item in value)
    if choices:  # one of several
        return any(_is_a(value, choice) for choice in choices)
    if kind in (int, float):  # a bool is an int to Python, and an int may stand for a float
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check_ranges(config: TrainConfig) -> None:
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                 "validation_steps", "logging_steps", "validation_inference_steps", "crops_per_picture",
                 "lr_decay_start_steps", "consistency_steps"):  # fmt: skip
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: {getattr(config, name)} is below 1")
    for name in ("caption_dropout", "held_out_fraction", "max_rejected_fraction"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name}: {getattr(config, name)} is not within 0 and 1")
    for name in ("checkpoints_total_limit", "num_train_epochs", "max_train_samples", "resolution", "lora_rank",
                 "shuffle_buffer", "ema_snapshot_steps"):  # fmt: skip
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"{name}: {getattr(config, name)} is below 1")
    for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name}: {getattr(config, name)} is not above 0")
    for name in ("adam_weight_decay", "lr_warmup_steps", "noise_offset"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name}: {getattr(config, name)} is below 0")
    for name in ("adam_beta1", "adam_beta2", "ema_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name}: {getattr(config, name)} is not in [0, 1)")
    if config.snr_gamma is not None and config.snr_gamma <= 0:
        raise ConfigError(f"snr_gamma: {config.snr_gamma} is not above 0; leave it out for the plain loss")
