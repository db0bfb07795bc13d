"""Every candidate tile, its timing for a benchmark, and sums of many partial tables."""

import pytest
import torch
from kernel_helpers import DEVICE, TWO_KERNELS
from sigreg_variants import Case, Size
from tiles_bench import time_candidates

from lejepa_fast import sample_unit_directions
from lejepa_fast.kernels import autotune, backward, epilogue, forward
from lejepa_fast.kernels.configs import ANY, get_config
from lejepa_fast.kernels.table import make_plan

t = torch.arange(17, device=DEVICE) * 0.1875
PHI = torch.exp(-t.square() / 2)
PLAN = make_plan(17, 0.1875)


@pytest.mark.parametrize(("K", "dtype"), [(13, torch.bfloat16), (TWO_KERNELS, torch.float32)])
def test_every_candidate_gives_the_same_result(K, dtype):
    x = torch.randn(1, 35, K).to(DEVICE, dtype)
    A, scale = sample_unit_directions(K, 9, step=1, device=DEVICE, dtype=dtype)
    shipped = get_config(x.device, dtype.itemsize)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2

    def forward_backward(config):
        table = forward.table_sums(x, A, scale, t, PLAN, config, "ieee")
        options = {"unbiased": False, "scale_by_n": True, "factor": 1.0}
        value, coef = epilogue.statistic(table, 35, scale, t, PHI, PHI, PLAN, **options)
        one = torch.ones((), device=DEVICE)
        return value, backward.gradient(one, 1.0, coef, x, A, scale, t, PLAN, config, "ieee")

    value, grad = forward_backward(shipped)
    ran = 0
    for kernel in ("forward", "fused") if K == 13 else ("forward", "gradient", "product"):
        for tile in shipped.candidates(kernel, K)[1:]:
            try:
                got = forward_backward(shipped._replace(**{kernel: {ANY: tile}}))
            except autotune.CANNOT_RUN:  # too large for this GPU
                continue
            ran += 1
            torch.testing.assert_close(got[0], value, rtol=1e-5, atol=0)
            atol = tolerance * grad.abs().max().item()
            torch.testing.assert_close(got[1], grad, rtol=tolerance, atol=atol)
    assert ran >= 2


def test_candidates_for_a_benchmark():
    case, device = Case("tiny", Size(1, 5, 8, 9, 17), torch.float32, ()), torch.device(DEVICE)
    calls = []

    def timer(call):
        calls.append(call())
        if len(calls) == 1:
            raise RuntimeError("too large")
        return 0.5

    rows = time_candidates(case, device, True, timer)
    assert len(rows) == len(calls)
    assert {row["kernel"] for row in rows} == {"forward", "fused"}
    assert (rows[0]["median_us"], rows[0]["error"]) == (None, "RuntimeError: too large")
    assert all(row["median_us"] == 0.5e6 and row["error"] is None for row in rows[1:])
    assert [row["shipped"] for row in rows[:2]] == [True, False]
    assert all(row["N"] == 5 and row["dtype"] == "float32" for row in rows)
    rows = time_candidates(case, device, False, lambda call: call() or 0.5)
    assert {row["kernel"] for row in rows} == {"forward", "gradient", "product"}


def test_many_partial_sums_lose_no_digit():
    """Of a view so large that an error of the mean counts: as from sums in float64, also of the division."""
    splits, count = 600, 600 * 1001.0
    torch.manual_seed(0)
    table = torch.zeros(splits, 1, PLAN.rows, 3)
    table[:, :, 0] = 1001.0
    means = torch.rand(1, PLAN.rows - 1, 3, dtype=torch.float64) - 0.5
    table[:, :, 1:] = (1001 * means).float()  # the same everywhere: roundings go one way
    options = {"unbiased": False, "scale_by_n": False, "factor": None}

    def statistic(sums, count):
        return epilogue.statistic(sums.to(DEVICE), count, None, t, PHI, PHI, PLAN, **options)[0].cpu()

    exact = statistic((table.double().sum(0, keepdim=True) / count).float(), 1.0)
    one_after_another = table[0]
    for part in table[1:]:
        one_after_another = one_after_another + part
    naive = (statistic(one_after_another[None], count) - exact).norm()
    assert (statistic(table, count) - exact).norm() <= 2e-7 * exact.norm()
    assert naive > 4e-7 * exact.norm(), "what it would be without compensation"
