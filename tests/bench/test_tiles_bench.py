"""The benchmark of tiles: its rows, which come one by one."""

import itertools

import benchlib
import pytest
import tiles_bench
import torch
import triton
from sigreg_variants import Case, Size
from standin_driver import standing_in

from lejepa_fast.kernels.configs import shipped_config
from lejepa_fast.kernels.runtime import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="a stand-in for the compiler")
CASE = Case("reference", Size(2, 64, 32, 64, 17), torch.bfloat16, ())


@pytest.fixture
def time_case(tmp_path, monkeypatch):
    """Times a case on a stand-in for a GPU that does not even compile; the rows as written."""
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    file = benchlib.Rows(tmp_path / "rows", "kernel_tiles")

    def run(timer):
        with standing_in():
            tiles_bench.time_case(CASE, torch.device("cpu"), timer, file)

    return run, lambda: benchlib.read_rows(file.path)


def test_every_candidate_is_a_row_with_kernel_size_tile_and_time(time_case):
    run, rows = time_case
    seconds = itertools.count(1)
    run(lambda call: 1e-6 * next(seconds))
    config = shipped_config("sm_90", 2)
    for kernel in ("forward", "gradient", "product"):
        found = [row for row in rows() if row["kernel"] == kernel]
        assert [row["tile"] for row in found] == [tile._asdict() for tile in config.candidates(kernel, 32)]
        assert [row["shipped"] for row in found] == [True] + [False] * (len(found) - 1)
    assert {row["kernel"] for row in rows()} == {"forward", "gradient", "product", "fused"}
    for row in rows():
        assert {key: row[key] for key in "VNKMJ"} == CASE.size._asdict()
        assert (row["dtype"], row["error"]) == ("bfloat16", None)
    assert [row["median_us"] for row in rows()[:3]] == pytest.approx([1, 2, 3])


def test_the_command_writes_rows_of_a_tiny_size_and_prints_the_fastest_tiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    with standing_in():
        tiles_bench.main(["--rehearse", "--out", str(tmp_path)])
    rows = benchlib.read_rows(tmp_path / "kernel_tiles.jsonl")
    assert {row["kernel"] for row in rows} == {"forward", "gradient", "product", "fused"}
    for row in rows:
        assert row.items() >= {**tiles_bench.TINY.size._asdict(), "rehearsal": True, "error": None}.items()
        assert row["median_us"] > 0
    count = sum(row["kernel"] == "forward" for row in rows)
    assert f"{count} of {count}" in next(
        line for line in capsys.readouterr().out.splitlines() if "forward" in line
    )


def test_a_tile_that_cannot_run_says_why_and_a_stop_loses_no_row(time_case):
    run, rows = time_case
    calls = itertools.count()

    def timer(call):
        number = next(calls)
        if number == 1:
            raise RuntimeError("too large")
        if number == 3:
            raise KeyboardInterrupt
        return 1e-6

    with pytest.raises(KeyboardInterrupt):
        run(timer)
    expected = [(1.0, None), (None, "RuntimeError: too large"), (1.0, None)]
    assert [(row["median_us"], row["error"]) for row in rows()] == expected
