"""The SIGReg benchmark: its gate, its measurements and its output, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types

import benchlib
import gpu_timing
import pytest
import sigreg_bench
import sigreg_variants
import tiles_bench
import torch
from sigreg_bench import Setting
from sigreg_variants import BASELINE, COMPILED, GRAPH, REDUCED, STREAMING, TRITON, Case, Loss, Size

from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.data.backends.choose_backend import dali_fault
from lejepa_fast.kernels import autotune, timing

TINY = Case("custom", Size(1, 64, 8, 16, 17), torch.float32, "given", (BASELINE, STREAMING))
CPU = torch.device("cpu")
H200 = gpu_timing.Ceilings(780e12, 4.3e12, 132 * 128 * 1.98e9, 1.98e9, "test")


@pytest.fixture
def in_process(monkeypatch):
    """Peak memory without a process for each variant."""
    monkeypatch.setattr(sigreg_bench, "measure_memory", sigreg_bench.peak_memory_here)


def with_variant(monkeypatch, name, build):
    monkeypatch.setitem(sigreg_variants.VARIANTS, name, build)
    return TINY._replace(variants=(BASELINE, name))


# --- The gate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("directions", ["given", "drawn"])
@pytest.mark.parametrize("name", [BASELINE, STREAMING, "our reference"])
def test_right_variants_pass_on_their_own_directions(name, directions, dtype):
    case = TINY._replace(directions=directions, dtype=dtype)
    (x,) = sigreg_variants.make_inputs(case, 1, CPU)
    truth = sigreg_variants.Truth(x, case.size.J)
    run, error = sigreg_bench.build_and_compare(case, name, x, truth, CPU)
    assert error <= sigreg_variants.MAX_ERROR[dtype]
    _, again = sigreg_bench.build_and_compare(case, name, x, lambda A: truth(A.flip(0)), CPU)
    assert again > sigreg_variants.MAX_ERROR[dtype], "other directions have another result"
    first, second = run(x.requires_grad_(), lambda: None), run(x, lambda: None)
    assert torch.equal(first[1], second[1]) == (directions == "given"), "drawn directions are fresh"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_variant_is_reported_and_not_timed(monkeypatch, capsys, in_process, dtype):
    def biased(case, given, device):
        right = sigreg_variants.ours("torch")(case, given, device)
        return Loss(lambda x: right(x * 1.03), right.directions)

    case = with_variant(monkeypatch, "wrong", biased)._replace(dtype=dtype)
    rows = sigreg_bench.measure(case, Setting(CPU), repeats=2)
    assert [row["correct"] for row in rows] == [True, False]
    assert "forward" not in rows[1]
    sigreg_bench.show(rows)
    assert "WRONG" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("no C++ compiler\nmore"), "not available here: RuntimeError: no C++ compiler"),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit into memory"),
    ],
)
def test_a_variant_that_cannot_run_is_left_out(monkeypatch, capsys, in_process, error, message):
    def broken(case, given, device):
        def loss(x):
            raise error

        return Loss(loss)

    rows = sigreg_bench.measure(with_variant(monkeypatch, "broken", broken), Setting(CPU), repeats=2)
    assert [row["correct"] for row in rows] == [True, False]
    assert rows[1]["problem"] == message
    sigreg_bench.show(rows)
    out = capsys.readouterr().out
    assert f"broken: {message}" in out
    assert message.split(":")[0] in out.splitlines()[-1]


@pytest.mark.parametrize("error", [RuntimeError("sticky"), torch.OutOfMemoryError("beside the others")])
def test_a_variant_that_fails_later_leaves_the_others(monkeypatch, in_process, error):
    def tired(case, given, device):
        right, calls = sigreg_variants.ours("torch")(case, given, device), []

        def loss(x):
            calls.append(x)
            if len(calls) > 2:
                raise error
            return right(x)

        return Loss(loss, right.directions)

    rows = sigreg_bench.measure(with_variant(monkeypatch, "tired", tired), Setting(CPU), repeats=3)
    assert [row["correct"] for row in rows] == [True, False]
    assert str(error) in rows[1]["problem"]
    assert rows[0]["forward_backward"]["median_ms"] > 0


def test_what_compiles_comes_later_and_costs_no_row_of_the_others(tmp_path, monkeypatch, in_process):
    """The process is stopped while it compiles: the rows of the group before are there."""

    def compile_forever(case, given, device):
        raise KeyboardInterrupt

    right = sigreg_variants.VARIANTS[STREAMING]
    for name, build in ((TRITON, right), (GRAPH, right), (COMPILED, right), (REDUCED, compile_forever)):
        monkeypatch.setitem(sigreg_variants.VARIANTS, name, build)
    monkeypatch.setattr(gpu_timing, "graphed", lambda run, device: run)
    case = TINY._replace(name="cpu", variants=(BASELINE, COMPILED, REDUCED, STREAMING, TRITON, GRAPH))
    monkeypatch.setattr(sigreg_variants, "CPU_CASE", case)
    with pytest.raises(KeyboardInterrupt):
        sigreg_bench.main(["--device", "cpu", "--repeats", "2", "--out", str(tmp_path)])
    rows = benchlib.read_rows(tmp_path / "sigreg.jsonl")
    quick = [(0, name) for name in (BASELINE, STREAMING, TRITON, GRAPH)]
    assert [(row["group"], row["variant"]) for row in rows] == [*quick, (1, COMPILED), (1, TRITON)]
    assert len({row["date"] for row in rows}) == 1, "one measurement"


def test_without_matplotlib_the_rows_stay(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    sigreg_bench.plot([], TINY, {}, tmp_path / "sigreg.png")
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("out", [["--out", "/a folder/x"], ["--out=/rows"], []])
def test_the_command_of_a_row_names_no_folder(out):
    assert benchlib._command(["bench/x.py", "--cases", "a", *out, "--repeats", "3"]).endswith(
        "x.py --cases a --repeats 3"
    )


def test_an_assumed_clock_gives_no_share_of_the_floor():
    case = TINY._replace(dtype=torch.bfloat16)
    assert gpu_timing.has_floor(case, H200)
    assert not gpu_timing.has_floor(case, H200._replace(clock_source="assumed"))
    assert not gpu_timing.has_floor(TINY, H200)


def test_tiles_are_saved_kernel_by_kernel(monkeypatch):
    """And before the next kernel is timed: a benchmark that is stopped leaves what it has."""
    kernels = ("forward", "fused")

    def time_candidates(*arguments, timer, **options):
        monkeypatch.setattr(autotune, "collected", rows := [])
        for kernel in kernels:
            rows.extend([{"kernel": kernel, "seconds": timer(lambda: None)} for _ in range(2)])
        return rows

    monkeypatch.setattr(timing, "time_candidates", time_candidates)
    saved = []
    timer = lambda call: float(len(saved))  # noqa: E731
    rows = tiles_bench.measure(Size(1, 4, 4, 4, 3), torch.float32, CPU, timer, saved.append)
    assert [[row["kernel"] for row in part] for part in saved] == [["forward"] * 2, ["fused"] * 2]
    assert [row["seconds"] for row in rows] == [0.0, 0.0, 1.0, 1.0]


def test_what_cannot_fit_is_not_tried(monkeypatch):
    giant = next(case for case in sigreg_variants.GPU_CASES if case.name == "giant")
    free = 60 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    gpu = torch.device("cuda", 0)
    assert "does not fit: needs about" in (sigreg_bench.too_large(giant, BASELINE, gpu) or "")
    assert sigreg_bench.too_large(giant, TRITON, gpu) is None
    assert sigreg_bench.too_large(giant._replace(size=sigreg_variants.REFERENCE), BASELINE, gpu) is None


# --- Measuring ------------------------------------------------------------------------------------


def test_peak_memory_sees_what_is_allocated_and_freed():
    def call():
        torch.ones(8 << 20).sum()  # 32 MiB

    assert 30 << 20 < benchlib.peak_extra_bytes(call) < 64 << 20


def test_calls_take_turns():
    order: list[str] = []

    def timed(name):
        return benchlib.Timed(lambda repeat: f"{name}{repeat}", lambda item, between: order.append(item))

    times = benchlib.interleaved_times({name: timed(name) for name in "ab"}, repeats=2)
    assert order == ["a0", "a1", "b0", "b1", "a0", "b0", "a1", "b1"]
    assert {name: len(t.forward_backward) for name, t in times.items()} == {"a": 2, "b": 2}
    assert times["a"].forward == [], "nothing marked where forward ends"


def test_the_mark_parts_forward_and_backward(monkeypatch):
    clock = iter([1.0, 4.0, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    call = benchlib.Timed(lambda repeat: None, lambda _, between: between())
    assert benchlib.cpu_time(call, 0) == (3.0, 5.0, 8.0)


def test_summary_is_in_milliseconds():
    assert benchlib.summary([0.001 * i for i in range(1, 12)]) == pytest.approx(
        {"median_ms": 6, "p20_ms": 3, "p80_ms": 9}
    )


@pytest.fixture
def fake_gpu(monkeypatch):
    """torch.cuda as far as the timing uses it, on the CPU; returns what was called, in order."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    properties = types.SimpleNamespace(
        L2_cache_size=1 << 16, clock_rate=1_980_000, multi_processor_count=132, major=9, minor=0
    )
    fakes = {
        "Event": Event,
        "_sleep": lambda cycles: log.append(f"sleep {type(cycles).__name__}"),
        "synchronize": lambda: log.append("synchronize"),
        "get_device_properties": lambda device: properties,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1 << 20,
        "max_memory_allocated": lambda: 3 << 20,
    }
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_timing, "nvidia_smi", lambda field: None)
    return log


def test_the_stream_is_busy_before_the_clock_starts(fake_gpu):
    clock = gpu_timing.GpuClock(CPU)
    assert (clock.hertz, clock.hertz_source) == (1.98e9, "device properties")
    call = benchlib.Timed(lambda repeat: None, lambda _, between: between())
    forward, backward, both = clock.once(call, 0)
    assert fake_gpu == ["sleep int", "record", "record", "record", "synchronize"]
    assert forward is not None
    assert backward is not None
    assert both == pytest.approx(forward + backward)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_all_that_a_gpu_row_holds(fake_gpu):
    case = TINY._replace(name="reference", dtype=torch.bfloat16, directions="drawn")
    setting = Setting(CPU, gpu_timing.GpuClock(CPU), H200)
    rows = sigreg_bench.measure(case, setting, repeats=3)
    for row in rows:
        assert all(row[key]["median_ms"] > 0 for key in ("forward", "backward", "forward_backward", "wall"))
        assert row["peak_extra_mib"] == 2
        assert row["share_of_floor"] == row["floor_ms"] / row["forward_backward"]["median_ms"]
        assert row["ceilings"]["matmul_flops"] == 780e12
    sigreg_bench.show(rows)
    ceilings = gpu_timing.measure_ceilings(setting.clock, CPU, side=32)
    assert ceilings.fp32_rate == pytest.approx(132 * 128 * 1.98e9)
    assert 0 < ceilings.matmul_flops < 1e13


def test_the_floor_of_the_reference_size():
    """kernels.md: near 80 us where the pipes overlap, about 150 us where they take turns."""
    floor = gpu_timing.floors(sigreg_variants.REFERENCE, 2, H200)
    assert floor["floor_ms"] == pytest.approx(0.080, rel=0.1)
    assert floor["serial_floor_ms"] == pytest.approx(0.150, rel=0.1)


def test_buffers_are_larger_than_the_cache(fake_gpu):
    clock = gpu_timing.GpuClock(CPU)  # 64 KiB of L2
    assert clock.buffers(1 << 16) * (1 << 16) >= 4 * clock.l2_bytes
    assert clock.buffers(1 << 20) == 2, "at least two take turns"
    assert clock.buffers(64) == 16, "the flush does the rest"


def test_kernels_copies_and_fills_count_as_launches():
    def event(category, name):
        return {"cat": category, "name": name, "ph": "X"}

    trace = [event("kernel", "_fwd"), event("kernel", "_fwd"), event("gpu_memset", "Memset")]
    trace += [event("gpu_user_annotation", "region"), event("cpu_op", "aten::add"), {"name": "no category"}]
    assert gpu_timing.kernels_of(trace) == {"_fwd": 2, "Memset": 1}


# --- The command ----------------------------------------------------------------------------------


def test_command_line_writes_rows_with_their_origin(tmp_path, monkeypatch, capsys, in_process):
    monkeypatch.setattr(sigreg_variants, "CPU_CASE", TINY._replace(name="cpu"))
    monkeypatch.setattr(sigreg_variants, "SWEEPS", {"cpu": {"N": [32, 64], "M": [8, 16]}})
    monkeypatch.setattr(sigreg_variants, "SWEEP_VARIANTS", {"cpu": TINY.variants})
    arguments = ["--device", "cpu", "--repeats", "2", "--sweep", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench/sigreg_bench.py", *arguments])
    assert sigreg_bench.main() == 0
    assert "SIGReg on the CPU" in capsys.readouterr().out
    rows = benchlib.read_rows(tmp_path / "sigreg.jsonl")
    assert {(row["N"], row["M"]) for row in rows} == {(64, 16), (32, 16), (64, 8)}
    for row in rows:
        assert row["correct"]
        assert all(row[phase]["median_ms"] > 0 for phase in ("forward", "backward", "forward_backward"))
        assert {"device", "driver", "torch", "triton", "commit", "command", "date"} <= row.keys()
    assert (tmp_path / "sigreg.png").read_bytes().startswith(b"\x89PNG")


def test_an_implementation_of_ours_that_fails_is_an_error(tmp_path, monkeypatch, capsys, in_process):
    case = TINY._replace(name="cpu", variants=(BASELINE, TRITON))  # no GPU, and no interpreter
    monkeypatch.setattr(sigreg_variants, "CPU_CASE", case)
    assert sigreg_bench.main(["--device", "cpu", "--repeats", "2", "--out", str(tmp_path)]) == 1
    assert "error: an implementation of ours failed" in capsys.readouterr().err


def test_unfinished_rows_are_passed_over(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": 1}) + '\n{"a": ')
    assert benchlib.read_rows(tmp_path / "rows.jsonl") == [{"a": 1}]
    assert benchlib.read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1", "2", "3", "4", "0"], "--size: expected five positive numbers"),
        (["--repeats", "1"], "--repeats: expected at least 2, got 1"),
        (["--colour", "red"], "--colour"),
        (["--dtype", "bfloat16"], "--dtype and --directions belong to --size"),
        (["--device", "cpu", "--cases", "giant-bfloat16"], "--cases: these sizes need a GPU"),
    ],
)
def test_bad_arguments_exit_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        sigreg_bench.main(arguments)
    assert f"error: {message}" in capsys.readouterr().err.replace("unrecognized arguments: ", "")


def test_memory_is_measured_in_a_process_of_its_own():
    size = ["--size", "1", "512", "8", "64", "17", "--dtype", "bfloat16", "--directions", "drawn"]
    run = subprocess.run(
        [sys.executable, sigreg_bench.__file__, "--peak-memory-of", BASELINE, "--device", "cpu", *size],
        capture_output=True,
        text=True,
        check=True,
    )
    phases = 512 * 64 * 17 * 4
    assert 2 * phases < int(run.stdout) < 40 * phases


def test_loader_bench_rehearsal(tmp_path, monkeypatch, capsys):
    """Everything it measures, in small; a loader that cannot run is left out and said so."""
    import loader_bench
    import loader_files

    def unavailable(setting):
        raise RuntimeError("no such thing\nmore")

    everything = loader_bench.contenders
    monkeypatch.setattr(
        loader_bench, "contenders", lambda s: {**everything(s), "broken": lambda: unavailable(s)}
    )
    monkeypatch.setattr(loader_bench, "measure_memory", lambda setting, deadline: [])  # a process each
    monkeypatch.setattr(loader_bench, "damage", lambda path: loader_files.damage(path, huge=(80, 60)))
    arguments = ["--rehearse", "--device", "cpu", "--workers", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench/loader_bench.py", *arguments])
    loader_bench.main()
    rows = [json.loads(line) for line in (tmp_path / "loader.jsonl").read_text().splitlines()]
    speeds = {row["contender"]: row["images_per_s"] for row in rows if row["kind"] == "speed"}
    assert {"torchvision v2", "backend torchvision", "bytes only"} <= speeds.keys()
    assert all(speed > 0 for speed in speeds.values())
    damage = [row for row in rows if row["kind"] == "damage"]
    counts = ("good", "odd", "damaged", "damage_batch_size")
    assert {tuple(row[name] for name in counts) for row in damage} == {(80, 5, 15, 40)}
    assert all(0 < row["bad"] <= 15 for row in damage)  # a part of them is dropped at the end of the epoch
    (large,) = (row for row in rows if row["kind"] == "large")
    assert min(large[f"{kind}_s"] for kind in ("whole", "reduced", "usual")) > 0
    if dali_fault(False) is None:
        (graph,) = (row for row in rows if row["kind"] == "graph")
        assert graph["run_ms"] > 0
        # Encoded bytes, windows and the decoder; for each of the 8 views two corners and the crop.
        assert graph["operators"] <= 3 + 8 * 3
    assert all(row["rehearsal"] and row["commit"] for row in rows)
    assert "broken: not available here: no such thing" in capsys.readouterr().out


def test_memory_of_the_loader_is_measured_on_shards_too(tmp_path, monkeypatch):
    import loader_bench
    from loader_contenders import Setting
    from loader_files import make_folder

    folder = make_folder(tmp_path / "files", 4)
    whole = [folder.path.joinpath(f"{number:05d}.jpg").read_bytes() for number in range(4)]

    def opened(setting, files, name, backend):  # and not measured, which takes a process each
        source = setting._replace(folder=folder._replace(path=files)).source(copies=2)
        images = [source.encoded(index) for index in range(len(source))]
        assert sorted(images) == sorted(2 * whole)
        return [{"contender": name, "kind": source.kind}]

    monkeypatch.setattr(loader_bench, "_memory_row", opened)
    monkeypatch.setattr(loader_bench, "MEMORY_SHARD_BYTES", 100_000)
    setting = Setting(folder, MultiCropRecipe(), 2, 0, CPU)
    rows = loader_bench.measure_memory(setting, time.monotonic() + 60)
    names = ["backend cpu", "backend dali", "backend torchvision"]
    assert [(row["contender"], row["kind"]) for row in rows] == [
        *((name, "folder") for name in names),
        *((f"{name}, shards", "webdataset") for name in names),
    ]


def test_loader_targets_are_judged():
    import loader_bench

    def judged(cpu: float, memory: list[float], seconds: float) -> list[bool]:
        rows = [
            {"kind": "speed", "contender": "torchvision v2", "images_per_s": 90.0},
            {"kind": "speed", "contender": "torchvision v2, tensors", "images_per_s": 100.0},
            {"kind": "speed", "contender": "backend cpu", "images_per_s": cpu},
            {"kind": "memory", "contender": "backend dali", "growth": max(memory) / min(memory)},
            {"kind": "damage", "contender": "backend dali", "ratio": seconds},
        ]
        return [row["met"] for row in loader_bench.targets(rows, on_gpu=False)]

    assert judged(501.0, [100.0, 104.0], 1.09) == [True, True, True]
    # Against the faster of the two ways to write it.
    assert judged(499.0, [100.0, 106.0], 1.11) == [False, False, False]
