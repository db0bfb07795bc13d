"""Models of the matrix units of GPUs, in float64 on the CPU: sums along K as they make them.

After Xie et al., "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores" (arXiv 2511.10909),
who compared such models with the hardware bit by bit. Finite numbers in the normal range only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class TensorCore(NamedTuple):
    """Adds the products of a group of dimensions, and the sum so far, at once.

    Attributes:
        group: 16-bit dimensions of a step; of tf32 half as many.
        bits: below the largest exponent, that the terms keep.
    """

    group: int
    bits: int


TENSOR_CORES = {
    "sm_80": TensorCore(8, 24),
    "sm_89": TensorCore(8, 24),
    "sm_90": TensorCore(16, 25),
    "sm_100": TensorCore(16, 25),
}
MODELS = (*TENSOR_CORES, "gfx942")


def multiply(target: str, a: Array, b: Array, acc: Array, precision: str) -> Array:
    """acc + a @ b as one instruction sequence of a target computes it.

    Args:
        target: one of `MODELS`.
        a, b: (M, K) and (K, N), of 16-bit values, or float32 values with another precision than "half".
        acc: (M, N), float32 values.
        precision: "half", or of float32 products: "tf32x3" (NVIDIA) or "ieee".
    """
    if precision not in ("half", "ieee") and (precision != "tf32x3" or target == "gfx942"):
        raise ValueError(
            f"precision: expected 'half', 'ieee' or NVIDIA's 'tf32x3', got {precision!r} on {target}"
        )
    if precision == "ieee":
        return _to_float32(acc + a @ b)
    if target == "gfx942":
        return _cdna3(a, b, acc)
    group, bits = TENSOR_CORES[target]
    if precision == "half":
        return _tensor_core(a, b, acc, group, bits)
    # Of three products the smallest first; the sum so far is added afterwards, in float32.
    high_a, high_b = _to_tf32(a), _to_tf32(b)
    low_a, low_b = _to_tf32(_to_float32(a - high_a)), _to_tf32(_to_float32(b - high_b))
    part = np.zeros_like(acc)
    for left, right in ((low_a, high_b), (high_a, low_b), (high_a, high_b)):
        part = _tensor_core(left, right, part, group // 2, bits)
    return _to_float32(acc + part)


def _tensor_core(a: Array, b: Array, acc: Array, group: int, bits: int) -> Array:
    exponent_a, exponent_b = _exponent(a), _exponent(b)
    for k in range(0, a.shape[1], group):
        step = slice(k, k + group)
        products = a[:, step, None] * b[None, step, :]
        exponent = (exponent_a[:, step, None] + exponent_b[None, step, :]).max(1)
        unit = np.ldexp(1.0, np.maximum(exponent, _exponent(acc)) - bits)
        total = np.trunc(products / unit[:, None, :]).sum(1) + np.trunc(acc / unit)
        acc = _cut_to_float32(total * unit)
    return acc


def _cdna3(a: Array, b: Array, acc: Array) -> Array:
    exponent_a, exponent_b = _exponent(a), _exponent(b)
    for k in range(0, a.shape[1], 8):
        step = slice(k, k + 8)
        products = a[:, step, None] * b[None, step, :]
        exponent = (exponent_a[:, step, None] + exponent_b[None, step, :]).max(1)
        unit = np.ldexp(1.0, exponent - 24)
        part = np.trunc(products / unit[:, None, :]).sum(1) * unit
        largest = np.maximum(exponent, _exponent(acc))
        fine, coarse = np.ldexp(1.0, largest - 31), np.ldexp(1.0, largest - 24)
        acc = _to_float32(np.floor(part / fine) * fine + np.floor(acc / coarse) * coarse)
    return acc


def _exponent(values: Array) -> NDArray[Any]:
    return np.where(values == 0, -126, np.frexp(values)[1] - 1)


def _to_float32(values: Array) -> Array:
    return values.astype(np.float32).astype(np.float64)


def _cut_to_float32(values: Array) -> Array:
    """Towards zero."""
    nearest = values.astype(np.float32)
    inner = np.nextafter(nearest, np.float32(0))
    return np.where(np.abs(nearest.astype(np.float64)) > np.abs(values), inner, nearest).astype(np.float64)


def _to_tf32(values: Array) -> Array:
    """To eleven bits, ties away from zero."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(np.copysign(np.floor(np.abs(fraction) * 2**11 + 0.5), fraction) / 2**11, exponent)
