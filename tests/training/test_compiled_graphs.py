"""A compiled model never leaves its graphs, and is compiled at most as often as docs/performance.md states."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch._dynamo.utils import counters
from watched_epoch import BareRun

from pipeline.distributed import accelerator as machine
from pipeline.settings.config import Config
from pipeline.training.build import assemble, load_images
from pipeline.training.evaluation import evaluate
from pipeline.training.loop import train_epoch
from pipeline.training.state import begin_state

# 60 training images: batches of 22, 22 and 16, then of 44 and 16; 20 validation images
COMPILED: dict[str, Any] = {
    "max_train_samples": 80, "val_fraction": 0.25, "epochs": 3, "batch_size": 22, "batch_size_schedule": {1: 44},
    "drop_last": False, "augment": "none", "warmup_epochs": 0.0, "log_every": 1000, "compile": True,
}  # fmt: skip
ONE_SIZE = {"batch_size": 20, "batch_size_schedule": {}, "drop_last": True}

# (row of the table in docs/performance.md, settings)
ROWS = [
    ("one size", {"model_name": "simple_mlp", **ONE_SIZE}),
    ("several sizes", {"model_name": "simple_mlp", "micro_batch_size": 16, "ema_decay": 0.5, "mixed_precision": "bf16"}),
    ("several sizes", {"model_name": "small_convnet"}),
    ("several sizes", {"model_name": "test_vit", "image_size": 32}),
    ("several sizes", {"model_name": "resnet18"}),
    ("several sizes, SAM with BatchNorm", {"model_name": "small_convnet", "optimizer": "sam"}),
    ("several sizes, `freeze_epochs`", {"model_name": "simple_mlp", "freeze_epochs": 1}),
    ("several sizes, a last batch of one image", {"model_name": "simple_mlp", "batch_size": 59}),
]


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains two epochs, evaluating after each; returns the number of graphs compiled in training and in evaluation."""
    passes, graphs, plain_compile = ["training"], Counter[str](), torch.nn.Module.compile

    def count(graph: Any, inputs: Any) -> Any:
        graphs[passes[-1]] += 1
        return graph.forward  # traced as usual, without the C++ compiler, which takes a minute

    def traced(model: torch.nn.Module, dynamic: bool | None, mode: str | None) -> None:
        plain_compile(model, backend=count, dynamic=dynamic)

    def compiled(**settings: Any) -> Counter[str]:
        config = Config(**{**COMPILED, **settings})
        accelerator = machine.make_accelerator(config, device="cpu")
        parts = assemble(config, accelerator)
        load_images(parts, accelerator)
        state, run = begin_state(parts.model, parts.optimizer, accelerator, parts.ema), BareRun(parts.config, accelerator)
        for _ in range(2):
            passes.append("training")
            train_epoch(state, parts.loaders["train"], run)
            passes.append("evaluation")
            for split in ("val", "test"):
                parts.loaders[split].eval_batch_size = 40
                evaluate(state.bare_model, parts.loaders[split], accelerator)
            state.epoch, state.batch = state.epoch + 1, 0
        return graphs

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    monkeypatch.setattr(machine, "check_compiler", lambda device: None)
    torch._dynamo.reset()
    counters.clear()
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("row, settings", ROWS, ids=[f"{row}: {settings['model_name']}" for row, settings in ROWS])
def test_a_model_is_compiled_as_often_as_the_documents_state_and_without_a_break(compiled_for, row, settings):
    documents = (ROOT / "docs" / "performance.md").read_text()
    (stated,) = re.findall(rf"^\| {re.escape(row)} \| (\d) \| (\d) \|$", documents, re.MULTILINE)
    graphs = compiled_for(**settings)
    assert (graphs["training"], graphs["evaluation"]) == tuple(map(int, stated))
    assert not counters["graph_break"] and counters["frames"]["ok"] == counters["frames"]["total"] == graphs.total()


def test_a_graph_break_is_found(compiled_for, monkeypatch):
    from pipeline.models.small_models import SimpleMLP

    forward = SimpleMLP.forward
    monkeypatch.setattr(SimpleMLP, "forward", lambda model, images: forward(model, images * images.sum().item()))
    assert compiled_for(model_name="simple_mlp").total() > 2 and counters["graph_break"]


@pytest.mark.parametrize(
    "device, varying, dynamic", [("cpu", True, None), ("cpu", False, None), ("cuda", True, False), ("cuda", False, None)]
)
def test_a_gpu_compiles_each_batch_size_by_itself(monkeypatch, device, varying, dynamic):
    """Torch fails there with a dynamic batch size, in channels_last on maps of one pixel."""
    compiled = []
    monkeypatch.setattr(machine, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **options: compiled.append(options))
    config = Config(compile="reduce-overhead", drop_last=not varying)
    with torch._dynamo.config.patch(recompile_limit=8):
        machine.compile_in_place(torch.nn.Linear(2, 2), config, torch.device(device))
        assert torch._dynamo.config.recompile_limit == (8 if dynamic is None else machine.MOST_GRAPHS)
    assert compiled == [{"dynamic": dynamic, "mode": "reduce-overhead"}]
