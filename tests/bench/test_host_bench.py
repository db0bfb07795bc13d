"""The benchmark of host time measures every variant and puts the library back as it was."""

import host_bench
import pytest
import triton
from benchlib import read_rows

from lejepa_fast import triton_operators
from lejepa_fast.kernels.runtime import interpreting


@pytest.mark.skipif(interpreting(), reason="the interpreter replaces the compiler")
def test_every_variant_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)  # compiling takes seconds
    tracing = triton_operators.tracing
    host_bench.main(["--rounds", "2", "--out", str(tmp_path)])
    assert triton_operators.tracing is tracing
    rows = read_rows(tmp_path / "host.jsonl")
    assert [row["variant"] for row in rows] == list(host_bench.SIZES)
    assert all(0 < row["host"]["p20_ms"] <= row["host"]["p80_ms"] for row in rows)
    assert "our impl='triton'" in capsys.readouterr().out
