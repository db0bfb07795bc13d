"""Random unit directions in one launch: the numbers of `lejepa_fast/directions.py`, which has the maths.

A program owns a block of columns. It draws their normals to get the norms and draws them again to write the
unit vectors: Philox is cheaper than memory traffic. Half-precision output is rounded, and the norm of the
ROUNDED column gives a float32 scale that makes it a unit vector again. So tensor cores multiply by exactly
known unit directions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .phases import cos_sin, to_dtype
from .runtime import OPTIONS, empty, kernel_device, launch

_BLOCK_Q = 16
_BLOCK_M = 16


@triton.jit
def _box_muller(word_1, word_2):
    """Two normals from two uint32 words."""
    u1 = ((word_1 >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08  # 2**-24; (0, 1]
    u2 = (word_2 >> 8).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * tl.log(u1))
    c, s = cos_sin(u2, 2.0, 0.0)
    return radius * c, radius * s


@triton.jit
def _normals(quad, m, step_lo, step_hi, seed):
    """Rows 4 quad .. 4 quad + 3 of columns m: four tensors of the broadcast shape."""
    zero = quad * 0 + m * 0
    w0, w1, w2, w3 = tl.philox(seed, m + zero, quad + zero, step_lo + zero, step_hi + zero)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit(do_not_specialize=["seed"])
def _directions_kernel(
    step_ptr,  # () int64
    out_ptr,  # (K, M)
    scale_ptr,  # (M,) float32: 1 / norm of the rounded column
    K,
    M,
    seed,
    BLOCK_Q: tl.constexpr,  # rows are drawn in fours
    BLOCK_M: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    step = tl.load(step_ptr)
    step_lo = step.to(tl.int32)
    step_hi = (step >> 32).to(tl.int32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    squares = tl.zeros((BLOCK_Q, BLOCK_M), tl.float32)
    for q0 in range(0, tl.cdiv(K, 4), BLOCK_Q):
        quad = q0 + tl.arange(0, BLOCK_Q)
        normals = _normals(quad[:, None], m[None, :], step_lo, step_hi, seed)
        for i in tl.static_range(4):
            value = tl.where((4 * quad + i < K)[:, None], normals[i], 0.0)
            squares += value * value
    norm = tl.sqrt_rn(tl.sum(squares, 0))
    zero = norm == 0.0  # K of 1 or 2, once in 2**24 columns: the first axis
    norm = tl.where(zero, 1.0, norm)

    squares = tl.zeros((BLOCK_Q, BLOCK_M), tl.float32)
    for q0 in range(0, tl.cdiv(K, 4), BLOCK_Q):
        quad = q0 + tl.arange(0, BLOCK_Q)
        normals = _normals(quad[:, None], m[None, :], step_lo, step_hi, seed)
        for i in tl.static_range(4):
            row = 4 * quad + i
            mask = (row < K)[:, None] & (m < M)[None, :]
            value = tl.where((row == 0)[:, None] & zero[None, :], 1.0, normals[i])
            value = to_dtype(tl.div_rn(value, norm[None, :] + value * 0.0), dtype)
            rounded = tl.where(mask, value.to(tl.float32), 0.0)
            squares += rounded * rounded
            tl.store(out_ptr + row[:, None].to(tl.int64) * M + m[None, :], value, mask=mask)
    norm = tl.where(m < M, tl.sqrt_rn(tl.sum(squares, 0)), 1.0)
    tl.store(scale_ptr + m, tl.div_rn(norm * 0.0 + 1.0, norm), mask=m < M)


def draw_directions(
    step: Tensor, dim: int, num_slices: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Directions A (dim, num_slices) in `dtype`, and the scale (num_slices,) that makes its columns unit.

    Args:
        step: 0-dim int64 tensor on the device; never read on the host.
        dim, num_slices: K and M.
        seed: signed 64-bit integer.
        dtype: float32, bf16 or fp16.
    """
    A = empty(step, (dim, num_slices), dtype)
    scale = empty(step, (num_slices,), torch.float32)

    def describe() -> tuple[int, dict[str, Any]]:
        numbers = {"K": dim, "M": num_slices, "seed": seed, "BLOCK_Q": _BLOCK_Q, "BLOCK_M": _BLOCK_M}
        return triton.cdiv(num_slices, _BLOCK_M), {**numbers, **OPTIONS, "num_warps": 4}

    tensors = {"step_ptr": step, "out_ptr": A, "scale_ptr": scale}
    with kernel_device(step):
        launch(_directions_kernel, (dim, num_slices, seed, dtype, step.device), tensors, describe)
    return A, scale
