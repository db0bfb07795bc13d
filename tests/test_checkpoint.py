"""Checkpoints: whole or not at all, checked before use, code in them never runs, full disks."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import random
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import checkpoint, files
from lejepa_fast.train.checkpoint import UnreadableCheckpointError


def some_state(value: float = 0.0) -> dict[str, Any]:
    weights = torch.full((50_000,), value)  # 200 kB: larger than any buffer on the way to the disk
    return {
        "model": {"weight": weights},
        "rng": [checkpoint.capture_rng()],
        "config": {"out": None, "lr": 0.1},
    }


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save_checkpoint(folder, step, some_state(step), keep=keep)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path.name == "step-00000007.pt"
    state = checkpoint.read_checkpoint(path)
    assert (state["step"], state["config"]) == (7, {"out": None, "lr": 0.1})
    assert torch.equal(state["model"]["weight"], torch.full((50_000,), 7.0))


def test_the_last_k_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1000):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000100.pt", "step-00001000.pt"]


def test_random_states_come_back() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    np.random.standard_normal()  # noqa: NPY002 - leaves numpy with a spare Gaussian, which is state as well
    state = checkpoint.capture_rng()
    expected = draws()
    assert draws() != expected
    checkpoint.restore_rng(state)
    assert draws() == expected
    with checkpoint.preserved_rng():
        inside = draws()
    assert draws() == inside


def test_random_states_survive_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    expected = (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002
    checkpoint.restore_rng(checkpoint.read_checkpoint(path)["rng"][0])
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected  # noqa: NPY002


def flip_a_byte_of_the_weights(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_text(path: Path) -> None:
    path.write_text("no checkpoint")


DAMAGES = [flip_a_byte_of_the_weights, cut_off, empty, replace_by_text]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_the_one_before_is_taken(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lejepa_fast"), "propagate", True)  # the command switches it off
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    damage(bad)
    with pytest.raises(UnreadableCheckpointError):
        checkpoint.read_checkpoint(bad)
    with pytest.raises(UsageError, match=r"step-00000002\.pt cannot be read"):
        checkpoint.find_checkpoint(bad)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest_checkpoint(tmp_path, own=True)
    assert found is not None
    assert found[1]["step"] == 1
    assert "step-00000002.pt cannot be read" in caplog.text
    # It no longer counts among the newest, so that pruning cannot leave it as the only one.
    save(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".pt"] == ["step-00000003.pt"]
    assert (tmp_path / "step-00000002.pt.damaged").exists()


def test_nothing_readable_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path) is None
    cut_off(save(tmp_path, 1))
    with pytest.raises(RunError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest_checkpoint(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_reading_changes_nothing(tmp_path: Path) -> None:
    """As the evaluation of a live run reads it: its trainer's unfinished file, and a damaged one, stay."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    cut_off(save(folder, 2))
    (folder / f".step-00000003.pt.4711{files.UNFINISHED}").write_bytes(b"half")
    before = contents(folder)
    assert checkpoint.find_checkpoint(tmp_path)[1]["step"] == 1
    assert checkpoint.newest_checkpoint(folder)[1]["step"] == 1  # type: ignore[index]
    assert contents(folder) == before
    assert checkpoint.newest_checkpoint(folder, own=True)[1]["step"] == 1  # type: ignore[index]
    assert sorted(contents(folder)) == ["step-00000001.pt", "step-00000002.pt.damaged"]


@pytest.mark.parametrize("after", [0, 3, 5])
def test_a_disk_that_does_not_read_is_no_damage(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first read and at later ones, in the sums and in torch.load: nothing is renamed."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = contents(tmp_path)
    reads = 0
    readinto = checkpoint._RememberingReader.readinto

    def refuse(self: Any, buffer: Any) -> int | None:
        nonlocal reads
        reads += 1
        if reads > after:
            self.error = OSError(errno.EIO, os.strerror(errno.EIO))
            raise self.error
        return readinto(self, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._RememberingReader, "readinto", refuse)
        with pytest.raises(RunError, match=r"cannot read .*step-00000002\.pt: Input/output error"):
            checkpoint.newest_checkpoint(tmp_path, own=True)
    assert contents(tmp_path) == before
    assert checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 2  # type: ignore[index]


def test_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newer = tmp_path / "step-00000002.pt"
    torch.save({"format": checkpoint.FORMAT, "version": 99, "step": 2}, newer)
    with pytest.raises(UsageError, match=r"step-00000002\.pt was written by a newer version"):
        checkpoint.newest_checkpoint(tmp_path, own=True)
    assert newer.exists()


def test_a_file_without_a_version_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"format": checkpoint.FORMAT}, path)
    with pytest.raises(UnreadableCheckpointError, match="format version, got None"):
        checkpoint.read_checkpoint(path)


class _Intruder:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.sentinel),))


def test_code_in_a_checkpoint_never_runs(tmp_path: Path) -> None:
    sentinel, path = tmp_path / "it-ran", tmp_path / "step-00000001.pt"
    torch.save({"format": checkpoint.FORMAT, "version": 1, "model": _Intruder(sentinel)}, path)
    with pytest.raises(UnreadableCheckpointError):
        checkpoint.read_checkpoint(path)
    path.write_bytes(pickle.dumps(_Intruder(sentinel)))
    with pytest.raises(UnreadableCheckpointError):
        checkpoint.read_checkpoint(path)
    assert not sentinel.exists()
    torch.load(tmp_path / _armed(sentinel, tmp_path), weights_only=False)
    assert sentinel.exists()  # the trap itself works


def _armed(sentinel: Path, folder: Path) -> str:
    torch.save(_Intruder(sentinel), folder / "armed.pt")
    return "armed.pt"


def test_foreign_and_newer_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UnreadableCheckpointError, match=r"not a checkpoint of lejepa_fast"):
        checkpoint.read_checkpoint(path)
    torch.save({"format": checkpoint.FORMAT, "version": 99}, path)
    with pytest.raises(UsageError, match=r"format 99.*update lejepa_fast"):
        checkpoint.read_checkpoint(path)


def test_a_run_folder_or_a_file_can_be_named(tmp_path: Path) -> None:
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

    path = Path("step-00000001.pt")
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
    with pytest.raises(RunError, match=r"cannot write .*step-00000002\.pt: .*free some space") as refusal:
        save(folder, 2)
    assert "\n" not in str(refusal.value)
    assert [p.name for p in folder.iterdir() if p.name != "ballast"] == ["step-00000001.pt"]
    found = checkpoint.newest_checkpoint(folder)
    assert found is not None
    assert found[1]["step"] == 1


@pytest.mark.parametrize("fails_at", ["write", "fsync"])
def test_full_disk(fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def refuse(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if fails_at == "write":
            written = []
            original = files._RememberingFile.write

            def write_a_little(self: Any, data: bytes) -> int:
                written.append(len(data))
                if sum(written) > 100_000:
                    self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    raise self.error
                return original(self, data)

            patch.setattr(files._RememberingFile, "write", write_a_little)
        else:
            patch.setattr(os, "fsync", refuse)
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
        half_of_one = (folder / "step-00000001.pt").stat().st_size // 2
        (folder / "ballast").write_bytes(bytes(space.f_bavail * space.f_bsize - half_of_one))
        check_a_refused_save(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / f".step-00000002.pt.4711{files.UNFINISHED}"
    half.write_bytes(b"half")
    assert checkpoint.newest_checkpoint(tmp_path, own=True)[1]["step"] == 1  # type: ignore[index]
    assert not half.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"cannot make the folder .*file/run: Not a directory; choose another --out"
    ):
        files.make_folder(tmp_path / "file" / "run")
