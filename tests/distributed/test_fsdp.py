"""FSDP2: the results and weights of DDP, checkpoints that one process can resume and vice versa, refused settings.

This file is also the program: it imports torch once and forks the processes, which communicate over gloo.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import (
    PYTHONPATH,
    SMALL_RUN,
    assert_close_figures,
    assert_close_weights,
    cut_back,
    in_processes,
    run_process,
    weights_of,
)

from pipeline.distributed.fsdp import blocks_of

# 40 images in batches of 17, 17 and 6; two processes have 8 and 9, and micro-batches of 4 make 2 and 3 of these
UNEVEN: dict[str, Any] = {
    "max_train_samples": 50, "batch_size": 17, "drop_last": False, "log_every": 1, "lr": 0.005, "epochs": 2, "image_size": 32,
}  # fmt: skip
ADAMW = {"optimizer": "adamw", "ema_decay": 0.3, "clip_grad_norm": 0.5, "micro_batch_size": 4, "mixup": 0.4}
RUNS: dict[str, dict[str, Any]] = {
    "vit, adamw": {"model_name": "test_vit", **ADAMW, "keep_checkpoints": 9},
    "convnext, sgd": {"model_name": "test_convnext", "lr": 0.02},
    "convnext, adam": {"model_name": "test_convnext", "optimizer": "adam", "epochs": 1, "gradient_checkpointing": True},
    "resnet, batchnorm": {"model_name": "test_resnet", "sync_batchnorm": True, "lr": 0.002, "epochs": 1},
}
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def train_named(folder: Path, names: list[str], settings: dict[str, Any]) -> None:
    """Runs in each process: trains, or resumes, the runs of these names."""
    from pipeline.settings.config import Config
    from pipeline.training.loop import train

    for name in names:
        own = {**SMALL_RUN, **UNEVEN, **RUNS[name], **settings}
        train(Config(**{**own, "output_dir": str(folder), "run_name": name}))


def shard_facts(folder: Path) -> None:
    """The size of the weights, the average and the optimizer state in each process."""
    from pipeline.training import loop

    name, facts = "vit, adamw", {}
    train_in = loop.train_in

    def watched(run: Any, parts: Any, started: float) -> Any:
        summary = train_in(run, parts, started)
        kept = {"weights": parts.model.parameters(), "average": parts.ema.module.parameters()}
        moments = [state["exp_avg"] for state in parts.optimizer.state.values()]
        for what, tensors in {**kept, "moments": moments}.items():
            pairs = [(tensor.to_local().numel(), tensor.numel()) for tensor in tensors]
            facts[what] = [sum(own for own, _ in pairs), sum(whole for _, whole in pairs)]
        return summary

    loop.train_in = watched
    train_named(folder, [name], {})
    rank = torch.distributed.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts))


def work(folder: Path) -> None:
    import pipeline.training.loop  # imported once for all forked processes

    assert pipeline.training
    assert in_processes(2, train_named, folder / "ddp", list(RUNS), {}) == [0, 0]
    assert in_processes(2, train_named, folder / "fsdp", list(RUNS)[1:], {}, **SHARDED) == [0, 0]
    assert in_processes(2, shard_facts, folder / "fsdp", **SHARDED) == [0, 0]
    name = "vit, adamw"
    cut_back(folder / "fsdp" / name, folder / "fsdp then one" / name, step=3)
    cut_back(folder / "ddp" / name, folder / "ddp then fsdp" / name, step=3)
    assert in_processes(1, train_named, folder / "fsdp then one", [name], {}) == [0]
    assert in_processes(2, train_named, folder / "ddp then fsdp", [name], {}, **SHARDED) == [0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of `work`."""
    folder = tmp_path_factory.mktemp("sharded")
    done = run_process(__file__, str(folder), PYTHONPATH=PYTHONPATH, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


def with_gradients(weights: dict[str, Any]) -> dict[str, Any]:
    """Removes the bias of the keys: its gradient is only rounding error, which Adam scales to full size."""
    split = {name: value.chunk(3) for name, value in weights.items() if name.endswith("qkv.bias")}
    return {**weights, **{name: torch.cat([parts[0], parts[2]]) for name, parts in split.items()}}


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Asserts equal metrics and weights up to rounding."""
    assert_close_figures(ours, theirs)
    has_adam = "adam" in ours.name
    assert_close_weights(with_gradients(weights_of(ours)), with_gradients(weights_of(theirs)), has_adam)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_model_trains_like_a_replicated_one(folder, name):
    assert json.loads((folder / "fsdp" / name / "summary.json").read_text())["num_processes"] == 2
    assert_same_run(folder / "fsdp" / name, folder / "ddp" / name)


@pytest.mark.slow
def test_each_process_holds_half_of_weights_average_and_moments(folder):
    facts = [json.loads((folder / "fsdp" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0].keys() == {"weights", "average", "moments"}
    for what, (own, whole) in facts[0].items():
        assert own + facts[1][what][0] == whole > 100_000
        assert 0.45 < own / whole < 0.55


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fsdp then one", "ddp then fsdp"])
def test_a_checkpoint_resumes_sharded_or_not(folder, path):
    assert_same_run(folder / path / "vit, adamw", folder / "ddp" / "vit, adamw")
    summary = json.loads((folder / path / "vit, adamw" / "summary.json").read_text())
    assert summary["num_processes"] == (1 if path.endswith("one") else 2) and summary["status"] == "completed"


@pytest.mark.parametrize(
    "name, kind, number",
    [("test_vit", "Block", 6), ("test_convnext", "ConvNeXtBlock", 9), ("resnet18", "BasicBlock", 8)],
)
def test_the_blocks_of_a_model_are_found(name, kind, number):
    blocks = blocks_of(timm.create_model(name))
    assert [type(block).__name__ for block in blocks] == [kind] * number


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "SAM": ({"sam_rho": 0.05}, {}),
    "optimizer muon": ({"optimizer": "muon"}, {}),
    "freeze_epochs": ({"freeze_epochs": 1}, {}),
    "channels_last": ({"channels_last": True}, {}),
    "compile": ({"compile": True}, {}),
    "fsdp_version 1": ({}, {"FSDP_VERSION": "1"}),
    "fsdp_offload_params": ({}, {"FSDP_OFFLOAD_PARAMS": "true"}),
    "fsdp_activation_checkpointing": ({}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
    "fsdp_transformer_layer_cls_to_wrap": ({}, {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_a_sharded_model_does_not_support_are_refused(what, run_training, monkeypatch):
    settings, environment = REFUSED[what]
    for name, value in {**SHARDED, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"A sharded model .* does not support {what}"):
        run_training(**settings)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
