"""What the launcher decides is recorded, so that the command that resumes a run gives the same run."""

import pytest
from conftest import lines_of, same_weights, timeless

from pipeline.settings.config import Config
from pipeline.settings.parser import from_yaml, read_config
from pipeline.training.tracking import Tracker


def test_a_run_begun_in_bf16_by_the_launcher_resumes_in_bf16_by_the_printed_command(run_training, monkeypatch):
    log = Tracker.log

    def killed(self, split, place, values):
        if place["step"] == 7:
            raise RuntimeError("killed")
        log(self, split, place, values)

    settings = {"log_every": 1, "checkpoint_every_steps": 1}
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        _, whole = run_training(run_name="whole", **settings)
        patch.setattr(Tracker, "log", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run_training(**settings)
    run_dir = whole.parent / "run"
    assert from_yaml(run_dir / "config.yaml").mixed_precision == "bf16"
    with pytest.raises(ValueError, match="started with other settings: mixed_precision bf16 -> no"):
        run_training(**settings)  # without the launcher
    resumed = read_config(["--config", str(run_dir / "config.yaml")])
    run_training(**vars(resumed))
    assert timeless(lines_of(run_dir)) == timeless(lines_of(whole)) and same_weights(run_dir, whole)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    _, plain = run_training(run_name="plain", **settings)
    assert timeless(lines_of(plain)) != timeless(lines_of(whole)) and from_yaml(plain / "config.yaml").mixed_precision == "no"


def test_the_launchers_gradient_accumulation_changes_no_figure(run_training, finished_run, monkeypatch, capsys):
    _, plain = finished_run(run_name="plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    _, run_dir = run_training()
    assert timeless(lines_of(run_dir)) == timeless(lines_of(plain)) and same_weights(run_dir, plain)
    assert "gradient_accumulation_steps has no effect" in capsys.readouterr().err


def test_a_change_of_device_or_sharding_is_reported(run_training, monkeypatch, capsys):
    from pipeline.training import run

    facts = {"device": "cuda", "FSDP": True}
    with monkeypatch.context() as patch:
        patch.setattr(run, "launch_facts", lambda accelerator: facts)
        _, run_dir = run_training()
    (run_dir / "summary.json").unlink()
    run_training()
    assert "The run resumes with device cuda -> cpu, FSDP True -> False" in capsys.readouterr().err
    assert Config().mixed_precision is None
