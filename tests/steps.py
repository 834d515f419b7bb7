"""Training steps on a small model, for tests that compare them: a state, a batch, and all that a step changes."""

import timm
import torch
from accelerate import Accelerator

from pipeline.optim.ema import create_ema
from pipeline.optim.optimizers import create_optimizer
from pipeline.training.state import begin_state
from pipeline.training.step import Share


def make_state(config, scaler=None, model_name="test_resnet", dtype=torch.float64):
    """A TrainState over a small model, prepared by Accelerate on the CPU, with torch's own scaler if one is given."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    model = timm.create_model(
        model_name, num_classes=3, in_chans=1, **({"img_size": 8} if model_name == "simple_mlp" else {})
    )
    model.to(dtype)
    ema = create_ema(model, config)
    optimizer = create_optimizer(model, config, "no" if scaler is None else "fp16")
    state = begin_state(model, optimizer, accelerator, ema)
    if scaler is not None:  # from here on Accelerate unscales before it clips
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    return state, accelerator


def batch(size=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 8, 8, generator=generator, dtype=dtype)
    return Share(images, torch.randint(3, (size,), generator=generator), size, epochs=0.1)


def everything(state):
    """All that a step may change, by name."""
    named = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    for number, values in state.optimizer.optimizer.state_dict()["state"].items():
        named |= {f"optimizer/{number}/{key}": value for key, value in values.items()}
    if state.ema is not None:
        named |= {f"ema/{name}": value for name, value in state.ema.module.state_dict().items()}
    return {name: value.clone() for name, value in {**named, "sums": state.sums}.items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def cpu_scaler(scale=2.0**10):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
