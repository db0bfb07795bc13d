"""dT/dp of a tile of projections from the coefficients of `finish.py` (maths: `backward.py`, `series.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .series import (
    baby_steps,
    complex_mul,
    complex_square,
    cos_sin,
    join_columns,
    replace_front,
    split_columns,
    stride_from_babies,
)


@triton.jit
def load_coefficients(coef_ptrs, mask, COUNT: tl.constexpr):
    """The first COUNT coefficients of every direction, a tuple of (BLOCK_M, 1)."""
    coef = ()
    for i in tl.static_range(COUNT):
        coef = coef + (tl.load(coef_ptrs + i, mask=mask, other=0.0),)
    return coef


@triton.jit
def _coefficient(coef, coef_ptrs, mask, INDEX: tl.constexpr):
    if len(coef) > 0:  # noqa: SIM108 - Triton takes the branch while it compiles
        value = coef[INDEX]
    else:
        value = tl.load(coef_ptrs + INDEX, mask=mask, other=0.0)
    return value


@triton.jit
def _table_row(babies, coef, coef_ptrs, mask, ROW: tl.constexpr, B: tl.constexpr):
    """sum over c of coef[ROW, c] * baby[c], baby[0] = 1."""
    FIRST: tl.constexpr = ROW * (1 + 2 * B)
    total = _coefficient(coef, coef_ptrs, mask, FIRST)
    for b in tl.static_range(2 * B):
        total = tl.fma(_coefficient(coef, coef_ptrs, mask, FIRST + b + 1), babies[b], total)
    return total


@triton.jit
def _series(
    p,  # (BLOCK_M, LANES)
    coef,  # `load_coefficients`, or () to load each where it is used
    coef_ptrs,  # (BLOCK_M, 1)
    mask,  # (BLOCK_M, 1)
    f_hi,
    f_lo,
    g_hi,
    g_lo,
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
):
    """dT/dp for projections p."""
    c1, s1 = cos_sin(p, f_hi, f_lo)
    babies = baby_steps(c1, s1, B)
    total = _table_row(babies, coef, coef_ptrs, mask, 0, B)
    if G > 0:
        if FAR:
            c_s, s_s = cos_sin(p, g_hi, g_lo)
        else:
            c_s, s_s = stride_from_babies(babies)
        c_a, s_a = c_s, s_s
        for g in tl.static_range(G):
            if g == 1:
                c_a, s_a = complex_square(c_s, s_s)
            elif g > 1:
                c_a, s_a = complex_mul(c_a, s_a, c_s, s_s)
            total = tl.fma(c_a, _table_row(babies, coef, coef_ptrs, mask, 2 * g + 1, B), total)
            total = tl.fma(s_a, _table_row(babies, coef, coef_ptrs, mask, 2 * g + 2, B), total)
    return total


@triton.jit
def _knot_series(p, coef_ptrs, t_ptr, mask, f_hi, f_lo, J):
    """dT/dp by a sine and cosine for every knot, for a whole tile of projections."""
    total = tl.zeros_like(p)
    for j in range(J):
        t = tl.load(t_ptr + j)
        h_hi = f_hi * t
        c, s = cos_sin(p, h_hi, tl.fma(f_hi, t, -h_hi) + f_lo * t)
        total = tl.fma(tl.load(coef_ptrs + 2 * j, mask=mask, other=0.0), c, total)
        total = tl.fma(tl.load(coef_ptrs + 2 * j + 1, mask=mask, other=0.0), s, total)
    return total


@triton.jit
def derivative(
    p,
    coef,
    coef_ptrs,
    t_ptr,
    mask,
    f_hi,
    f_lo,
    g_hi,
    g_lo,
    J,
    turns,
    EQUIDISTANT: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):
    """dT/dp of a tile of projections (BLOCK_M, BLOCK_N), in `turns` turns."""
    if EQUIDISTANT:
        parts = split_columns(p, BLOCK_M, BLOCK_N, LANES)
        COUNT: tl.constexpr = BLOCK_N // LANES // TURNS
        for _turn in range(turns):
            done = ()
            for i in tl.static_range(COUNT):
                done = done + (_series(parts[i], coef, coef_ptrs, mask, f_hi, f_lo, g_hi, g_lo, B, G, FAR),)
            parts = replace_front(parts, done)
        dp = join_columns(parts, BLOCK_M, BLOCK_N, LANES)
    else:
        dp = _knot_series(p, coef_ptrs, t_ptr, mask, f_hi, f_lo, J)
    return dp
