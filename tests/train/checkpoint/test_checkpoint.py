"""Checkpoints: whole or not at all, checked before use, no code runs from them, full disks, kills."""

import contextlib
import errno
import json
import os
import pickle
import random
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import saving_worker
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from training import CPU, file_size_limit, forkserver, rows_of, train_only, wait_until

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.checkpoint import resume, saving
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.checkpoint.saving import Saver, unfinished
from lejepa_fast.train.checkpoint.storage import UnreadableCheckpointError
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime import files
from lejepa_fast.train.runtime.world import World

SHARD = "shard-00001.safetensors"
FILES = [SHARD, checkpoint.STATE, checkpoint.MANIFEST]


def save(folder, step, keep=3, **tensors):
    saver = Saver(folder, CPU, keep=keep)
    tensors = tensors or {"model.weight": torch.full((50_000,), float(step)), "loss.step": torch.tensor(step)}
    saver.start(step, tensors, {"rng": [random_state.capture_rng()], "config": {"out": None, "lr": 0.1}})
    saver.wait()
    return checkpoint.checkpoint_path(folder, step)


def newest_step(folder, *, own=False):
    found = checkpoint.newest_checkpoint(folder, own=own)
    assert found is not None
    return found[1]["step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- saving ------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
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


def test_the_last_k_are_kept_and_a_save_of_the_same_step_replaces(tmp_path):
    for step in (5, 20, 100, 1000):
        path = save(tmp_path, step, keep=2)
    unfinished(path).mkdir()
    (unfinished(path) / "shard-00002.safetensors").write_bytes(b"half, by a second rank")
    save(tmp_path, 1000, keep=2, **{"model.weight": torch.zeros(3)})
    assert torch.equal(checkpoint.load_model(path)["weight"], torch.zeros(3))
    assert names(path) == sorted(FILES)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]


@pytest.mark.parametrize("rank", range(4))
def test_each_shard_is_written_once(rank, tmp_path, monkeypatch):
    """Two replicas of two shards: the first replica writes, rank 0 also the plain tensors; the copy makes no
    process groups, each of which would be a communicator between GPUs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    written: dict[str, Any] = {}

    def write_shard(path, tensors, offsets):
        written.update({name: (tensor.tolist(), offsets[name]) for name, tensor in tensors.items()})
        path.parent.mkdir(exist_ok=True)  # rank 0 has made it
        path.touch()

    monkeypatch.setattr(saving, "write_shard", write_shard)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2))
        values = torch.arange(6.0) + 6 * (rank % 2)
        sharded = DTensor.from_local(values, mesh, [Replicate(), Shard(0)], run_check=False)
        monkeypatch.setattr(dist, "new_group", lambda **options: None)
        monkeypatch.setattr(dist, "is_initialized", lambda: False)  # the thread does not communicate
        saver = Saver(tmp_path, World(CPU.device, rank, 4), keep=1)
        groups = len(dist.distributed_c10d._world.pg_map)
        saver.start(1, {"sharded": sharded, "plain": torch.ones(2)}, {})
        assert len(dist.distributed_c10d._world.pg_map) == groups
        saver.wait()
        staged = {name: copy.numel() for name, copy in saver._memory.items()}
        assert staged == {name: len(values) for name, (values, _) in written.items()}  # pinned on a GPU
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()
    mine = {"sharded": (values.tolist(), (6 * rank,))} if rank < 2 else {}
    assert written == (mine | {"plain": ([1.0, 1.0], (0,))} if rank == 0 else mine)


def test_random_states_survive_the_file(tmp_path):
    def draws():
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


def flip_a_bit(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path, data: path.write_bytes(flip_a_bit(data)),
        lambda path, data: path.write_bytes(data[: len(data) // 2]),
        lambda path, data: path.write_bytes(b""),
        lambda path, data: path.write_bytes(b"no checkpoint"),
        lambda path, data: None,
        lambda path, data: os.mkfifo(path),
        lambda path, data: path.symlink_to("/dev/zero"),
    ],
    ids=["bit flipped", "truncated", "empty", "text", "deleted", "a pipe", "a device"],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(damage, file, tmp_path, caplog):
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    data = (bad / file).read_bytes()
    (bad / file).unlink()
    damage(bad / file, data)
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


def test_every_bit_of_the_manifest_and_an_extra_file_are_noticed(tmp_path):
    """The manifest has no sum of its own: a change must show in what it says."""
    path = save(tmp_path, 1, **{"model.weight": torch.zeros(3)})
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


def test_reading_changes_nothing_and_the_trainer_cleans_up(tmp_path):
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
    # Where nothing can be read, the run does not start anew.
    (folder / "step-00000001" / SHARD).write_bytes(b"")
    with pytest.raises(RunError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest_checkpoint(folder)


def test_a_disk_that_does_not_read_is_no_damage(tmp_path, monkeypatch):
    """Nothing is renamed: the checkpoint may be good."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = contents(tmp_path)

    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256_of", refuse)
        with pytest.raises(RunError, match=r"cannot read .*step-00000002/.*: Input/output error"):
            checkpoint.newest_checkpoint(tmp_path, own=True)
    assert contents(tmp_path) == before
    assert newest_step(tmp_path) == 2


def sign(path):
    """Write a manifest that fits the files, whatever they hold."""
    sums = [(checkpoint.sha256_of(f), f.name) for f in path.iterdir() if f.name != checkpoint.MANIFEST]
    (path / checkpoint.MANIFEST).write_text("".join(f"{digest}  {name}\n" for digest, name in sums))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 99}, UsageError, r"was written by a newer version \(format 99, not 3\); update"),
        ({"version": None}, UnreadableCheckpointError, "not that of a checkpoint of lejepa_fast"),
        ({"format": "other"}, UnreadableCheckpointError, "not that of a checkpoint of lejepa_fast"),
    ],
)
def test_foreign_states_are_named(change, error, message, tmp_path):
    path = save(tmp_path, 1)
    (path / checkpoint.STATE).write_text(json.dumps({**checkpoint.read_checkpoint(path), **change}))
    sign(path)
    with pytest.raises(error, match=message):
        checkpoint.read_checkpoint(path)
    assert path.exists()


class _Intruder:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (os.mkdir, (str(self.sentinel),))


def test_code_in_a_checkpoint_never_runs(tmp_path):
    """In place of any file, with sums that fit, and as the index that DCP would unpickle."""
    sentinel = tmp_path / "it-ran"
    armed = pickle.dumps(_Intruder(sentinel))

    def checkpoint_with(name):
        path = save(tmp_path / "run", 1)
        (path / name).write_bytes(armed)
        sign(path)
        return path

    with pytest.raises(UnreadableCheckpointError, match="not JSON"):
        checkpoint.read_checkpoint(checkpoint_with(checkpoint.STATE))
    with pytest.raises(UsageError, match="not safetensors"):
        checkpoint.load_model(checkpoint_with(SHARD))
    path = checkpoint_with(".metadata")
    checkpoint.read_checkpoint(path)
    assert len(checkpoint.load_model(path)["weight"]) == 50_000
    assert not sentinel.exists()
    pickle.loads(armed)
    assert sentinel.exists()  # the trap itself works


def test_a_run_folder_or_a_checkpoint_can_be_named(tmp_path):
    newest = save(tmp_path / "checkpoints", 2)
    for where in (tmp_path, tmp_path / "checkpoints", newest, str(newest)):
        assert checkpoint.find_checkpoint(where)[0] == newest
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "holds no checkpoint"), ("none", "does not exist")):
        with pytest.raises(UsageError, match=message):
            checkpoint.find_checkpoint(tmp_path / name)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    path = save(tmp_path, 1, **{"model.weight": torch.ones(4, 3)})
    for wanted, problem in (
        ({"model.weight": torch.empty(4, 4)}, r"Size mismatch .*\[4, 3\]\) and current: .*\[4, 4\]"),
        ({"model.bias": torch.empty(4)}, "Missing key in checkpoint state_dict: model.bias"),
    ):
        with pytest.raises(UsageError, match=f"checkpoint {path} does not fit this run: {problem}"):
            checkpoint.load_tensors(path, wanted)


def test_a_checkpoint_that_a_rank_cannot_load_is_no_misfit(tmp_path, monkeypatch):
    path, into = save(tmp_path, 1, **{"model.weight": torch.ones(4, 3)}), {"model.weight": torch.empty(4, 3)}

    def fails(failure):
        monkeypatch.setattr(checkpoint.HuggingFaceStorageReader, "read_data", Mock(side_effect=failure))

    fails(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(
        RunError, match=rf"load checkpoint {path}: \[Errno 5\] .* error; run the same command"
    ):
        checkpoint.load_tensors(path, into)
    for no_memory in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")):
        fails(no_memory)
        with pytest.raises(RuntimeError) as caught:  # the trainer says what helps
            checkpoint.load_tensors(path, into)
        assert caught.value is no_memory


def test_a_rank_that_is_lost_while_loading_is_no_misfit(tmp_path, monkeypatch):
    """Its error is left to `lost_rank_is_a_run_error`."""
    lost = RuntimeError("Connection closed by peer")
    monkeypatch.setattr(checkpoint.dcp, "load", Mock(side_effect=lost))
    with pytest.raises(RuntimeError) as caught:
        checkpoint.load_tensors(save(tmp_path, 1), {})
    assert caught.value is lost


def test_another_projector_is_named():
    def check(channels=3, **changes):
        model = {"name": "resnet18", "img_size": None, "drop_path": 0.0, "projector_dim": 64}
        model["kwargs"] = '{"a": 1, "b": [2]}'
        shared = {"crops": {"global_size": 48}, "data": {}}
        saved, current = ({**shared, "model": m} for m in (model, model | changes))
        current["data"] = {"channels": channels}
        resume.check_same_model(saved, current, Path("step-00000001"))

    check(img_size=48, drop_path=0.2)  # the same weights
    check(kwargs='{"b":[2], "a":1}')
    with pytest.raises(UsageError, match=r"resnet18 \(projector_dim 64\).*resnet18 \(projector_dim 32\)"):
        check(projector_dim=32)
    with pytest.raises(UsageError, match=r"resnet18 \(data.channels 3\).*resnet18 \(data.channels 5\)"):
        check(channels=5)


# ---- full disks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", ["the kernel", "fsync", "state.json", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before(fails_at, tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(*args):
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


# ---- under fire --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    """One in each twentieth of a save, from its start to its publication; every start finds the newest step,
    whole. In every second round one rank is killed before the other, rank 0 and rank 1 in turn."""
    context, folder = forkserver(), tmp_path / "checkpoints"
    moments = random.Random(0)
    newest = 0
    killed: list[int] = []  # files of each save that did not get its name

    def saved():
        """The checkpoints of the processes that run now."""
        return [path for path in checkpoint.list_checkpoints(folder) if path.name > f"step-{newest:08d}"]

    for attempt in range(20):
        processes = [
            context.Process(
                target=saving_worker.save_without_end, args=(rank, str(tmp_path), attempt, newest + 1)
            )
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        try:
            wait_until(lambda: len(saved()) > 1, alive=lambda both=processes: all(p.is_alive() for p in both))
            first, second = (path.stat().st_mtime for path in saved()[-2:])
            time.sleep((second - first) * moments.uniform(attempt, attempt + 1) / 20)
            for process in processes if attempt % 4 == 3 else reversed(processes):
                process.kill()
                time.sleep(0.2 * (attempt % 2))
        finally:
            for process in processes:
                process.kill()
                process.join()
        killed += [len(list(left.iterdir())) for left in folder.glob(f".step-????????{files.UNFINISHED}")]
        there = saved()[-1]
        newest = newest_step(folder, own=True)
        assert there == checkpoint.checkpoint_path(folder, newest)  # none was passed over
        weight = checkpoint.load_model(there)["weight"]
        assert torch.equal(weight, torch.full(saving_worker.SHAPE, float(newest)))
        assert not list(folder.glob(".*"))
    assert not list(folder.glob("*.damaged"))
    assert sum(files > 0 for files in killed) >= 3, killed  # tensors were written or being written


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(tiny, monkeypatch):
    """And not when the next checkpoint is due, 100 steps later."""
    write = saving.write_synced

    def full(path, data):
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(saving, "write_synced", full)
    cfg = tiny(max_steps=200, checkpoint_every=2)
    trainer = Trainer(cfg, CPU)
    start = trainer.saver.start

    def start_and_let_it_fail(*args):
        start(*args)
        trainer.cfg = replace(trainer.cfg, checkpoint_every=100)
        wait_until(lambda: trainer.saver.failed, alive=lambda: True)

    monkeypatch.setattr(trainer.saver, "start", start_and_let_it_fail)
    with pytest.raises(RunError, match=r"cannot write .*step-00000002: No space left"):
        trainer.run()
    assert rows_of(cfg)[-1]["step"] == 3
    assert list((trainer.run_dir / "checkpoints").iterdir()) == []


def test_a_second_trainer_in_the_folder_is_refused(tiny):
    cfg = tiny(max_steps=2)
    cfg.out.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from lejepa_fast.train.runtime.files import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); lock.take(); print('taken', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(cfg.out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(UsageError, match=rf"another trainer \(process {other.pid} on .*another --out"):
            train_only(cfg)
        assert not (cfg.out / "metrics.jsonl").exists()
    finally:
        other.kill()
        other.wait()
    train_only(cfg)  # the lock died with its holder
