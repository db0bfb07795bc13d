"""The SIGReg benchmark: its gate, its timing, its rows and its output, at tiny sizes."""

import json
import types

import benchlib
import pytest
import sigreg_bench
import sigreg_variants
import timing
import torch
from sigreg_bench import Setting
from sigreg_variants import BASELINE, COMPILED, GRAPH, REDUCED, STREAMING, TRITON, Case, Loss, Size

TINY = Case("custom", Size(1, 64, 8, 16, 17), torch.float32, (BASELINE, STREAMING))
CPU = torch.device("cpu")
ON_CPU = Setting(CPU)
H200 = timing.Ceilings(780e12, 4.3e12, 132 * 128 * 1.98e9)


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Measures a case, peak memory without a process for each variant; the rows as written."""
    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *arguments: function(*arguments))
    writer = benchlib.Rows(tmp_path / "sigreg.jsonl", "sigreg")
    return lambda case, setting=ON_CPU, repeats=2: sigreg_bench.measure(case, setting, repeats, writer)


def streaming(monkeypatch, function):
    """Replaces the streaming variant by `function` of its loss and x."""

    def build(case, device):
        right = sigreg_variants.ours("torch", case, device)
        return Loss(lambda x: (function(right.forward, x), right.directions))

    monkeypatch.setitem(sigreg_variants.VARIANTS, STREAMING, build)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [BASELINE, STREAMING, "our reference"])
def test_right_variants_pass_on_their_own_directions(monkeypatch, name, dtype):
    case = TINY._replace(dtype=dtype)
    (x,) = sigreg_variants.make_inputs(case, 1, CPU)
    _, step, error = sigreg_variants.build_and_compare(case, name, x, CPU)
    assert error <= sigreg_variants.MAX_ERROR[dtype]
    assert not torch.equal(step(x)[1], step(x)[1]), "drawn directions are fresh"
    directions = Loss.directions
    monkeypatch.setattr(Loss, "directions", lambda loss: directions(loss).flip(0))
    _, _, error = sigreg_variants.build_and_compare(case, name, x, CPU)
    assert error > sigreg_variants.MAX_ERROR[dtype], "other directions have another result"


def failing(error, at_call):
    """A loss that raises from this call on."""
    calls = []

    def loss(right, x):
        calls.append(x)
        if len(calls) >= at_call:
            raise error
        return right(x)

    return loss


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda loss, x: loss(x * 1.03), "WRONG"),
        (lambda loss, x: loss(x * float("nan")), "WRONG"),
        (failing(RuntimeError("no C++\nmore"), 1), "not available here: RuntimeError: no C++"),
        (failing(torch.OutOfMemoryError("CUDA out of memory"), 1), "does not fit into memory"),
        (failing(RuntimeError("sticky"), 3), "failed while it was timed: RuntimeError: sticky"),
        (failing(torch.OutOfMemoryError("full"), 3), "does not fit into memory beside the others"),
    ],
)
def test_a_variant_that_is_wrong_or_fails_is_reported_not_timed_and_leaves_the_others(
    monkeypatch, capsys, measure, function, problem
):
    streaming(monkeypatch, function)
    right, lost = measure(TINY)
    assert (right["correct"], lost["correct"]) == (True, False)
    assert lost["problem"].startswith(problem)
    assert "forward_backward" not in lost
    assert right["share_of_floor"] == right["floor_ms"] / right["forward_backward"]["median_ms"] > 0
    assert problem in capsys.readouterr().out.splitlines()[-1]


def test_the_floor_of_a_cpu_is_the_products_of_forward_recomputation_and_backward():
    x, A = torch.randn(5, 3), torch.randn(3, 4)
    torch.testing.assert_close(sigreg_bench.multiply(A, x), (x @ A, x @ A, x @ A @ A.T))


def test_rows_are_written_before_a_compiler_that_never_ends(tmp_path, monkeypatch, measure):
    def compile_forever(case, device):
        raise KeyboardInterrupt

    right = sigreg_variants.VARIANTS[STREAMING]
    for name, build in ((TRITON, right), (GRAPH, right), (COMPILED, right), (REDUCED, compile_forever)):
        monkeypatch.setitem(sigreg_variants.VARIANTS, name, build)
    monkeypatch.setattr(timing, "graphed", lambda step, device: step)
    with pytest.raises(KeyboardInterrupt):
        measure(TINY._replace(variants=(BASELINE, COMPILED, REDUCED, STREAMING, TRITON, GRAPH)))
    rows = benchlib.read_rows(tmp_path / "sigreg.jsonl")
    quick = [(0, name) for name in (BASELINE, STREAMING, TRITON, GRAPH)]
    assert [(row["group"], row["variant"]) for row in rows] == [*quick, (1, COMPILED), (1, TRITON)]
    assert len({row["date"] for row in rows}) == 1, "one measurement"


@pytest.mark.parametrize("name", [sigreg_variants.LIGHTLY, sigreg_variants.STABLE])
def test_peers_agree_with_float64(name):
    if name not in sigreg_variants.PEERS:
        pytest.skip(f"{name} is not installed")
    case = next(case for case in sigreg_variants.peer_cases(gpu=False) if name in case.variants)
    small = case._replace(size=case.size._replace(N=16, M=32))
    (x,) = sigreg_variants.make_inputs(small, 1, CPU)
    assert sigreg_variants.build_and_compare(small, name, x, CPU)[2] < 1e-5


def test_calls_take_turns_and_one_that_raises_is_left_out():
    order = []

    def call(name):
        order.append(name)
        if name == "b" and len(order) > 3:
            raise ValueError("tired")

    calls, failures = {name: lambda name=name: call(name) for name in "abc"}, {}
    found = timing.interleave(calls, 3, timing.once, failures=failures)
    assert "".join(order) == "abcabcac"
    assert ({name: len(seconds) for name, seconds in found.items()}, str(failures["b"])) == (
        {"a": 3, "c": 3},
        "tired",
    )
    with pytest.raises(ValueError, match="tired"):
        timing.interleave(calls, 1, timing.once)
    summary = timing.summary([0.001 * i for i in range(1, 12)])
    assert summary == pytest.approx({"median_ms": 6, "p20_ms": 3, "p80_ms": 9})


def test_memory_is_measured_in_a_fresh_process():
    case = Case("custom", Size(1, 512, 8, 64, 17), torch.bfloat16, ())
    phases = 512 * 64 * 17 * 4
    peak, seconds = timing.in_fresh_process(sigreg_bench.step_cost, case, BASELINE, CPU)
    assert 2 * phases < peak < 40 * phases
    assert 0 < seconds < 60


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_a_gpu_row_holds(monkeypatch, measure):
    """With torch.cuda, as far as the timing uses it, on the CPU."""
    log: list[str] = []
    event = types.SimpleNamespace(record=lambda: log.append("record"), elapsed_time=lambda end: 2.0)
    for name, function in (
        ("Event", lambda enable_timing: event),
        ("_sleep", lambda cycles: log.append(f"sleep {type(cycles).__name__}")),
        ("synchronize", lambda: log.append("synchronize")),
        ("get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1 << 16)),
    ):
        monkeypatch.setattr(torch.cuda, name, function)
    clock = timing.GpuClock(CPU)
    assert clock(lambda: log.append("call")) == pytest.approx(0.002)
    assert log == ["sleep int", "record", "call", "record", "synchronize"], "the stream is busy first"
    # Inputs in turns are larger than the cache together.
    assert clock.buffers(1 << 16) * (1 << 16) >= 4 * clock.l2_bytes
    assert (clock.buffers(1 << 20), clock.buffers(64)) == (2, 16)
    for dtype in (torch.bfloat16, torch.float32):
        for row in measure(TINY._replace(dtype=dtype), Setting(CPU, clock, H200), repeats=3):
            assert row["forward"]["median_ms"] == row["forward_backward"]["median_ms"] == pytest.approx(2)
            assert row["wall"]["median_ms"] > 0
            # The ceilings are those of half precision.
            assert row.get("share_of_floor") == (row["floor_ms"] / 2 if dtype == torch.bfloat16 else None)
    # Near 80 us where the pipes overlap, about 150 us where they take turns.
    floor = sigreg_bench.floors(sigreg_variants.REFERENCE, 2, H200)
    assert floor == pytest.approx({"floor_ms": 0.080, "serial_floor_ms": 0.150}, rel=0.1)


def test_kernels_copies_and_fills_count_as_launches():
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    names = [(gpu, "_fwd"), (gpu, "_fwd"), (gpu, "Memset"), (cpu, "aten::add")]
    trace = [types.SimpleNamespace(device_type=device, name=name) for device, name in names]
    trace.append(types.SimpleNamespace(device_type=gpu, name="region", is_user_annotation=True))
    assert timing.device_work(trace) == {"_fwd": 2, "Memset": 1}


def test_command_line_writes_rows_with_their_origin_and_a_plot(tmp_path, monkeypatch, capsys, measure):
    monkeypatch.setattr(sigreg_variants, "CPU_CASE", TINY._replace(name="cpu"))
    monkeypatch.setattr(sigreg_variants, "SWEEPS", {False: {"N": [32, 64], "M": [8, 16]}})
    arguments = ["--device", "cpu", "--repeats", "2", "--out", str(tmp_path)]
    assert sigreg_bench.main([*arguments, "--sweep"]) == 0
    assert "SIGReg on the CPU" in capsys.readouterr().out
    rows = benchlib.read_rows(tmp_path / "sigreg.jsonl")
    assert {(row["N"], row["M"]) for row in rows} == {(64, 16), (32, 16), (64, 8)}
    for row in rows:
        assert row["correct"]
        assert all(row[phase]["p80_ms"] > 0 for phase in ("forward", "forward_backward"))
        assert {"device", "driver", "torch", "triton", "commit", "command", "date"} <= row.keys()
    assert (tmp_path / "sigreg.png").read_bytes().startswith(b"\x89PNG")

    case = TINY._replace(name="cpu", variants=(BASELINE, TRITON))  # no GPU, and no interpreter
    monkeypatch.setattr(sigreg_variants, "CPU_CASE", case)
    assert sigreg_bench.main(arguments) == 1
    assert "error: an implementation of ours failed" in capsys.readouterr().err


@pytest.mark.parametrize(("both", "largest"), [(False, 1_000_000), (True, 1000)])
def test_the_largest_size_is_searched_between_one_that_fits_and_one_that_does_not(
    tmp_path, monkeypatch, capsys, both, largest
):
    def cost(case, name, device):
        """1000 bytes for each sample or, if N = M, for each product."""
        bytes_each = 1e9 if name == COMPILED else 1000 * (case.size.M if both else 1)
        inputs = case.size.N * case.size.K * 4
        return case.size.N * bytes_each - inputs, 40.0 if case.size.N >= 1024 and name == BASELINE else 0.1

    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(sigreg_bench, "step_cost", cost)
    monkeypatch.setitem(sigreg_variants.VARIANTS, COMPILED, sigreg_variants.VARIANTS[BASELINE])
    size = Size(1, 64, 8, 64 if both else 16, 5)
    case = Case("largest", size, torch.float32, (STREAMING, BASELINE, COMPILED))
    rows = sigreg_bench.measure_largest(case, ON_CPU, 1e9, benchlib.Rows(tmp_path / "rows", "sigreg"))
    fits, slow, lost = rows
    assert 0.95 * largest <= fits["N"] <= largest
    assert fits["M"] == (fits["N"] if both else 16)
    assert not fits["at_least"]
    assert fits["peak_mib"] == fits["N"] * 1000 * (fits["N"] if both else 1) / 2**20
    # A size whose double would take more than a minute is the last.
    assert (slow["at_least"], slow["N"] == 1024) == (not both, not both)
    assert (lost["correct"], lost["problem"]) == (False, "does not fit into memory")
    assert f"{fits['N']:,}" in capsys.readouterr().out


def test_the_share_of_a_step_is_that_of_one_with_the_variant_in_place_of_ours(tmp_path, monkeypatch, capsys):
    import train_bench

    trained = {"step_ms": 100.0, "sigreg_share": 0.1}
    monkeypatch.setattr(train_bench, "run_case", lambda case: trained)
    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *arguments: (0, 0.0))
    case = TINY._replace(name="vit", variants=(STREAMING, BASELINE))
    rows = benchlib.Rows(tmp_path / "rows", "sigreg")
    for row in sigreg_bench.measure_share(case, ON_CPU, 3, rows):
        own = row["forward_backward"]["median_ms"]
        assert row["step_ms"] == pytest.approx(90 + own)
        assert row["share"] == pytest.approx(own / (90 + own))
        assert (row["case"], row["model"], row["N"]) == ("share", "vit", case.size.N)
        assert f"{row['share']:.2%}" in capsys.readouterr().out or row["variant"] == BASELINE
    trained["error"] = "out of memory"
    (lost,) = sigreg_bench.measure_share(case, ON_CPU, 3, rows)
    assert (lost["correct"], lost["problem"]) == (False, "out of memory")


def test_large_cases_are_those_of_the_paper_and_a_cpu_leaves_formulas_of_minutes_out():
    cases = sigreg_variants.large_cases(gpu=False)
    names = {(c.name, c.size.N, c.size.M, c.size.J): BASELINE in c.variants for c in cases}
    assert not any(names[key] for key in (("large", 32768, 1024, 17), ("table 6", 32768, 512, 16)))
    assert names["table 6", 512, 512, 16]
    assert names.keys() >= {("large", 2048, 8192, 17), ("large", 2048, 1024, 17)}
    assert not names["large", 2048, 1024, 17], "beside the products of the floor alone"
    assert all({BASELINE, TRITON} <= {*c.variants} for c in sigreg_variants.large_cases(gpu=True))


def test_the_command_of_a_row_names_no_folder_and_unfinished_rows_are_passed_over(tmp_path):
    for out in (["--out", "/a folder/x"], ["--out=/rows"], []):
        said = benchlib.repeatable(["bench/x.py", "--cases", "a", *out, "--repeats", "3"])
        assert said.endswith("x.py --cases a --repeats 3")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": 1}) + '\n{"a": ')
    assert benchlib.read_rows(tmp_path / "rows.jsonl") == [{"a": 1}]
    assert benchlib.read_rows(tmp_path / "none.jsonl") == []


def test_bad_arguments_exit_with_code_2(capsys):
    for arguments, message in (
        ("--size 1 2 3 4 0", "--size: expected five positive numbers"),
        ("--memory 0", "--memory: expected a positive number of GB, got 0.0"),
        ("--repeats 1", "--repeats: expected at least 2, got 1"),
        ("--device cpu --cases giant-bfloat16", "--cases: these sizes need a GPU"),
    ):
        with pytest.raises(SystemExit, match="2"):
            sigreg_bench.main(arguments.split())
        assert f"error: {message}" in capsys.readouterr().err
