"""Shipped configurations go through the compiler, without a GPU, and are held to their budgets.

Of a half-precision step on sm_90 every tile, for the hard limits. For float32 and for the other targets
one tile of each kernel: `bench/kernel_report.py --check`, which `make test-versions` runs, compiles every
tile, dtype and uneven size for every target.
"""

import json

import kernel_report
import pytest
from kernel_report import PLAIN, SHARED_BYTES, TILED, Size, color_kernels, compile_kernel, step_kernels

from lejepa_fast.kernels.configs import shipped_config
from lejepa_fast.kernels.runtime import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter replaces the compiler")


@pytest.fixture(scope="module")
def report():
    """Rows of the bf16 kernels for sm_90, of every even size."""
    return kernel_report.report("sm_90", ["bf16"], which="even")


@pytest.fixture(scope="module")
def budgets():
    return json.loads(kernel_report.BUDGETS.read_text())


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        (None, None),
        ("sm_80", "fp16"),
        ("sm_89", "bf16"),
        ("sm_90", "fp32"),
        ("sm_100", "bf16"),
        ("gfx942", "fp32"),
    ],
)
def test_shipped_configurations_keep_their_budgets(target, dtype, report, budgets):
    """Every tile of `report`; elsewhere one of each kernel."""
    rows = kernel_report.report(target, [dtype], which="first") if target else report
    assert kernel_report.violations(rows, budgets) == []
    assert {row["kernel"] for row in rows} == {*TILED.values(), *PLAIN.values()}
    assert all(row["tensor_kind"] for row in rows if row["kernel"] in TILED.values())


def test_the_reference_size_on_sm_90_keeps_the_hard_limits(report):
    """At most 75 and 85 FP32 instructions a projected sample; what backward does besides is a product."""
    found = {(row["kernel"], row["K"]): row for row in report}
    assert found["forward", 512]["per_sample"]["fp32"] <= 75
    for kernel in (("gradient", 512), ("gradient", 1536), ("fused", 256)):
        assert found[kernel]["per_sample"]["fp32"] <= 85
    assert all(row["tensor_kind"] == "HGMMA" for row in found.values() if row["kernel"] not in PLAIN.values())


def test_loads_are_in_flight_while_a_tile_is_summed(report):
    """Most instructions of a tile lie between the loads of the next one and the first that needs them."""
    found = {(row["kernel"], row["K"]): row for row in report}
    for kernel in ("forward", "gradient"):
        row = found[kernel, 512]
        samples = row["block_m"] * row["block_n"] / (32 * row["num_warps"])
        assert row["ahead"] >= 0.8 * row["slots_per_sample"] * samples
        assert row["drains"] == 1, "waits for the tensor cores"
        assert row["predicted_h200"]["wait_us"] == 0, "two programs on a multiprocessor"
    for row in found.values():
        if "predicted_h200" in row:
            assert row["predicted_h200"]["time_us"] > row["floor_h200"]["floor_us"], row


def test_predictions_stand_beside_measurements(report, monkeypatch, tmp_path, capsys):
    row = next(row for row in report if (row["kernel"], row["K"]) == ("gradient", 1536))
    size = {name: row[name] for name in kernel_report.Size._fields}
    timed = {"kernel": "gradient", **size, "J": 17, "dtype": "bfloat16", "device": "NVIDIA H200"}
    timed |= {"tile": {name: row[name] for name in kernel_report.Tile._fields}, "median_us": 3.0}
    others = [{"median_us": None}, {"rehearsal": True}, {"device": "CPU"}]
    others.append({"tile": timed["tile"] | {"num_stages": 9}})
    times = tmp_path / "times.jsonl"
    monkeypatch.setattr(kernel_report, "TIMES", times)
    for changes, expected in ([others, None], [[*others, {"median_us": 2.0}, others[0]], pytest.approx(20)]):
        times.write_text("".join(json.dumps(timed | change) + "\n" for change in changes))
        assert kernel_report.measured(row) == expected, "of ten chunks"
    kernel_report.show_steps(report)
    printed = capsys.readouterr().out
    assert "predictions: no GPU" in printed
    parts = {r["kernel"]: r["predicted_h200"]["time_us"] for r in report if r["K"] == 512 and "ahead" in r}
    total = sum(parts[name] for name in ("forward", "gradient", "product")) + 12
    assert f"{total:.0f}" in next(line for line in printed.splitlines() if "reference bf16" in line).split()


@pytest.mark.parametrize(
    ("K", "M", "slice_grad", "fuses"),
    [
        (256, 1024, False, True),
        (33, 70, False, True),  # small ones of any size
        (256, 1040, False, False),  # sizes that do not fill the tiles
        (200, 1024, False, False),
        (256, 1024, True, False),  # float32 products
        (512, 1024, False, False),
    ],
)
def test_sizes_whose_backward_is_one_kernel(K, M, slice_grad, fuses):
    """On sm_90 where two programs fit on a multiprocessor; no buffer for dT/dp then."""
    assert shipped_config("sm_90", 2).fuses(K, M, slice_grad=slice_grad) == fuses


@pytest.mark.parametrize(
    "change",
    [
        {"spills": 2},
        {"stack_bytes": 8},
        {"tensor_kind": "HMMA"},
        {"repeated": 2.0},  # projections worked on twice
        {"shared_bytes": 1 << 18},
        {"per_sample": {"fp32": 78.0}},
        {"uneven": "without a budget"},
    ],
)
def test_the_gate_finds_planted_faults(change, report, budgets):
    (good,) = (row for row in report if (row["kernel"], row["K"]) == ("forward", 512))
    assert len(kernel_report.violations([good | change], budgets)) == 1


def test_sizes_of_one():
    """A size of 1 is a constant of the compilation."""
    kernels = step_kernels("sm_90", "bf16", Size(1, 1, 1, 1), fused=True)
    assert kernels.keys() == {"directions", "forward", "statistic", "sum", "fused"}
    for kernel in kernels.values():
        assert compile_kernel(kernel, "sm_90").metadata.shared <= SHARED_BYTES["sm_90"], kernel.name


def test_the_color_kernels_keep_pixels_in_registers():
    for kernel in color_kernels(size=224, kernel_size=7):
        row = kernel_report.inspect(compile_kernel(kernel, "sm_90"), "sm_90")
        assert row["spills"] == row["stack_bytes"] == 0, kernel.name
