"""The uniform numbers of `directions.py` on CPUs, by Numba: the same bits, much faster."""

from typing import Any

import numpy as np
import torch
from numba import njit, types, uint64
from torch import Tensor

_ROUNDS = 10
_LOW, _32, _8 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(8)
_MUL_0, _MUL_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_SCALE = np.float32(2.0**-24)


def _fill(seed, step, out):
    """Philox-4x32-10 of (column, row of out, step) by the key `seed`; out (4, rows, columns) float32."""
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            c0, c1, c2, c3 = np.uint64(column), np.uint64(row), step & _LOW, step >> _32
            k0, k1 = seed & _LOW, seed >> _32
            for _ in range(_ROUNDS):
                p0, p1 = c0 * _MUL_0, c2 * _MUL_1
                c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
                k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
            out[0, row, column] = np.float32(np.int64(c0 >> _8) + 1) * _SCALE
            out[1, row, column] = np.float32(np.int64(c1 >> _8)) * _SCALE
            out[2, row, column] = np.float32(np.int64(c2 >> _8) + 1) * _SCALE
            out[3, row, column] = np.float32(np.int64(c3 >> _8)) * _SCALE


_signature = types.void(uint64, uint64, types.float32[:, :, ::1])
_options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
try:
    _compiled = njit(_signature, cache=True, **_options)(_fill)
except RuntimeError:  # there is no folder that a cache can be written to
    _compiled = njit(_signature, **_options)(_fill)


def uniforms(quads: int, num_slices: int, step: int, seed: int) -> Tensor:
    """As `directions._uniforms`, for a step on the host."""
    out = np.empty((4, quads, num_slices), np.float32)
    _compiled(np.uint64(seed % (1 << 64)), np.uint64(step), out)
    return torch.from_numpy(out)
