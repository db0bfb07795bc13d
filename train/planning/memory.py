"""Peak memory and traffic of one rank, found without a GPU and without the other ranks.

The trainer's step (forward, loss, backward, norm of the gradient, optimiser, averaged weights) runs on fake
tensors, which have shapes and no memory, in a fake process group, whose collectives return at once. PyTorch's
memory trackers count the storages alive after every operator. Model, sharding, recomputation, loss and
optimiser are those of the trainer; what differs from a run is said in `docs/launching.md`. DDP's reducer is
C++ that fake tensors cannot enter: its buckets, which hold all gradients from step to step, are made here.

Each operator of the step leaves c + s / shards + a * images bytes alive: c for gathered blocks or, without
FSDP2, the whole state, s for what is sharded, a for activations. Three runs (two numbers of shards, two
batches) give the three coefficients at every operator, and these the peak for any number of GPUs and any
batch at once; without FSDP2 two are enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType, _RefType
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.utils import get_total_norm

from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.config import Config
from lejepa_fast.train.engine.optimization import build_optimizer
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.model.initialize import allocate
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.model.objective import build_loss
from lejepa_fast.train.parallel.parallelize import compute_dtype, make_mesh, parallelize
from lejepa_fast.train.planning.autocast import autocast_as_on_gpus

CPU = torch.device("cpu")
_c10d = torch.ops.c10d


@dataclass
class Traffic:
    """Bytes of whole tensors that the collectives of one step handle; what a rank sends follows from them.

    `gathered` and `scattered` are over the ranks that share one copy of the model; `summed` (HSDP, DDP) over
    the copies, where a rank holds one shard of such a tensor.
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
    ranks and changes neither. Without FSDP2 there is one shard. Raises UsageError as building the model does.
    """
    sharded = cfg.parallel.strategy == "fsdp"
    several = max(shards, 2) if sharded else 1  # one shard of FSDP2 runs other operators than several
    base = trace_step(cfg, shards=several, images=images)
    more = trace_step(cfg, shards=several, images=2 * images)
    assert len(base.alive) == len(more.alive)  # the same operators
    a = (more.alive - base.alive) / images
    s = np.zeros_like(a)
    if sharded:
        other = 2 if several > 2 else 8
        elsewhere = trace_step(cfg, shards=other, images=images)
        assert len(base.alive) == len(elsewhere.alive)
        s = (elsewhere.alive - base.alive) / (1 / other - 1 / several)
    c = base.alive - s / several - a * images
    asked = base if shards == several else trace_step(cfg, shards=shards, images=images)
    return MemoryPlan(asked, base.traffic, np.stack([c, s, a]))


def trace_step(cfg: Config, *, shards: int, images: int) -> Trace:
    """Run one step of rank 0 of shards * cfg.parallel.replicate on fake tensors.

    `cfg.parallel.strategy` is not `auto` here; under `ddp` and `none` there is one shard.
    """
    strategy = cfg.parallel.strategy
    assert strategy == "fsdp" or (shards == 1 and strategy != "auto")
    cfg = config.resolve(dataclasses.replace(cfg, compile="off"))
    ranks = {"none": 1, "ddp": 2, "fsdp": shards * cfg.parallel.replicate}[strategy]
    group = contextlib.nullcontext() if strategy == "none" else _fake_processes(ranks)
    with group, _quiet():
        step = PlannedStep(cfg, images, fake=True)
        with step.context:
            tracker = (_ShardedTracker if strategy == "fsdp" else _WholeTracker)(shards, step)
            with tracker, tracker.leaving_out_propagation():
                step.run()
    tracker.traffic.summed += sum(map(_bytes, step.buckets))
    return Trace(shards, images, np.array(tracker.alive), tracker.at_peak, tracker.traffic)


class PlannedStep:
    """The trainer's step on one rank, on fake tensors or on real ones (to compare with).

    A first optimiser step on gradients of zero makes its state: the step that `run` does is one of many.
    """

    def __init__(self, cfg: Config, images: int, *, fake: bool):
        self.model: LeJEPAModel = build_model(cfg, meta=True)
        self.called = self._parallelized(cfg, fake)
        self.loss_fn = build_loss(cfg, CPU)
        self.amp_dtype = compute_dtype(cfg, CPU)
        self.context: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
        self.buckets: list[Tensor] = []
        self.average: WeightAverage | None = None
        with self.context:
            if fake:
                self._allocate()
                if cfg.parallel.strategy == "ddp":
                    self._keep_gradients()
            sizes = [cfg.crops.global_size] * cfg.crops.global_crops
            sizes += [cfg.crops.local_size] * cfg.crops.local_crops
            self.views = [torch.zeros(images, 3, size, size) for size in sizes]
            self.optimizer = build_optimizer(self.model, cfg.optim, CPU)
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.skipped = torch.zeros(())
            if cfg.average.kind != "none":
                self.average = WeightAverage(self.model, cfg.average, total_steps=1)
                self.average.update(1, self.skipped)

    def _parallelized(self, cfg: Config, fake: bool) -> nn.Module:
        if fake and cfg.parallel.strategy == "ddp":
            parallel = dataclasses.replace(cfg.parallel, strategy="none")
            return parallelize(
                self.model, dataclasses.replace(cfg, parallel=parallel), None, CPU, weights=False
            )
        return parallelize(self.model, cfg, make_mesh(cfg.parallel, "cpu"), CPU, weights=not fake)

    def _keep_gradients(self) -> None:
        """As DDP's reducer does: a finished gradient is copied into a bucket, and is a view of it then."""

        def into(bucket: Tensor, parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad = bucket.copy_(parameter.grad)

        for parameter in self.model.parameters():
            self.buckets.append(torch.empty_like(parameter, requires_grad=False))
            parameter.register_post_accumulate_grad_hook(functools.partial(into, self.buckets[-1]))

    def _allocate(self) -> None:
        allocate(self.model, CPU)
        for module in self.loss_fn.modules():
            for name, value in module._buffers.items():
                module._buffers[name] = self.context.from_tensor(value)

    def run(self) -> None:
        """As `Trainer._train_step` does it on a GPU."""
        with autocast_as_on_gpus():  # in the backward pass, too: it may compute activations again
            with torch.autocast("cpu", dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                global_z, all_z = self.called(self.views)
            out = self.loss_fn(global_z, all_z)
            out.total.backward()
        get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(1, self.skipped)


class _Kind(_RefType):
    """What PyTorch's trackers have no name for."""

    AVERAGE = "Average"


class _Tracker(MemTracker):
    """Keeps the total after every operator, and the parts at the peak, instead of statistics by module."""

    def __init__(self, shards: int, step: PlannedStep, *tracked: Any):
        super().__init__(*tracked)
        self._ref_class = (*self._ref_class, _Kind.AVERAGE)  # type: ignore[assignment]
        averaged = step.average.tensors() if step.average is not None else {}
        for tensor in averaged.values():
            self._update_and_maybe_create_winfos(tensor, _Kind.AVERAGE)
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


class _ShardedTracker(_Tracker, FSDPMemTracker):
    """Of a step under FSDP2."""

    def __init__(self, shards: int, step: PlannedStep):
        super().__init__(shards, step, step.model, step.optimizer)
        self.track_inputs(tuple(step.views))


class _WholeTracker(_Tracker):
    """Of a step under DDP or without a wrapper."""

    def __init__(self, shards: int, step: PlannedStep):
        super().__init__(shards, step)
        self.track_external(step.model, step.optimizer, *step.views)
        for bucket in step.buckets:
            self._update_and_maybe_create_winfos(bucket, _MemRefType.GRAD)


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
