"""Every shipped configuration goes through the compiler, without a GPU; sm_90 is held to its budgets."""

from __future__ import annotations

import copy
import json

import kernel_report
import pytest

from lejepa_fast.kernels.configs import TARGETS
from lejepa_fast.kernels.runtime import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter replaces the compiler")
SHARED_BYTES = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a block


@pytest.fixture(scope="module")
def report():
    reports: dict[str, list[dict]] = {}

    def get(target: str) -> list[dict]:
        if target not in reports:
            reports[target] = kernel_report.report(target, ["bf16", "fp32"])
        return reports[target]

    return get


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_configurations_compile(report, target):
    rows = report(target)
    assert {row["kernel"] for row in rows} >= {
        "directions",
        "forward",
        "finish",
        "gradient",
        "product",
        "fused",
    }
    for row in rows:
        assert row["shared_bytes"] <= 1024 * SHARED_BYTES[target], row


def test_sm_90_keeps_its_budgets(report):
    budgets = json.loads(kernel_report.BUDGETS.read_text())
    assert kernel_report.violations(report("sm_90"), budgets) == []


def test_the_gate_finds_what_it_is_for(report):
    """A spill, lost tensor-core instructions and too many instructions, planted one at a time."""
    budgets = json.loads(kernel_report.BUDGETS.read_text())
    good = [row for row in report("sm_90") if row["kernel"] == "forward"]
    for change in ({"spills": 2}, {"tensor_kind": "HMMA"}, {"per_sample": {"fp32": 76.0}}):
        bad = copy.deepcopy(good)
        bad[0].update(change)
        assert len(kernel_report.violations(bad, budgets)) == 1, change
