"""Peak memory and traffic of one rank under FSDP2, found without a GPU and without the other ranks.

The trainer's step (forward, loss, backward, norm of the gradient, optimiser) runs on fake tensors, which have
shapes and no memory, in a fake process group, whose collectives return at once. PyTorch's FSDPMemTracker
counts the storages alive after every operator. Model, sharding, recomputation, loss and optimiser are those
of the trainer; what differs from a run is said in `docs/training.md`.

Each operator of the step leaves c + s / shards + a * images bytes alive: c for gathered blocks, s for what
is sharded, a for activations. Three runs (two numbers of shards, two batches) give the three coefficients
at every operator, and these the peak for any number of GPUs and any batch at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.utils import get_total_norm

from lejepa_fast import LeJEPALoss
from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.config import Config
from lejepa_fast.train.model import LeJEPAModel, build_model
from lejepa_fast.train.optimization import build_optimizer
from lejepa_fast.train.parallelize import compute_dtype, make_mesh, parallelize

CPU = torch.device("cpu")
_c10d = torch.ops.c10d


@dataclass
class Traffic:
    """Bytes of whole tensors that the collectives of one step handle; what a rank sends follows from them.

    `gathered` and `scattered` are over the ranks that share one copy of the model; `summed` (HSDP) over the
    copies, where a rank holds one shard of such a tensor.
    """

    gathered: int = 0
    scattered: int = 0
    summed: int = 0

    def sent(self, shards: int, replicas: int) -> tuple[float, float]:
        """Bytes that one rank sends in a step within its group, and between the groups, by rings: (n - 1) / n
        of a gathered or scattered tensor, and twice that of what it holds of a summed one."""
        within = (self.gathered + self.scattered) * (shards - 1) / shards
        return within, 2 * self.summed / shards * (replicas - 1) / replicas


@dataclass(frozen=True)
class Trace:
    """One rank's step: bytes alive after each operator, what they were at the peak, and the traffic."""

    shards: int
    images: int
    alive: np.ndarray
    at_peak: dict[str, int]
    traffic: Traffic

    @property
    def peak(self) -> int:
        return int(self.alive.max())


@dataclass(frozen=True)
class MemoryPlan:
    """Peak bytes of a rank for any number of shards and any number of images per rank."""

    traced: Trace
    """The run at the shards and images that were asked for."""
    traffic: Traffic
    """Of a run that shards: one shard alone gathers and scatters nothing."""
    coefficients: np.ndarray = field(repr=False)
    """(3, operators): c, s and a of the module's docstring."""

    def peak(self, shards: int, images: int) -> int:
        c, s, a = self.coefficients
        return int((c + s / shards + a * images).max())


def plan_memory(cfg: Config, *, shards: int, images: int) -> MemoryPlan:
    """Trace the step of a configuration on `shards` ranks, `images` each; `parallel.replicate` multiplies the
    ranks and changes neither. Raises UsageError as building the model does."""
    several = max(shards, 2)  # for a single shard FSDP2 runs other operators, which cannot be compared
    base = trace_step(cfg, shards=several, images=images)
    other = 2 if several > 2 else 8
    elsewhere = trace_step(cfg, shards=other, images=images)
    more = trace_step(cfg, shards=several, images=2 * images)
    assert len(base.alive) == len(elsewhere.alive) == len(more.alive)  # the same operators
    a = (more.alive - base.alive) / images
    s = (elsewhere.alive - base.alive) / (1 / other - 1 / several)
    c = base.alive - s / several - a * images
    asked = base if shards == several else trace_step(cfg, shards=shards, images=images)
    return MemoryPlan(asked, base.traffic, np.stack([c, s, a]))


def trace_step(cfg: Config, *, shards: int, images: int) -> Trace:
    """Run one step of rank 0 of shards * cfg.parallel.replicate on fake tensors."""
    cfg = config.resolve(dataclasses.replace(cfg, compile="off"))
    cfg = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, strategy="fsdp"))
    with _fake_processes(shards * cfg.parallel.replicate), _quiet():
        step = PlannedStep(cfg, images, fake=True)
        with step.context:
            tracker = _Tracker(step.model, step.optimizer, shards)
            tracker.track_inputs(tuple(step.views))
            with tracker, tracker.leaving_out_propagation():
                step.run()
    return Trace(shards, images, np.array(tracker.alive), tracker.at_peak, tracker.traffic)


class PlannedStep:
    """The trainer's step on one rank, on fake tensors or on real ones (to compare with).

    A first optimiser step on gradients of zero makes its state: the step that `run` does is one of many.
    """

    def __init__(self, cfg: Config, images: int, *, fake: bool):
        self.model: LeJEPAModel = build_model(cfg, meta=True)
        mesh = make_mesh(cfg.parallel, "cpu")
        parallelize(self.model, cfg, mesh, CPU, weights=not fake)
        self.loss_fn = self._loss(cfg)
        self.amp_dtype = compute_dtype(cfg, CPU)
        self.context: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
        with self.context:
            if fake:
                self._allocate()
            sizes = [cfg.crops.global_size] * cfg.crops.global_crops
            sizes += [cfg.crops.local_size] * cfg.crops.local_crops
            self.views = [torch.zeros(images, 3, size, size) for size in sizes]
            self.optimizer = build_optimizer(self.model, cfg.optim, CPU)
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @staticmethod
    def _loss(cfg: Config) -> LeJEPALoss:
        from lejepa_fast.train.loop import build_loss

        return build_loss(cfg, CPU)

    def _allocate(self) -> None:
        self.model.to_empty(device=CPU)
        for module in self.model.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_meta:
                    setattr(module, name, torch.empty_like(value, device=CPU))
        for module in self.loss_fn.modules():
            for name, value in module._buffers.items():
                module._buffers[name] = self.context.from_tensor(value)

    def run(self) -> None:
        """As `Trainer._train_step` does it."""
        with torch.autocast("cpu", dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            global_z, all_z = self.model(self.views)
        out = self.loss_fn(global_z, all_z)
        out.total.backward()
        get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Tracker(FSDPMemTracker):
    """Keeps the total after every operator, and the parts at the peak, instead of statistics by module."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, shards: int):
        super().__init__(model, optimizer)
        self.shards = shards
        self.alive: list[int] = []
        self.at_peak: dict[str, int] = {}
        self.traffic = Traffic()
        self._most = 0
        self._paused = False

    @contextlib.contextmanager
    def leaving_out_propagation(self) -> Iterator[None]:
        """To learn the shape of a result, DTensor runs operators on fake tensors of the whole, unsharded
        size. In a run these are no memory; here, where all tensors are fake, they would count."""
        original = ShardingPropagator._propagate_tensor_meta_non_cached

        def uncounted(propagator: ShardingPropagator, op_schema: Any) -> Any:
            self._paused = True
            try:
                return original(propagator, op_schema)
            finally:
                self._paused = False

        ShardingPropagator._propagate_tensor_meta_non_cached = uncounted  # type: ignore
        try:
            yield
        finally:
            ShardingPropagator._propagate_tensor_meta_non_cached = original  # type: ignore

    def _update_peak_stats(self, peak_state: Any) -> None:
        # The original walks through all modules at every operator, for statistics that nobody reads here.
        now = self._curr_mem_snap.get(CPU, {})
        total = now.get("Total", 0)
        self.alive.append(total)
        if total > self._most:
            self._most = total
            parts = {getattr(kind, "value", kind): size for kind, size in now.items()}
            self.at_peak = {kind: size for kind, size in parts.items() if kind != "Total" and size}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        if func is _c10d._allgather_base_.default:
            self.traffic.gathered += _bytes(args[0])
        elif func is _c10d._reduce_scatter_base_.default:
            self.traffic.scattered += _bytes(args[1])
        elif func is _c10d.allreduce_.default:
            self.traffic.summed += self.shards * sum(map(_bytes, args[0]))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings here are about fake processes on a CPU, and not about the plan."""
    log = logging.getLogger("lejepa_fast.train")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _fake_processes(size: int) -> Iterator[None]:
    """This process as rank 0 of a group whose other ranks do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UsageError("plan: a process group exists already; plan outside of torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
