"""Work of hours on rank 0: the others wait longer than any collective may take, but not for the dead."""

from __future__ import annotations

import gc
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training import run_ranks

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.runtime import heartbeat as long_work
from lejepa_fast.train.runtime.heartbeat import on_main_for_long
from lejepa_fast.train.runtime.signals import Interrupted
from lejepa_fast.train.runtime.world import World, lost_rank_is_a_run_error, reported_elsewhere

TIMEOUT = timedelta(seconds=2)  # of a collective


def group(rank: int, folder: str) -> World:
    torch.set_num_threads(1)
    long_work.SECONDS_BETWEEN_WORDS = 0.1
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)  # now that both are there
    return World(torch.device("cpu"), rank=rank, size=2)


def outwait(rank: int, folder: str) -> None:
    world = group(rank, folder)

    def long() -> int:
        time.sleep(1.5 * TIMEOUT.total_seconds())
        return 7

    assert on_main_for_long(world, long) == (7 if rank == 0 else None)
    for error in (UsageError("seven"), Interrupted("eight", 15)):

        def raising(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error.args[0])) as caught:
            on_main_for_long(world, raising)
        assert rank == 0 or isinstance(error, Interrupted) or reported_elsewhere(caught.value, 1)  # type: ignore[arg-type]
    assert on_main_for_long(world, lambda: 9) == (9 if rank == 0 else None)  # nothing is left of the errors
    gc.collect()
    dist.destroy_process_group()


def wait_for_the_dead(rank: int, folder: str) -> None:
    world = group(rank, folder)

    def dying() -> None:
        time.sleep(0.3)
        os._exit(0)

    # By the connection: of a timeout it says something else.
    with pytest.raises(RunError, match="another rank failed"), lost_rank_is_a_run_error():
        on_main_for_long(world, dying)
    Path(folder, "told").touch()
    os._exit(0)


def test_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    run_ranks(outwait, str(tmp_path), ranks=2)


def test_the_dead_are_not_waited_for(tmp_path: Path) -> None:
    run_ranks(wait_for_the_dead, str(tmp_path), ranks=2)
    assert (tmp_path / "told").exists()
