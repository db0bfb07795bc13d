"""The copy of a checkpoint's tensors that the training waits for: no groups, and not without memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lejepa_fast.train.checkpoint.saving import _Stager


@pytest.fixture
def four_ranks() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_copy_makes_no_groups_of_processes(four_ranks: None) -> None:
    """Between GPUs each would be a communicator of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    values = torch.arange(6.0)
    sharded = DTensor.from_local(values, mesh, [Replicate(), Shard(0)], run_check=False)
    groups = len(dist.distributed_c10d._world.pg_map)
    staged = _Stager(pinned=False).stage({"a": sharded})["a"]
    assert len(dist.distributed_c10d._world.pg_map) == groups
    assert staged.shape == (12,)
    assert staged.placements == sharded.placements
    sharded.zero_()
    assert staged.to_local().tolist() == [0, 1, 2, 3, 4, 5]


def test_without_pinned_memory_the_copy_is_pageable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty

    def refused(*size: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")
        return empty(*size, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", refused)
    stager = _Stager(pinned=True)
    tensors = {name: torch.full((3,), number) for name, number in (("a", 1.0), ("b", 2.0))}
    for _ in range(2):
        staged = stager.stage(tensors)
        assert {name: tensor.tolist() for name, tensor in staged.items()} == {"a": [1.0] * 3, "b": [2.0] * 3}
    (record,) = caplog.records
    assert "(CUDA error: out of memory): the rest is copied to pageable memory" in record.getMessage()
