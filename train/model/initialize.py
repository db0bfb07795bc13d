"""Memory and weights for a model, from a CPU or from the meta device.

Rank 0 builds the weights of a meta model in CPU memory, initialized by timm, and distributes them tensor by
tensor. They are the same for every number of ranks, and no other process holds more than its shards and one
whole tensor.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config
from lejepa_fast.train.config.names import is_convolutional
from lejepa_fast.train.model.average import local_shard
from lejepa_fast.train.model.model import TrainedModule, build_model
from lejepa_fast.train.runtime.world import World, on_main


@torch.no_grad()
def initialize(model: TrainedModule, cfg: Config, device: torch.device) -> None:
    """Move `model` to `device`; a model on the meta device gets the weights of `cfg.seed`. All ranks call it.

    UsageError if modules of a model on the meta device share a parameter, which sharding would separate.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        lay_out(model.to(device), cfg)
        return
    if len(list(model.named_parameters(remove_duplicate=False))) != len(list(model.parameters())):
        raise UsageError(
            f"model.name: modules of {cfg.model.name} share a parameter, which sharding would separate; "
            "use --parallel.strategy ddp"
        )
    model.to_empty(device=device)
    group = {"rank": dist.get_rank(), "size": dist.get_world_size()} if dist.is_initialized() else {}
    world = World(device, **group)
    reference = on_main(world, lambda: build_model(cfg))
    sources = dict(named_tensors(reference)) if reference is not None else {}
    for name, target in named_tensors(model):
        whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        if sources:
            whole.copy_(sources[name])
        if isinstance(target, DTensor):
            shards = distribute_tensor(whole, target.device_mesh, target.placements)
            target.to_local().copy_(shards.to_local())
            continue
        if world.distributed:
            dist.broadcast(whole, src=0)
        target.copy_(whole)


@torch.no_grad()
def copy_values(copy: TrainedModule, model: TrainedModule, cfg: Config, device: torch.device) -> None:
    """Move `copy` to `device`, with the values of `model`, which is sharded alike."""
    if any(parameter.is_meta for parameter in copy.parameters()):
        copy.to_empty(device=device)
    else:
        lay_out(copy.to(device), cfg)
    for (_, own), (_, its) in zip(named_tensors(copy), named_tensors(model), strict=True):
        local_shard(own).copy_(local_shard(its))


def memory_format(cfg: Config) -> torch.memory_format:
    """Return the memory layout of weights and images: channels last for convolutional networks.

    cuDNN's tensor-core convolutions and oneDNN compute in it and copy from any other. FSDP2 shards
    contiguous weights only; there the layout of the images counts.
    """
    return torch.channels_last if is_convolutional(cfg.model.name) else torch.contiguous_format


@torch.no_grad()
def lay_out(model: nn.Module, cfg: Config) -> None:
    """Give a model's weights the `memory_format` of the run, in place: those of 2-D convolutions, as
    `Module.to` refuses channels last for a model with a 3-D one."""
    for _, tensor in named_tensors(model):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format(cfg))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and all buffers; one that modules share appears under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@torch.no_grad()
def whole_model(
    model: TrainedModule, cfg: Config, world: World, instead: Mapping[str, Tensor]
) -> TrainedModule | None:
    """Gather a sharded model on rank 0 and return it there, None elsewhere. All ranks call it.

    `instead` holds tensors, sharded like the model's, to take in place of those with their names.
    """

    def without_values() -> TrainedModule:
        return build_model(cfg, meta=True).to_empty(device=world.device)

    whole = on_main(world, without_values)
    targets = dict(named_tensors(whole)) if whole is not None else {}
    for name, own in named_tensors(model):
        tensor = instead.get(name, own)
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if whole is not None:
            targets[name].copy_(gathered)
    return whole
