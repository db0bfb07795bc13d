r"""What Numba compiles for CPUs: SIGReg sums and their gradient, and the random numbers of the directions.

The sums take float32 and equidistant knots. BLAS projects, Numba does the rest.

A slab of projections (directions, samples) stays in the cache between the matrix products and the compiled
loops below. The loops run on PyTorch's own OpenMP threads: a second pool would compete with the first, whose
threads spin for milliseconds after a product. One thread adds up a direction, in a fixed order, so that
results do not depend on the number of threads.

The mathematics is that of `streaming.py` with babies z^b, |b| <= 3, and giants Z_a = z^(7a) for any number of
knots. A table holds, for the giants 1, Z_1, Z_2, ..., a row for the real and one for the imaginary part, and
in columns 0 to 3 and 4 to 7 the real and imaginary parts of the babies 1, z, z^2, z^3.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from numba import carray, cfunc, njit, types, uint64
from numba.extending import intrinsic
from torch import Tensor

from .reference import full_precision

# Samples of a tile, directions of a slab: 4 MiB of projections.
_TILE_SAMPLES, _SLAB_SLICES = 2048, 512
# Samples whose powers stay in the L1 cache; their sums are added to the table together.
_CHUNK = 256
# Fewer projections for each thread are not worth waking it.
_LEAST_WORK = 1 << 14

_openmp = ctypes.CDLL(torch._C.__file__)  # also finds the symbols of the libraries that PyTorch is linked to
for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_openmp, _name), ctypes.c_void_p).value)
_thread_num: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads: Any = types.ExternalFunction("omp_get_num_threads", types.int32())
_run_on_threads = _openmp.GOMP_parallel
_run_on_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]

_JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
# The compiler may split sums into as many parts as a vector has. NaN and infinities keep their meaning.
_SUM: dict[str, Any] = {**_JIT, "fastmath": {"contract", "reassoc", "nsz"}}

# sin(pi q) = q S(q^2) and cos(pi q) = C(q^2) on |q| <= 1/2: each coefficient a float32, the next ones fitted
# to it, so that the polynomials are off by at most 8e-9.
_S0, _S1, _S2, _S3 = map(np.float32, (3.1415925, -5.1677022, 2.5499578, -0.59762526))
_S4, _C1, _C2, _C3 = map(np.float32, (0.07643315, -4.934802, 4.0587053, -1.3351616))
_C4, _C5 = map(np.float32, (0.23468372, -0.023963654))
_HALF, _ONE, _FOUR, _LIMIT = map(np.float32, (0.5, 1.0, 4.0, 0.5625))


def _make_fma(typing_context, a, b, c):
    """a b + c of float32 numbers, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, signature, arguments: builder.fma(*arguments)


_fma: Any = intrinsic(_make_fma)


@njit(**_JIT)
def _cos_sin(p, factor_hi, factor_lo, cos, sin):
    """Those of pi * (factor_hi + factor_lo) * p: NaN where p is not finite, bounded where p is huge."""
    for i in range(p.size):
        k = np.rint(p[i] * factor_hi)
        # The compiler would not make an FMA of the first, whose product it has already; only an FMA is exact.
        q = _fma(p[i], factor_lo, _fma(p[i], factor_hi, -k))
        q = -_LIMIT if q < -_LIMIT else q
        q = _LIMIT if q > _LIMIT else q
        half = k * _HALF
        sign = _ONE - _FOUR * (half - np.floor(half))  # -1 where k is odd
        u = q * q
        s = (((_S4 * u + _S3) * u + _S2) * u + _S1) * u + _S0
        c = ((((_C5 * u + _C4) * u + _C3) * u + _C2) * u + _C1) * u + _ONE
        cos[i], sin[i] = sign * c, sign * q * s


@njit(**_JIT)
def _multiply(cos, sin, by_cos, by_sin):
    for i in range(cos.size):
        c, s = cos[i], sin[i]
        cos[i], sin[i] = c * by_cos[i] - s * by_sin[i], s * by_cos[i] + c * by_sin[i]


@njit(inline="always", **_JIT)
def _square_and_cube(c, s):
    c2, s2 = c * c - s * s, (c + c) * s
    return c2, c2 * c - s2 * s, s2, s2 * c + c2 * s


@njit(**_SUM)
def _add_products(row, giant, cos, sin):
    """Add the sums over samples of a giant's part times {1, babies} to a row of the table."""
    t0 = t1 = t2 = t3 = t5 = t6 = t7 = np.float32(0)
    for i in range(cos.size):
        g, c, s = giant[i], cos[i], sin[i]
        c2, c3, s2, s3 = _square_and_cube(c, s)
        t0, t1, t2, t3 = t0 + g, t1 + g * c, t2 + g * c2, t3 + g * c3
        t5, t6, t7 = t5 + g * s, t6 + g * s2, t7 + g * s3
    for column, total in ((0, t0), (1, t1), (2, t2), (3, t3), (5, t5), (6, t6), (7, t7)):
        row[column] += total


@njit(**_JIT)
def _add_series(row, giant, cos, sin, out):
    """Add a giant's part times the series of {1, babies} with the coefficients of a row."""
    t0, t1, t2, t3 = np.float32(row[0]), np.float32(row[1]), np.float32(row[2]), np.float32(row[3])
    t5, t6, t7 = np.float32(row[5]), np.float32(row[6]), np.float32(row[7])
    for i in range(out.size):
        c, s = cos[i], sin[i]
        c2, c3, s2, s3 = _square_and_cube(c, s)
        out[i] += giant[i] * (t0 + t1 * c + t2 * c2 + t3 * c3 + t5 * s + t6 * s2 + t7 * s3)


@njit(**_JIT)
def _process(p, factors, table, work, backward):
    """Add a chunk's sums to the table, or overwrite p by the series whose coefficients the table holds."""
    n = p.size
    cos, sin, step_cos, step_sin = work[0, :n], work[1, :n], work[2, :n], work[3, :n]
    giant_cos, giant_sin = work[4, :n], work[5, :n]
    _cos_sin(p, factors[0], factors[1], cos, sin)
    _cos_sin(p, factors[2], factors[3], step_cos, step_sin)
    giant_cos[:], giant_sin[:] = 1, 0
    if backward:
        p[:] = 0
    for row in range(table.shape[0]):
        if row == 1:  # the imaginary part of 1
            continue
        if row > 1 and row % 2 == 0:
            _multiply(giant_cos, giant_sin, step_cos, step_sin)
        giant = giant_sin if row % 2 else giant_cos
        if backward:
            _add_series(table[row], giant, cos, sin, p)
        else:
            _add_products(table[row], giant, cos, sin)


@njit(**_JIT)
def _convert(table, t, sums, backward):
    """Add the table to sums of cos(ju) and sin(ju), (2, J), or to a table the series of their gradient."""
    for j in range(t.size):
        a = (j + 3) // 7
        b = abs(j - 7 * a)
        sign = _ONE if j >= 7 * a else -_ONE
        cos, sin = table[2 * a], table[2 * a + 1]
        if backward:  # d cos(t p)/dp = -t sin(t p) and d sin(t p)/dp = t cos(t p)
            alpha, beta = t[j] * sums[1, j], -t[j] * sums[0, j]
            cos[b] += alpha
            sin[4 + b] -= sign * alpha
            sin[b] += beta
            cos[4 + b] += sign * beta
        else:
            sums[0, j] += cos[b] - sign * sin[4 + b]
            sums[1, j] += sin[b] + sign * cos[4 + b]


def _process_slab(args):
    """Sums of a slab of projections, or their gradient, by one of the threads that run this together."""
    sizes = carray(args[0], 9, np.int64)
    directions, samples, first_sample, first_direction = sizes[0], sizes[1], sizes[2], sizes[3]
    V, N, J, M, backward = sizes[4], sizes[5], sizes[6], sizes[7], sizes[8] != 0
    factors, t = carray(args[1], 4, np.float32), carray(args[2], J, np.float32)
    projections = carray(args[3], (directions, samples), np.float32)
    sums = carray(args[4], (V, 2, J, M), np.float32)
    table, work = np.empty(((J + 2) // 7 * 2 + 2, 8)), np.empty((6, _CHUNK), np.float32)
    thread, threads = np.int64(_thread_num()), np.int64(_num_threads())
    for m in range(thread * directions // threads, (thread + 1) * directions // threads):
        start = 0
        while start < samples:
            view = (first_sample + start) // N
            stop = min(samples, (view + 1) * N - first_sample)
            table[:] = 0
            if backward:
                _convert(table, t, sums[view, :, :, first_direction + m], True)
            for chunk in range(start, stop, _CHUNK):
                p = projections[m, chunk : min(chunk + _CHUNK, stop)]
                _process(p, factors, table, work, backward)
            if not backward:
                _convert(table, t, sums[view, :, :, first_direction + m], False)
            start = stop


def _cached(compiler: Callable[..., Any], function: Callable[..., None]) -> Any:
    """Compile a function, and keep the machine code on the disk."""
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # there is no folder that a cache can be written to
        return compiler()(function)


_compiled_slab = _cached(partial(cfunc, types.void(types.CPointer(types.voidptr)), **_JIT), _process_slab)


def ecf_sums(x: Tensor, A: Tensor, t: Tensor, spacing: float) -> Tensor:
    """As `streaming.ecf_sums`, for `A` and `t` of float32 on the CPU and at least two knots."""
    sums = A.new_zeros(x.shape[0], 2, t.shape[0], A.shape[1])
    for _ in _processed_slabs(x, A, t, spacing, sums, backward=False):
        pass
    sums[:, 0, 0] = x.shape[1]
    return sums


def ecf_sums_backward(grad: Tensor, x: Tensor, A: Tensor, t: Tensor, spacing: float) -> Tensor:
    """As `streaming.ecf_sums_backward`, for `A` and `t` of float32 on the CPU and at least two knots."""
    dx = x.new_empty(x.shape) if A.shape[1] else x.new_zeros(x.shape)
    for first, slab, p in _processed_slabs(x, A, t, spacing, grad.contiguous(), backward=True):
        rows = dx.flatten(0, 1)[first : first + p.shape[1]]
        if slab.start == 0:
            tile = rows if x.dtype == A.dtype else rows.to(A.dtype)
        tile.addmm_(p.t(), A[:, slab].t(), beta=float(slab.start > 0))
        if slab.stop == A.shape[1] and tile is not rows:
            rows.copy_(tile)
    return dx


def _processed_slabs(
    x: Tensor, A: Tensor, t: Tensor, spacing: float, sums: Tensor, *, backward: bool
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield (first sample of all views, direction slice, projections (directions, samples)) when processed.

    Views lie in one tile where they lie side by side in memory.
    """
    (V, N, _), (J, M) = x.shape, sums.shape[2:]
    factors = np.empty((2, 2), np.float32)
    for i, factor in enumerate((spacing / math.pi, 7 * spacing / math.pi)):
        factors[i] = factor, factor - float(np.float32(factor))
    t = t.contiguous()
    # Fresh memory for each slab would cost a page fault for every 4 KiB.
    buffer = A.new_empty(min(V * N, _TILE_SAMPLES) * min(M, _SLAB_SLICES))
    parts = [x.flatten(0, 1)] if x.stride(0) == N * x.stride(1) else x.unbind(0)
    with full_precision(x.device):  # users do call backward() under autocast
        for v, part in enumerate(parts):
            for n in range(0, part.shape[0], _TILE_SAMPLES):
                x_tile = part[n : n + _TILE_SAMPLES].to(A.dtype)
                for m in range(0, M, _SLAB_SLICES):
                    slab = slice(m, min(m + _SLAB_SLICES, M))
                    shape = (slab.stop - m, x_tile.shape[0])
                    p = buffer[: math.prod(shape)].view(shape)
                    torch.mm(A[:, slab].t(), x_tile.t(), out=p)
                    sizes = np.array([*p.shape, v * N + n, m, V, N, J, M, backward], np.int64)
                    pointers = [sizes.ctypes.data, factors.ctypes.data]
                    pointers += [a.data_ptr() for a in (t, p, sums)]
                    threads = min(torch.get_num_threads(), p.shape[0], 1 + p.numel() // _LEAST_WORK)
                    _run_on_threads(_compiled_slab.address, (ctypes.c_void_p * 5)(*pointers), threads, 0)
                    yield v * N + n, slab, p


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


_filler = partial(njit, types.void(uint64, uint64, types.float32[:, :, ::1]), nogil=True, error_model="numpy")
_compiled_fill = _cached(_filler, _fill)


def uniforms(quads: int, num_slices: int, step: int, seed: int) -> Tensor:
    """As `directions._uniforms`, the same bits, for a step on the host."""
    out = np.empty((4, quads, num_slices), np.float32)
    _compiled_fill(np.uint64(seed % (1 << 64)), np.uint64(step), out)
    return torch.from_numpy(out)
