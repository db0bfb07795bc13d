"""Watching a run: what waits for the device, MFU and the time left, the profile, running out of memory."""

from __future__ import annotations

import gzip
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import CPU, Make, rows_of, train_only

from lejepa_fast.errors import RunError
from lejepa_fast.train import config
from lejepa_fast.train.engine.metrics import Meter, Metrics, peak_memory_gib
from lejepa_fast.train.engine.profiling import ACTIVE, SKIPPED, WARM_UP
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.model.model import flops


class Waits(TorchDispatchMode):
    """Notes where a program reads a tensor's value on the host: on a GPU each would wait for the device.

    Use as `with waits, waits.methods:`; the second part sees what PyTorch does not dispatch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.methods = _ReadingMethods(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        # (The knots' spacing is looked at where they lie on the CPU, and never on a GPU: ops._readable.)
        ours = [f.name for f in traceback.extract_stack() if "/tests/" not in f.filename and _is_ours(f)]
        place = ours[-1] if ours else "elsewhere"
        if place != "_fits":
            self.places.append(place)


def _is_ours(frame: traceback.FrameSummary) -> bool:
    root = Path(__file__).parents[3]
    return any(Path(frame.filename).is_relative_to(root / part) for part in ("train", "lejepa_fast"))


class _ReadingMethods(TorchFunctionMode):
    NAMES = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self, waits: Waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            self._waits.note()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def stepped(tiny: Make) -> Iterator[Trainer]:
    """A trainer between two steps that need no row."""
    trainer = Trainer(tiny(log_every=10, average={"kind": "ema"}), CPU)
    trainer._prepare()
    trainer.model.train()
    for _ in range(2):
        _step(trainer)
    yield trainer
    trainer.metrics.close()


def _step(trainer: Trainer) -> None:
    views = next(iter(trainer.loader))[0]
    _run_step(trainer, views)


def _run_step(trainer: Trainer, views: list[torch.Tensor]) -> None:
    trainer._train_step(views, epoch=0)
    trainer.meter.add(8, 0.0)
    trainer._log_if_due()


def _waits_of_a_step(trainer: Trainer) -> list[str]:
    views = next(iter(trainer.loader))[0]
    waits = Waits()
    with waits, waits.methods:
        _run_step(trainer, views)
    return waits.places


def test_a_step_reads_nothing_back_but_the_flags(stepped: Trainer) -> None:
    """The guard's flags are copied without waiting on a GPU and read a step late; on the CPU at once."""
    assert stepped.step == 2
    assert _waits_of_a_step(stepped) == ["_act_on"]


def test_a_row_costs_one_wait(stepped: Trainer) -> None:
    stepped.step = 9
    assert sorted(_waits_of_a_step(stepped)) == ["_act_on", "_log_if_due"]


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, bool, float, torch.Tensor.numpy])
def test_waits_are_seen(stepped: Trainer, monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    before_forward = stepped.guard.before_forward

    def reading(step: int) -> None:
        read(torch.ones(()))
        before_forward(step)

    monkeypatch.setattr(stepped.guard, "before_forward", reading)
    assert len(_waits_of_a_step(stepped)) == 2


@pytest.fixture
def stepped_on_a_gpu(tiny: Make) -> Iterator[Trainer]:
    """As `stepped`, with everything that a step may do beside the plain one."""
    from lejepa_fast.train.runtime.world import setup_world

    cfg = tiny(log_every=10, device="cuda", average={"kind": "ema"}, optim={"clip_grad_norm": 1.0})
    trainer = Trainer(cfg, setup_world("cuda"))
    trainer._prepare()
    for _ in range(2):
        _step(trainer)
    yield trainer
    trainer.metrics.close()


def _step_that_must_not_wait(trainer: Trainer) -> None:
    views = next(iter(trainer.loader))[0]
    try:
        torch.cuda.set_sync_debug_mode("error")
        _run_step(trainer, views)
    finally:
        torch.cuda.set_sync_debug_mode("default")


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: PyTorch reports waits for it only there"
)


@pytest.mark.gpu
@needs_gpu
def test_a_step_never_waits_for_the_gpu(stepped_on_a_gpu: Trainer) -> None:
    _step_that_must_not_wait(stepped_on_a_gpu)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, bool, float, torch.Tensor.cpu])
def test_waits_for_the_gpu_are_seen(
    stepped_on_a_gpu: Trainer, monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    before_forward = stepped_on_a_gpu.guard.before_forward

    def reading(step: int) -> None:
        read(torch.ones((), device="cuda"))
        before_forward(step)

    monkeypatch.setattr(stepped_on_a_gpu.guard, "before_forward", reading)
    with pytest.raises(RuntimeError, match="synchronizing"):
        _step_that_must_not_wait(stepped_on_a_gpu)


def test_mfu_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter = Meter(flops_per_image=3e9, peak_flops=2 * 10e12)
    meter.add(4000, waited=0.0)
    clock[0] = 2.0
    assert meter.read()["mfu"] == pytest.approx(0.3)
    assert "mfu" not in Meter(flops_per_image=3e9, peak_flops=None).read()


def test_time_left_follows_the_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    metrics = Metrics(tmp_path, enabled=True, tensorboard=False, step=10, total_steps=50)
    clock[0] += 30.0
    numbers = dict.fromkeys(("loss", "prediction", "sigreg", "images_per_second", "data_wait"), 0.0)
    metrics.write("train", 20, **numbers, memory_gib=1.0)
    metrics.close()
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
    assert "aten::_fused_adamw_" in (folder / f"{stem}.operators.txt").read_text()


def test_a_run_without_profile_writes_none(tiny: Make) -> None:
    cfg = tiny(max_steps=1)
    train_only(cfg)
    assert cfg.out is not None
    assert not (cfg.out / "profile").exists()


def test_out_of_gpu_memory_says_which_settings_help(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(max_steps=2), CPU)

    def full(views: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(trainer, "parallel", full)
    with pytest.raises(RunError) as refusal:
        trainer.run()
    text = str(refusal.value)
    assert "\n" not in text
    assert "--parallel.activation-checkpointing selective or full (now none)" in text
    assert "a smaller --batch-size (now 8, 8 images per process)" in text


def test_no_memory_for_the_average_is_told_too(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(WeightAverage, "__init__", full)
    with pytest.raises(RunError, match=r"out of memory; what helps: .*no --average ema"):
        Trainer(tiny(average={"kind": "ema"}), CPU)


def test_the_machine_runs_out_of_memory(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(max_steps=2, parallel={"activation_checkpointing": "full"}), CPU)
    monkeypatch.setattr(trainer, "parallel", lambda views: torch.empty(2**60))  # no machine has that
    with pytest.raises(RunError, match=r"^out of memory; what helps: a smaller --batch-size"):
        trainer.run()


def test_other_errors_keep_their_text(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(max_steps=2), CPU)

    def broken(views: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(trainer, "parallel", broken)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$") as refusal:
        trainer.run()
    assert not isinstance(refusal.value, RunError)


def test_an_evaluation_and_its_save_pause_the_meter_once(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny(eval={"every": 1}), CPU)
    trainer._steps_evaluated = set()
    clock, paused = [0.0], list[float]()

    def takes(seconds: float) -> Any:
        return lambda *args, **options: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr(
        "lejepa_fast.train.engine.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0])
    )
    monkeypatch.setattr(trainer.saver, "start", takes(5))
    monkeypatch.setattr(trainer, "_evaluate", takes(7))
    trainer._given_up = set()
    trainer.metrics = Metrics(trainer.run_dir, enabled=False, tensorboard=False, step=0, total_steps=1)
    monkeypatch.setattr(trainer.meter, "pause", paused.append)
    trainer._evaluate_if_due(1)
    assert sum(paused) == clock[0] == 12
    assert trainer.meter.read()["save_seconds"] == 5


def test_what_a_checkpoint_held_up_stands_in_the_next_row(tiny: Make) -> None:
    cfg = tiny(max_steps=5, checkpoint_every=2)
    train_only(cfg)
    assert [row["save_seconds"] > 0 for row in rows_of(cfg)] == [False, False, True, False, True]


def test_a_batch_that_is_small_for_sigreg_is_told(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """On data of one's own; the embedded images have a recipe of small batches."""
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    monkeypatch.setattr(Trainer, "finish", lambda self: Path())
    Trainer(tiny(out=tmp_path / "embedded", data={"path": config.EMBEDDED_DATA}), CPU).run()
    assert "rule of thumb" not in caplog.text
    Trainer(tiny(out=tmp_path / "own"), CPU).run()
    assert "are few for SIGReg" in caplog.text
