"""TrainState: the state of a run, saved to and loaded from checkpoints."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.accelerator import prepared
from pipeline.distributed.fsdp import gathered, load_weights
from pipeline.optim.optimizer_state import load_state_tensors, state_tensors
from pipeline.optim.schedule import History
from pipeline.run_folder.checkpoint import BadCheckpoint, Tensors, read_facts, read_tensors
from pipeline.training.metrics import zero_sums

COUNTED = ("epoch", "batch", "step", "samples", "skipped_steps", "seconds", "train_seconds")
RECORDED = ("history", "logged", "last_loss")


@dataclass
class TrainState:
    """The state of a run: what a checkpoint contains, except for the fp16 scaler, which Accelerate holds.

    model, optimizer: as Accelerate wrapped them. ema: the moving average of the weights, or None. sums: this rank's
    metrics.zero_sums of the current epoch. epoch: finished epochs; batch: finished batches of the current epoch. step, samples,
    skipped_steps (by the fp16 scaler): counts over the whole run. logged: the part of the sums, over all ranks, that has been
    logged; last_loss: the last logged loss. seconds, train_seconds: over the whole run.
    """

    model: nn.Module
    optimizer: Any
    sums: Tensor
    bad_step: Tensor  # int64 [], the step of the first loss that was not finite; -1 while there is none
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    history: History = field(default_factory=list)
    logged: list[float] = field(default_factory=lambda: [0.0] * 4)
    last_loss: float | None = None
    seconds: float = 0.0
    train_seconds: float = 0.0

    @property
    def bare_model(self) -> nn.Module:
        """The model without its DDP wrapper. Accelerate's unwrap_model looks for other packages on the disk at each call."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def models(self) -> list[nn.Module]:
        """The bare model and, if there is one, its moving average."""
        return [self.bare_model] if self.ema is None else [self.bare_model, self.ema.module]

    def place(self, epoch: int) -> dict[str, Any]:
        """The keys that every line of metrics.jsonl has besides its split. epoch: the epoch of the line, counted from 1."""
        return {"epoch": epoch, "step": self.step, "samples": self.samples, "seconds": round(self.seconds, 3)}


def begin_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, ema: ModelEmaV3 | None = None
) -> TrainState:
    """The state before the first step, with model and optimizer wrapped by Accelerate. Every rank calls it."""
    wrapped, wrapped_optimizer = prepared(model, optimizer, accelerator)
    bad_step = torch.tensor(-1, device=accelerator.device)
    return TrainState(wrapped, wrapped_optimizer, zero_sums(accelerator.device), bad_step, ema)


def average_buffers(state: TrainState, accelerator: Accelerator) -> None:
    """Averages BatchNorm's running statistics over all ranks. Every rank must call it, before evaluating and saving."""
    if accelerator.num_processes > 1:
        for buffer in (buffer for model in state.models for buffer in model.buffers()):
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, reduction="mean"))


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values of the tensors are finite. Reads once from the device.

    A sum with a NaN or an infinity is never finite. Sums take a fraction of the time of isfinite(), which then only decides for
    tensors whose sum overflows.
    """
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors]).isfinite().tolist()
    return all(is_sum_finite or bool(tensor.isfinite().all()) for tensor, is_sum_finite in zip(tensors, sums))


def to_tensors(state: TrainState, accelerator: Accelerator) -> dict[str, Tensors]:
    """The tensors by file that save_checkpoint writes; on ranks other than 0 without content. Every rank must call it."""
    model = state.bare_model
    tensors = {"model": model.state_dict(), "optimizer": state_tensors(state.optimizer.optimizer, model)}
    if state.ema is not None:
        tensors["ema"] = state.ema.module.state_dict()
    return {name: gathered(part, keep=accelerator.is_main_process) for name, part in tensors.items()}


def to_facts(state: TrainState, accelerator: Accelerator) -> dict[str, Any]:
    """The facts of the state that save_checkpoint writes. Every rank must call it."""
    # a copy: the writer's thread uses them while training appends to the history
    facts = copy.deepcopy({name: getattr(state, name) for name in (*COUNTED, *RECORDED)})
    if accelerator.scaler is not None:
        facts["scaler"] = accelerator.scaler.state_dict()
    return facts | {"sums": accelerator.reduce(state.sums).tolist()}


def from_checkpoint(state: TrainState, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Loads a checkpoint into the state and returns the checkpoint's facts. Every rank must call it.

    Raises BadCheckpoint if a file is missing or does not fit; weights and counters are unchanged then.
    """
    facts = read_facts(folder)
    model = state.bare_model
    weights, moments = read_tensors(folder, "model"), read_tensors(folder, "optimizer")
    try:
        values = {name: facts[name] for name in (*COUNTED, *RECORDED)}
        sums = torch.tensor(facts["sums"] if accelerator.is_main_process else [0.0] * 4, dtype=torch.float64)
        check_shapes(model, weights)
        average = read_tensors(folder, "ema") if state.ema is not None else None
        load_state_tensors(state.optimizer.optimizer, model, moments)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(facts["scaler"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{folder} does not fit this run: {error}") from error
    load_weights(model, weights)
    if state.ema is not None and average is not None:
        load_weights(state.ema.module, average)
    state.sums.copy_(sums)
    for name, value in values.items():
        setattr(state, name, value)
    return facts


def check_shapes(model: nn.Module, weights: Tensors) -> None:
    """Raises ValueError unless the weights have the model's names and shapes."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{len(wrong)} tensors differ in name or shape, {', '.join(wrong[:3])} for example.")
