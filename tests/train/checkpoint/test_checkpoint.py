"""Checkpoints: whole or not at all, checked before use, code in them never runs, full disks."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pickle
import random
import resource
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.checkpoint.saving import Saver, unfinished
from lejepa_fast.train.checkpoint.storage import UnreadableCheckpointError
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.runtime import files
from lejepa_fast.train.runtime.world import World

WORLD = World(torch.device("cpu"))
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def save(folder: Path, step: int, keep: int = 3) -> Path:
    saver = Saver(folder, WORLD, keep=keep)
    tensors = {"model.weight": torch.full((50_000,), float(step)), "loss.step": torch.tensor(step)}
    state = {"rng": [random_state.capture_rng()], "config": {"out": None, "lr": 0.1}}
    saver.start(step, tensors, state)
    saver.wait()
    return checkpoint.checkpoint_path(folder, step)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path.name == "step-00000007"
    state = checkpoint.read_checkpoint(path)
    assert (state["step"], state["config"]) == (7, {"out": None, "lr": 0.1})
    assert torch.equal(checkpoint.load_model(path)["weight"], torch.full((50_000,), 7.0))
    saved = checkpoint.saved_tensors(path)
    assert {name: (tuple(t.shape), t.dtype) for name, t in saved.items()} == {
        "model.weight": ((50_000,), torch.float32),
        "loss.step": ((), torch.int64),
    }


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_tensors_are_as_readable_as_the_rest(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert modes == dict.fromkeys([SHARD, checkpoint.STATE, checkpoint.MANIFEST], 0o666 & ~umask)


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    """What changes after `start` is not in the checkpoint."""
    saver = Saver(tmp_path, WORLD, keep=3)
    weight = torch.ones(50_000)
    saver.start(1, {"model.weight": weight}, {})
    weight.zero_()
    saver.wait()
    assert torch.equal(checkpoint.load_model(tmp_path / "step-00000001")["weight"], torch.ones(50_000))


def test_no_file_is_made_under_the_interpreters_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bytes in memory it would be, and meanwhile the training could not go on."""

    def refuse(*arguments: Any, **options: Any) -> bytes:
        raise AssertionError("serialised to bytes")

    monkeypatch.setattr("safetensors.torch.save", refuse)
    assert checkpoint.read_checkpoint(save(tmp_path, 1))["step"] == 1


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    check = subprocess.run(["sha256sum", "-c", checkpoint.MANIFEST], cwd=path, capture_output=True, text=True)
    assert check.returncode == 0
    assert sorted(check.stdout.split()) == sorted(["OK", "OK", f"{SHARD}:", "state.json:"])


def test_a_save_of_the_same_step_replaces_and_takes_nothing_from_a_killed_one(tmp_path: Path) -> None:
    """Also where more ranks had begun it: their files are not of the new one."""
    path = save(tmp_path, 1)
    left = unfinished(path)
    left.mkdir()
    (left / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"half")
    saver = Saver(tmp_path, WORLD, keep=3)
    saver.start(1, {"model.weight": torch.zeros(3)}, {})
    saver.wait()
    assert checkpoint.read_checkpoint(path)["step"] == 1
    assert torch.equal(checkpoint.load_model(path)["weight"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_the_last_k_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1000):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]


def test_random_states_come_back() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    np.random.standard_normal()  # noqa: NPY002 - leaves numpy with a spare Gaussian, which is state as well
    state = random_state.capture_rng()
    expected = draws()
    assert draws() != expected
    random_state.restore_rng(state)
    assert draws() == expected
    with random_state.preserved_rng():
        inside = draws()
    assert draws() == inside


def test_random_states_survive_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    expected = (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002
    random_state.restore_rng(checkpoint.read_checkpoint(path)["rng"][0])
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected  # noqa: NPY002


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def replace_by_text(file: Path) -> None:
    file.write_text("no checkpoint")


def delete(file: Path) -> None:
    file.unlink()


DAMAGES = [flip_a_bit, cut_off, empty, replace_by_text, delete]


@pytest.mark.parametrize("file", [SHARD, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    damage: Any, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    damage(bad / file)
    # A manifest that lost lines or a digit is whole in itself: the file that it then disagrees with is named.
    named = "|".join([SHARD, checkpoint.STATE, checkpoint.MANIFEST]) if file == checkpoint.MANIFEST else file
    with pytest.raises(UnreadableCheckpointError, match=named):
        checkpoint.read_checkpoint(bad)
    with pytest.raises(UsageError, match=r"step-00000002 cannot be read"):
        checkpoint.find_checkpoint(bad)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest_checkpoint(tmp_path, own=True)
    assert found is not None
    assert found[1]["step"] == 1
    assert "step-00000002 cannot be read" in caplog.text
    # It no longer counts among the newest, so that pruning cannot leave it as the only one.
    save(tmp_path, 3, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002.damaged", "step-00000003"]


def test_every_single_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    """Its own bits have no sum: a change must show in what it says."""
    path = save(tmp_path, 1)
    manifest = path / checkpoint.MANIFEST
    good = manifest.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(data)
        with pytest.raises(UnreadableCheckpointError):
            checkpoint.read_checkpoint(path)


def test_a_file_too_many_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(UnreadableCheckpointError, match=r"shard-00002.* is not of this checkpoint"):
        checkpoint.read_checkpoint(path)


def test_nothing_readable_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path) is None
    cut_off(save(tmp_path, 1) / SHARD)
    with pytest.raises(RunError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest_checkpoint(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_reading_changes_nothing(tmp_path: Path) -> None:
    """As the evaluation of a live run reads it: its trainer's unfinished file, and a damaged one, stay."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    cut_off(save(folder, 2) / SHARD)
    unfinished(folder / "step-00000003").mkdir()
    (unfinished(folder / "step-00000003") / SHARD).write_bytes(b"half")
    before = contents(folder)
    assert checkpoint.find_checkpoint(tmp_path)[1]["step"] == 1
    assert checkpoint.newest_checkpoint(folder)[1]["step"] == 1  # type: ignore[index]
    assert contents(folder) == before
    assert checkpoint.newest_checkpoint(folder, own=True)[1]["step"] == 1  # type: ignore[index]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000002.damaged"]


@pytest.mark.parametrize("file", [SHARD, checkpoint.STATE, checkpoint.MANIFEST])
def test_a_disk_that_does_not_read_is_no_damage(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is renamed: the checkpoint may be good."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = contents(tmp_path)
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return opened(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(RunError, match=rf"cannot read .*step-00000002/{file}: Input/output error"):
            checkpoint.newest_checkpoint(tmp_path, own=True)
    assert contents(tmp_path) == before
    assert checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 2  # type: ignore[index]


def with_state(path: Path, **changes: Any) -> Path:
    """The checkpoint with another state.json, and sums that fit."""
    state = {**checkpoint.read_checkpoint(path), **changes}
    (path / checkpoint.STATE).write_text(json.dumps(state))
    sign(path)
    return path


def sign(path: Path) -> None:
    sums = [(checkpoint.sha256_of(f), f.name) for f in path.iterdir() if f.name != checkpoint.MANIFEST]
    (path / checkpoint.MANIFEST).write_text("".join(f"{digest}  {name}\n" for digest, name in sums))


def test_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newer = with_state(save(tmp_path, 2), version=99)
    with pytest.raises(UsageError, match=r"step-00000002 was written by a newer version \(format 99.*update"):
        checkpoint.newest_checkpoint(tmp_path, own=True)
    assert newer.exists()


def test_foreign_states_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableCheckpointError, match="format version, got None"):
        checkpoint.read_checkpoint(with_state(save(tmp_path, 1), version=None))
    with pytest.raises(UnreadableCheckpointError, match="not a checkpoint of lejepa_fast"):
        checkpoint.read_checkpoint(with_state(save(tmp_path, 1), format="other"))


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
    with pytest.raises(UnreadableCheckpointError, match="no JSON"):
        checkpoint.read_checkpoint(path)
    path = save(tmp_path / "run", 1)
    (path / SHARD).write_bytes(armed)
    sign(path)
    with pytest.raises(UsageError, match="no safetensors"):
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
    with pytest.raises(UsageError, match="holds no checkpoint"):
        checkpoint.find_checkpoint(tmp_path / "empty")
    with pytest.raises(UsageError, match="does not exist"):
        checkpoint.find_checkpoint(tmp_path / "none")


def test_another_model_is_named() -> None:
    def configured(**model: Any) -> dict[str, Any]:
        options = {"name": "resnet18", "img_size": None, "drop_path": 0.0, "projector_dim": 64, **model}
        return {"model": options, "crops": {"global_size": 48}}

    path = Path("step-00000001")
    checkpoint.check_same_model(
        configured(), configured(img_size=48, drop_path=0.2), path
    )  # the same weights
    with pytest.raises(UsageError, match="is of model resnet18, and this run is of resnet50"):
        checkpoint.check_same_model(configured(), configured(name="resnet50"), path)
    with pytest.raises(UsageError, match=r"resnet18 \(projector_dim 64\).*resnet18 \(projector_dim 32\)"):
        checkpoint.check_same_model(configured(), configured(projector_dim=32), path)


# ---- full disks --------------------------------------------------------------------------------------


def check_a_refused_save(folder: Path) -> None:
    """With a checkpoint of step 1 in place and a disk that refuses: what must hold for step 2."""
    with pytest.raises(RunError, match=r"cannot write .*step-00000002: .*free some space") as refusal:
        save(folder, 2)
    assert "\n" not in str(refusal.value)
    assert [p.name for p in folder.iterdir() if p.name != "ballast"] == ["step-00000001"]
    found = checkpoint.newest_checkpoint(folder)
    assert found is not None
    assert found[1]["step"] == 1


@pytest.mark.parametrize("fails_at", ["fsync", "replace", "rename"])
def test_full_disk(fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if fails_at == "replace":
            patch.setattr("lejepa_fast.train.checkpoint.saving._write_synced", refuse)
        else:
            patch.setattr(os, fails_at, refuse)
        check_a_refused_save(tmp_path)
    save(tmp_path, 2)  # with space again, it goes through
    assert checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 2  # type: ignore[index]


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_kernel_refuses_to_write(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with file_size_limit(100_000):
        check_a_refused_save(tmp_path)


def test_a_small_file_system(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"mounting is not permitted here: {mount.stderr.strip()}")
    try:
        save(folder, 1)
        space = os.statvfs(folder)
        half_of_one = (folder / "step-00000001" / SHARD).stat().st_size // 2
        (folder / "ballast").write_bytes(bytes(space.f_bavail * space.f_bsize - half_of_one))
        check_a_refused_save(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    half = unfinished(tmp_path / "step-00000002")
    half.mkdir()
    (half / SHARD).write_bytes(b"half")
    (tmp_path / f".config.json.4711{files.UNFINISHED}").write_bytes(b"half")
    assert checkpoint.newest_checkpoint(tmp_path, own=True)[1]["step"] == 1  # type: ignore[index]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"cannot make the folder .*file/run: Not a directory; choose another --out"
    ):
        files.make_folder(tmp_path / "file" / "run")
