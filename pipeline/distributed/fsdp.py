"""FSDP2: a model's weights shared out among the processes, block by block; whole tensors from their shards and back."""

import copy
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

CONTAINERS = (nn.Sequential, nn.ModuleList)


def is_asked_for() -> bool:
    """Whether the launcher says so: distributed_type FSDP of `accelerate launch`, or ACCELERATE_USE_FSDP=true under torchrun."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def launcher_says(name: str, default: str) -> str:
    """A line of the launch file's fsdp_config, which Accelerate hands on in the environment."""
    return os.environ.get(f"FSDP_{name}", default).lower()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, each gathered as one: the innermost members of its sequences that have layers of their own.

    So a ViT's and a ConvNeXt's blocks, a ResNet's too; none for a model without such sequences.
    """
    return list(blocks_below(model))


def blocks_below(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        inner = list(blocks_below(child))
        yield from inner
        layered = any(any(True for _ in layer.parameters()) for layer in child.children())
        if not inner and layered and isinstance(module, CONTAINERS) and not isinstance(child, CONTAINERS):
            yield child


def shard(model: nn.Module, device: torch.device) -> None:
    """Shares the weights out, in place, on their way to the device. Every rank calls it, with the same weights.

    By torch's fully_shard, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. Afterwards every
    parameter is a DTensor, and a forward pass is something that all ranks do together.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    reshard = launcher_says("RESHARD_AFTER_FORWARD", "true") == "true"
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # so that outside a pass its parameters are shards


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a shared tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A shared tensor put together, for which every rank calls it; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, shared ones in the CPU's memory, one after another; only where keep is true. Every rank calls it."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            kept[name] = full.cpu() if full is not tensor else tensor
    return kept


def fitted(value: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, as the reference is: shared out like it, or in its memory order and place."""
    if isinstance(reference, DTensor):
        value = value.to(reference.device, reference.dtype)
        return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
    return torch.empty_like(reference).copy_(value)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives the model whole weights, whether it is sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: fitted(value, own[name]) for name, value in weights.items()})


def skeleton_of(model: nn.Module) -> nn.Module:
    """The model without its weights, to be kept beside its shards: an FSDP2 model can be neither copied nor put together."""
    return copy.deepcopy(model).to("meta")


def with_weights(skeleton: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A plain model in the CPU's memory, with whole weights."""
    model = copy.deepcopy(skeleton).to_empty(device="cpu")
    model.load_state_dict(weights)
    return model
