"""From sums to the statistic, its sum, and the coefficients of its gradient (maths: `reference.py`).

The partial tables of the forward kernel are added in a fixed order. An entry of the table is the sum over
samples of a product of a giant step a and a baby step b; four of them give the sums of two knots,

    cos(j u) = cc - ss    sin(j u) = sc + cs        j = s a + b
    cos(j u) = cc + ss    sin(j u) = sc - cs        j = s a - b

and receive the gradients of both, so a program processes pairs (a, b) of a block of directions. Their
coefficients have the same rows: `backward.py` evaluates the same bilinear form.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import OPTIONS, empty, kernel_device, launch
from .table import COEF_BLOCK, Plan, coefficient_shape

_SUM_BLOCK = 1024


@triton.jit
def _table_sums(table_ptr, rows, mask, splits, stride_split):
    """Entries of the table summed over splits, by Kahan; `rows` are offsets (PAIRS, BLOCK_M)."""
    total = tl.zeros(rows.shape, tl.float32)
    lost = tl.zeros(rows.shape, tl.float32)
    pointers = table_ptr + rows
    for _ in range(splits):
        value = tl.load(pointers, mask=mask, other=0.0) - lost
        new = total + value
        lost = (new - total) - value
        total = new
        pointers += stride_split
    return total


@triton.jit
def _divide(values, count):
    """Division with correct rounding. `/` is biased, and T multiplies an error of the mean by N."""
    return tl.div_rn(values, tl.zeros(values.shape, tl.float32) + count)


@triton.jit
def _knot(cos_sum, sin_sum, t, phi, weight, count, UNBIASED: tl.constexpr):
    """Contribution of knots to T / N, and the coefficients of cos and sin in dT/dp (T with its factor N)."""
    mean_cos = _divide(cos_sum, count)
    mean_sin = _divide(sin_sum, count)
    error = mean_cos - phi
    value = error * error + mean_sin * mean_sin
    if UNBIASED:
        value -= _divide(1.0 - mean_cos * mean_cos - mean_sin * mean_sin, count - 1.0)
        error += _divide(mean_cos, count - 1.0)
        mean_sin += _divide(mean_sin, count - 1.0)
    twice = 2.0 * weight * t
    return weight * value, twice * mean_sin, -twice * error


@triton.jit
def _store(coef_ptr, row, value, mask, inside, BLOCK_M: tl.constexpr):
    """Writes rows of coefficients, 0 for directions outside; returns their absolute values, 0 elsewhere."""
    value = tl.where(inside & mask, value, 0.0)
    tl.store(coef_ptr + row * BLOCK_M, value, mask=mask)
    return tl.abs(value)


@triton.jit
def _sigreg_statistic_kernel(
    table_ptr,  # (splits, V, ROWS, M) float32
    count_ptr,  # () float32, with COUNT_ON_DEVICE
    scale_ptr,  # (M,) float32, multiplies the columns of A
    t_ptr,  # (J,) float32
    phi_ptr,  # (J,) or (J, M) float32
    weights_ptr,  # (J,) or (J, M) float32
    value_ptr,  # T (V, M), or with REDUCE its sum over the block, (V * blocks,)
    coef_ptr,  # (V, blocks, ROWS + 1, BLOCK_M) float32, see `coefficient_shape`
    count,
    splits,
    stride_split,
    M,
    J,
    stride_pj,
    stride_pm,
    stride_wj,
    stride_wm,
    COUNT_ON_DEVICE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    UNBIASED: tl.constexpr,
    SCALE_BY_N: tl.constexpr,
    REDUCE: tl.constexpr,
    EQUIDISTANT: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, BLOCK_M)
    m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]  # (1, BLOCK_M)
    view = (pid // blocks).to(tl.int64)
    table_ptr += view * ROWS * M
    lane = tl.arange(0, BLOCK_M)[None, :]
    coef_ptr += pid.to(tl.int64) * ((ROWS + 1) * BLOCK_M) + lane
    if COUNT_ON_DEVICE:
        count = tl.load(count_ptr)
    pair = tl.arange(0, PAIRS)[:, None]  # (PAIRS, 1)
    inside = m < M
    coef_factor = tl.full((1, BLOCK_M), 1.0, tl.float32)
    if HAS_SCALE:
        coef_factor = tl.load(scale_ptr + m, mask=inside, other=0.0)
    if not SCALE_BY_N:
        coef_factor = _divide(coef_factor, count)

    if EQUIDISTANT:
        W: tl.constexpr = 1 + 2 * B
        a, b = pair // (B + 1), pair % (B + 1)
        plus, minus = a * W + b, a * W - b
        row_cos, row_sin = tl.maximum(2 * a - 1, 0) * W, 2 * a * W
        cc_row, cs_row, sc_row, ss_row = row_cos + b, row_cos + B + b, row_sin + b, row_sin + B + b
        cc_rows = (a <= G) & (lane >= 0)
        cs_rows = cc_rows & (b > 0)
        sc_rows = cc_rows & (a > 0)
        ss_rows = cs_rows & (a > 0)
    else:
        plus = pair
        cc_row, sc_row = 2 * pair, 2 * pair + 1
        cc_rows = (pair < J) & (lane >= 0)
        sc_rows = cc_rows

    cc = _table_sums(table_ptr, cc_row * M + m, cc_rows & inside, splits, stride_split)
    sc = _table_sums(table_ptr, sc_row * M + m, sc_rows & inside, splits, stride_split)
    cos_sum, sin_sum = cc, sc
    if EQUIDISTANT:
        cs = _table_sums(table_ptr, cs_row * M + m, cs_rows & inside, splits, stride_split)
        ss = _table_sums(table_ptr, ss_row * M + m, ss_rows & inside, splits, stride_split)
        cos_sum, sin_sum = cc - ss, sc + cs
    mask = cc_rows & inside & (plus < J)
    t = tl.load(t_ptr + plus, mask=plus < J, other=0.0)
    phi = tl.load(phi_ptr + plus * stride_pj + m * stride_pm, mask=mask, other=0.0)
    weight = tl.load(weights_ptr + plus * stride_wj + m * stride_wm, mask=mask, other=0.0)
    # Masked knots have weight 0 and sums of finite numbers, or of NaN where the whole column is NaN.
    value, alpha, beta = _knot(cos_sum, sin_sum, t, phi, weight, count, UNBIASED)
    if EQUIDISTANT:
        mask = ss_rows & inside & (minus < J)
        t = tl.load(t_ptr + minus, mask=(a > 0) & (minus < J), other=0.0)
        phi = tl.load(phi_ptr + minus * stride_pj + m * stride_pm, mask=mask, other=0.0)
        weight = tl.load(weights_ptr + minus * stride_wj + m * stride_wm, mask=mask, other=0.0)
        value_minus, alpha_minus, beta_minus = _knot(cc + ss, sc - cs, t, phi, weight, count, UNBIASED)
        value += value_minus
        peak = _store(coef_ptr, cc_row, (alpha + alpha_minus) * coef_factor, cc_rows, inside, BLOCK_M)
        new = _store(coef_ptr, ss_row, (alpha_minus - alpha) * coef_factor, ss_rows, inside, BLOCK_M)
        peak = tl.maximum(peak, new)
        new = _store(coef_ptr, sc_row, (beta + beta_minus) * coef_factor, sc_rows, inside, BLOCK_M)
        peak = tl.maximum(peak, new)
        new = _store(coef_ptr, cs_row, (beta - beta_minus) * coef_factor, cs_rows, inside, BLOCK_M)
        peak = tl.maximum(peak, new)
    else:
        peak = _store(coef_ptr, cc_row, alpha * coef_factor, cc_rows, inside, BLOCK_M)
        peak = tl.maximum(peak, _store(coef_ptr, sc_row, beta * coef_factor, sc_rows, inside, BLOCK_M))
    tl.store(coef_ptr + ROWS * BLOCK_M, tl.zeros((1, BLOCK_M), tl.float32) + tl.max(peak))

    statistic = tl.sum(value, 0)[None, :]
    if SCALE_BY_N:
        statistic *= count
    if REDUCE:
        tl.store(value_ptr + pid, tl.sum(tl.where(inside, statistic, 0.0)))
    else:
        tl.store(value_ptr + view * M + m, statistic, mask=inside)


@triton.jit
def _sum_kernel(
    in_ptr,  # (count,) float32
    out_ptr,  # () float32
    count,
    factor,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(in_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr, tl.sum(total) * factor)


def statistic(
    table: Tensor,
    count: float | Tensor,
    scale: Tensor | None,
    t: Tensor,
    phi: Tensor,
    weights: Tensor,
    plan: Plan,
    *,
    unbiased: bool,
    scale_by_n: bool,
    factor: float | None,
) -> tuple[Tensor, Tensor]:
    """Statistic of every view and direction, or its sum, and the coefficients of dT/dp.

    Args:
        table: sums of the products, shape (splits, V, rows, M), float32.
        count: samples behind the table, a number or a 0-dim float32 tensor on the device.
        scale: what the columns of A were multiplied with, shape (M,), or None.
        t: knots, shape (J,); phi, weights: shape (J,) or (J, M); float32.
        plan: layout of the table.
        unbiased, scale_by_n: as in `lejepa_fast.sigreg`.
        factor: None for T (V, M), else its sum over views and directions times this number.

    Returns:
        (T or the 0-dim sum, coefficients by `coefficient_shape` with `scale` multiplied in), float32.
    """
    splits, views, rows, M = table.shape
    coef = empty(table, coefficient_shape(views, M, plan), torch.float32)
    blocks = views * coef.shape[1]
    value = empty(table, (views, M) if factor is None else (blocks,), torch.float32)
    on_device = isinstance(count, Tensor)
    strides = [s for p in (phi, weights) for s in (p.stride(0), p.stride(1) if p.dim() == 2 else 0)]
    number = 0.0 if on_device else float(count)
    read = {"table_ptr": table, "t_ptr": t, "phi_ptr": phi, "weights_ptr": weights}
    read |= {"count_ptr": count if isinstance(count, Tensor) else table}
    read |= {"scale_ptr": table if scale is None else scale}
    flags = (on_device, scale is not None, unbiased, scale_by_n, factor is not None)

    def describe() -> tuple[int, dict[str, Any]]:
        pairs = triton.next_power_of_2((plan.G + 1) * (plan.B + 1) if plan.equidistant else plan.J)
        sizes = (number, splits, table.stride(0), M, plan.J, *strides)
        values = (*sizes, *flags, plan.equidistant, plan.B, plan.G, rows, pairs, COEF_BLOCK)
        names = _sigreg_statistic_kernel.arg_names[-len(values) :]
        return blocks, {**dict(zip(names, values, strict=True)), **OPTIONS, "num_warps": 4}

    problem = (table.shape, table.stride(), table.device, number, *strides, flags, plan)
    with kernel_device(table):
        launch(_sigreg_statistic_kernel, problem, read | {"value_ptr": value, "coef_ptr": coef}, describe)
        if factor is None:
            return value, coef
        total = empty(table, (), torch.float32)

        def describe_sum() -> tuple[int, dict[str, Any]]:
            return 1, {"count": blocks, "factor": factor, "BLOCK": _SUM_BLOCK, **OPTIONS, "num_warps": 4}

        launch(_sum_kernel, (blocks, factor, table.device), {"in_ptr": value, "out_ptr": total}, describe_sum)
    return total, coef
