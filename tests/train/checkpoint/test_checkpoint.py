"""Checkpoints: whole or not at all, checked before use, no code runs from them, full disks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from training import CPU

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.checkpoint import saving
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.checkpoint.saving import Saver, unfinished
from lejepa_fast.train.checkpoint.storage import UnreadableCheckpointError
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.runtime import files
from lejepa_fast.train.runtime.world import World

SHARD = "shard-00001.safetensors"
FILES = [SHARD, checkpoint.STATE, checkpoint.MANIFEST]


def save(folder: Path, step: int, keep: int = 3, **tensors: torch.Tensor) -> Path:
    saver = Saver(folder, CPU, keep=keep)
    tensors = tensors or {"model.weight": torch.full((50_000,), float(step)), "loss.step": torch.tensor(step)}
    saver.start(step, tensors, {"rng": [random_state.capture_rng()], "config": {"out": None, "lr": 0.1}})
    saver.wait()
    return checkpoint.checkpoint_path(folder, step)


def newest_step(folder: Path, *, own: bool = False) -> int:
    found = checkpoint.newest_checkpoint(folder, own=own)
    assert found is not None
    return found[1]["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- saving ------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    """Of the values at the start of a save, which the training may change at once."""
    weight = torch.arange(50_000.0)
    saver = Saver(tmp_path, CPU, keep=3)
    umask = os.umask(0o027)
    try:
        saver.start(7, {"model.weight": weight, "loss.step": torch.tensor(7)}, {"config": {"lr": 0.1}})
        weight.zero_()
        saver.wait()
    finally:
        os.umask(umask)
    path = tmp_path / "step-00000007"
    state = checkpoint.read_checkpoint(path)
    assert (state["step"], state["config"]) == (7, {"lr": 0.1})
    assert torch.equal(checkpoint.load_model(path)["weight"], torch.arange(50_000.0))
    saved = checkpoint.saved_tensors(path)
    assert {name: (tuple(t.shape), t.dtype) for name, t in saved.items()} == {
        "model.weight": ((50_000,), torch.float32),
        "loss.step": ((), torch.int64),
    }
    # safetensors gives its file mode 0600; the umask decides here.
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert modes == dict.fromkeys(FILES, 0o640)
    subprocess.run(["sha256sum", "-c", "--strict", checkpoint.MANIFEST], cwd=path, check=True)


def test_a_save_of_the_same_step_replaces_and_keeps_no_file_of_a_killed_one(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    left = unfinished(path)
    left.mkdir()
    (left / "shard-00002.safetensors").write_bytes(b"half, by a second rank")
    save(tmp_path, 1, **{"model.weight": torch.zeros(3)})
    assert torch.equal(checkpoint.load_model(path)["weight"], torch.zeros(3))
    assert names(tmp_path) == ["step-00000001"]


def test_the_last_k_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]


@pytest.mark.parametrize("rank", range(4))
def test_each_shard_is_written_once(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of two shards: the first replica writes, rank 0 also the plain tensors; the copy makes no
    process groups, each of which would be a communicator between GPUs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    written: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []

    def write_shard(path: Path, *what: Any) -> None:
        written.append(what)  # type: ignore[arg-type]
        path.parent.mkdir(exist_ok=True)  # rank 0 has made it
        path.touch()

    monkeypatch.setattr(saving, "write_shard", write_shard)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        values = torch.arange(6.0) + 6 * (rank % 2)
        tensors = {
            "sharded": DTensor.from_local(values, mesh, [Replicate(), Shard(0)], run_check=False),
            "plain": torch.ones(2),
        }
        monkeypatch.setattr(dist, "new_group", lambda **options: None)
        monkeypatch.setattr(dist, "is_initialized", lambda: False)  # the thread does not communicate
        saver = Saver(tmp_path, World(CPU.device, rank, 4), keep=1)
        groups = len(dist.distributed_c10d._world.pg_map)
        saver.start(1, tensors, {})
        assert len(dist.distributed_c10d._world.pg_map) == groups
        saver.wait()
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()
    found = [{name: (t.tolist(), offsets[name]) for name, t in parts.items()} for parts, offsets in written]
    sharded = {"sharded": (values.tolist(), (6 * rank,))}
    plain = {"plain": ([1.0, 1.0], (0,))}
    assert found == {0: [sharded | plain], 1: [sharded]}.get(rank, [])


def test_random_states_survive_the_file(tmp_path: Path) -> None:
    def draws() -> tuple[float, ...]:
        return random.random(), float(np.random.standard_normal()), float(torch.rand(()))  # noqa: NPY002

    np.random.standard_normal()  # noqa: NPY002 - leaves numpy with a spare Gaussian, which is state as well
    path = save(tmp_path, 1)
    expected = draws()
    with random_state.preserved_rng():
        after = draws()
    assert after != expected
    random_state.restore_rng(checkpoint.read_checkpoint(path)["rng"][0])
    assert draws() == expected
    assert draws() == after  # what happens in `preserved_rng` leaves no trace


# ---- damage ------------------------------------------------------------------------------------------


def flip_a_bit(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no checkpoint", None],
    ids=["bit flipped", "truncated", "empty", "text", "deleted"],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    damage: Callable[[bytes], bytes] | None, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    if damage is None:
        (bad / file).unlink()
    else:
        (bad / file).write_bytes(damage((bad / file).read_bytes()))
    # A manifest with a changed sum is valid in itself: the file that it then disagrees with is named.
    named = "|".join(FILES) if file == checkpoint.MANIFEST else file
    with pytest.raises(UnreadableCheckpointError, match=named):
        checkpoint.read_checkpoint(bad)
    with pytest.raises(UsageError, match=r"step-00000002 cannot be read"):
        checkpoint.find_checkpoint(bad)
    assert newest_step(tmp_path, own=True) == 1
    assert "step-00000002 cannot be read" in caplog.text
    # It no longer counts among the newest, so that pruning cannot leave it as the only one.
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000002.damaged", "step-00000003"]


def test_every_bit_of_the_manifest_and_an_extra_file_are_noticed(tmp_path: Path) -> None:
    """The manifest has no sum of its own: a change must show in what it says."""
    path = save(tmp_path, 1)
    manifest = path / checkpoint.MANIFEST
    good = manifest.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        with pytest.raises(UnreadableCheckpointError):
            checkpoint.read_checkpoint(path)
    manifest.write_bytes(good)
    (path / "shard-00002.safetensors").write_bytes(b"")
    with pytest.raises(UnreadableCheckpointError, match=r"shard-00002.* is not in manifest\.sha256"):
        checkpoint.read_checkpoint(path)


def test_nothing_readable_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path) is None
    (save(tmp_path, 1) / SHARD).write_bytes(b"")
    with pytest.raises(RunError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest_checkpoint(tmp_path)


def test_reading_changes_nothing_and_the_trainer_cleans_up(tmp_path: Path) -> None:
    """With an unfinished save and a damaged checkpoint."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    (save(folder, 2) / SHARD).write_bytes(b"")
    half = unfinished(folder / "step-00000003")
    half.mkdir()
    (half / SHARD).write_bytes(b"half")
    (folder / f".config.json.4711{files.UNFINISHED}").write_bytes(b"half")
    before = contents(tmp_path)
    for where in (tmp_path, folder):
        assert checkpoint.find_checkpoint(where)[1]["step"] == 1
    assert contents(tmp_path) == before
    assert newest_step(folder, own=True) == 1
    assert names(folder) == ["step-00000001", "step-00000002.damaged"]


def test_a_disk_that_does_not_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is renamed: the checkpoint may be good."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = contents(tmp_path)
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == SHARD:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return opened(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(RunError, match=rf"cannot read .*step-00000002/{SHARD}: Input/output error"):
            checkpoint.newest_checkpoint(tmp_path, own=True)
    assert contents(tmp_path) == before
    assert newest_step(tmp_path) == 2


def sign(path: Path) -> None:
    """Write a manifest that fits the files, whatever they hold."""
    sums = [(checkpoint.sha256_of(f), f.name) for f in path.iterdir() if f.name != checkpoint.MANIFEST]
    (path / checkpoint.MANIFEST).write_text("".join(f"{digest}  {name}\n" for digest, name in sums))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 99}, UsageError, r"was written by a newer version \(format 99, not 2\); update"),
        ({"version": None}, UnreadableCheckpointError, "not that of a checkpoint of lejepa_fast"),
        ({"format": "other"}, UnreadableCheckpointError, "not that of a checkpoint of lejepa_fast"),
    ],
)
def test_foreign_states_are_named(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path, 1)
    (path / checkpoint.STATE).write_text(json.dumps({**checkpoint.read_checkpoint(path), **change}))
    sign(path)
    with pytest.raises(error, match=message):
        checkpoint.read_checkpoint(path)
    assert path.exists()


class _Intruder:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.sentinel),))


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    """In place of any file, with sums that fit, and as the index that DCP would unpickle."""
    sentinel = tmp_path / "it-ran"
    armed = pickle.dumps(_Intruder(sentinel))
    path = save(tmp_path / "run", 1)
    (path / checkpoint.STATE).write_bytes(armed)
    sign(path)
    with pytest.raises(UnreadableCheckpointError, match="not JSON"):
        checkpoint.read_checkpoint(path)
    path = save(tmp_path / "run", 1)
    (path / SHARD).write_bytes(armed)
    sign(path)
    with pytest.raises(UsageError, match="not safetensors"):
        checkpoint.load_model(path)
    path = save(tmp_path / "run", 1)
    (path / ".metadata").write_bytes(armed)
    sign(path)
    checkpoint.read_checkpoint(path)
    assert len(checkpoint.load_model(path)["weight"]) == 50_000
    assert not sentinel.exists()
    pickle.loads(armed)
    assert sentinel.exists()  # the trap itself works


def test_a_run_folder_or_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    for where in (tmp_path, tmp_path / "checkpoints", newest, str(newest)):
        assert checkpoint.find_checkpoint(where)[0] == newest
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "holds no checkpoint"), ("none", "does not exist")):
        with pytest.raises(UsageError, match=message):
            checkpoint.find_checkpoint(tmp_path / name)


def test_another_model_is_named() -> None:
    def configured(**model: Any) -> dict[str, Any]:
        options = {"name": "resnet18", "img_size": None, "drop_path": 0.0, "projector_dim": 64, **model}
        return {"model": options, "crops": {"global_size": 48}}

    path = Path("step-00000001")
    same_weights = configured(img_size=48, drop_path=0.2)
    checkpoint.check_same_model(configured(), same_weights, path)
    with pytest.raises(UsageError, match="is of model resnet18, and this run is of resnet50"):
        checkpoint.check_same_model(configured(), configured(name="resnet50"), path)
    with pytest.raises(UsageError, match=r"resnet18 \(projector_dim 64\).*resnet18 \(projector_dim 32\)"):
        checkpoint.check_same_model(configured(), configured(projector_dim=32), path)


# ---- full disks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to write larger files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fails_at", ["the kernel", "fsync", "state.json", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if fails_at == "the kernel":
            stack.enter_context(file_size_limit(100_000))
        elif fails_at == "state.json":
            patch.setattr(saving, "write_synced", refuse)
        else:
            patch.setattr(os, fails_at, refuse)
        with pytest.raises(RunError, match=r"cannot write .*step-00000002: .*free some space") as refusal:
            save(tmp_path, 2)
    assert "\n" not in str(refusal.value)
    assert names(tmp_path) == ["step-00000001"]
    assert newest_step(tmp_path) == 1
    save(tmp_path, 2)  # with space again, it goes through
    assert newest_step(tmp_path) == 2
