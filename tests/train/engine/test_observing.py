"""Watching a run: no step waits for the device; time left, flops, profile."""

from __future__ import annotations

import contextlib
import gzip
import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import CPU, Make, rows_of, train_only

from lejepa_fast.train.engine.metrics import Metrics, peak_memory_gib
from lejepa_fast.train.engine.profiling import ACTIVE, SKIPPED, WARM_UP
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model import flops
from lejepa_fast.train.runtime.world import setup_world


class Reads(TorchDispatchMode):
    """The functions on the stack at each read of a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: list[set[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.stacks.append({frame.name for frame in traceback.extract_stack()})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("planted", [False, True])
def test_a_step_reads_no_value_on_the_host(
    planted: bool, tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the guard's flags, which are on the host already, and SIGReg's knots on a CPU (`_fits`)."""
    with Trainer(tiny(log_every=10, average={"kind": "ema"}), CPU) as trainer:
        views = next(iter(trainer.loader))[0]
        trainer.train_step(views, epoch=0)
        if planted:
            monkeypatch.setattr(trainer.guard, "before_forward", lambda step: torch.ones(()).item())
        with Reads() as reads:
            trainer.train_step(views, epoch=0)
        assert len([stack for stack in reads.stacks if "_fits" not in stack]) == planted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch reports waits for a GPU only on one")
@pytest.mark.parametrize("planted", [False, True])
def test_a_step_never_waits_for_the_gpu(planted: bool, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny(log_every=10, device="cuda", average={"kind": "ema"}, optim={"clip_grad_norm": 1.0})
    with Trainer(cfg, setup_world("cuda")) as trainer:
        views = next(iter(trainer.loader))[0]
        for _ in range(2):
            trainer.train_step(views, epoch=0)
        if planted:
            monkeypatch.setattr(
                trainer.guard, "before_forward", lambda step: torch.ones((), device="cuda").item()
            )
        waits = pytest.raises(RuntimeError, match="synchronizing")
        torch.cuda.set_sync_debug_mode("error")
        try:
            with waits if planted else contextlib.nullcontext():
                trainer.train_step(views, epoch=0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_time_left_follows_the_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    numbers = dict.fromkeys(("loss", "prediction", "sigreg", "images_per_second", "data_wait"), 0.0)
    with Metrics(tmp_path, enabled=True, tensorboard=False, step=10, total_steps=50) as metrics:
        clock[0] += 30.0
        metrics.write("train", 20, **numbers, memory_gib=1.0)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["eta_seconds"] == 90.0  # 3 s a step since this start, 30 steps to go


def test_a_run_reports_flops_memory_and_time_left(tiny: Make) -> None:
    cfg = tiny(max_steps=2)
    trainer = train_only(cfg)
    (start,) = rows_of(cfg, "run")
    assert start["gflops_per_image"] == pytest.approx(flops.count_flops(cfg).per_image / 1e9, abs=1e-3)
    assert start["compiled_blocks"] == 0  # on a CPU, where nobody asked for it
    rows = rows_of(cfg)
    assert all("mfu" not in row for row in rows)  # the peak of a CPU is not known
    assert 0.05 < rows[-1]["memory_gib"] <= peak_memory_gib(trainer.world.device)
    assert rows[-1]["eta_seconds"] == 0


def test_a_profile_holds_the_steps_it_names(tiny: Make) -> None:
    cfg = tiny(profile=True)
    train_only(cfg)
    last = SKIPPED + WARM_UP + ACTIVE
    assert cfg.out is not None
    folder = cfg.out / "profile"
    stem = f"step-{last:08d}"
    assert {path.name for path in folder.iterdir()} == {f"{stem}.trace.json.gz", f"{stem}.operators.txt"}
    events = json.loads(gzip.decompress((folder / f"{stem}.trace.json.gz").read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("Optimizer.step#AdamW.step") == ACTIVE
    assert "[memory]" in names
    assert "aten::" in (folder / f"{stem}.operators.txt").read_text()


def test_evaluations_and_saves_do_not_count_as_training(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only in a save (5 s), in the evaluation (7 s) and in a step (1 s)."""
    clock = [0.0]

    def takes(seconds: float, work: Any = lambda *args, **options: None) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            return work(*args, **options)

        return timed

    cfg = tiny(eval={"every": 1}, max_steps=5)
    trainer = Trainer(cfg, CPU)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(trainer.saver, "start", takes(5))
    monkeypatch.setattr(trainer, "evaluate", takes(7))
    monkeypatch.setattr(trainer, "train_step", takes(1, trainer.train_step))
    trainer.run()
    assert [row["save_seconds"] for row in rows_of(cfg)] == [0, 0, 0, 0, 5]
    assert [row["images_per_second"] for row in rows_of(cfg)] == [8.0] * 5
