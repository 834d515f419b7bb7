"""Results are equal with 1, 2 and 4 processes, any workers, loader and micro-batch, for sizes that do not divide.

This file is also the program: it imports torch once and forks the processes, which communicate over gloo.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    PYTHONPATH,
    SMALL_RUN,
    assert_close_figures,
    assert_close_weights,
    in_processes,
    lines_of,
    run_process,
    weights_of,
)

# 80 training images in batches of 39, 39 and 2: with four processes, three have an empty share of the last. 20 val, 359 test.
UNEVEN = {"batch_size": 39, "drop_last": False, "log_every": 1, "augment": "light", "lr": 0.02}
BATCHNORM = {
    "sync_batchnorm": True,
    "batch_size": 37,
    "image_size": 16,
    "lr": 0.002,
    # channels last, torch's own BatchNorm of one process rounds more: 2e-6 between one process and several
    "channels_last": False,
    "epochs": 1,
}  # with four processes, one has an empty share of the last 6
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "mlp, mixed": {
        "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.3, "optimizer": "adamw", "lr": 0.005,
        "clip_grad_norm": 0.5,
    },
    "mlp, growing batch": {
        "batch_size": 13, "batch_size_schedule": {1: 39}, "batch_lr_scaling": "linear", "flip": "alternate",
    },
    "batchnorm": {**BATCHNORM, "model_name": "test_resnet", "ema_decay": 0.3},
    "batchnorm of timm with sam": {
        **BATCHNORM, "model_name": "test_efficientnet", "sam_rho": 0.05, "drop_last": True,
    },
}  # fmt: skip
IN_MEMORY, ONE_BY_ONE = {"loader": "device"}, {"loader": "workers", "num_workers": 0}
# name: number of processes, model, and the settings that must not change the results
CELLS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "1, micro-batches, 2 workers": (1, "mlp", {"micro_batch_size": 5, "loader": "workers", "num_workers": 2}),
    "2, no worker": (2, "mlp", ONE_BY_ONE),
    "2, micro-batches, 2 workers": (2, "mlp", {"micro_batch_size": 7, "loader": "workers", "num_workers": 2}),
    "2, device, mixed, micro-batches": (2, "mlp, mixed", {"micro_batch_size": 5, **IN_MEMORY}),
    "2, growing batch": (2, "mlp, growing batch", {"micro_batch_size": 9, "time_limit": "1h"}),
    "2, batchnorm": (2, "batchnorm", ONE_BY_ONE),
    "2, batchnorm of timm with sam": (2, "batchnorm of timm with sam", IN_MEMORY),
    "4, device, micro-batches": (4, "mlp", {"micro_batch_size": 3, **IN_MEMORY}),
    "4, workers, mixed": (4, "mlp, mixed", {"loader": "workers", "num_workers": 2}),
    "4, growing batch": (4, "mlp, growing batch", IN_MEMORY),
    "4, batchnorm": (4, "batchnorm", IN_MEMORY),
    "4, batchnorm of timm with sam": (4, "batchnorm of timm with sam", {"loader": "workers", "num_workers": 1}),
}


def run_cells(folder: Path, cells: dict[str, tuple[int, str, dict[str, Any]]]) -> None:
    """Runs in each process."""
    from pipeline.settings.config import Config
    from pipeline.training.loop import train

    for name, (_, model, free) in cells.items():
        train(Config(**{**SMALL_RUN, **UNEVEN, **MODELS[model], **free, "output_dir": str(folder), "run_name": name}))


def batchnorm_facts(folder: Path) -> None:
    """Compares with torch's BatchNorm of the whole batch: outputs, gradients, running statistics; one rank is empty."""
    import timm.layers
    import torch.distributed as dist

    from pipeline.distributed.sync_batchnorm import convert_batchnorm

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    facts = {}
    for name, layer, shape in (
        ("BatchNorm1d", torch.nn.BatchNorm1d(5), (7, 5)),
        ("BatchNorm2d", torch.nn.BatchNorm2d(5, momentum=None), (7, 5, 3, 2)),
        ("BatchNorm3d", torch.nn.BatchNorm3d(5, affine=False), (7, 5, 3, 2, 2)),
        ("BatchNormAct2d", timm.layers.BatchNormAct2d(5), (7, 5, 3, 2)),
    ):
        torch.manual_seed(0)
        for tensor in layer.parameters():
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        whole = torch.nn.Sequential(layer)
        ours = convert_batchnorm(copy.deepcopy(whole))
        for cut in ((0, 3, 7), (0, 7, 7), (0, 0, 7)):
            x = (torch.randn(shape) * 3 + 100).requires_grad_()
            share = x.detach()[cut[rank] : cut[rank + 1]].clone().requires_grad_()
            pull = torch.randn(shape)
            whole.zero_grad()
            ours.zero_grad()
            expected, found = whole(x), ours(share)
            (expected * pull).sum().backward()
            (found * pull[cut[rank] : cut[rank + 1]]).sum().backward()
            own = [parameter.grad for parameter in ours.parameters()]
            for gradient in own:
                dist.all_reduce(gradient)
            pairs = [(expected[cut[rank] : cut[rank + 1]], found), (x.grad[cut[rank] : cut[rank + 1]], share.grad)]
            pairs += zip([parameter.grad for parameter in whole.parameters()], own)
            pairs += zip(whole.state_dict().values(), ours.state_dict().values())
            facts[f"{name} {cut}"] = [bool(torch.allclose(a, b, rtol=1e-4, atol=1e-4)) for a, b in pairs]
            assert whole.state_dict().keys() == ours.state_dict().keys() and len(pairs) >= 4
    (folder / f"batchnorm-{rank}.json").write_text(json.dumps(facts))


def work(folder: Path) -> None:
    import pipeline.training.loop  # imported once for all forked processes

    assert pipeline.training
    for number in (1, 2, 4):
        cells = {key: cell for key, cell in CELLS.items() if cell[0] == number}
        assert in_processes(number, run_cells, folder, cells) == [0] * number
    assert in_processes(2, batchnorm_facts, folder) == [0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cells' runs."""
    folder = tmp_path_factory.mktemp("cells")
    done = run_process(__file__, str(folder), PYTHONPATH=PYTHONPATH, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of each model in one process, without workers and micro-batches."""
    folder = tmp_path_factory.mktemp("plain")
    run_cells(folder, {name: (1, name, {}) for name in MODELS})
    return {name: folder / name for name in MODELS}


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_processes_workers_and_micro_batches_change_no_result(folder, plain, name):
    number, model, _ = CELLS[name]
    summary = json.loads((folder / name / "summary.json").read_text())
    assert summary["num_processes"] == number and summary["status"] == "completed"
    assert_close_figures(folder / name, plain[model])
    plain_summary = json.loads((plain[model] / "summary.json").read_text())
    assert summary["test"]["confusion_matrix"] == plain_summary["test"]["confusion_matrix"]
    assert sum(map(sum, summary["test"]["confusion_matrix"])) == summary["test"]["num_samples"] == 359
    assert_close_weights(weights_of(folder / name), weights_of(plain[model]), MODELS[model].get("optimizer") == "adamw")


@pytest.mark.slow
def test_metrics_of_the_averaged_weights_are_logged_too(folder):
    lines = [line for line in lines_of(folder / "4, workers, mixed") if line["split"] == "val"]
    assert len(lines) == 2 and all(line["ema_loss"] != line["loss"] for line in lines)


@pytest.mark.slow
def test_batchnorm_over_two_processes_is_that_of_the_whole_batch(folder):
    for rank in (0, 1):
        facts = json.loads((folder / f"batchnorm-{rank}.json").read_text())
        assert len(facts) == 12
        for name, found in facts.items():
            assert all(found), (rank, name, found)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
