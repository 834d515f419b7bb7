"""FSDP2: shards the weights of a model over the processes, block by block; converts between shards and full tensors."""

import copy
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

CONTAINERS = (nn.Sequential, nn.ModuleList)


def is_requested() -> bool:
    """Whether the launch requests FSDP: distributed_type FSDP of `accelerate launch`, or ACCELERATE_USE_FSDP=true."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def launch_setting(name: str, default: str) -> str:
    """A setting of fsdp_config in the launch file, which Accelerate passes in the environment."""
    return os.environ.get(f"FSDP_{name}", default).lower()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, each gathered as one unit: the innermost members of its containers with own layers.

    These are the blocks of a ViT, ConvNeXt or ResNet; none for a model without such containers.
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
    """Shards the weights in place and moves the shards to the device. All ranks must call it, with the same weights.

    Uses fully_shard, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. Afterwards every parameter is a
    DTensor, and all ranks must run each forward pass together.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    reshard = launch_setting("RESHARD_AFTER_FORWARD", "true") == "true"
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # so that its parameters are shards outside a pass


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor; any other tensor unchanged. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Full tensors on the ranks where `keep` is true, else none; gathered ones on the CPU. All ranks must call it."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            kept[name] = full.cpu() if full is not tensor else tensor
    return kept


def fitted(value: Tensor, reference: Tensor) -> Tensor:
    """A full tensor, equal on all ranks, in the form of the reference: sharded like it, or with its strides and device."""
    if isinstance(reference, DTensor):
        value = value.to(reference.device, reference.dtype)
        return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)
    return torch.empty_like(reference).copy_(value)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads full weights into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: fitted(value, own[name]) for name, value in weights.items()})


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, taken before sharding, because an FSDP2 model cannot be copied."""
    return copy.deepcopy(model).to("meta")


def with_weights(skeleton: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A model on the CPU, built from a skeleton and full weights."""
    model = copy.deepcopy(skeleton).to_empty(device="cpu")
    model.load_state_dict(weights)
    return model
