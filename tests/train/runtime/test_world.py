"""Work on some ranks: longer than a collective may take, errors on all ranks, and no waiting for the dead."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from training import run_ranks

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.runtime import signals
from lejepa_fast.train.runtime.signals import Interrupted
from lejepa_fast.train.runtime.world import (
    lost_rank_is_a_run_error,
    on_all,
    on_main,
    reported_elsewhere,
    reported_once,
    require_same_device,
    setup_world,
    store_of_this_start,
)

TIMEOUT = timedelta(seconds=2)  # of a collective between devices


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def work_fail_and_die(rank, port, folder):
    """As one of two ranks that torchrun starts."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    world = setup_world("cpu")
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)  # from now on

    def takes_long():
        time.sleep(1.5 * TIMEOUT.total_seconds())
        return 7

    assert on_main(world, takes_long) == (7 if rank == 0 else None)
    for error in (UsageError("seven"), RunError("eight"), Interrupted("nine", 15), KeyError("ten")):
        defect = rank == 1 and isinstance(error, KeyError)
        with pytest.raises(RunError if defect else type(error)) as caught:
            on_main(world, Mock(side_effect=error))
        assert ("see its message" if defect else str(error)) in str(caught.value)
        assert reported_elsewhere(caught.value, rank) == (rank == 1)  # rank 0 alone prints it
    # On one rank of those that work: that one prints it.
    with pytest.raises(UsageError, match="rank 1") as caught:
        on_all(world, Mock(side_effect=UsageError("of rank 1") if rank == 1 else None))
    assert reported_elsewhere(caught.value, rank) == (rank == 0)
    # On both: rank 0's.
    with pytest.raises(UsageError, match="of rank 0") as caught:
        on_all(world, Mock(side_effect=UsageError(f"of rank {rank}")))
    assert on_all(world, lambda: rank) == rank  # nothing is left of the errors

    # By the connection: the error of a timeout says something else.
    with pytest.raises(RunError, match="another rank failed"), lost_rank_is_a_run_error():
        on_main(world, lambda: time.sleep(0.3) or os._exit(0))
    Path(folder, "noticed").touch()
    os._exit(0)


def test_work_on_rank_0_may_take_long_and_errors_reach_all_ranks_but_the_dead(tmp_path):
    run_ranks(work_fail_and_die, free_port(), str(tmp_path), ranks=2)
    assert (tmp_path / "noticed").exists()


@pytest.fixture
def torchrun_store(monkeypatch):
    """torchrun's store, which outlives the ranks."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def test_ranks_that_start_again_do_not_read_what_dead_ranks_left(torchrun_store):
    with ThreadPoolExecutor(3) as threads:
        for size in (3, 3, 2):
            ranks = [threads.submit(store_of_this_start, 0, size)]
            time.sleep(0.1)  # rank 0 answers the dead first
            ranks += [threads.submit(store_of_this_start, rank, size) for rank in range(1, size)]
            stores = [rank.result(timeout=30) for rank in ranks]
            assert not stores[0].check(["who"])
            stores[1].set("who", "1")
            for store in stores:
                store.wait(["who"], timedelta(seconds=10))  # raises if they do not share it


def test_of_equal_errors_before_the_ranks_join_one_is_printed(torchrun_store):
    found = []
    for rank, message in enumerate(
        ("unknown option --a", "unknown option --a", "device: none", "unknown \udcff")
    ):
        with pytest.raises(UsageError) as caught, reported_once():
            raise UsageError(message)
        found.append(not reported_elsewhere(caught.value, rank))
    assert found == [True, False, True, True]


def test_ranks_on_other_devices_are_named():
    store = dist.HashStore()
    for rank in range(2):
        require_same_device(store, rank, "cuda")
    with pytest.raises(UsageError, match="device: cuda on rank 0 and cpu on rank 2; give all ranks the same"):
        require_same_device(store, 2, "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="a signal at the parent's death is Linux's")
def test_a_killed_torchrun_leaves_no_trainer_behind():
    trainer = f"import runpy, time; runpy.run_path({signals.__file__!r})['end_with_torchrun']()"
    trainer += "; print('ready', flush=True); time.sleep(600)"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, trainer],
        stdout=subprocess.PIPE,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "run"},
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == b""  # the end of the file: no process holds it open
