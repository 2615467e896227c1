"""Settings: what a command line, a file and a preset make of them, and what is refused in one line."""

import dataclasses

import pytest
import torch

from latentdiff.config.presets import PRESETS, parse_train_config, preset, read_config, run_training
from latentdiff.config.train import TrainConfig
from latentdiff.training.memory import saying_what_needs_less
from latentdiff.utils.errors import ConfigError


def one_line(capsys, argv: list[str], main=lambda config: None) -> str:
    """The one line on stderr with which a run of `argv` ends, with a status that is not zero."""
    with pytest.raises(SystemExit) as end:
        run_training(main, argv)
    printed = capsys.readouterr().err
    assert end.value.code not in (0, None)
    assert len(printed.splitlines()) == 1 and printed.startswith("error: "), printed
    return printed


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_run(name):
    """A preset would name a setting that does not exist, or a value that is refused."""
    config = TrainConfig(**preset(name))
    assert all(getattr(config, key) == value for key, value in PRESETS[name].items())


def test_saved_settings_come_back_equal(tmp_path):
    """`--config train_config.yaml` would start another run: a tuple as a list, 1e-05 as a string, `no` as False."""
    odd = TrainConfig(
        validation_prompts=("a cat", "ein Käse, 猫"),
        learning_rate=1e-5,
        adam_epsilon=1e-8,
        snr_gamma=5.0,
        seed=0,
        cache_latents=False,
        checkpoints_total_limit=None,
        resume_from_checkpoint="4",
        train_data_dir=str(tmp_path),
    )
    odd.save(tmp_path / "config.yaml")
    assert TrainConfig(**read_config(str(tmp_path / "config.yaml"))) == odd


def test_flags_over_file_over_preset(tmp_path):
    """What is nearest to the user's hand decides."""
    (tmp_path / "c.yaml").write_text("train_batch_size: 7\nmax_train_steps: 8\n")
    config = parse_train_config(
        ["--preset", "finetune", "--config", str(tmp_path / "c.yaml"), "--max_train_steps", "9", "--seed=3"]
    )
    assert (config.max_train_steps, config.seed) == (9, 3)
    assert config.train_batch_size == 7
    assert config.unet == "pretrained" and config.learning_rate == PRESETS["finetune"]["learning_rate"]


def test_flags_are_written_with_underscores_or_hyphens():
    """A command line of diffusers' example, which has underscores, would not be understood."""
    config = parse_train_config(["--train_batch_size=2", "--no-cache_latents", "--push_to_hub", "--no-use-ema"])
    assert (config.train_batch_size, config.cache_latents, config.push_to_hub, config.use_ema) == (
        2,
        False,
        True,
        False,
    )


def test_yaml_as_a_person_writes_it(tmp_path):
    """YAML reads `1e-4` as a string and `no` as False; the run would end in a traceback."""
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\nmixed_precision: no\nsnr_gamma: 5\nvalidation_prompts: []\n")
    config = parse_train_config(["--config", str(tmp_path / "c.yaml")])
    assert (config.learning_rate, config.mixed_precision, config.snr_gamma) == (1e-4, "no", 5)
    assert config.validation_prompts == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("max_train_steps", 0),
        ("checkpointing_steps", -1),
        ("validation_steps", 0),
        ("caption_dropout", 1.5),
        ("held_out_fraction", -0.1),
        ("max_rejected_fraction", 2.0),
        ("checkpoints_total_limit", 0),
        ("num_train_epochs", 0),
        ("resolution", 0),
        ("learning_rate", 0.0),
        ("snr_gamma", 0.0),
        ("noise_offset", -0.1),
        ("prediction_type", "x0"),
        ("ema_decay", 1.0),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("adam_epsilon", 0.0),
        ("adam_weight_decay", -1.0),
        ("lr_warmup_steps", -1),
        ("max_grad_norm", 0.0),
        ("train_data_dir", "/no/such/folder"),
        ("hub_model_id", "me/model"),
        ("mixed_precision", "fp8"),
        ("task", "outpaint"),
        ("seed", "zero"),
        ("use_ema", 1),
        ("max_train_steps", 2.5),
        ("max_train_steps", True),
        ("validation_prompts", "a cat"),
        ("save_dtype", None),
        ("single_file_config", "a folder"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field, value):
    """The run would fail later, or train something else than was asked for, and not say which setting was wrong."""
    with pytest.raises(ConfigError, match=field) as refused:
        TrainConfig(**{field: value})
    assert len(str(refused.value).splitlines()) == 1


def test_settings_that_exclude_each_other(tmp_path):
    """One of two sources of pictures, and a share held out where the split is fixed, would be ignored in silence."""
    with pytest.raises(ConfigError, match="train_data_dir and dataset_name"):
        TrainConfig(train_data_dir=str(tmp_path), dataset_name="x/y")
    with pytest.raises(ConfigError, match="held_out_fraction"):
        TrainConfig(held_out_fraction=0.1)
    with pytest.raises(ConfigError, match="lr_warmup_steps"):
        TrainConfig(lr_scheduler="constant", lr_warmup_steps=10)
    with pytest.raises(ConfigError, match="validation_prompts: have no effect with task inpaint"):
        TrainConfig(task="inpaint", validation_prompts=("a cat",))
    with pytest.raises(ConfigError, match="beta_start and beta_end"):
        TrainConfig(beta_schedule="squaredcos_cap_v2", beta_end=0.01)
    for name in ("revision", "variant"):
        with pytest.raises(ConfigError, match=f"{name}: has no effect on the single file 'a.safetensors'"):
            TrainConfig(pretrained_model_name_or_path="a.safetensors", **{name: "fp16"})


def test_settings_are_frozen():
    """A setting changed on the way would not be the one that was saved."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1\n", "learning_rat"),
        ("- a\n- b\n", "no list of settings"),
        ("a: [1\n", "cannot be read"),
        ("mixed_precision: fp8\n", "'no', 'fp16', 'bf16'"),
        ("max_train_steps: many\n", "max_train_steps: 'many'"),
        ("train_data_dir: /no/such\n", "/no/such"),
        ("learning_rate: .nan\n", "learning_rate: nan is not finite"),
        ("consistency_guidance: [1.0, .inf]\n", "is not finite"),
        ("seed: \x00\n", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("", "is empty"),
    ],
)
def test_a_wrong_file_is_one_line(capsys, tmp_path, text, said):
    """A typing error in a file would show as a traceback, or be ignored."""
    (tmp_path / "c.yaml").write_text(text)
    assert said in one_line(capsys, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "emoji65"], "'emoji64', 'demo', 'finetune'"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["--train_data_dir", "/no/such"], "/no/such"),
        (["--caption_dropout", "3"], "caption_dropout: 3"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, argv, said):
    """A user's mistake would show as a traceback."""
    assert said in one_line(capsys, argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mixed_precision", "fp8"], ("--mixed_precision: 'fp8'", "bf16")),
        (["--max_train_steps", "abc"], ("--max_train_steps: 'abc' is not a whole number",)),
        (["--nonsense", "3"], ("--nonsense",)),
    ],
)
def test_tyro_refuses_what_it_parses(capsys, argv, said):
    """A flag that does not exist would be ignored, or a mistake hidden in a box of ten lines."""
    line = one_line(capsys, argv)
    assert all(words in line for words in said)


def test_faults_of_ours_keep_their_traceback():
    """A bug would be shown as a user's mistake, and could not be found."""

    def broken(config):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_training(broken, [])


@pytest.mark.parametrize(
    "full", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(), torch.OutOfMemoryError("CUDA")]
)
def test_a_full_memory_says_what_needs_less(capsys, full):
    """A hundred lines of a library would end the run, and none of them names a setting."""

    def main(config):
        with saying_what_needs_less(config):
            raise full

    said = one_line(capsys, ["--train_batch_size", "8"], main)
    assert "out of memory" in said
    assert "--train_batch_size 4 --gradient_accumulation_steps 2, or --gradient_checkpointing, or" in said
    said = one_line(capsys, ["--train_batch_size", "1", "--gradient_checkpointing"], main)
    assert said.endswith("less of it needs a smaller --resolution or a smaller model\n")


def test_texts_that_are_none_are_refused(capsys, tmp_path):
    """Half a character ends the tokenizer, an hour into the run."""
    assert "validation_prompts: 'c\\udce9t' is not text" in one_line(capsys, ["--validation_prompts", "c\udce9t"])
    (tmp_path / "a.yaml").write_text('validation_prompts: ["\\ud83d"]')
    assert "validation_prompts: '\\ud83d' is not text" in one_line(capsys, ["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: " + b"[" * 5000, "cannot be read"),
        (b"seed: caf\xe9", "UTF-8"),
        (b"# " + b"x" * 2**21, "it is larger than 1 MiB"),
        (b"learning_rate: .nan", "learning_rate: nan is not finite"),
        (b"learning_rate: -.inf", "learning_rate: -inf is not finite"),
        (b"a: &a [x, x]\n" + b"".join(b"%c: &%c [%s]\n" % (i, i, b"*%c, " % (i - 1) * 9) for i in b"bcdefghij"), "'a'"),
        (b"seed: &a [" + b"x, " * 9 + b"]\nrevision: [*a, *a]", "revision: "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_hostile_file_of_settings_is_one_line(capsys, tmp_path, content, said):
    (tmp_path / "a.yaml").write_bytes(content)
    assert said in one_line(capsys, ["--config", str(tmp_path / "a.yaml")])
