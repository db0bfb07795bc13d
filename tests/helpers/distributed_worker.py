"""What each rank runs for test_distributed.py; imported by spawned processes."""

import contextlib
import copy
import gc
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lejepa_fast import LeJEPALoss, SIGReg, sample_directions, sigreg, standard_normal_knots

VIEWS, DIM, SLICES = 3, 6, 20
EQUAL = {1: [24], 2: [12, 12], 4: [6, 6, 6, 6]}
UNEQUAL = {1: [24], 2: [17, 7], 4: [13, 0, 10, 1]}  # a rank without samples, and one with a single one
MANY = [66_000, 257]  # 257 is no number of bf16, in which the samples are
CASES = [  # implementation, dtype, unbiased; Triton in the interpreter
    ("reference", torch.float64, False),
    ("torch", torch.float64, True),
    ("torch", torch.float32, False),
    ("triton", torch.float32, False),
    ("triton", torch.float32, True),
]


def batch(dtype: torch.dtype) -> torch.Tensor:
    """The concatenated batch (V, 24, K): off-center, so that ranks disagree and gradients are large."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(VIEWS, 24, DIM, generator=generator, dtype=torch.float64)
    return (x + torch.linspace(-1, 1, 24).double().view(1, 24, 1)).to(dtype)


def shard(x: torch.Tensor, sizes: list[int], rank: int) -> torch.Tensor:
    return x.split(sizes, dim=1)[rank]


def many_samples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(sum(MANY), DIM, generator=generator) + 0.5).bfloat16()


def encoder(dtype: torch.dtype) -> nn.Linear:
    model = nn.Linear(DIM, DIM, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.eye(DIM) + 0.1 * torch.arange(DIM * DIM).view(DIM, DIM).sin())
        model.bias.fill_(0.1)
    return model


def functional_loss(z: torch.Tensor, impl: str, unbiased: bool, **options: Any) -> torch.Tensor:
    knots = standard_normal_knots()
    A = sample_directions(DIM, SLICES, step=4, dtype=torch.promote_types(z.dtype, torch.float32))
    return sigreg(z, A, *knots[:3], impl=impl, unbiased=unbiased, spacing=knots.spacing, **options)


def value_and_gradient(model: nn.Module, x: torch.Tensor, loss_fn) -> dict[str, torch.Tensor]:
    """Loss of a batch and the parameter gradient that an optimizer would see."""
    model.zero_grad()
    value = loss_fn(model(x))
    value.backward()
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return {"value": value.detach(), "grad": torch.cat([grad.flatten() for grad in grads])}


def gradient_of_input(x: torch.Tensor, loss_fn) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    value = loss_fn(x)
    value.backward()
    return {"value": value.detach(), "grad": x.grad}


def lejepa_loss(**options: Any):
    loss_fn = LeJEPALoss(lambd=0.3, sigreg=SIGReg(num_slices=SLICES, **options))
    return lambda z: loss_fn(z[:2], z).total


def trial(rank: int, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Of "auto", which tries the kernels first, while rank 0 alone counts operations; then with embeddings
    (V, N, K) from channels (V, K, N), which are contiguous on rank 1 alone, as it has one sample."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    module = SIGReg(num_slices=SLICES)
    found = []
    with mock.patch("lejepa_fast.regularizer.choose", return_value="triton"):
        for sizes in ([4, 4], [4, 1]):
            own = shard(x[:, : sum(sizes)], sizes, rank).mT.contiguous().mT
            with FlopCounterMode(display=False) if rank == 0 else contextlib.nullcontext():
                found.append({"value": module(own)})
    return found


def run(rank: int, folder: str) -> None:
    """This rank of four, of two if it is one of the first, and rank 0 alone: `folder/WORLD_SIZE-RANK.pt`."""
    os.environ["TRITON_INTERPRET"] = "1"  # impl="triton" on CPU tensors, in these processes only
    from interpreter_speed import speed_up  # not above: it imports Triton, which is to interpret

    torch.set_num_threads(1)
    speed_up()
    for world_size in sorted(EQUAL, reverse=True):
        if rank >= world_size:
            break
        modules = {impl: lejepa_loss(impl=impl) for impl in ("reference", "torch")}  # before the group exists
        store = f"file://{folder}/init{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        try:
            results = collect(rank, world_size, modules)
        finally:
            gc.collect()  # a DDP module that outlives its process group can abort the interpreter's exit
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
        torch.save(results, Path(folder) / f"{world_size}-{rank}.pt")


def collect(rank: int, world_size: int, modules: dict[str, Any]) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    uneven, x = (shard(batch(torch.float64), sizes[world_size], rank) for sizes in (UNEQUAL, EQUAL))

    def ddp(dtype: torch.dtype, x: torch.Tensor, loss_fn) -> dict[str, torch.Tensor]:
        return value_and_gradient(DistributedDataParallel(encoder(dtype)), x.to(dtype), loss_fn)

    def plain(impl: str, unbiased: bool = False, **options: Any):
        return lambda z: functional_loss(z, impl, unbiased, **options)

    for impl, dtype, unbiased in CASES:
        results[impl, dtype, unbiased] = ddp(dtype, uneven, plain(impl, unbiased))
    for impl, loss_fn in modules.items():
        results["lejepa", impl] = [ddp(torch.float64, uneven, loss_fn) for _ in range(2)]
    results["scaled"] = ddp(torch.float64, x, lambda z: (rank + 1) * plain("torch")(z))
    results["local"] = plain("torch", sync=False)(x)
    poisoned = x.clone()
    poisoned[0, 0, 0] += torch.nan if rank == world_size - 1 else 0.0
    results["poisoned"] = plain("torch")(poisoned)
    for impl in ("reference", "torch", "triton") if world_size == 2 else ():
        results["nothing", impl] = gradient_of_input(x[:, :0].float(), plain(impl))
    if world_size == 2:
        results["trial"] = trial(rank, batch(torch.float32))
        for impl in ("torch", "triton"):
            model = encoder(torch.float32)
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            results[f"fsdp {impl}"] = value_and_gradient(model, uneven.float(), plain(impl))
        # Shares of a second size: their number of samples is a symbol of the graph.
        loss_fn = torch.compile(lejepa_loss(impl="torch"), fullgraph=True, backend="aot_eager")
        results["compiled torch"] = [ddp(torch.float64, share, loss_fn) for share in (x, uneven)]
        loss_fn = torch.compile(lejepa_loss(impl="triton"), fullgraph=True, backend="aot_eager")
        results["compiled triton"] = [ddp(torch.float32, uneven, loss_fn)]
        in_half = torch.autocast("cpu", torch.bfloat16)(plain("torch", True))
        results["many"] = gradient_of_input(many_samples().split(MANY)[rank], in_half)
    if world_size == 4:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine, other = pairs[rank // 2], pairs[1 - rank // 2]
        results["subgroup"] = gradient_of_input(x, plain("torch", process_group=mine))
        reg = SIGReg(num_slices=SLICES, process_group=mine).eval()
        copied = copy.deepcopy(reg)
        results["copy"] = reg(x), copied(x), copied.process_group is mine
        if rank == 0:  # evaluates alone
            copied.sync = False
            results["alone"] = copied(x), SIGReg(num_slices=SLICES, sync=False)(x)
        try:
            plain("torch", process_group=other)(x)
        except ValueError as error:
            results["foreign group"] = str(error)
    return results
