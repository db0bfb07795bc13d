"""Processes and devices: who this process is, and what ranks say to each other outside the model.

`torchrun` starts W processes and sets RANK, LOCAL_RANK and WORLD_SIZE; without these variables the run
is a single process and no process group exists. NCCL connects GPUs and gloo connects CPUs.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.runtime.signals import Interrupted

log = logging.getLogger("lejepa_fast.train")

T = TypeVar("T")

# Rank 0 evaluates and writes the report while the others wait in a collective: they must outwait it.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank among `size` processes, and the device that it computes on."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """True when a process group exists: also with torchrun and one process."""
        return dist.is_initialized()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Resolve `auto`, `cpu` or `cuda` for the process with this local rank; UsageError if it is not there."""
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
    """Choose the device and, under torchrun, join the process group. Pair it with `close_world`."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # a run has two input sizes at most
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(chosen)
    # gloo beside NCCL: checkpoints are coordinated on the CPU, while NCCL trains.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    device_id = chosen if chosen.type == "cuda" else None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _store_of_this_start(rank, size)
        where: dict[str, Any] = {"store": store, "rank": rank, "world_size": size}
    else:
        where = {}
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=device_id, **where)
    return World(chosen, rank=dist.get_rank(), size=dist.get_world_size())


def _store_of_this_start(rank: int, size: int) -> dist.Store:
    """torchrun's store, under a prefix that the ranks of this start share and no earlier start had.

    The store lives in torchrun. Without the prefix, processes that it starts again find the addresses of
    those that are dead there, and connect to them (pytorch/pytorch#135712; seen with torch 2.15). Its count
    of restarts would not do as a prefix: each machine has its own.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    shared = dist.PrefixStore("lejepa_fast", store)
    if rank == 0:
        start = _hand_out_a_name(shared, size)
    else:
        # What rank 0 answers stands under a name that only this process has: it cannot be an old answer.
        me = uuid.uuid4().hex
        shared.set(f"here/{rank}", me)
        start = shared.get(f"start/{me}").decode()
        shared.set(f"known/{start}/{rank}", "")
    return dist.PrefixStore(f"lejepa_fast/{start}", store)


def _hand_out_a_name(shared: dist.Store, size: int) -> str:
    """On rank 0: answers whoever is here, which dead processes still seem to be, until all others know."""
    start = uuid.uuid4().hex
    missing = set(range(1, size))
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise RunError(f"rank {', '.join(map(str, sorted(missing)))} did not start; see its message")
        for other in sorted(missing):
            if shared.check([f"here/{other}"]):
                shared.set(f"start/{shared.get(f'here/{other}').decode()}", start)
        time.sleep(0.02)
        missing = {other for other in missing if not shared.check([f"known/{start}/{other}"])}
    return start


def close_world(code: int = 0) -> None:
    """Leave the process group, at the end of a command with this exit code. DDP modules must be gone by then:
    one that still holds the group when the interpreter exits lets gloo's threads abort the process (seen with
    torch 2.15).

    Among other ranks a code above 0 ends the process at once, after what is being raised is printed. They may
    wait for this one in a collective, and NCCL's way of leaving waits for them (pytorch/torchtitan#1342);
    torchrun ends them when this process is gone.
    """
    if not dist.is_initialized():
        return
    if code and dist.get_world_size() > 1:
        try:  # what it prints to may be gone
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            time.sleep(1)  # for the others to print why they end: torchrun ends them when the first is gone
        finally:
            os._exit(code)
    gc.collect()
    dist.destroy_process_group()


def on_main(world: World, work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 while the others wait; returns its result there and None elsewhere.

    What rank 0 raises ends every rank, instead of leaving them waiting for one that has gone: UsageError,
    RunError and Interrupted with the same text, anything else as a RunError that points to rank 0.
    """
    if not world.distributed:
        return work()
    result: T | None = None
    failure: list[tuple[str, str, int] | None] = [None]
    error: BaseException | None = None
    if world.is_main:
        try:
            result = work()
        except (Exception, Interrupted) as caught:
            error = caught
            failure = [_described(caught)]
    dist.broadcast_object_list(failure, src=0, device=world.device)
    if error is not None:
        raise error
    if failure[0] is not None:
        kind, text, signum = failure[0]
        if kind == "interrupted":
            raise Interrupted(text, signum)
        with the_same_on_every_rank():
            raise (UsageError if kind == "usage" else RunError)(text)
    return result


def _described(error: BaseException) -> tuple[str, str, int]:
    if isinstance(error, Interrupted):
        return "interrupted", str(error), error.signum
    if isinstance(error, (UsageError, RunError)):
        return ("usage" if isinstance(error, UsageError) else "run"), str(error), 0
    return "run", f"rank 0 failed with {type(error).__name__}; see its message", 0


def on_all(world: World, work: Callable[[], T]) -> T:
    """Run `work`, which must not communicate, on every rank; if one fails, all end together.

    Each rank raises its own error; a rank that has none raises one that names those which have.
    """
    if not world.distributed:
        return work()
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    ends: list[tuple[str, str, int] | None] = [None] * world.size
    dist.all_gather_object(ends, None if error is None else _described(error))
    if error is not None:
        if all(end == ends[0] for end in ends):
            with the_same_on_every_rank():
                raise error
        raise error
    failed = {str(rank): end[0] for rank, end in enumerate(ends) if end}
    if failed:
        kind = RunError if "run" in failed.values() else UsageError
        raise kind(f"rank {', '.join(failed)} failed; see the message there")
    return result  # type: ignore[return-value]


_SAID_BY_RANK_0 = "lejepa_fast_said_by_rank_0"


@contextmanager
def the_same_on_every_rank() -> Iterator[None]:
    """An error raised in here is raised on rank 0 with the same text: it is enough if that one prints it."""
    try:
        yield
    except (UsageError, RunError) as error:
        setattr(error, _SAID_BY_RANK_0, True)
        raise


def is_said_by_rank_0(error: Exception) -> bool:
    return getattr(error, _SAID_BY_RANK_0, False)


@contextmanager
def one_line_for_a_lost_peer() -> Iterator[None]:
    """Where another rank has gone, its own message says why: RunError for the collective that failed."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if isinstance(error, RunError) or not (dist.is_initialized() and dist.get_world_size() > 1):
            raise
        text = str(error).lower()
        signs = ("closed by peer", "reset by peer", "connection refused", "broken pipe", "remote process")
        if not isinstance(error, (ConnectionError, dist.DistError)) and not any(s in text for s in signs):
            raise
        raise RunError("another rank failed; see its message above") from error


def from_main(world: World, value: T) -> T:
    """Rank 0's `value` on every rank."""
    if not world.distributed:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def gather_to_main(world: World, value: Any) -> list[Any] | None:
    """Every rank's `value`, in the order of ranks, on rank 0; None elsewhere."""
    if not world.distributed:
        return [value]
    box: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(value, box, dst=0)
    return box


def mean_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """The mean of a small float32 tensor over the ranks (in place where there is more than one)."""
    if world.distributed:
        dist.all_reduce(values)
        values /= world.size
    return values
