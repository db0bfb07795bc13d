"""Peak memory and traffic of one rank, without a GPU and without the other ranks.

The trainer's step runs on fake tensors, which have shapes but no memory, in a fake process group, whose
collectives return at once. After every operator the storages alive are counted. Model, sharding,
recomputation, loss and optimizer are those of the trainer. DDP's reducer is C++ that fake tensors cannot
enter; its buckets are imitated here.

After each operator c + s / shards + a * images bytes are alive: s is sharded, a are activations. Three traces
(two numbers of shards, two batches) give c, s and a of every operator, and so the peak for any number of GPUs
and any batch; without FSDP2 s is 0 and two traces suffice.
"""

import contextlib
import dataclasses
import functools
import logging
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config, resolve
from lejepa_fast.train.engine.optimization import build_optimizer
from lejepa_fast.train.model.initialize import named_tensors
from lejepa_fast.train.model.masked import MaskedBatch, MaskedModel
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.model.objective import build_loss
from lejepa_fast.train.parallel.parallelize import (
    add_average,
    center_model,
    compute_dtype,
    make_mesh,
    parallelize,
)
from lejepa_fast.train.planning.autocast import autocast_as_on_gpus

CPU = torch.device("cpu")
_c10d = torch.ops.c10d


@dataclass
class Traffic:
    """Bytes of whole tensors that the collectives of one step handle."""

    gathered: int = 0
    """Over the ranks that share one copy of the model, as `scattered`."""
    scattered: int = 0
    summed: int = 0
    """Over the copies (HSDP, DDP), where a rank holds one shard of the tensor."""

    def sent(self, shards: int, copies: int) -> tuple[float, float]:
        """Return the bytes that one rank sends per step in rings, within its group and between groups."""
        within = (self.gathered + self.scattered) * (shards - 1) / shards
        return within, 2 * self.summed / shards * (copies - 1) / copies


class Trace(NamedTuple):
    """One rank's step."""

    alive: np.ndarray
    """Bytes after each operator."""
    state: int
    """Bytes of parameters, buffers, moments and averaged weights."""
    traffic: Traffic

    @property
    def peak(self) -> int:
        return int(self.alive.max())


class MemoryPlan(NamedTuple):
    """Peak bytes of a rank for any number of shards and any number of images per rank."""

    traced: Trace
    coefficients: tuple[np.ndarray, np.ndarray, np.ndarray]
    """c, s and a of the module's docstring, one value for each operator."""

    def peak(self, shards: int, images: int) -> int:
        c, s, a = self.coefficients
        return int((c + s / shards + a * images).max())


def plan_memory(cfg: Config, *, shards: int, images: int) -> MemoryPlan:
    """Trace the step of a configuration on `shards` ranks (1 without FSDP2) with `images` images each."""
    sharded = cfg.parallel.strategy == "fsdp"
    shards = max(shards, 2) if sharded else 1  # one shard of FSDP2 runs other operators than several
    base = trace_step(cfg, shards=shards, images=images)
    a = (trace_step(cfg, shards=shards, images=2 * images).alive - base.alive) / images
    s = np.zeros_like(a)
    if sharded:
        other = 2 if shards > 2 else 8
        s = (trace_step(cfg, shards=other, images=images).alive - base.alive) / (1 / other - 1 / shards)
    c = base.alive - s / shards - a * images
    return MemoryPlan(base, (c, s, a))


def trace_step(cfg: Config, *, shards: int, images: int) -> Trace:
    """Run one step of rank 0, with `images` images, on fake tensors. `shards` ranks share a copy of the
    model, 1 under ddp and none; `parallel.strategy` is not auto here."""
    loss = dataclasses.replace(cfg.loss, impl="torch")
    cfg = resolve(dataclasses.replace(cfg, compile="off", loss=loss))
    with _fake_processes(shards * cfg.parallel.replicate if cfg.parallel.strategy == "fsdp" else 0):
        step = PlannedStep(cfg, images, fake=True)
        with step.context:
            step.run()  # creates the optimizer's state, and caches shapes that DTensor infers
            with _Counter(shards) as counter, _resizes_go_to(counter):
                counter.add(*step.state(), *step.buckets, *step.views)
                state = sum(map(_local_bytes, step.state()))
                step.run()
    counter.traffic.summed += sum(map(_local_bytes, step.buckets))
    return Trace(np.array(counter.alive), state, counter.traffic)


class PlannedStep:
    """The trainer's step on one rank, on fake tensors or, to compare with, on real ones."""

    def __init__(self, cfg: Config, images: int, *, fake: bool):
        self.model = build_model(cfg, meta=True)
        self.context: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
        self.buckets: list[Tensor] = []
        self.masked = _masks_for(self.model, cfg, images) if isinstance(self.model, MaskedModel) else None
        self.loss_fn = build_loss(cfg, CPU)
        self.amp_dtype = compute_dtype(cfg, CPU)
        imitated = fake and cfg.parallel.strategy == "ddp"
        if imitated:
            cfg = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, strategy="none"))
        mesh = None if imitated else make_mesh(cfg.parallel, "cpu")
        called = parallelize(self.model, cfg, mesh, CPU, weights=not fake)
        second = center_model(self.model, cfg, mesh, CPU, weights=not fake)
        with self.context:
            if fake:
                self.model.to_empty(device=CPU)
                if second is not None:
                    second.to_empty(device=CPU)
            if imitated:  # DDP's reducer copies a finished gradient into a bucket, and makes it a view of it
                for parameter in filter(lambda each: each.requires_grad, self.model.parameters()):
                    self.buckets.append(torch.empty_like(parameter, requires_grad=False))
                    hook = functools.partial(_into_bucket, self.buckets[-1])
                    parameter.register_post_accumulate_grad_hook(hook)
            views = [torch.zeros(images, cfg.data.channels, size, size) for size in cfg.crops.view_sizes()]
            self.views = views
            self.optimizer = build_optimizer(self.model, cfg.optim)
            self.skipped = torch.zeros(())
            found = add_average(self.model, called, second, cfg, mesh, total_steps=1)
            self.average, self.called = found
            if self.average is not None:  # planned is a step after the first averaged one
                self.average.update(1, self.skipped)

    def state(self) -> list[Tensor]:
        """Return parameters, buffers, moments and averaged weights."""
        moments = [moment for moments in self.optimizer.state.values() for moment in moments.values()]
        average = self.average.tensors().values() if self.average is not None else ()
        return [*(tensor for _, tensor in named_tensors(self.model)), *moments, *average]

    def run(self) -> None:
        """Do what `Trainer.train_step` does on a GPU."""
        with autocast_as_on_gpus():  # the backward pass may recompute activations
            with torch.autocast("cpu", dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                outputs = self.called(self.views, *([] if self.masked is None else [self.masked]))
            self.loss_fn(*outputs).total.backward()
        get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.model, MaskedModel):
            self.model.follow(0.5, self.skipped)
        if self.average is not None:
            self.average.update(1, self.skipped)


def _masks_for(model: MaskedModel, cfg: Config, images: int) -> MaskedBatch:
    """The masks, for every image, of the one among 64 that leaves most patches: memory is then in proportion
    to the number of images, and seldom more."""
    contexts, targets = model.masks(cfg.seed, 0, range(64))
    blocks = targets.shape[1]
    rows = (1 + blocks) * contexts.flatten(1).sum(1) + targets.flatten(1).sum(1)
    image = int(rows.argmax())
    return model.batch(cfg.seed, 0, [image] * images, CPU)


def _into_bucket(bucket: Tensor, parameter: Any) -> None:
    parameter.grad = bucket.copy_(parameter.grad)


class _Counter(TorchDispatchMode):
    """Counts the bytes of all storages alive after every operator, and the traffic of collectives."""

    def __init__(self, shards: int):
        super().__init__()
        self.shards = shards
        self.alive: list[int] = []
        self.traffic = Traffic()
        self._now = 0
        self._sizes: dict[int, int] = {}

    def add(self, *tensors: Tensor) -> None:
        """Count storages from now on, until they are freed."""
        for tensor in tensors:
            self.resized(_local(tensor).untyped_storage())

    def resized(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._freed, key).atexit = False
        self._now += storage.nbytes() - self._sizes[key]
        self._sizes[key] = storage.nbytes()

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _c10d._allgather_base_.default:
            self.traffic.gathered += _local_bytes(args[0])
        elif func is _c10d._reduce_scatter_base_.default:
            self.traffic.scattered += _local_bytes(args[1])
        elif func is _c10d.allreduce_.default:
            self.traffic.summed += self.shards * sum(map(_local_bytes, args[0]))
        tree_map_only(Tensor, self.add, result)
        self.alive.append(self._now)
        return result


def _resizes_go_to(counter: _Counter) -> Any:
    """Count `UntypedStorage.resize_`, by which FSDP2 frees and allocates, in a context."""
    resize = torch.UntypedStorage.resize_

    def counted(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        counter.resized(storage)

    return mock.patch.object(torch.UntypedStorage, "resize_", counted)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _local_bytes(tensor: Tensor) -> int:
    return _local(tensor).nbytes


@contextlib.contextmanager
def _fake_processes(size: int) -> Iterator[None]:
    """Make this process rank 0 of a group (0: none) whose other ranks do not exist; hide warnings of it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UsageError("plan: a process group exists already; plan outside of torchrun")
    if size:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if size:
            dist.destroy_process_group()
