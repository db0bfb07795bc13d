"""Memory and weights for a model: moved to its device, or made there from the meta device.

A model on the meta device gets its weights from one that rank 0 builds in the CPU's memory, as timm
initialises it: any family, the same weights as without sharding, whatever the number of ranks. They are dealt
out tensor by tensor, so no other process and no GPU ever holds more than its share and one tensor.

Before that, all memory is filled with NaN: what is forgotten cannot pass for a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config
from lejepa_fast.train.model.model import LeJEPAModel, build_model, is_convolutional
from lejepa_fast.train.runtime.world import World, on_main


def initialize(model: LeJEPAModel, cfg: Config, device: torch.device) -> None:
    """Put `model` on `device`, from the meta device with the weights of `cfg.seed`.

    Every rank calls it, since those weights come from rank 0. Raises UsageError for a model on the meta
    device whose modules share a parameter, RuntimeError naming a tensor that would stay without a value.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(device, memory_format=memory_format(cfg))
        return
    _refuse_shared_parameters(model, cfg.model.name)
    allocate(model, device)
    fill_with_nan(model)
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = World(device, rank=rank, size=dist.get_world_size() if dist.is_initialized() else 1)
    reference = on_main(world, lambda: build_model(cfg))
    copy_from_main(model, reference, world)
    check_initialized(model)


def memory_format(cfg: Config) -> torch.memory_format:
    """Convolutional networks run channels last, the layout that cuDNN's tensor-core convolutions and oneDNN's
    compute in: from any other they copy first. (FSDP2 shards weights in the contiguous layout alone; the
    images' layout counts there.)"""
    return torch.channels_last if is_convolutional(cfg.model.name) else torch.contiguous_format


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers (those outside the state dict too) and tensors that modules hold as attributes.

    A tensor that modules share comes under each of its names: in a copy made on the meta device it is two.
    """
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, tensor in _plain_tensors(module):
            yield f"{prefix}.{name}", tensor


def _plain_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]


@torch.no_grad()
def fill_with_nan(model: nn.Module) -> None:
    for _, tensor in named_tensors(model):
        if tensor.is_floating_point():
            _local(tensor).fill_(torch.nan)


@torch.no_grad()
def copy_from_main(model: nn.Module, reference: nn.Module | None, world: World) -> None:
    """Deal out the tensors of `reference`, which rank 0 has on its CPU, to the `model` of every rank."""
    sources = dict(named_tensors(reference)) if reference is not None else {}
    for name, target in named_tensors(model):
        if reference is None:
            whole = torch.empty(target.shape, dtype=target.dtype, device=world.device)
        elif name in sources:
            whole = sources[name].detach().to(world.device)
        else:
            raise RuntimeError(f"{name}: the model on the meta device has it, and timm's own has not")
        if isinstance(target, DTensor):
            dealt = distribute_tensor(whole, target.device_mesh, target.placements)
            target.to_local().copy_(dealt.to_local())
        else:
            if world.distributed:
                whole = whole.contiguous()
                dist.broadcast(whole, src=0)
            target.copy_(whole)


@torch.no_grad()
def whole_model(
    model: LeJEPAModel, cfg: Config, world: World, instead: Mapping[str, Tensor]
) -> LeJEPAModel | None:
    """A copy of the model that is not sharded, on rank 0; None elsewhere. All ranks call it.

    `instead` holds tensors, sharded like the model's, to take in place of those with their names.
    """
    names = [name for name, _ in named_tensors(model)]
    whole = on_main(world, lambda: _without_values(cfg, world.device, names))
    targets = dict(named_tensors(whole)) if whole is not None else {}
    for name, own in named_tensors(model):
        tensor = instead.get(name, own)
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if whole is not None:
            targets[name].copy_(gathered)
    return whole


def _without_values(cfg: Config, device: torch.device, names: Iterable[str]) -> LeJEPAModel:
    """A model in memory that nobody wrote; RuntimeError if its tensors are not those of `names`."""
    model = build_model(cfg, meta=True)
    allocate(model, device)
    if differing := {name for name, _ in named_tensors(model)} ^ set(names):
        raise RuntimeError(
            f"{', '.join(sorted(differing))}: not both in the model and in its copy; "
            "this is a defect of lejepa_fast"
        )
    return model


def check_initialized(model: nn.Module) -> None:
    """RuntimeError naming a tensor that still holds NaN."""
    for name, tensor in named_tensors(model):
        if tensor.is_floating_point() and bool(_local(tensor).isnan().any()):
            raise RuntimeError(f"{name}: no value after initialisation; this is a defect of lejepa_fast")


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory for every tensor of a model on the meta device; its values are nobody's."""
    model.to_empty(device=device)
    for module in model.modules():
        for name, tensor in _plain_tensors(module):
            if tensor.is_meta:
                setattr(module, name, torch.empty_like(tensor, device=device))


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _refuse_shared_parameters(model: nn.Module, name: str) -> None:
    entries = list(model.named_parameters(remove_duplicate=False))
    if len(entries) != len(list(model.parameters())):
        raise UsageError(
            f"model.name: modules of {name} share a parameter, which sharding would separate; "
            "use --parallel.strategy ddp"
        )
