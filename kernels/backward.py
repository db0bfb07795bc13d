"""Backward kernels: recompute projections, form dT/dp in registers, multiply by A^T on the tensor cores.

With the coefficients of `epilogue.py`, the derivative of T at a projection p is the series

    dT/dp = sum over table entries (r, c) of coef[r, c] * giant[r](p) * baby[c](p)         (see `phases.py`)

and dx[n] = sum over m of dT/dp[n, m] * scale[m] * A[:, m]. While K is small enough for dx^T (K, BLOCK_N) to
stay in registers, one program owns BLOCK_N samples and walks over all directions (`_sigreg_bwd_kernel`):
nothing of the size of the projections is stored. For larger K one kernel writes dT/dp of a chunk of samples
and another multiplies it by A^T (`_sigreg_dp_kernel`, `_sigreg_dx_kernel`). The order of all sums is fixed.

The product takes dT/dp in the dtype of x and A. float16 has a small range, while dT/dp depends on weights and
`scale_by_n`: with NORMALIZE it is multiplied by a power of two for each view, which is undone in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import launch_best
from .configs import Config, Tile, get_config, operands, problem_of
from .phases import (
    LANES,
    baby_steps,
    complex_mul,
    complex_square,
    cos_sin,
    dot,
    here,
    join_columns,
    load_tiles,
    multiply,
    project,
    scaled_factor,
    split_columns,
    stride_from_babies,
    to_dtype,
)
from .runtime import empty, kernel_device, launch
from .table import COEF_BLOCK, Plan, count_splits

# A table of up to two giant steps fits into the registers of a program.
_COEF_IN_REGISTERS = 35
# Bytes of dT/dp at a time: enough to fill a GPU many times, small beside a batch.
CHUNK_BYTES, CHUNK_STEP = 32 << 20, 128
_COEF_BLOCK = tl.constexpr(COEF_BLOCK)


@triton.jit
def _coefficient_pointers(coef_ptr, m, M, ROWS: tl.constexpr):
    """The first coefficient of each direction m, (BLOCK_M, 1); the next ones follow COEF_BLOCK apart.

    Beyond M it reads those of the last direction; their results are multiplied by directions that are 0.
    """
    m = tl.minimum(m, M - 1)
    offsets = m // _COEF_BLOCK * ((ROWS + 1) * _COEF_BLOCK) + m % _COEF_BLOCK
    return coef_ptr + offsets[:, None]


@triton.jit
def _normalizing_power(coef_ptr, views, M, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Powers of two (COUNT, 1) that scale dT/dp of `views` (COUNT,) to the upper end of float16.

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
def _load_coefficients(coef_ptrs, COUNT: tl.constexpr):
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
    coef,  # `_load_coefficients`, or () to load each where it is used
    coef_ptrs,  # (BLOCK_M, 1)
    factors,  # of `cos_sin`: (high, low) for a baby step, then for a giant step
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
):
    """dT/dp for projections p."""
    c1, s1 = cos_sin(p, factors[0], factors[1])
    babies = baby_steps(c1, s1, B)
    total = _table_row(babies, coef, coef_ptrs, 0, B)
    if G > 0:
        if FAR:
            c_s, s_s = cos_sin(p, factors[2], factors[3])
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
def _derivative(
    p,
    coef,
    coef_ptrs,
    t_ptr,
    factors,
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
):
    """dT/dp of a tile of projections (BLOCK_M, BLOCK_N), one sub-tile at a time."""
    if EQUIDISTANT:
        parts = split_columns(p, BLOCK_M, BLOCK_N)
        COUNT: tl.constexpr = BLOCK_N // LANES // SUB_TILES
        for _ in range(sub_tiles):
            done = ()
            for i in tl.static_range(COUNT):
                done = done + (_series(parts[i], coef, coef_ptrs, factors, B, G, FAR),)
            # Pointers that move are read for every sub-tile. Else the compiler would read all coefficients
            # before the first one and keep them in registers, which `coef` is for.
            coef_ptrs += sub_tile_stride
            parts = parts[COUNT:] + done
        dp = join_columns(parts, BLOCK_M, BLOCK_N)
    else:
        dp = _knot_series(p, coef_ptrs, t_ptr, factors[0], factors[1], J)
    return dp


# Not specialized: 1 or a multiple of 16 would compile another kernel without making it faster.
@triton.jit(do_not_specialize=["first_view", "splits", "sub_tile_stride"])
def _sigreg_dp_kernel(
    x_ptr,  # (V, N, K)
    a_ptr,  # (K, M)
    scale_ptr,  # (M,) float32, multiplies the columns of A
    t_ptr,  # (J,) float32, arbitrary knots
    coef_ptr,  # (V, blocks, ROWS + 1, _COEF_BLOCK) float32, scale included
    grad_ptr,  # float32: gradient of the loss (), or of T (V, M) with SLICE_GRAD
    out_ptr,  # dT/dp (views of this launch, n_stop - n_first, M), times the gradient with SLICE_GRAD
    first_view,
    n_first,
    n_stop,
    splits,
    split_samples,  # a multiple of BLOCK_N
    K: tl.constexpr,
    M,
    J,
    factor_hi,
    factor_lo,
    giant_hi,
    giant_lo,
    sub_tiles,  # SUB_TILES, at run time
    sub_tile_stride,
    stride_xv,
    stride_xn: tl.constexpr,
    stride_xk,
    stride_ak,
    stride_am,
    stride_gv,
    stride_gm,
    HAS_SCALE: tl.constexpr,
    SLICE_GRAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EQUIDISTANT: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,  # tiles that hold the directions during the whole program, or 0
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,  # n_stop - n_first is a multiple of BLOCK_N
    MASK_M: tl.constexpr,  # M is not a multiple of BLOCK_M
    COEF_IN_REGISTERS: tl.constexpr,
    SUB_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs are those of the forward kernel: BLOCK_M directions and a split of the samples of a view."""
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(M, BLOCK_M)
    m0 = (pid % m_blocks) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    pid = pid // m_blocks
    start = n_first + (pid % splits) * split_samples
    stop = tl.minimum(n_stop, start + split_samples)
    launch_view = (pid // splits).to(tl.int64)
    view = first_view + launch_view
    x_ptr += view * stride_xv
    if NORMALIZE:
        power = _normalizing_power(coef_ptr, view + tl.zeros((1,), tl.int64), M, ROWS, 1)
    coef_ptr += view * tl.cdiv(M, _COEF_BLOCK) * ((ROWS + 1) * _COEF_BLOCK)
    out_ptr += launch_view * (n_stop - n_first) * M
    m_mask = (m < M)[:, None]
    coef_ptrs = _coefficient_pointers(coef_ptr, m, M, ROWS)
    coef = ()
    if COEF_IN_REGISTERS:
        coef = _load_coefficients(coef_ptrs, ROWS)
    factors = scaled_factor(factor_hi, factor_lo, scale_ptr, m, M, HAS_SCALE)
    if FAR:
        factors = factors + scaled_factor(giant_hi, giant_lo, scale_ptr, m, M, HAS_SCALE)
    if SLICE_GRAD:
        grad = tl.load(grad_ptr + view * stride_gv + m[:, None] * stride_gm, mask=m_mask, other=0.0)
    a = ()
    samples = tl.arange(0, BLOCK_N)[None, :]
    if RESIDENT > 0:
        directions = tl.arange(0, BLOCK_M)[:, None]
        a = load_tiles(a_ptr, directions, m0, M, K, stride_am, stride_ak, BLOCK_K, RESIDENT, EVEN_K, MASK_M)
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    LEAD: tl.constexpr = BLOCK_N if RESIDENT > 0 else 0
    last = start + (stop - start - 1) // BLOCK_N * BLOCK_N
    for n0 in range(start - LEAD, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        if RESIDENT > 0:
            # As in `forward.py`; the first iteration stores nothing.
            ahead = tl.minimum(n0 + BLOCK_N, last)
            x = load_tiles(x_ptr, samples, ahead, n_stop, K, stride_xn, stride_xk,
                BLOCK_K, RESIDENT, EVEN_K, not EVEN_N)  # fmt: skip
        else:
            p = project(x_ptr, a_ptr, m, n, n_stop, K, M, stride_xn, stride_xk, stride_ak, stride_am,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, not EVEN_N, PRECISION)  # fmt: skip
        dp = _derivative(p, coef, coef_ptrs, t_ptr, factors, J, tl.where(n0 < start, 0, sub_tiles),
            sub_tile_stride, EQUIDISTANT, B, G, FAR, SUB_TILES, BLOCK_M, BLOCK_N)  # fmt: skip
        if SLICE_GRAD:
            dp *= grad
        if NORMALIZE:
            dp *= power
        out_ptrs = out_ptr + (n - n_first)[None, :].to(tl.int64) * M + m[:, None]
        inside = m_mask & ((n >= start) & (n < n_stop))[None, :]
        tl.store(out_ptrs, to_dtype(dp, out_ptr.dtype.element_ty), mask=inside)
        if RESIDENT > 0:
            p = multiply(a, here(x), BLOCK_M, BLOCK_N, RESIDENT, PRECISION)


@triton.jit(do_not_specialize=["sub_tile_stride"])
def _sigreg_bwd_kernel(
    x_ptr,  # (V, N, K)
    a_ptr,  # (K, M)
    scale_ptr,  # (M,) float32, multiplies the columns of A
    t_ptr,  # (J,) float32, arbitrary knots
    coef_ptr,  # (V, blocks, ROWS + 1, _COEF_BLOCK) float32, scale included
    grad_ptr,  # float32: gradient of the loss (), or of T (V, M) with SLICE_GRAD
    out_ptr,  # dx (V, N, K)
    N,
    K,
    M,
    J,
    factor_hi,
    factor_lo,
    giant_hi,
    giant_lo,
    out_factor,  # multiplies dx
    sub_tiles,  # SUB_TILES, at run time
    sub_tile_stride,
    stride_xv,
    stride_xn,
    stride_xk,
    stride_ak,
    stride_am,
    stride_gv,
    stride_gm,
    HAS_SCALE: tl.constexpr,
    SLICE_GRAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EQUIDISTANT: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,  # of BLOCK_K, that cover K
    EVEN_K: tl.constexpr,
    MASK_M: tl.constexpr,  # M is not a multiple of BLOCK_M
    SUB_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(N, BLOCK_N)
    n0 = (pid % n_blocks) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    view = (pid // n_blocks).to(tl.int64)
    x_ptr += view * stride_xv
    if NORMALIZE:
        power = _normalizing_power(coef_ptr, view + tl.zeros((1,), tl.int64), M, ROWS, 1)
    coef_ptr += view * tl.cdiv(M, _COEF_BLOCK) * ((ROWS + 1) * _COEF_BLOCK)
    samples, directions = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_M)[:, None]
    x = load_tiles(x_ptr, samples, n0, N, K, stride_xn, stride_xk, BLOCK_K, TILES, EVEN_K, True)
    dx = ()
    for _ in tl.static_range(TILES):
        dx = dx + (tl.zeros((BLOCK_K, BLOCK_N), tl.float32),)

    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        m_mask = (m < M)[:, None]
        coef_ptrs = _coefficient_pointers(coef_ptr, m, M, ROWS)
        factors = scaled_factor(factor_hi, factor_lo, scale_ptr, m, M, HAS_SCALE)
        if FAR:
            factors = factors + scaled_factor(giant_hi, giant_lo, scale_ptr, m, M, HAS_SCALE)
        a = load_tiles(a_ptr, directions, m0, M, K, stride_am, stride_ak, BLOCK_K, TILES, EVEN_K, MASK_M)
        p = multiply(a, x, BLOCK_M, BLOCK_N, TILES, PRECISION)
        dp = _derivative(p, (), coef_ptrs, t_ptr, factors, J, sub_tiles, sub_tile_stride,
            EQUIDISTANT, B, G, FAR, SUB_TILES, BLOCK_M, BLOCK_N)  # fmt: skip
        if SLICE_GRAD:
            dp *= tl.load(grad_ptr + view * stride_gv + m[:, None] * stride_gm, mask=m_mask, other=0.0)
        if NORMALIZE:
            dp *= power
        if not SLICE_GRAD and x[0].dtype == a[0].dtype:
            dp = to_dtype(dp, a[0].dtype)  # else in float32: the gradients may span any range
        added = ()
        for i in tl.static_range(TILES):
            added = added + (dot(tl.trans(a[i]), dp, dx[i], PRECISION),)
        dx = added

    if not SLICE_GRAD:
        out_factor *= tl.load(grad_ptr)
    k = tl.arange(0, BLOCK_K)
    out_ptrs = out_ptr + (view * N + n)[None, :] * K + k[:, None]
    for i in tl.static_range(TILES):
        out = dx[i] * (1.0 / power) if NORMALIZE else dx[i]
        mask = (n < N)[None, :] & (k < K - i * BLOCK_K)[:, None]
        tl.store(out_ptrs + i * BLOCK_K, to_dtype(out * out_factor, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_view", "view_rows", "rows"])
def _sigreg_dx_kernel(
    dp_ptr,  # (rows, M)
    a_ptr,  # (K, M)
    grad_ptr,  # () float32, without SLICE_GRAD
    coef_ptr,  # as above, with NORMALIZE
    out_ptr,  # (rows, K)
    first_view,
    view_rows,  # of this launch in each view
    rows,
    K,
    M,
    out_factor,
    stride_ak,
    stride_am,
    SLICE_GRAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = out_factor * grad * dp A^T for the samples of a chunk."""
    pid = tl.program_id(0)
    k_blocks = tl.cdiv(K, BLOCK_K)
    k = (pid % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = (pid // k_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    dp_ptrs = dp_ptr + n[:, None] * M + m[None, :]
    a_ptrs = a_ptr + m[:, None].to(tl.int64) * stride_am + k[None, :].to(tl.int64) * stride_ak
    dx = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        dp = tl.load(dp_ptrs, mask=(n < rows)[:, None] & (m < M - m0)[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=(m < M - m0)[:, None] & (k < K)[None, :], other=0.0)
        dx = dot(dp, a, dx, PRECISION)
        dp_ptrs += BLOCK_M
        a_ptrs += BLOCK_M * tl.cast(stride_am, tl.int64)
    if NORMALIZE:
        view = first_view + tl.minimum(n, rows - 1) // view_rows
        dx *= 1.0 / _normalizing_power(coef_ptr, view, M, TABLE_ROWS, BLOCK_N)
    if not SLICE_GRAD:
        out_factor *= tl.load(grad_ptr)
    mask = (n < rows)[:, None] & (k < K)[None, :]
    dx = to_dtype(dx * out_factor, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n[:, None] * K + k[None, :], dx, mask=mask)


def gradient(
    grad: Tensor,
    factor: float,
    coef: Tensor,
    x: Tensor,
    A: Tensor,
    scale: Tensor | None,
    t: Tensor,
    plan: Plan,
    config: Config,
    precision: str,
) -> Tensor:
    """Gradient in x, shape (V, N, K) in the dtype of x: `factor * grad * dT/dx`, summed over directions.

    Args:
        grad: gradient of the loss, a 0-dim tensor, or of T, shape (V, M); float32, any strides.
        factor: derivative of the loss by each T; 1 for a `grad` of shape (V, M).
        coef: coefficients from `epilogue.statistic`.
        x, A, scale, t, plan, config, precision: as in `forward.table_sums`.
    """
    (views, N, K), M = x.shape, A.shape[1]
    dx = empty(x, (views, N, K), x.dtype)
    if N == 0:
        return dx
    slice_grad = grad.dim() == 2
    normalize = x.dtype == A.dtype == torch.float16 and not slice_grad
    stride_gv, stride_gm = grad.stride() if slice_grad else (0, 0)

    def arguments(tile: Tile) -> dict[str, Any]:
        """Those that `_sigreg_dp_kernel` and `_sigreg_bwd_kernel` have in common."""
        sub_tiles = count_sub_tiles(tile, plan)
        return {
            "giant_hi": plan.giant_factor[0],
            "giant_lo": plan.giant_factor[1],
            "sub_tiles": sub_tiles,
            "sub_tile_stride": 0,
            "stride_gv": stride_gv,
            "stride_gm": stride_gm,
            "SLICE_GRAD": slice_grad,
            "NORMALIZE": normalize,
            "G": plan.G,
            "FAR": plan.chunks > 1,
            "MASK_M": M % tile.block_m != 0,
            "SUB_TILES": sub_tiles,
            **config.arguments(tile, x, A, scale, plan, precision),
        }

    problem = (problem_of(x, A, scale, plan, precision), factor, slice_grad, stride_gv, stride_gm)
    read = {"coef_ptr": coef, "grad_ptr": grad, **operands(x, A, scale, t)}

    def best(run: Callable[[Tile], None], kernel: str, config: Config = config) -> None:
        launch_best(run, kernel, config, x, A, plan, precision, slice_grad)

    def fused(tile: Tile) -> None:
        def describe() -> tuple[int, dict[str, Any]]:
            own = {"N": N, "out_factor": factor, "TILES": triton.cdiv(K, tile.steps(K)[0])}
            return views * triton.cdiv(N, tile.block_n), {**own, **arguments(tile)}

        launch(_sigreg_bwd_kernel, (tile, problem), {"out_ptr": dx, **read}, describe)

    def chunk(dp: Tensor, first_view: int, view_count: int, first: int, samples: int) -> None:
        """dT/dp, and from it dx, of some samples of some views: of a part of one view or of whole views."""
        splits, split_samples = count_splits(view_count, samples, M, 1, config.split)
        rows, out = view_count * samples, dx.view(-1, K)[first_view * N + first :]

        part = (problem, dp.dtype, first_view, view_count, first, samples)

        def projections(tile: Tile) -> None:
            def describe() -> tuple[int, dict[str, Any]]:
                return view_count * splits * triton.cdiv(M, tile.block_m), {
                    "first_view": first_view,
                    "n_first": first,
                    "n_stop": first + samples,
                    "splits": splits,
                    "split_samples": split_samples,
                    "RESIDENT": tile.steps(K)[1],
                    "EVEN_N": samples % tile.block_n == 0,
                    "COEF_IN_REGISTERS": _in_registers(plan),
                    **arguments(tile),
                }

            launch(_sigreg_dp_kernel, (tile, part), {"out_ptr": dp, **read}, describe)

        def product(tile: Tile) -> None:
            def describe() -> tuple[int, dict[str, Any]]:
                return triton.cdiv(rows, tile.block_n) * triton.cdiv(K, tile.block_k), {
                    "first_view": first_view,
                    "view_rows": samples,
                    "rows": rows,
                    "K": K,
                    "M": M,
                    "out_factor": factor,
                    "stride_ak": A.stride(0),
                    "stride_am": A.stride(1),
                    "SLICE_GRAD": slice_grad,
                    "NORMALIZE": normalize,
                    "TABLE_ROWS": plan.rows,
                    **tile.options(K, precision),
                    "BLOCK_K": tile.block_k,
                }

            tensors = {"dp_ptr": dp, "a_ptr": A, "grad_ptr": grad, "coef_ptr": coef, "out_ptr": out}
            launch(_sigreg_dx_kernel, (tile, part), tensors, describe)

        best(projections, "gradient")
        # float32 gradients with half-precision directions need the shared memory of float32.
        of_product = config if dp.dtype == A.dtype else get_config(dp.device, dp.itemsize)
        best(product, "product", of_product.for_directions(M))

    with kernel_device(x):
        if config.fuses(K, M, slice_grad=slice_grad):
            best(fused, "fused")
            return dx
        # Products of gradients per direction span any range: they stay in float32.
        dtype = A.dtype if A.dtype == x.dtype and not slice_grad else torch.float32
        most = max(1, CHUNK_BYTES // (M * dtype.itemsize))
        chunk_views = max(1, min(views, most // N))
        chunk_samples = min(N, max(CHUNK_STEP, most // CHUNK_STEP * CHUNK_STEP))
        dp = empty(x, (chunk_views * chunk_samples, M), dtype)
        for v in range(0, views, chunk_views):
            for n in range(0, N, chunk_samples):
                chunk(dp, v, min(chunk_views, views - v), n, min(chunk_samples, N - n))
    return dx


def count_sub_tiles(tile: Tile, plan: Plan) -> int:
    """Sub-tiles of a tile: twice as many where coefficients do not fit into registers."""
    twice = 2 * tile.sub_tiles * LANES.value <= tile.block_n and not _in_registers(plan)
    return tile.sub_tiles * (2 if twice else 1)


def _in_registers(plan: Plan) -> bool:
    return plan.equidistant and plan.rows <= _COEF_IN_REGISTERS
