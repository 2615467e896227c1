"""Typed, frozen settings of a training run, in groups, as which the help shows them; flat in Python and in YAML."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from ..utils.files import packaged_checkpoint, write_whole
from .checks import check, check_types


@dataclass(frozen=True, kw_only=True)
class SettingsGroup:
    """Some of a run's settings: a box in the help. Their types are checked, and nothing else."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(SettingsGroup):
    """What is trained, and what it begins from."""

    task: Literal["text2img", "inpaint"] = "text2img"
    """"inpaint" trains the UNet to paint what a mask leaves open: it also sees the mask and the masked picture, as in
    Stable Diffusion's inpainting model. The masks are random; a pretrained UNet gets the inputs that it lacks."""
    pretrained_model_name_or_path: str = field(default_factory=packaged_checkpoint)
    """Folder or Hub id of a Stable-Diffusion-shaped model, or a single .safetensors file of one: VAE, text encoder and
    tokenizer come from it."""
    single_file_config: str | None = None
    """Folder or Hub id of a model of the same kind as a single file, whose configurations and tokenizer are taken:
    it has none; by default those of the Stable Diffusion that it looks like, from the Hub."""
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


@dataclass(frozen=True, kw_only=True)
class DataSettings(SettingsGroup):
    """Pictures and captions: where they are, what is made of them, and what of that is kept."""

    train_data_dir: str | None = None
    """A folder of pictures with a .txt beside each, or with a metadata.jsonl, .csv or .parquet of `file_name` and
    `text`, or of WebDataset tars; without it and without `dataset_name` the embedded emoji are trained."""
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


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings(SettingsGroup):
    """What the UNet learns: the loss, the noise schedule, consistency in place of denoising."""

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


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings(SettingsGroup):
    """Batches, steps, the optimizer, averages of the weights, precision."""

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


@dataclass(frozen=True, kw_only=True)
class ResultSettings(SettingsGroup):
    """Checkpoints, validation, logs, the finished model, the Hub."""

    output_dir: str = "runs/emoji64"
    """Checkpoints, logs, pictures and the finished model."""
    checkpointing_steps: int = 1000
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = 2
    """How many checkpoints are kept."""
    resume_from_checkpoint: str | None = None
    """A checkpoint's step or path, or "latest", which is that of the run that the folder is of."""
    overwrite_output_dir: bool = False
    """Begin anew in a folder that holds another run, whose checkpoints go when this one has its first."""
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
    """Tracker of the settings, curves and validation pictures, as accelerate names it (wandb, mlflow, …); "none" for
    no tracker. What it gets stands in the output folder, too."""
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


@dataclass(frozen=True, kw_only=True)
# A dataclass begins with the fields of its last base.
class TrainConfig(ResultSettings, OptimisationSettings, ObjectiveSettings, DataSettings, ModelSettings):
    """Train a latent text-to-image model. Without arguments: the embedded emoji, 64x64, from scratch."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def uses_emoji(self) -> bool:
        """Whether the embedded data set is trained rather than pictures of one's own."""
        return not (self.train_data_dir or self.dataset_name)

    @property
    def samples_per_step(self) -> int:
        """Pictures per optimizer step on one process."""
        return self.train_batch_size * self.gradient_accumulation_steps

    def to_yaml(self) -> str:
        """Every setting; in a file, `--config PATH` starts the same run again."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False)

    def save(self, path: Path) -> None:
        """Write `to_yaml`, whole or not at all."""
        write_whole(path, self.to_yaml().encode())
