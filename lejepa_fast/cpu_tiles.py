r"""What Numba compiles for CPUs: SIGReg sums and their gradient, and the random numbers of the directions.

The sums take float32 and equidistant knots. BLAS projects, Numba does the rest.

A slab of projections (directions, samples) stays in the cache between the matrix products and the compiled
loops below. The loops run on PyTorch's own OpenMP threads: a second pool would compete with the first, whose
threads spin for milliseconds after a product. One thread adds up a direction, in a fixed order, so that
the sums do not depend on the number of threads.

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
from numba.extending import intrinsic, register_jitable
from torch import Tensor

from .reference import full_precision

# Samples of a tile, directions of a slab: 4 MiB of projections.
_TILE_SAMPLES, _SLAB_SLICES = 2048, 512
# Samples whose powers stay in the L1 cache; their sums are added to the table together.
_CHUNK = 512
# A row of their powers. The addresses of rows differ by no power of two: all fit in the cache together.
_ROW = _CHUNK + 16
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


def _make_prefer_wide_vectors(typing_context):
    """Let the compiler take vectors of 512 bits in the calling function. It prefers 256 for most Intel CPUs,
    whose matrix products take 512 anyway."""

    def generate(context, builder, signature, arguments):
        # llvmlite's own `add` knows no attributes with values.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


_prefer_wide_vectors: Any = intrinsic(_make_prefer_wide_vectors)


@njit(inline="always", **_JIT)
def _cos_sin(p, factor_hi, factor_lo):
    """Those of pi * (factor_hi + factor_lo) * p: NaN where p is not finite, bounded where p is huge."""
    k = np.rint(p * factor_hi)
    # The compiler would not make an FMA of the first, whose product it has already; only an FMA is exact.
    q = _fma(p, factor_lo, _fma(p, factor_hi, -k))
    q = -_LIMIT if q < -_LIMIT else q
    q = _LIMIT if q > _LIMIT else q
    half = k * _HALF
    sign = _ONE - _FOUR * (half - np.floor(half))  # -1 where k is odd
    u = q * q
    s = (((_S4 * u + _S3) * u + _S2) * u + _S1) * u + _S0
    c = ((((_C5 * u + _C4) * u + _C3) * u + _C2) * u + _C1) * u + _ONE
    return sign * c, sign * q * s


@njit(inline="always", **_JIT)
def _babies(powers, start, stop):
    cos = powers[0, start:stop], powers[1, start:stop], powers[2, start:stop]
    return cos, (powers[3, start:stop], powers[4, start:stop], powers[5, start:stop])


@njit(**_JIT)
def _fill_powers(p, factors, powers):
    """Rows of powers: the cosines of z, z^2, z^3, their sines, then cosine and sine of Z_1, of Z_2, ..."""
    _prefer_wide_vectors()
    n = p.size
    (c1, c2, c3), (s1, s2, s3) = _babies(powers, 0, n)
    step_cos, step_sin = powers[6, :n], powers[7, :n]
    for i in range(n):
        c, s = _cos_sin(p[i], factors[0], factors[1])
        square_c, square_s = c * c - s * s, (c + c) * s
        c1[i], c2[i], c3[i] = c, square_c, square_c * c - square_s * s
        s1[i], s2[i], s3[i] = s, square_s, square_s * c + square_c * s
        step_cos[i], step_sin[i] = _cos_sin(p[i], factors[2], factors[3])
    for row in range(8, powers.shape[0], 2):
        cos, sin = powers[row, :n], powers[row + 1, :n]
        _multiply(powers[row - 2, :n], powers[row - 1, :n], step_cos, step_sin, cos, sin)


@njit(**_JIT)
def _multiply(c, s, by_c, by_s, cos, sin):
    _prefer_wide_vectors()
    for i in range(cos.size):
        cos[i], sin[i] = c[i] * by_c[i] - s[i] * by_s[i], s[i] * by_c[i] + c[i] * by_s[i]


@njit(**_SUM)
def _add_babies(row, babies):
    """Add the sums over samples of {1, babies} to the first row of the table."""
    _prefer_wide_vectors()
    (c1, c2, c3), (s1, s2, s3) = babies
    t1 = t2 = t3 = t5 = t6 = t7 = np.float32(0)
    for i in range(c1.size):
        t1, t2, t3 = t1 + c1[i], t2 + c2[i], t3 + c3[i]
        t5, t6, t7 = t5 + s1[i], t6 + s2[i], t7 + s3[i]
    row[0] += c1.size
    for column, t in ((1, t1), (2, t2), (3, t3), (5, t5), (6, t6), (7, t7)):
        row[column] += t


@njit(**_SUM)
def _add_products(rows, cos, sin, babies):
    """Add the sums over samples of a giant's two parts times {1, babies} to two rows of the table."""
    _prefer_wide_vectors()
    (c1, c2, c3), (s1, s2, s3) = babies
    t0 = t1 = t2 = t3 = t5 = t6 = t7 = np.float32(0)
    u0 = u1 = u2 = u3 = u5 = u6 = u7 = np.float32(0)
    for i in range(cos.size):
        c, s = cos[i], sin[i]
        t0, t1, t2, t3 = t0 + c, t1 + c * c1[i], t2 + c * c2[i], t3 + c * c3[i]
        t5, t6, t7 = t5 + c * s1[i], t6 + c * s2[i], t7 + c * s3[i]
        u0, u1, u2, u3 = u0 + s, u1 + s * c1[i], u2 + s * c2[i], u3 + s * c3[i]
        u5, u6, u7 = u5 + s * s1[i], u6 + s * s2[i], u7 + s * s3[i]
    columns = ((0, t0, u0), (1, t1, u1), (2, t2, u2), (3, t3, u3), (5, t5, u5), (6, t6, u6), (7, t7, u7))
    for column, t, u in columns:
        rows[0, column] += t
        rows[1, column] += u


@njit(inline="always", **_JIT)
def _coefficients(row):
    t0, t1, t2, t3 = np.float32(row[0]), np.float32(row[1]), np.float32(row[2]), np.float32(row[3])
    return t0, t1, t2, t3, np.float32(row[5]), np.float32(row[6]), np.float32(row[7])


@njit(**_JIT)
def _fill_series(row, babies, out):
    """The series of {1, babies} with the coefficients of the first row of the table."""
    _prefer_wide_vectors()
    (c1, c2, c3), (s1, s2, s3) = babies
    t0, t1, t2, t3, t5, t6, t7 = _coefficients(row)
    for i in range(out.size):
        out[i] = t0 + t1 * c1[i] + t2 * c2[i] + t3 * c3[i] + t5 * s1[i] + t6 * s2[i] + t7 * s3[i]


@njit(**_JIT)
def _add_series(rows, cos, sin, babies, out):
    """Add a giant's two parts times the series of {1, babies} with the coefficients of two rows."""
    _prefer_wide_vectors()
    (c1, c2, c3), (s1, s2, s3) = babies
    t0, t1, t2, t3, t5, t6, t7 = _coefficients(rows[0])
    u0, u1, u2, u3, u5, u6, u7 = _coefficients(rows[1])
    for i in range(out.size):
        t = t0 + t1 * c1[i] + t2 * c2[i] + t3 * c3[i] + t5 * s1[i] + t6 * s2[i] + t7 * s3[i]
        u = u0 + u1 * c1[i] + u2 * c2[i] + u3 * c3[i] + u5 * s1[i] + u6 * s2[i] + u7 * s3[i]
        out[i] += cos[i] * t + sin[i] * u


@njit(**_JIT)
def _process(p, powers, start, stop, table, backward):
    """Add the sums of one view to its table, or overwrite p by the series whose coefficients it holds."""
    babies = _babies(powers, start, stop)
    if backward:
        _fill_series(table[0], babies, p)
    else:
        _add_babies(table[0], babies)
    for row in range(2, table.shape[0], 2):
        rows, cos, sin = table[row : row + 2], powers[4 + row, start:stop], powers[5 + row, start:stop]
        if backward:
            _add_series(rows, cos, sin, babies, p)
        else:
            _add_products(rows, cos, sin, babies)


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


@register_jitable
def _giants(J):
    return (J + 2) // 7


def _process_slab(args):
    """Sums of a slab of projections, or their gradient, by one of the threads that run this together."""
    sizes = carray(args[0], 9, np.int64)
    directions, samples, first_sample, first_direction = sizes[0], sizes[1], sizes[2], sizes[3]
    V, N, J, M, backward = sizes[4], sizes[5], sizes[6], sizes[7], sizes[8] != 0
    factors, t = carray(args[1], 4, np.float32), carray(args[2], J, np.float32)
    projections = carray(args[3], (directions, samples), np.float32)
    sums = carray(args[4], (V, M, 2, J), np.float32)
    thread, threads = np.int64(_thread_num()), np.int64(_num_threads())
    table = carray(args[5], (threads, 2 + 2 * _giants(J), 8), np.float64)[thread]
    powers = carray(args[6], (threads, 6 + 2 * max(1, _giants(J)), _ROW), np.float32)[thread]
    for m in range(thread * directions // threads, (thread + 1) * directions // threads):
        table[:] = 0
        for first in range(0, samples, _CHUNK):
            chunk = projections[m, first : min(first + _CHUNK, samples)]
            _fill_powers(chunk, factors, powers)
            start = 0
            while start < chunk.size:
                view = (first_sample + first + start) // N
                end = (view + 1) * N - first_sample - first
                stop = min(chunk.size, end)
                if backward:
                    _convert(table, t, sums[view, first_direction + m], True)
                _process(chunk[start:stop], powers, start, stop, table, backward)
                if not backward and (stop == end or first + stop == samples):
                    _convert(table, t, sums[view, first_direction + m], False)
                if backward or stop == end:
                    table[:] = 0
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
    sums = A.new_zeros(x.shape[0], A.shape[1], 2, t.shape[0])
    for _ in _processed_slabs(x, A, t, spacing, sums, backward=False):
        pass
    sums[..., 0, 0] = x.shape[1]
    return sums.permute(0, 2, 3, 1).contiguous()


def ecf_sums_backward(grad: Tensor, x: Tensor, A: Tensor, t: Tensor, spacing: float) -> Tensor:
    """As `streaming.ecf_sums_backward`, for `A` and `t` of float32 on the CPU and at least two knots."""
    grad = grad.permute(0, 3, 1, 2).contiguous()
    dx = x.new_empty(x.shape) if A.shape[1] else x.new_zeros(x.shape)
    for first, slab, p in _processed_slabs(x, A, t, spacing, grad, backward=True):
        rows = dx.flatten(0, 1)[first : first + p.shape[1]]
        if slab.start == 0:
            tile = rows if x.dtype == A.dtype else rows.to(A.dtype)
        tile.addmm_(p.t(), A[:, slab].t(), beta=float(slab.start > 0))
        if slab.stop == A.shape[1] and x.dtype != A.dtype:
            rows.copy_(tile)
    return dx


def _processed_slabs(
    x: Tensor, A: Tensor, t: Tensor, spacing: float, sums: Tensor, *, backward: bool
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield (first sample of all views, direction slice, projections (directions, samples)) when processed.

    `sums` (V, M, 2, J) is written, or read in the backward pass: what belongs to a direction lies together.
    Views lie in one tile where they lie side by side in memory.
    """
    (V, N, _), M, J = x.shape, A.shape[1], t.shape[0]
    factors = np.empty((2, 2), np.float32)
    for i, factor in enumerate((spacing / math.pi, 7 * spacing / math.pi)):
        factors[i] = factor, factor - float(np.float32(factor))
    t = t.contiguous()
    max_threads = torch.get_num_threads()
    table = torch.empty(max_threads, 2 + 2 * _giants(J), 8, dtype=torch.float64)
    powers = A.new_empty(max_threads, 6 + 2 * max(1, _giants(J)), _ROW)
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
                    pointers += [a.data_ptr() for a in (t, p, sums, table, powers)]
                    threads = min(max_threads, p.shape[0], 1 + p.numel() // _LEAST_WORK)
                    _run_on_threads(_compiled_slab.address, (ctypes.c_void_p * 7)(*pointers), threads, 0)
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
