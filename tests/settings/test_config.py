"""Settings: the same from flags and YAML, of the declared type, and refused with a line that helps when wrong."""

import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT, run_process

from pipeline.settings.checks import ignored_settings
from pipeline.settings.config import DEFAULTS, FIELDS, SECTIONS, Config, to_yaml
from pipeline.settings.parser import limits_in_words, make_parser, parse_config, read_config

# A value other than the default for every setting, as a person writes it, and what must arrive.
SETTINGS = {
    "dataset": ("cifar100", "cifar100"),
    "hub_config": ("plain_text", "plain_text"),
    "label_column": ("coarse_label", "coarse_label"),
    "image_size": ("64", 64),
    "val_fraction": ("0.2", 0.2),
    "loader": ("workers", "workers"),
    "shuffle_buffer": ("1000", 1000),
    "num_workers": ("2", 2),
    "on_bad_image": ("skip", "skip"),
    "max_train_samples": ("5000", 5000),
    "sampler": ("balanced", "balanced"),
    "drop_last": ("False", False),
    "augment": ("none", "none"),
    "flip": ("alternate", "alternate"),
    "random_erasing": ("0.25", 0.25),
    "mixup": ("2e-1", 0.2),
    "cutmix": ("1", 1.0),
    "label_smoothing": ("0.1", 0.1),
    "loss": ("bce", "bce"),
    "class_weights": ("balanced", "balanced"),
    "model_name": ("resnest14d", "resnest14d"),
    "pretrained": ("True", True),
    "stem": ("small", "small"),
    "init_from": ("runs/x", "runs/x"),
    "head_init": ("zero", "zero"),
    "head_init_samples": ("100", 100),
    "drop_rate": ("0.5", 0.5),
    "drop_path_rate": (".1", 0.1),
    "freeze_epochs": ("2", 2),
    "freeze_batchnorm": ("true", True),
    "gradient_checkpointing": ("true", True),
    "optimizer": ("adamw", "adamw"),
    "optimizer_args": ("{betas: [0.9, 0.99]}", {"betas": [0.9, 0.99]}),
    "lr": ("1e-05", 1e-05),
    "weight_decay": ("0", 0.0),
    "layer_decay": ("0.75", 0.75),
    "momentum": ("0.8", 0.8),
    "nesterov": ("false", False),
    "muon_momentum": ("0.9", 0.9),
    "ns_steps": ("3", 3),
    "muon_lr_scaling": ("original", "original"),
    "adamw_lr_scale": ("0.5", 0.5),
    "adamw_weight_decay": ("0.0", 0.0),
    "sam_rho": ("0.1", 0.1),
    "sam_adaptive": ("true", True),
    "sam_every": ("2", 2),
    "sam_sync": ("false", False),
    "ema_decay": ("0.5", 0.5),
    "clip_grad_norm": ("1.0", 1.0),
    "scheduler": ("step", "step"),
    "warmup_epochs": ("0.5", 0.5),
    "step_epochs": ("[1, 2]", [1.0, 2.0]),
    "gamma": ("0.5", 0.5),
    "plateau_patience": ("3", 3),
    "min_lr_scale": ("0.01", 0.01),
    "epochs": ("20", 20),
    "time_limit": ("1h30m", "1h30m"),
    "batch_size": ("64", 64),
    "batch_size_schedule": ("{5: 256, 10: 512}", {5: 256, 10: 512}),
    "batch_lr_scaling": ("sqrt", "sqrt"),
    "micro_batch_size": ("16", 16),
    "early_stopping_patience": ("4", 4),
    "monitor": ("loss", "loss"),
    "mixed_precision": ("no", "no"),
    "channels_last": ("true", True),
    "compile": ("true", True),
    "sync_batchnorm": ("true", True),
    "output_dir": ("elsewhere", "elsewhere"),
    "run_name": ("a-run", "a-run"),
    "seed": ("7", 7),
    "resume": ("never", "never"),
    "checkpoint_every_steps": ("100", 100),
    "keep_checkpoints": ("3", 3),
    "log_with": ("[wandb, tensorboard]", ["wandb", "tensorboard"]),
    "project": ("a-project", "a-project"),
    "log_model": ("true", True),
    "log_every": ("5", 5),
    "dry_run": ("true", True),
}


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parse_config(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err.strip()


def test_the_table_has_every_setting():
    assert SETTINGS.keys() == FIELDS.keys()
    assert all(getattr(DEFAULTS, name) != value for name, (_, value) in SETTINGS.items())


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_arrives_the_same_from_both_flag_forms_and_yaml(name, tmp_path):
    text, value = SETTINGS[name]
    more = [] if name in ("epochs", "pretrained", "init_from") else ["--epochs", "20"]
    path = tmp_path / "settings.yaml"
    path.write_text(f"{name}: {text}\n")
    for arguments in ([f"--{name}", text], [f"--{name}={text}"], ["--config", str(path)]):
        received = getattr(read_config([*arguments, *more]), name)
        assert received == value and type(received) is type(value)


@pytest.mark.parametrize("none", ["None", "null"])
@pytest.mark.parametrize("name", [name for name in FIELDS if getattr(DEFAULTS, name) is None])
def test_none_and_null_mean_no_value(name, none, tmp_path):
    (tmp_path / "settings.yaml").write_text(f"{name}: {none}\n")
    assert getattr(read_config([f"--{name}", none]), name) is None
    assert getattr(read_config(["--config", str(tmp_path / "settings.yaml")]), name) is None


def test_the_command_line_overrides_the_file_in_any_order(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("lr: 0.5\nseed: 3\n")
    for arguments in (["--config", str(path), "--lr", "0.25"], ["--config", str(path), "--lr=0.25"]):
        config = read_config(arguments)
        assert (config.lr, config.seed) == (0.25, 3)


def test_the_saved_settings_read_back_the_same(tmp_path):
    arguments = [f"--{name}={text}" for name, (text, _) in SETTINGS.items() if name not in ("init_from", "sampler")]
    config = read_config(arguments)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(["--config", str(path)]) == config
    assert yaml.safe_load(path.read_text()) == asdict(config)


def test_what_print_config_prints_reads_back_as_the_defaults(tmp_path):
    (tmp_path / "printed.yaml").write_text(run_process("train.py", "--print_config").stdout)
    assert read_config(["--config", str(tmp_path / "printed.yaml")]) == Config()


def test_compile_takes_yes_no_or_a_mode():
    given = {text: read_config([f"--compile={text}"]) for text in ("true", "false", "reduce-overhead")}
    assert [config.compile for config in given.values()] == [True, False, "reduce-overhead"]
    assert [config.compile_mode for config in given.values()] == [None, None, "reduce-overhead"]


@pytest.mark.parametrize("word", ["no", "False", "false", "off"])
def test_no_is_no_in_both_versions_of_yaml(word, tmp_path):
    """YAML 1.1, as `wandb agent` reads it, makes False of no and off."""
    assert read_config([f"--mixed_precision={word}"]).mixed_precision == "no"
    assert read_config(["--mixed_precision", word]).mixed_precision == "no"
    (tmp_path / "settings.yaml").write_text(f"mixed_precision: {word}\n")
    assert read_config(["--config", str(tmp_path / "settings.yaml")]).mixed_precision == "no"
    with pytest.raises(ValueError, match="mixed_precision 'True' is not one of no"):
        read_config(["--mixed_precision=True"])


def test_an_argument_that_the_wandb_agent_adds_is_ignored():
    assert parse_config(["--lr=0.5", "--_wandb={'x': 1}"]).lr == 0.5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--schedular", "cosine"], ["'schedular'", "'scheduler'"]),
        (["--schedular=cosine"], ["'schedular'", "'scheduler'"]),
        (["--loss", "BCE"], ["Did you mean 'bce'?"]),
        (["--lr", "fast"], ["lr", "'fast'", "a number or null"]),
        (["--stem", "smal"], ["'smal'", "Did you mean 'small'"]),
        (["--mixed_precision", "fp8"], ["no, fp16, bf16 or null"]),
        (["--batch_size", "0"], ["batch_size is 0", "at least 1"]),
        (["--val_fraction", "1"], ["below 1"]),
        (["--batch_size_schedule", "{a: 4}"], ["{5: 256, 10: 512}"]),
        (["--batch_size_schedule", "{0: 4}"], ["at least 1"]),
        (["--batch_size_schedule", "{50: 4}"], ["epochs 8"]),
        (["--step_epochs", "[4, 2]"], ["ascending order"]),
        (["--pretrained", "true", "--init_from", "x"], ["Set only one of them"]),
        (["--compile", "reduce-overhaed"], ["true, false or reduce-overhead", "Did you mean 'reduce-overhead'"]),
        (["--compile", "reduce-overhead", "--micro_batch_size", "auto"], ["one pass per step", "Use compile true"]),
        (["--compile", "reduce-overhead", "--optimizer", "sam"], ["one pass per step"]),
        (["--compile", "reduce-overhead", "--sam_rho", "0.1"], ["one pass per step"]),
        (["--warmup_epochs", "30"], ["warmup_epochs 30.0 must be below epochs 8"]),
        *((["--run_name", name], ["plain folder name"]) for name in ("a/b", "", ".", "..", "two\nlines", "a\0b", 256 * "x")),
        (["--config", "missing.yaml"], ["missing.yaml is not a file"]),
        (["--config"], ["--config needs a value: a YAML file."]),
        (["--pretrained"], ["--pretrained needs a value: true or false."]),
        (["--flip", "maybe"], ["flip 'maybe' is not true, false, alternate or null."]),
        (["extra"], ["'extra'", "--name value"]),
    ],
)
def test_a_wrong_setting_ends_with_status_2_and_one_line_that_helps(arguments, words, capsys):
    message = error_of(capsys, *arguments)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text, words", [("lrr: 1\n", "'lrr'"), ("lr: [1\n", "YAML: while parsing"), ("- 1\n", "YAML: - 1")])
def test_a_wrong_file_ends_with_status_2_and_one_line(text, words, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(text)
    message = error_of(capsys, "--config", str(tmp_path / "settings.yaml"))
    assert message.startswith("error: ") and "\n" not in message and words in message


def test_a_setting_without_effect_is_reported():
    assert ignored_settings(Config()) == []
    assert ignored_settings(Config(gamma=0.5)) == ["gamma 0.5 has no effect: it needs scheduler step or plateau."]
    assert ignored_settings(Config(gamma=0.5, scheduler="step")) == []
    assert len(ignored_settings(Config(batch_lr_scaling="sqrt", plateau_patience=2))) == 2


def test_help_has_the_sentence_the_limits_and_the_default_of_every_setting(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = " ".join(make_parser().format_help().split("\noptions:")[1].split())
    for name, field in FIELDS.items():
        limits = limits_in_words(field.metadata["limits"])
        sentences = f"{field.metadata['help']} Must be {limits}." if limits else field.metadata["help"]
        default = "null" if getattr(DEFAULTS, name) is None else str(getattr(DEFAULTS, name))
        start = text.index(f" {name.upper()} {sentences} (type: ")
        assert re.search(r"default: (.*?)\)(?: --| \w|$)", text[start:])[1] == default, name
    for section in SECTIONS.values():
        assert f" {section}: --" in text


def test_help_and_a_wrong_setting_import_nothing_heavy():
    heavy = "torch numpy pandas timm accelerate datasets wandb tensorboard matplotlib optuna jinja2 psutil"
    code = (
        "import sys, train\n"
        "for arguments in (['--help'], ['--print_config'], ['--schedular', 'cosine'], ['--lr', 'fast']):\n"
        "    try:\n        train.main(arguments)\n"
        "    except SystemExit as exit:\n        assert exit.code == (2 if len(arguments) == 2 else 0)\n"
        "    else:\n        raise AssertionError('did not exit')\n"
        f"print('imported:', *set('{heavy}'.split()) & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("imported:\n") and "--optimizer" in done.stdout


@pytest.mark.parametrize("warmup_epochs, epochs, warned", [(3.0, 4, True), (2.0, 4, False), (1.0, 1, False)])
def test_a_warm_up_that_is_shortened_is_reported(warmup_epochs, epochs, warned):
    sentences = ignored_settings(Config(warmup_epochs=warmup_epochs, epochs=epochs))
    assert sentences == (["warmup_epochs 3 is shortened to half of the run, 2 epochs."] if warned else [])
