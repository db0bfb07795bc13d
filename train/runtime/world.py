"""Processes and devices: which rank this process is, and what ranks exchange outside the model.

`torchrun` starts W processes and sets RANK, LOCAL_RANK and WORLD_SIZE. Without these variables the run is a
single process without a process group. NCCL connects GPUs, gloo connects CPUs.
"""

import gc
import hashlib
import os
import reprlib
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.runtime.signals import Interrupted, end_with_torchrun

T = TypeVar("T")

CONNECT_TIMEOUT = timedelta(minutes=5)
"""Timeout of a connection to torchrun's store, which is there before the ranks are."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of collectives between devices in a training step."""
CONTROL_TIMEOUT = timedelta(days=7)
"""Timeout of the control group, in which ranks wait while rank 0 evaluates for hours. A rank that dies closes
its connections, so nobody waits for it."""


@dataclass(frozen=True)
class World:
    """The place of this process: its device, and its rank among `size` processes."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None
    """Process group (gloo, CPU) for everything outside the training step; None: the default group."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether a process group exists: also under torchrun with one process."""
        return dist.is_initialized()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Resolve `auto`, `cpu` or `cuda` for the process with this local rank; UsageError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for and PyTorch sees no GPU; use --device cpu or auto")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(
            f"torchrun: {local_rank + 1} or more processes on this machine and {count} GPU(s); "
            f"use --nproc-per-node {count}"
        )
    return torch.device("cuda", local_rank)


def setup_world(device: str = "auto") -> World:
    """Choose the device and, under torchrun, join the process group. Call `close_world` at the end.

    UsageError if the device is not there, or ranks have devices of different types.
    """
    end_with_torchrun()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    on_gpu = chosen.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # a run has two input sizes at most
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(chosen)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store: dict[str, Any] = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = {"store": store_of_this_start(rank, size), "rank": rank, "world_size": size}
        require_same_device(store["store"], rank, chosen.type)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        device_id=chosen if on_gpu else None,
        **store,
    )
    return World(chosen, rank, size, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))


def require_same_device(store: dist.Store, rank: int, device_type: str) -> None:
    """Raise UsageError on a rank whose type of device is not that of rank 0. Before the ranks join, because
    those with NCCL would wait for those without."""
    if rank == 0:
        store.set("device", device_type)
    if (first := store.get("device").decode()) != device_type:
        raise UsageError(
            f"device: {first} on rank 0 and {device_type} on rank {rank}; "
            "give all ranks the same --device, on machines that have it"
        )


def _store_of_torchrun() -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=CONNECT_TIMEOUT)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return dist.PrefixStore("lejepa_fast", store)


@contextmanager
def reported_once() -> Iterator[None]:
    """For errors before the ranks have joined: of those that torchrun started and that fail with the same
    words, one prints them."""
    try:
        yield
    except UsageError as error:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            with suppress(dist.DistError):
                key = f"error/{hashlib.sha256(str(error).encode('utf-8', 'replace')).hexdigest()}"
                if _store_of_torchrun().add(key, 1) > 1:
                    error.reported_by = None  # type: ignore[attr-defined]
        raise


def store_of_this_start(rank: int, size: int) -> dist.Store:
    """Return torchrun's store under a prefix that the ranks of this start share and no earlier start used.

    The store outlives the ranks: without a fresh prefix, restarted ranks find the addresses of dead ones
    there and connect to them (pytorch/pytorch#135712; seen with torch 2.15). TORCHELASTIC_RESTART_COUNT is no
    such prefix, because each machine counts for itself. So rank 0 draws a random name. Every other rank asks
    for it under a random key, so that it cannot read an answer to a dead rank, and confirms it.
    """
    shared = _store_of_torchrun()
    if rank > 0:
        key = uuid.uuid4().hex
        shared.set(f"asks/{rank}", key)
        start = shared.get(f"answer/{key}").decode()
        shared.set(f"confirmed/{start}/{rank}", "")
        return dist.PrefixStore(start, shared)
    start = uuid.uuid4().hex
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while missing := [rank for rank in range(1, size) if not shared.check([f"confirmed/{start}/{rank}"])]:
        if time.monotonic() > deadline:
            raise RunError(f"rank {', '.join(map(str, missing))} did not start; see its message")
        for other in missing:
            if shared.check([f"asks/{other}"]):
                shared.set(f"answer/{shared.get(f'asks/{other}').decode()}", start)
        time.sleep(0.02)
    return dist.PrefixStore(start, shared)


def close_world(code: int = 0) -> None:
    """Leave the process group at the end of a command with this exit code. DDP modules must be gone by then.

    A rank that fails among others ends at once, without cleaning up: the others may wait for it in a
    collective, where NCCL's clean exit would wait for them (pytorch/torchtitan#1342). torchrun ends them.
    """
    if not dist.is_initialized():
        return
    if code and dist.get_world_size() > 1:
        try:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also if the reader of the output is gone
            os._exit(code)
    gc.collect()
    dist.destroy_process_group()


# ---- work on some ranks, errors on all -----------------------------------------------------------------


def on_main(world: World, work: Callable[[], T]) -> T | None:
    """As `on_all` on rank 0, while the others wait, for hours if need be; None on those."""
    return on_all(world, work if world.is_main else lambda: None)


def on_all(world: World, work: Callable[[], T]) -> T:
    """Run `work`, which must not communicate, on every rank; if it fails on one, every rank raises.

    The first rank that failed raises its own error, the others a copy that is marked as reported there; of a
    defect (another class than UsageError, RunError, Interrupted) a RunError.
    """
    if not world.distributed:
        return work()
    error: BaseException | None = None
    try:
        result = work()
    except (Exception, Interrupted) as caught:
        error = caught
    errors: list[Any] = [None] * world.size
    try:
        dist.all_gather_object(errors, error and _portable(error, world.rank), group=world.control)
    except RuntimeError as lost:  # another rank is gone; this rank's own error may explain why
        raise (error or lost) from (lost if error else None)
    first = next((rank for rank, other in enumerate(errors) if other is not None), None)
    if first is None:
        return result
    reported: Any = error if first == world.rank else errors[first]
    reported.reported_by = first
    raise reported


def _portable(error: BaseException, rank: int) -> BaseException:
    """The error as other ranks raise it."""
    if isinstance(error, Interrupted):
        return Interrupted(str(error), error.signum)
    if isinstance(error, UsageError):
        return UsageError(str(error))
    if isinstance(error, RunError):
        return RunError(str(error))
    return RunError(f"rank {rank} failed with {type(error).__name__}; see its message")


@contextmanager
def same_error_on_all_ranks() -> Iterator[None]:
    """Mark an error that every rank raises alike: only rank 0 needs to print it."""
    try:
        yield
    except (UsageError, RunError, Interrupted) as error:
        error.reported_by = 0  # type: ignore[union-attr]
        raise


def reported_elsewhere(error: BaseException, rank: int) -> bool:
    """Whether another rank than `rank` prints this error."""
    return getattr(error, "reported_by", rank) != rank


@contextmanager
def lost_rank_is_a_run_error() -> Iterator[None]:
    """Raise RunError for a collective that failed because another rank died, whose own message says why."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        signs = ("closed by peer", "reset by peer", "connection refused", "broken pipe", "remote process")
        words = str(error).lower()
        lost = isinstance(error, (ConnectionError, dist.DistError)) or any(sign in words for sign in signs)
        if isinstance(error, RunError) or not (lost and dist.is_initialized() and dist.get_world_size() > 1):
            raise
        raise RunError("another rank failed; see its message above") from error


def from_main(world: World, value: T) -> T:
    """Return rank 0's `value` on every rank."""
    if not world.distributed:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.control)
    return box[0]


def gather_to_main(world: World, value: Any) -> list[Any] | None:
    """Return every rank's `value`, in the order of ranks, on rank 0; None on the others."""
    if not world.distributed:
        return [value]
    box: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(value, box, dst=0, group=world.control)
    return box


def first_difference(facts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first entry in which ranks differ, as `NAME is 1 on rank 0 and 2 on rank 1, 3`.

    `facts` has the entries of each rank, in the order of ranks. None if all are equal.
    """
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(facts):
            ranks.setdefault(repr(of_rank.get(name)), []).append(rank)
        if len(ranks) > 1:
            found = [f"{value} on rank {reprlib.repr(some)[1:-1]}" for value, some in ranks.items()]
            return f"{name} is {' and '.join(found[:3])}"  # of many ranks and values the first ones
    return None


def require_same_on_all(world: World, facts: Mapping[str, Any]) -> None:
    """Raise UsageError on every rank if ranks differ in an entry of `facts`; see `first_difference`."""
    every = gather_to_main(world, facts)

    def compare() -> None:
        if difference := first_difference(every or []):
            raise UsageError(
                f"ranks differ: {difference}; start all ranks with the same options, images and versions"
            )

    on_main(world, compare)


def mean_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """The mean of a small float32 tensor over the ranks (in place if there is more than one)."""
    if world.distributed:
        dist.all_reduce(values)
        values /= world.size
    return values
