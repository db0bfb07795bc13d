"""The SIGReg benchmark: its gate, its measurements and its output, at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import benchlib
import pytest
import sigreg_bench
import torch

TINY = sigreg_bench.Size(1, 64, 8, 16, 17)
EAGER = "authors' formulation"


def test_a_wrong_variant_is_reported_and_not_timed(monkeypatch, capsys):
    def biased(size, A):
        right = sigreg_bench.ours("torch")(size, A)
        return lambda x: right(x * 1.01)

    monkeypatch.setitem(sigreg_bench.VARIANTS, "wrong", biased)
    names = [EAGER, "our impl='torch'", "wrong"]
    rows = sigreg_bench.measure_times(TINY, names, repeats=2)
    assert [row["correct"] for row in rows] == [True, True, False]
    assert "forward" not in rows[2]
    for row in rows[:2]:
        row["peak_extra_mib"] = 1.0
    sigreg_bench.show(rows, names)
    assert "WRONG" in capsys.readouterr().out.splitlines()[-1]


def test_a_variant_that_cannot_run_is_left_out(monkeypatch, capsys):
    def broken(size, A):
        def loss(x):
            raise RuntimeError("no C++ compiler\nmore")

        return loss

    monkeypatch.setitem(sigreg_bench.VARIANTS, "broken", broken)
    rows = sigreg_bench.measure_times(TINY, [EAGER, "broken"], repeats=2)
    assert [row["correct"] for row in rows] == [True, False]
    rows[0]["peak_extra_mib"] = 1.0
    sigreg_bench.show(rows, [EAGER, "broken"])
    out = capsys.readouterr().out
    assert "broken: not available here: no C++ compiler" in out
    assert "not available" in out.splitlines()[-1]


def test_peak_memory_sees_what_is_allocated_and_freed():
    def call():
        torch.ones(8 << 20).sum()  # 32 MiB

    assert 30 << 20 < benchlib.peak_extra_bytes(call) < 64 << 20


def test_calls_take_turns():
    order: list[str] = []
    calls = {name: benchlib.Timed(lambda repeat, n=name: f"{n}{repeat}", order.append) for name in "ab"}
    times = benchlib.interleaved_times(calls, repeats=2)
    assert order == ["a0", "a1", "b0", "b1", "a0", "b0", "a1", "b1"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_summary_is_in_milliseconds():
    assert benchlib.summary([0.001 * i for i in range(1, 12)]) == pytest.approx(
        {"median_ms": 6, "p20_ms": 3, "p80_ms": 9}
    )


def test_command_line_writes_rows_with_their_origin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sigreg_bench, "VARIANTS", {k: sigreg_bench.VARIANTS[k] for k in (EAGER, "our impl='torch'")}
    )
    monkeypatch.setattr(sigreg_bench, "SWEEPS", {"N": [32, 64], "M": [8, 16]})
    monkeypatch.setattr(sigreg_bench, "CPU_SIZE", TINY)
    arguments = ["--size", *map(str, TINY), "--repeats", "2", "--sweep", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench/sigreg_bench.py", *arguments])
    monkeypatch.setattr(sigreg_bench, "measure_memory", sigreg_bench.peak_memory_here)
    sigreg_bench.main()
    out = capsys.readouterr().out
    assert "SIGReg on the" in out
    assert "CPU" in out
    rows = [json.loads(line) for line in (tmp_path / "sigreg.jsonl").read_text().splitlines()]
    assert {(row["N"], row["M"]) for row in rows} == {(64, 16), (32, 16), (64, 8)}
    for row in rows:
        assert row["correct"]
        assert all(row[phase]["median_ms"] > 0 for phase in ("forward", "backward", "forward_backward"))
        assert {"device", "driver", "torch", "triton", "commit", "command", "date"} <= row.keys()
    assert (tmp_path / "sigreg.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments", [["--size", "1", "2", "3", "4", "0"], ["--repeats", "1"], ["--colour", "red"]]
)
def test_bad_arguments_exit_with_code_2(arguments):
    script = Path(sigreg_bench.__file__)
    run = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "error:" in run.stderr
