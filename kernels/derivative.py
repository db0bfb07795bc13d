"""dT/dp of a tile of projections, from the coefficients of `epilogue.py` (maths: `phases.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .phases import (
    baby_steps,
    complex_mul,
    complex_square,
    cos_sin,
    join_columns,
    replace_front,
    split_columns,
    stride_from_babies,
)
from .table import COEF_BLOCK

_COEF_BLOCK = tl.constexpr(COEF_BLOCK)


@triton.jit
def coefficient_pointers(coef_ptr, m, M, ROWS: tl.constexpr):
    """The first coefficient of each direction m, (BLOCK_M, 1); the next ones follow COEF_BLOCK apart.

    Beyond M stand those of the last direction: what comes of them meets directions that are 0.
    """
    m = tl.minimum(m, M - 1)
    offsets = m // _COEF_BLOCK * ((ROWS + 1) * _COEF_BLOCK) + m % _COEF_BLOCK
    return coef_ptr + offsets[:, None]


@triton.jit
def normalizing_power(coef_ptr, views, M, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """The powers of two that take dT/dp of `views`, (COUNT,), to the upper end of float16; (COUNT, 1).

    |dT/dp| <= ROWS * peak, the largest coefficient of the view; times the power it is below 2**15. Within
    2**100 either way its inverse is exact, and both leave float32 room for what they multiply.
    """
    STRIDE: tl.constexpr = (ROWS + 1) * _COEF_BLOCK
    blocks = tl.cdiv(M, _COEF_BLOCK)
    coef_ptrs = coef_ptr + (views * blocks)[:, None] * STRIDE + ROWS * _COEF_BLOCK
    peaks = tl.zeros((COUNT, 16), tl.float32)
    for first in range(0, blocks, 16):
        block = (first + tl.arange(0, 16))[None, :]
        peaks = tl.maximum(peaks, tl.load(coef_ptrs + block * STRIDE, mask=block < blocks, other=0.0))
    bound = tl.max(peaks, 1)[:, None] * ROWS
    exponent = bound.to(tl.int32, bitcast=True) >> 23  # biased by 127; bound < 2**(exponent - 126)
    power = tl.minimum(tl.maximum(127 + 15 + 126 - exponent, 27), 227)
    return (power << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_coefficients(coef_ptrs, COUNT: tl.constexpr):
    """The first COUNT coefficients of every direction, a tuple of (BLOCK_M, 1)."""
    coef = ()
    for i in tl.static_range(COUNT):
        coef = coef + (_coefficient((), coef_ptrs, i),)
    return coef


@triton.jit
def _coefficient(coef, coef_ptrs, INDEX: tl.constexpr):
    if len(coef) > 0:  # noqa: SIM108 - Triton takes the branch while it compiles
        value = coef[INDEX]
    else:
        value = tl.load(coef_ptrs + INDEX * _COEF_BLOCK)
    return value


@triton.jit
def _table_row(babies, coef, coef_ptrs, ROW: tl.constexpr, B: tl.constexpr):
    """sum over c of coef[ROW, c] * baby[c], baby[0] = 1."""
    FIRST: tl.constexpr = ROW * (1 + 2 * B)
    total = _coefficient(coef, coef_ptrs, FIRST)
    for b in tl.static_range(2 * B):
        total = tl.fma(_coefficient(coef, coef_ptrs, FIRST + b + 1), babies[b], total)
    return total


@triton.jit
def _series(
    p,  # (BLOCK_M, LANES)
    coef,  # `load_coefficients`, or () to load each where it is used
    coef_ptrs,  # (BLOCK_M, 1)
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
    total = _table_row(babies, coef, coef_ptrs, 0, B)
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
            total = tl.fma(c_a, _table_row(babies, coef, coef_ptrs, 2 * g + 1, B), total)
            total = tl.fma(s_a, _table_row(babies, coef, coef_ptrs, 2 * g + 2, B), total)
    return total


@triton.jit
def _knot_series(p, coef_ptrs, t_ptr, f_hi, f_lo, J):
    """dT/dp by a sine and cosine for every knot, for a whole tile of projections."""
    total = tl.zeros_like(p)
    for j in range(J):
        t = tl.load(t_ptr + j)
        h_hi = f_hi * t
        c, s = cos_sin(p, h_hi, tl.fma(f_hi, t, -h_hi) + f_lo * t)
        total = tl.fma(_coefficient((), coef_ptrs, 0), c, total)
        total = tl.fma(_coefficient((), coef_ptrs, 1), s, total)
        coef_ptrs += 2 * _COEF_BLOCK
    return total


@triton.jit
def derivative(
    p,
    coef,
    coef_ptrs,
    t_ptr,
    f_hi,
    f_lo,
    g_hi,
    g_lo,
    J,
    sub_tiles,
    sub_tile_stride,  # of the coefficients: 0, which the compiler does not know, see below
    EQUIDISTANT: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
    SUB_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):
    """dT/dp of a tile of projections (BLOCK_M, BLOCK_N), one sub-tile at a time."""
    if EQUIDISTANT:
        parts = split_columns(p, BLOCK_M, BLOCK_N, LANES)
        COUNT: tl.constexpr = BLOCK_N // LANES // SUB_TILES
        for _ in range(sub_tiles):
            done = ()
            for i in tl.static_range(COUNT):
                part = _series(parts[i], coef, coef_ptrs, f_hi, f_lo, g_hi, g_lo, B, G, FAR)
                done = done + (part,)
            # Pointers that move are read in every turn. Else all coefficients would be read before the first
            # one and stay in registers, which `coef` is for.
            coef_ptrs += sub_tile_stride
            parts = replace_front(parts, done)
        dp = join_columns(parts, BLOCK_M, BLOCK_N, LANES)
    else:
        dp = _knot_series(p, coef_ptrs, t_ptr, f_hi, f_lo, J)
    return dp
