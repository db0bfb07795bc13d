"""Gradient of the statistic in x: projections recomputed, dT/dp in registers, dx on the tensor cores.

With the coefficients of `finish.py`, the derivative of T at a projection p is the series

    dT/dp = sum over table entries (r, c) of coef[r, c] * giant[r](p) * baby[c](p)         (see `series.py`)

and dx[n] = sum over m of dT/dp[n, m] * scale[m] * A[:, m]. One program owns BLOCK_N samples and walks over
all directions, so dx is a sum in a fixed order, held in registers as dx^T (K, BLOCK_N) while K fits.
For larger K the kernel writes dT/dp of a chunk of samples instead, and a matrix product follows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, Tile
from .layout import Plan
from .runtime import empty, kernel_device
from .series import (
    baby_steps,
    complex_mul,
    complex_square,
    cos_sin,
    dot,
    join_columns,
    load_directions,
    load_samples,
    project,
    scaled_factor,
    split_columns,
    stride_from_babies,
    to_dtype,
)


@triton.jit
def _table_row(babies, coef_ptrs, mask, ROW: tl.constexpr, B: tl.constexpr):
    """sum over c of coef[ROW, c] * baby[c], baby[0] = 1."""
    FIRST: tl.constexpr = ROW * (1 + 2 * B)
    total = tl.load(coef_ptrs + FIRST, mask=mask, other=0.0)
    for b in tl.static_range(2 * B):
        total = tl.fma(tl.load(coef_ptrs + (FIRST + b + 1), mask=mask, other=0.0), babies[b], total)
    return total


@triton.jit
def _series(p, coef_ptrs, mask, f_hi, f_lo, g_hi, g_lo, B: tl.constexpr, G: tl.constexpr, FAR: tl.constexpr):
    """dT/dp for projections p (BLOCK_M, LANES); `coef_ptrs` and `mask` have shape (BLOCK_M, 1)."""
    c1, s1 = cos_sin(p, f_hi, f_lo)
    babies = baby_steps(c1, s1, B)
    total = _table_row(babies, coef_ptrs, mask, 0, B)
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
            total = tl.fma(c_a, _table_row(babies, coef_ptrs, mask, 2 * g + 1, B), total)
            total = tl.fma(s_a, _table_row(babies, coef_ptrs, mask, 2 * g + 2, B), total)
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
def _sigreg_bwd_kernel(
    x_ptr,  # (V, N, K)
    a_ptr,  # (K, M)
    scale_ptr,  # (M,) float32, multiplies the columns of A
    t_ptr,  # (J,) float32, arbitrary knots
    coef_ptr,  # (V, M, ROWS) float32, scale included
    grad_ptr,  # float32: gradient of the loss (), or of T (V, M) with SLICE_GRAD
    out_ptr,  # dx (V, N, K); with STORE_DP dT/dp (views of this launch, n_stop - n_first, M)
    first_view,
    n_first,
    n_stop,
    K,
    M,
    J,
    factor_hi,
    factor_lo,
    giant_hi,
    giant_lo,
    out_factor,  # multiplies dx
    stride_xv,
    stride_xn,
    stride_xk,
    stride_ak,
    stride_am,
    stride_gv,
    stride_gm,
    HAS_SCALE: tl.constexpr,
    SLICE_GRAD: tl.constexpr,
    STORE_DP: tl.constexpr,
    EQUIDISTANT: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K unless STORE_DP
    SINGLE_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LANES: tl.constexpr = 4
    pid = tl.program_id(0)
    m_start = 0
    m_stop = M
    if STORE_DP:
        m_blocks = tl.cdiv(M, BLOCK_M)
        m_start = (pid % m_blocks) * BLOCK_M
        m_stop = m_start + 1
        pid = pid // m_blocks
    n_blocks = tl.cdiv(n_stop - n_first, BLOCK_N)
    n = n_first + (pid % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    launch_view = pid // n_blocks
    view = (first_view + launch_view).to(tl.int64)
    x_ptr += view * stride_xv
    coef_ptr += view * M * ROWS
    k = tl.arange(0, BLOCK_K)
    if not STORE_DP:
        x_ptrs = x_ptr + n[None, :].to(tl.int64) * stride_xn + k[:, None] * stride_xk
        x = load_samples(x_ptrs, n, k, n_stop, K, EVEN_K, True)
        dx = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)

    for m0 in range(m_start, m_stop, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        m_mask = (m < M)[:, None]
        coef_ptrs = coef_ptr + m[:, None] * ROWS
        f_hi, f_lo = scaled_factor(factor_hi, factor_lo, scale_ptr, m, M, HAS_SCALE)
        a_ptrs = a_ptr + m[:, None].to(tl.int64) * stride_am + k[None, :] * stride_ak
        if STORE_DP:
            a = tl.zeros((BLOCK_M, BLOCK_K), a_ptr.dtype.element_ty)
            if SINGLE_K:
                a = load_directions(a_ptrs, m, k, M, K, EVEN_K)
            p = project(x_ptr, a_ptr, a, m, n, n_stop, K, M, stride_xn, stride_xk, stride_ak, stride_am,
                BLOCK_M, BLOCK_N, BLOCK_K, SINGLE_K, EVEN_K, True, PRECISION)  # fmt: skip
        else:
            a = load_directions(a_ptrs, m, k, M, K, EVEN_K)
            p = dot(a, x, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if EQUIDISTANT:
            g_hi, g_lo = f_hi, f_lo
            if FAR:
                g_hi, g_lo = scaled_factor(giant_hi, giant_lo, scale_ptr, m, M, HAS_SCALE)
            parts = split_columns(p, BLOCK_M, BLOCK_N, LANES)
            columns = ()
            for i in tl.static_range(len(parts)):
                columns = columns + (_series(parts[i], coef_ptrs, m_mask, f_hi, f_lo, g_hi, g_lo, B, G, FAR),)
            dp = join_columns(columns, BLOCK_M, BLOCK_N, LANES)
        else:
            dp = _knot_series(p, coef_ptrs, t_ptr, m_mask, f_hi, f_lo, J)
        if SLICE_GRAD:
            dp *= tl.load(grad_ptr + view * stride_gv + m[:, None] * stride_gm, mask=m_mask, other=0.0)
        if STORE_DP:
            rows = launch_view.to(tl.int64) * (n_stop - n_first) + (n - n_first)
            out_ptrs = out_ptr + rows[None, :] * M + m[:, None]
            tl.store(out_ptrs, to_dtype(dp, out_ptr.dtype.element_ty), mask=m_mask & (n < n_stop)[None, :])
        elif SLICE_GRAD or x.dtype != a.dtype:
            dx = dot(tl.trans(a), dp, dx, PRECISION)  # in float32: the gradients may span any range
        else:
            dx = dot(tl.trans(a), to_dtype(dp, a.dtype), dx, PRECISION)

    if not STORE_DP:
        if not SLICE_GRAD:
            out_factor *= tl.load(grad_ptr)
        rows = view * n_stop + n
        out_ptrs = out_ptr + rows[None, :] * K + k[:, None]
        mask = (n < n_stop)[None, :] & (k < K)[:, None]
        tl.store(out_ptrs, to_dtype(dx * out_factor, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sigreg_dx_kernel(
    dp_ptr,  # (rows, M)
    a_ptr,  # (K, M)
    grad_ptr,  # () float32, without SLICE_GRAD
    out_ptr,  # (rows, K)
    rows,
    K,
    M,
    out_factor,
    stride_ak,
    stride_am,
    SLICE_GRAD: tl.constexpr,
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
    a_ptrs = a_ptr + m[:, None].to(tl.int64) * stride_am + k[None, :] * stride_ak
    dx = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        dp = tl.load(dp_ptrs, mask=(n < rows)[:, None] & (m < M - m0)[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=(m < M - m0)[:, None] & (k < K)[None, :], other=0.0)
        dx = dot(dp, a, dx, PRECISION)
        dp_ptrs += BLOCK_M
        a_ptrs += BLOCK_M * stride_am
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
        coef: coefficients from `finish`, shape (V, M, rows).
        x, A, scale, t, plan, config, precision: as in `forward.table_sums`.
    """
    (views, N, K), M = x.shape, A.shape[1]
    dx = empty(x, (views, N, K), x.dtype)
    if N == 0:
        return dx
    slice_grad = grad.dim() == 2
    common = _Launch(grad, factor, coef, x, A, scale, t, plan, precision, slice_grad)
    with kernel_device(x):
        if K <= config.fused_max_dim:
            block_k = max(16, triton.next_power_of_2(K))
            _launch(common, dx, config.fused, block_k, range(views), range(N), store_dp=False)
            return dx
        # Products of gradients per direction span any range: they stay in float32.
        dtype = A.dtype if A.dtype == x.dtype and not slice_grad else torch.float32
        chunk_views, chunk_samples = _chunk(views, N, M * dtype.itemsize)
        buffer = empty(x, (chunk_views * chunk_samples, M), dtype)
        block_k = min(config.gradient.block_k, max(16, triton.next_power_of_2(K)))
        for v in range(0, views, chunk_views):
            for n in range(0, N, chunk_samples):
                chunk = range(v, min(views, v + chunk_views)), range(n, min(N, n + chunk_samples))
                _launch(common, buffer, config.gradient, block_k, *chunk, store_dp=True)
                _launch_product(common, buffer, dx, config, *chunk)
    return dx


# Bytes of dT/dp at a time: large enough to fill a GPU many times over, small beside any batch.
_CHUNK_BYTES = 64 << 20
_CHUNK_STEP = 128


def _chunk(views: int, N: int, sample_bytes: int) -> tuple[int, int]:
    """Views and samples of a chunk: some whole views, or a part of one."""
    samples = max(1, _CHUNK_BYTES // sample_bytes)
    if samples >= N:
        return min(views, samples // N), N
    return 1, max(_CHUNK_STEP, samples // _CHUNK_STEP * _CHUNK_STEP)


class _Launch(NamedTuple):
    """What the kernels of one backward pass share."""

    grad: Tensor
    factor: float
    coef: Tensor
    x: Tensor
    A: Tensor
    scale: Tensor | None
    t: Tensor
    plan: Plan
    precision: str
    slice_grad: bool


def _launch(
    c: _Launch, out: Tensor, tile: Tile, block_k: int, views: range, samples: range, *, store_dp: bool
) -> None:
    plan, K, M = c.plan, c.x.shape[2], c.A.shape[1]
    giant_hi, giant_lo = plan.giant_factor
    programs = len(views) * triton.cdiv(len(samples), tile.block_n)
    if store_dp:
        programs *= triton.cdiv(M, tile.block_m)
    _sigreg_bwd_kernel[(programs,)](
        c.x,
        c.A,
        c.A if c.scale is None else c.scale,
        c.t,
        c.coef,
        c.grad,
        out,
        views.start,
        samples.start,
        samples.stop,
        K,
        M,
        plan.J,
        plan.factor_hi,
        plan.factor_lo,
        giant_hi,
        giant_lo,
        c.factor,
        *c.x.stride(),
        *c.A.stride(),
        *(c.grad.stride() if c.slice_grad else (0, 0)),
        HAS_SCALE=c.scale is not None,
        SLICE_GRAD=c.slice_grad,
        STORE_DP=store_dp,
        EQUIDISTANT=plan.equidistant,
        B=plan.B,
        G=plan.G,
        FAR=plan.chunks > 1,
        ROWS=plan.rows,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        SINGLE_K=block_k >= K,
        EVEN_K=K % block_k == 0,
        PRECISION=c.precision,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _launch_product(c: _Launch, dp: Tensor, dx: Tensor, config: Config, views: range, samples: range) -> None:
    K, M, tile = c.x.shape[2], c.A.shape[1], config.product
    rows = len(views) * len(samples)
    out = dx.view(-1, K)[views.start * dx.shape[1] + samples.start :]  # whole views, or a part of one
    _sigreg_dx_kernel[(triton.cdiv(rows, tile.block_n) * triton.cdiv(K, tile.block_k),)](
        dp,
        c.A,
        c.grad,
        out,
        rows,
        K,
        M,
        c.factor,
        *c.A.stride(),
        SLICE_GRAD=c.slice_grad,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PRECISION=c.precision,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
