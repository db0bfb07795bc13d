"""Saving under fire: processes killed in the middle, a disk that fills up in the background, two trainers."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import saving_worker
import torch
from safetensors.torch import load_file
from training import CPU, Make, arguments_of, course_of, rows_of, train_only

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import pretrain
from lejepa_fast.train.checkpoint import saving
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.files import UNFINISHED


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """One in each twentieth of a save, from its start to its publication; every start finds the newest step,
    whole. In every second round one rank is killed before the other, rank 0 and rank 1 in turn."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lejepa_fast.train.checkpoint.saving"])
    folder = tmp_path / "checkpoints"
    moments = random.Random(0)
    newest = 0
    killed: list[int] = []  # files of each save that did not get its name
    for attempt in range(20):
        arguments = (str(tmp_path), attempt, newest + 1)
        processes = [
            context.Process(target=saving_worker.save_without_end, args=(rank, *arguments), daemon=True)
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        try:
            seconds = wait_for_a_second_save(folder, newest, processes)
            time.sleep(seconds * moments.uniform(attempt, attempt + 1) / 20)
            for process in processes if attempt % 4 == 3 else reversed(processes):
                process.kill()
                time.sleep(0.2 * (attempt % 2))
        finally:
            for process in processes:
                process.kill()
                process.join()
        killed += [len(list(left.iterdir())) for left in folder.glob(f".step-????????{UNFINISHED}")]
        there = checkpoint.list_checkpoints(folder)[-1]
        found = checkpoint.newest_checkpoint(folder, own=True)
        assert found is not None
        path, state = found
        assert path == there  # none was passed over
        assert state["step"] > newest
        newest = state["step"]
        weight = checkpoint.load_model(path)["weight"]
        assert torch.equal(weight, torch.full(saving_worker.SHAPE, float(newest)))
        assert not list(folder.glob(".*"))
    assert not list(folder.glob("*.damaged"))
    # Some before anything was written, some with tensors written or being written.
    assert killed.count(0) >= 1, killed
    assert sum(files > 0 for files in killed) >= 3, killed


def wait_for_a_second_save(folder: Path, step: int, processes: list[Any]) -> float:
    """Until two checkpoints after `step` have their names; the seconds from the one to the other."""
    deadline = time.monotonic() + 60
    while True:
        paths = [path for path in checkpoint.list_checkpoints(folder) if path.name > f"step-{step:08d}"]
        if len(paths) > 1:
            first, second = (path.stat().st_mtime for path in paths[-2:])
            return second - first
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)


@pytest.mark.parametrize(("stage", "files"), [("half a shard", 1), ("all but the name", 3)])
def test_a_trainer_killed_during_a_save_goes_on_from_the_one_before(
    stage: str, files: int, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, while it trains on beside the save; then the same command again, to the end."""
    straight, cfg = (tiny(out=tmp_path / name, checkpoint_every=4) for name in ("straight", "killed"))
    assert straight.out is not None
    assert cfg.out is not None
    folder = cfg.out / "checkpoints"
    half = saving.unfinished(checkpoint.checkpoint_path(folder, 8))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lejepa_fast.train.pretrain"])
    arguments = arguments_of(cfg, tmp_path / "configs")
    process = context.Process(
        target=saving_worker.train_and_never_finish_a_save,
        args=(arguments, torch.get_num_threads(), 8, stage),
        daemon=True,
    )
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (half.is_dir() and len(list(half.iterdir())) == files and rows_of(cfg)[-1]["step"] > 8):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-00000004"]

    monkeypatch.setattr(pretrain, "pretrain", lambda cfg, world: Trainer(cfg, world).run())
    assert pretrain.main(arguments) == 0
    assert [row["step"] for row in rows_of(cfg, "run")] == [0, 4]
    train_only(straight)
    assert course_of(cfg) == course_of(straight)
    assert len({row[2] for row in course_of(cfg)}) == 12  # losses differ: the comparison means something
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{s:08d}" for s in (4, 8, 12)]
    (mine, my_state), (other, other_state) = (last_of(run) for run in (cfg.out, straight.out))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in other.items())
    assert all(my_state[name] == other_state[name] for name in ("scheduler", "loader", "rng"))


def last_of(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that the newest checkpoint of a run holds."""
    found = checkpoint.newest_checkpoint(run / "checkpoints")
    assert found is not None
    (shard,) = found[0].glob("*.safetensors")
    return load_file(shard), found[1]


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not when the next checkpoint is due, 100 steps later."""
    write = saving.write_synced

    def full(path: Path, data: bytes) -> None:
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(saving, "write_synced", full)
    cfg = tiny(max_steps=200, checkpoint_every=2)
    trainer = Trainer(cfg, CPU)
    start = trainer.saver.start

    def start_and_let_it_fail(*args: Any) -> None:
        start(*args)
        object.__setattr__(trainer, "cfg", tiny(max_steps=200, checkpoint_every=100))
        deadline = time.monotonic() + 30
        while not trainer.saver.failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(trainer.saver, "start", start_and_let_it_fail)
    with pytest.raises(RunError, match=r"cannot write .*step-00000002: No space left"):
        trainer.run()
    assert rows_of(cfg)[-1]["step"] == 3
    assert list((trainer.run_dir / "checkpoints").iterdir()) == []


def test_a_second_trainer_in_the_folder_is_refused(tiny: Make) -> None:
    cfg = tiny(max_steps=2)
    assert cfg.out is not None
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
