"""Forward kernel: sums of the table's products over samples, projections not stored (maths: `phases.py`).

A program takes BLOCK_M directions, a range of samples of one view (a split) and a chunk of the table. It
projects BLOCK_N samples at a time on the tensor cores and accumulates the products in registers. It writes
its partial table once, so two runs agree bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import launch_best
from .configs import Config, Tile, operands, problem_of
from .phases import (
    LANES,
    baby_steps,
    complex_mul,
    complex_square,
    cos_sin,
    here,
    load_tiles,
    multiply,
    project,
    scaled_factor,
    split_columns,
    stride_from_babies,
)
from .runtime import empty, kernel_device, launch
from .table import COEF_BLOCK, Plan, count_splits

# int32 counts samples (the end of a split, less than twice as far, must fit too) and the entries of a view's
# table.
MAX_SAMPLES = 1 << 30
MAX_TABLE = (1 << 31) - 1


@triton.jit
def _add_products(
    sums,
    p,
    part_mask,
    factors_hi,  # of `cos_sin`: for a baby step, then for the first giant step
    factors_lo,
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
    MASK: tl.constexpr,
):
    """`sums` plus the products of one column of samples; p and `part_mask` have shape (BLOCK_M, LANES)."""
    c1, s1 = cos_sin(p, factors_hi[0], factors_lo[0])
    babies = baby_steps(c1, s1, B)
    giants = ()
    if FAR:
        # Giant steps far from 0 start from their own sine and cosine: ten powers lose a digit.
        c_a, s_a = cos_sin(p, factors_hi[1], factors_lo[1])
        c7, s7 = stride_from_babies(babies)
        c_b, s_b = complex_mul(c_a, s_a, c7, s7)
        giants = (c_a, s_a, c_b, s_b)
    elif G > 0:
        c_a, s_a = stride_from_babies(babies)
        giants = (c_a, s_a)
        if G > 1:
            c_b, s_b = complex_square(c_a, s_a)
            giants = (c_a, s_a, c_b, s_b)
    if MASK:
        babies = _masked(babies, part_mask)
        giants = _masked(giants, part_mask)
    new = ()
    for b in tl.static_range(2 * B):
        new = new + (sums[b] + babies[b],)
    for r in tl.static_range(2 * G):
        new = new + (sums[(r + 1) * (1 + 2 * B) - 1] + giants[r],)
        for b in tl.static_range(2 * B):
            new = new + (tl.fma(giants[r], babies[b], sums[(r + 1) * (1 + 2 * B) + b]),)
    return new


@triton.jit
def _masked(values, mask):
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (tl.where(mask, values[i], 0.0),)
    return out


@triton.jit
def _add_knots(sums, p, part_mask, factors_hi, factors_lo, MASK: tl.constexpr):
    """`sums` plus cosine and sine of every knot of the chunk."""
    new = ()
    for j in tl.static_range(len(factors_hi)):
        c, s = cos_sin(p, factors_hi[j], factors_lo[j])
        if MASK:
            c = tl.where(part_mask, c, 0.0)
            s = tl.where(part_mask, s, 0.0)
        new = new + (sums[2 * j] + c, sums[2 * j + 1] + s)
    return new


@triton.jit
def _add_tile(
    sums,
    p,
    valid,  # (BLOCK_M, BLOCK_N) int32, 0 for samples outside the batch; read with MASK
    factors_hi,
    factors_lo,
    sub_tiles,
    EQUIDISTANT: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    FAR: tl.constexpr,
    MASK: tl.constexpr,
    SUB_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`sums` plus a tile of projections p (BLOCK_M, BLOCK_N), one sub-tile at a time."""
    parts = split_columns(p, BLOCK_M, BLOCK_N)
    masks = parts
    if MASK:
        masks = split_columns(valid, BLOCK_M, BLOCK_N)
    COUNT: tl.constexpr = BLOCK_N // LANES // SUB_TILES
    for _ in range(sub_tiles):
        for i in tl.static_range(COUNT):
            mask = masks[i] != 0
            if EQUIDISTANT:
                sums = _add_products(sums, parts[i], mask, factors_hi, factors_lo, B, G, FAR, MASK)
            else:
                sums = _add_knots(sums, parts[i], mask, factors_hi, factors_lo, MASK)
        if SUB_TILES > 1:
            parts = parts[COUNT:] + parts[:COUNT]
            if MASK:
                masks = masks[COUNT:] + masks[:COUNT]
    return sums


# Not specialized: 1 or a multiple of 16 would compile another kernel without making it faster.
@triton.jit(do_not_specialize=["views", "splits"])
def _sigreg_fwd_kernel(
    x_ptr,  # (V, N, K)
    a_ptr,  # (K, M)
    scale_ptr,  # (M,) float32, multiplies the columns of A
    t_ptr,  # (J,) float32, direct path
    out_ptr,  # (splits, V, rows, M) float32
    views,
    N,
    K: tl.constexpr,  # compiled in, as the next stride, for short addresses
    M,
    J,
    factor_hi,
    factor_lo,
    splits,
    split_samples,  # a multiple of BLOCK_N
    sub_tiles,  # SUB_TILES, at run time
    stride_xv,
    stride_xn: tl.constexpr,
    stride_xk,
    stride_ak,
    stride_am,
    HAS_SCALE: tl.constexpr,
    EQUIDISTANT: tl.constexpr,
    B: tl.constexpr,  # baby steps
    G: tl.constexpr,  # giant steps of a chunk
    ROWS: tl.constexpr,  # rows of the whole table
    CHUNKS: tl.constexpr,
    CHUNK_KNOTS: tl.constexpr,  # direct path
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,  # tiles that hold the directions during the whole program, or 0
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N
    SUB_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighboring programs share samples, so that their tile of x comes from the L2 cache.
    pid = tl.program_id(0)
    m_blocks = tl.cdiv(M, BLOCK_M)
    m0 = (pid % m_blocks) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    pid = pid // m_blocks
    chunk = pid % CHUNKS
    pid = pid // CHUNKS
    split = pid % splits
    view = pid // splits

    f_hi, f_lo = scaled_factor(factor_hi, factor_lo, scale_ptr, m, M, HAS_SCALE)
    factors_hi = (f_hi,)
    factors_lo = (f_lo,)
    zero = tl.zeros((BLOCK_M, LANES), tl.float32)
    sums = ()
    if EQUIDISTANT:
        COUNT: tl.constexpr = (1 + 2 * G) * (1 + 2 * B) - 1
        if CHUNKS > 1:
            first = ((2 * chunk + 1) * (2 * B + 1)).to(tl.float32)
            g_hi = f_hi * first
            factors_hi = (f_hi, g_hi)
            factors_lo = (f_lo, tl.fma(f_hi, first, -g_hi) + f_lo * first)
    else:
        COUNT: tl.constexpr = 2 * CHUNK_KNOTS
        factors_hi = ()
        factors_lo = ()
        for j in tl.static_range(CHUNK_KNOTS):
            knot = chunk * CHUNK_KNOTS + j
            t = tl.load(t_ptr + knot, mask=knot < J, other=0.0)
            h_hi = f_hi * t
            factors_hi = factors_hi + (h_hi,)
            factors_lo = factors_lo + (tl.fma(f_hi, t, -h_hi) + f_lo * t,)
    for _ in tl.static_range(COUNT):
        sums = sums + (zero,)

    x_ptr += view.to(tl.int64) * stride_xv
    a = ()
    if RESIDENT > 0:
        directions = tl.arange(0, BLOCK_M)[:, None]
        a = load_tiles(a_ptr, directions, m0, M, K, stride_am, stride_ak, BLOCK_K, RESIDENT, EVEN_K, True)
    start = split * split_samples
    stop = tl.minimum(N, start + split_samples)
    full_stop = stop if EVEN_N else start + (stop - start) // BLOCK_N * BLOCK_N
    valid = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    samples = tl.arange(0, BLOCK_N)[None, :]
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    LEAD: tl.constexpr = BLOCK_N if RESIDENT > 0 else 0
    for n0 in range(start - tl.minimum(LEAD, full_stop - start), full_stop, BLOCK_N):
        if RESIDENT > 0:
            # Load the next tile, sum this one, project the next. First there is none to sum; the tile after
            # the last is not used.
            ahead = tl.minimum(n0 + BLOCK_N, full_stop - BLOCK_N)
            x = load_tiles(
                x_ptr, samples, ahead, N, K, stride_xn, stride_xk, BLOCK_K, RESIDENT, EVEN_K, False
            )
        else:
            n = n0 + tl.arange(0, BLOCK_N)
            p = project(x_ptr, a_ptr, m, n, N, K, M, stride_xn, stride_xk, stride_ak, stride_am,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, False, PRECISION)  # fmt: skip
        sums = _add_tile(sums, p, valid, factors_hi, factors_lo, tl.where(n0 < start, 0, sub_tiles),
            EQUIDISTANT, B, G, CHUNKS > 1, False, SUB_TILES, BLOCK_M, BLOCK_N)  # fmt: skip
        if RESIDENT > 0:
            p = multiply(a, here(x), BLOCK_M, BLOCK_N, RESIDENT, PRECISION)
    if not EVEN_N:
        for n0 in range(full_stop, stop, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            if RESIDENT > 0:
                x = load_tiles(
                    x_ptr, samples, n0, N, K, stride_xn, stride_xk, BLOCK_K, RESIDENT, EVEN_K, True
                )
                p = multiply(a, x, BLOCK_M, BLOCK_N, RESIDENT, PRECISION)
            else:
                p = project(x_ptr, a_ptr, m, n, N, K, M, stride_xn, stride_xk, stride_ak, stride_am,
                    BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, True, PRECISION)  # fmt: skip
            valid = tl.broadcast_to((n < N)[None, :].to(tl.int32), (BLOCK_M, BLOCK_N))
            sums = _add_tile(sums, p, valid, factors_hi, factors_lo, sub_tiles, EQUIDISTANT, B, G,
                CHUNKS > 1, True, SUB_TILES, BLOCK_M, BLOCK_N)  # fmt: skip

    out_ptr += (split.to(tl.int64) * views + view) * ROWS * M + m
    if EQUIDISTANT:
        # Sum i is entry i + 1 of the chunk's table: row 0 is shared, the others follow chunk by chunk.
        W: tl.constexpr = 1 + 2 * B
        shared = m < tl.where(chunk == 0, M, 0)
        tl.store(out_ptr, tl.zeros((BLOCK_M,), tl.float32) + (stop - start), mask=shared)
        for i in tl.static_range(2 * B):
            tl.store(out_ptr + (i + 1) * M, tl.sum(sums[i], 1), mask=shared)
        for i in tl.static_range(2 * B, COUNT):
            row = i + 1 + chunk * (2 * G * W)
            tl.store(out_ptr + row * M, tl.sum(sums[i], 1), mask=m < tl.where(row < ROWS, M, 0))
    else:
        for i in tl.static_range(COUNT):
            row = i + chunk * (2 * CHUNK_KNOTS)
            tl.store(out_ptr + row * M, tl.sum(sums[i], 1), mask=m < tl.where(row < ROWS, M, 0))


def table_sums(
    x: Tensor, A: Tensor, scale: Tensor | None, t: Tensor, plan: Plan, config: Config, precision: str
) -> Tensor:
    """Partial tables of every view.

    Args:
        x: embeddings, shape (V, N, K), float32, bf16 or fp16, any strides.
        A: directions, shape (K, M). In the dtype of x both are multiplied on the tensor cores of that dtype,
            else as float32.
        scale: multiplies the columns of A, shape (M,) float32, or None.
        t: knots, shape (J,) float32; read on the device, and for arbitrary knots only.
        plan: layout of the table.
        config: tile sizes.
        precision: of float32 products: "ieee", "tf32x3" or "tf32".

    Returns:
        shape (splits, V, rows, M), float32, to be summed over the splits.

    Raises:
        ValueError: more samples or directions than int32 can count.
    """
    (views, N, K), M = x.shape, A.shape[1]
    if N > MAX_SAMPLES:
        raise ValueError(
            f"x: expected at most {MAX_SAMPLES} samples in a view for impl='triton', got N = {N}; "
            "use impl='torch'"
        )
    most = MAX_TABLE // (plan.rows + 1) - COEF_BLOCK
    if most < M:
        raise ValueError(
            f"A: expected at most {most} directions with {plan.J} knots for impl='triton', got {M}; "
            "use impl='torch'"
        )
    splits, split_samples = count_splits(views, N, M, plan.chunks, config.split)
    out = empty(x, (splits, views, plan.rows, M), torch.float32)

    problem = problem_of(x, A, scale, plan, precision)
    tensors = {"out_ptr": out, **operands(x, A, scale, t)}

    def run(tile: Tile) -> None:
        def describe() -> tuple[int, dict[str, Any]]:
            return views * triton.cdiv(M, tile.block_m) * plan.chunks * splits, {
                "views": views,
                "N": N,
                "splits": splits,
                "split_samples": split_samples,
                "sub_tiles": tile.sub_tiles,
                "G": plan.chunk_giants,
                "CHUNKS": plan.chunks,
                "CHUNK_KNOTS": plan.chunk_knots,
                "RESIDENT": tile.steps(K)[1],
                "EVEN_N": N % tile.block_n == 0,
                "SUB_TILES": tile.sub_tiles,
                **config.arguments(tile, x, A, scale, plan, precision),
            }

        launch(_sigreg_fwd_kernel, (tile, problem), tensors, describe)

    with kernel_device(x):
        launch_best(run, "forward", config, x, A, plan, precision)
    return out
