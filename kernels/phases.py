r"""Device functions of the forward and backward kernels: sine and cosine, their powers, projections.

Phases are counted in half turns, `h = t p / pi`, so that range reduction is exact: with k the integer
nearest to h, `q = h - k` lies in [-1/2, 1/2], cos(pi h) = (-1)^k cos(pi q), and the same for the sine.
Both are polynomials in q^2 whose error (2e-10 and 4e-9) is below float32 rounding. They cost ten instructions
more than the hardware's sine, whose absolute error (2^-21) would break the accuracy rule of a gradient.

Equidistant knots `t_j = j dt`: with z = exp(i dt p), every power z^j, 0 < j < J, is

    z^j = Z_a z^b,    j = s a + b,    Z_a = z^(s a),    s = 2 B + 1,    -B <= b <= B,    0 <= a <= G

(baby steps z^b, giant steps Z_a). A sum over samples of all cos(j u), sin(j u) follows from the sums of
the products of {1, Re Z_a, Im Z_a} with {1, Re z^b, Im z^b}, which accumulate as one FMA each: the
`table`, rows (1, Re Z_1, Im Z_1, Re Z_2, ...) and columns (1, Re z .. Re z^B, Im z .. Im z^B). The series
sum_j alpha_j cos(j u) + beta_j sin(j u) of the gradient is the same bilinear form. `epilogue.py` converts.

Register tiles. A projected tile (slices, samples) leaves the tensor cores with the samples of a slice
spread over the registers of a few threads. `split_columns` cuts it into columns of LANES samples
without moving data between threads, so that everything that follows is elementwise, and sums over
samples stay inside a thread until the end of the kernel.
"""

import triton
import triton.language as tl

from .runtime import interpreting

_INTERPRETED = tl.constexpr(interpreting())
# Threads that share a row of a tensor-core accumulator, see `split_columns`.
LANES = tl.constexpr(4)
# 1.5 * 2**23: adding it rounds to the nearest integer, whose parity is then the lowest bit.
_ROUND = tl.constexpr(12582912.0)
# sin(pi q) = q * P(q^2) and cos(pi q) = Q(q^2) on |q| <= 1/2, minimax.
_S0 = tl.constexpr(3.14159259)
_S1 = tl.constexpr(-5.16770722)
_S2 = tl.constexpr(2.55003548)
_S3 = tl.constexpr(-0.59806415)
_S4 = tl.constexpr(0.07725012)
_C1 = tl.constexpr(-4.93480214)
_C2 = tl.constexpr(4.05870914)
_C3 = tl.constexpr(-1.33521176)
_C4 = tl.constexpr(0.23493601)
_C5 = tl.constexpr(-0.02439397)


@triton.jit
def cos_sin(p, factor_hi, factor_lo):
    """(cos, sin) of pi * (factor_hi + factor_lo) * p.

    Beyond 2**22 half turns a float32 projection has no phase left: results are bounded but arbitrary. NaN and
    infinity give NaN.
    """
    shifted = tl.fma(p, factor_hi, _ROUND)
    q = tl.fma(p, factor_hi, -(shifted - _ROUND))  # the interpreter takes no constant minus a tensor here
    q = tl.fma(p, factor_lo, q)
    q = tl.clamp(q, -0.5625, 0.5625, propagate_nan=tl.PropagateNan.ALL)
    odd = shifted.to(tl.int32, bitcast=True) << 31  # the sign bit, when k is odd
    u = q * q
    s = tl.fma(tl.fma(tl.fma(tl.fma(u, _S4, _S3), u, _S2), u, _S1), u, _S0)
    c = tl.fma(tl.fma(tl.fma(tl.fma(tl.fma(u, _C5, _C4), u, _C3), u, _C2), u, _C1), u, 1.0)
    q = (q.to(tl.int32, bitcast=True) ^ odd).to(tl.float32, bitcast=True)
    c = (c.to(tl.int32, bitcast=True) ^ odd).to(tl.float32, bitcast=True)
    return c, q * s


@triton.jit
def complex_mul(c_a, s_a, c_b, s_b):
    """(cos, sin) of the sum of two angles."""
    return tl.fma(c_a, c_b, -(s_a * s_b)), tl.fma(s_a, c_b, c_a * s_b)


@triton.jit
def complex_square(c, s):
    """(cos, sin) of twice the angle.

    Not 2 c^2 - 1, which doubles an error of the modulus where c^2 - s^2 keeps it.
    """
    return tl.fma(c, c, -(s * s)), (c + c) * s


@triton.jit
def baby_steps(c1, s1, B: tl.constexpr):
    """Tuple (Re z .. Re z^B, Im z .. Im z^B) for B <= 3, given z = c1 + i s1."""
    c2, s2 = complex_square(c1, s1)
    if B == 1:
        babies = (c1, s1)
    elif B == 2:
        babies = (c1, c2, s1, s2)
    else:
        c3, s3 = complex_mul(c2, s2, c1, s1)
        babies = (c1, c2, c3, s1, s2, s3)
    return babies


@triton.jit
def stride_from_babies(babies):
    """z^7 = (z^3)^2 z, the giant step that belongs to B = 3."""
    c6, s6 = complex_square(babies[2], babies[5])
    return complex_mul(c6, s6, babies[0], babies[3])


@triton.jit
def split_columns(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tuple of COLUMNS / LANES tensors (ROWS, LANES) that together hold `tile` (ROWS, COLUMNS).

    Part i takes column 8 g + 2 l + h, with h the lowest bit of i and g the rest, into lane l: the two
    columns and the groups of eight that one thread of a tensor-core accumulator holds.

    A loop over the sub-tiles of a tile takes some parts from the front each time and adds as many at the end:
    unrolled, the compiler would start all parts of a large tile at once and run out of registers.
    """
    even, odd = tl.split(tl.reshape(tile, (ROWS, COLUMNS // (2 * LANES), LANES, 2)))
    parts = (tl.permute(even, (0, 2, 1)), tl.permute(odd, (0, 2, 1)))  # (ROWS, LANES, groups)
    for _ in tl.static_range(8):
        if parts[0].shape[2] > 1:
            halves = ()
            for i in tl.static_range(len(parts)):
                pair = tl.reshape(parts[i], (ROWS, LANES, 2, parts[i].shape[2] // 2))
                low, high = tl.split(tl.permute(pair, (0, 1, 3, 2)))
                halves = halves + (low, high)
            parts = halves
    columns = ()
    for i in tl.static_range(len(parts)):
        columns = columns + (tl.reshape(parts[i], (ROWS, LANES)),)
    return columns


@triton.jit
def join_columns(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile (ROWS, COLUMNS) whose `split_columns` is `columns`."""
    parts = ()
    for i in tl.static_range(len(columns)):
        parts = parts + (tl.reshape(columns[i], (ROWS, LANES, 1)),)
    for _ in tl.static_range(8):
        if len(parts) > 2:
            joined = ()
            for i in tl.static_range(len(parts) // 2):
                pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 1, 3, 2))
                joined = joined + (tl.reshape(pair, (ROWS, LANES, 2 * parts[0].shape[2])),)
            parts = joined
    even, odd = tl.permute(parts[0], (0, 2, 1)), tl.permute(parts[1], (0, 2, 1))
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))


@triton.jit
def scaled_factor(factor_hi, factor_lo, scale_ptr, m, M, HAS_SCALE: tl.constexpr):
    """The factor of `cos_sin` times the scale of each direction, (BLOCK_M, 1), as the sum of two floats."""
    if HAS_SCALE:
        scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)[:, None]
        hi = scale * factor_hi
        lo = tl.fma(scale, factor_hi, -hi) + scale * factor_lo
    else:
        hi = factor_hi
        lo = factor_lo
    return hi, lo


@triton.jit
def project(
    x_ptr,  # (N, K) of one view
    a_ptr,  # (K, M)
    m,
    n,
    N,
    K,
    M,
    stride_xn,
    stride_xk,
    stride_ak,
    stride_am,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    MASK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Projections of samples n on directions m, (BLOCK_M, BLOCK_N) float32; 0 outside the batch."""
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + n[None, :].to(tl.int64) * stride_xn + k[:, None].to(tl.int64) * stride_xk
    a_ptrs = a_ptr + m[:, None].to(tl.int64) * stride_am + k[None, :].to(tl.int64) * stride_ak
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = load_tile(x_ptrs, n[None, :] < N, k[:, None] < K - k0, MASK_N, not EVEN_K)
        a = load_tile(a_ptrs, m[:, None] < M, k[None, :] < K - k0, True, not EVEN_K)
        p = dot(a, x, p, PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        a_ptrs += BLOCK_K * tl.cast(stride_ak, tl.int64)
    return p


@triton.jit
def multiply(
    a, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr
):
    """Sum of the products of COUNT tiles, (BLOCK_M, BLOCK_N) float32."""
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(COUNT):
        p = dot(a[i], x[i], p, PRECISION)
    return p


@triton.jit
def load_tiles(
    ptr,
    lanes,  # `tl.arange` of samples (1, BLOCK_N), or of directions (BLOCK_M, 1)
    first,  # the first of them
    bound,
    K,
    stride_index,
    stride_k,
    BLOCK_K: tl.constexpr,
    COUNT: tl.constexpr,
    EVEN_K: tl.constexpr,
    MASK: tl.constexpr,
):
    """Samples or directions, transposed, as a tuple of COUNT tiles that cover K; 0 outside."""
    k = tl.arange(0, BLOCK_K)
    k = k[:, None] if lanes.shape[0] == 1 else k[None, :]
    # One address a thread; with strides known to the compiler the others are constants in the instructions.
    ptr += tl.cast(first, tl.int64) * stride_index
    ptrs = ptr + lanes.to(tl.int64) * stride_index + k.to(tl.int64) * stride_k
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (load_tile(ptrs, lanes < bound - first, k < K - i * BLOCK_K, MASK, not EVEN_K),)
        ptrs += BLOCK_K * tl.cast(stride_k, tl.int64)
    return tiles


@triton.jit
def here(tiles):
    """The same tiles, which the compiler takes for values that appear here (NVIDIA only).

    It copies operands of the tensor cores to shared memory where they appear; where they were loaded it would
    wait for them. The instruction is a move, which the assembler removes.
    """
    out = ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i]
        if not _INTERPRETED:
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, False, 32 // tile.dtype.primitive_bitwidth
            )
        out = out + (tile,)
    return out


@triton.jit
def load_tile(ptrs, row_mask, column_mask, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile; 0 where a mask is false that MASK_ROWS or MASK_COLUMNS enables."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(ptrs, mask=row_mask & column_mask, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(ptrs, mask=row_mask, other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(ptrs, mask=column_mask, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Matrix product accumulated in float32; operands of different dtypes are multiplied as float32."""
    if a.dtype != b.dtype or _INTERPRETED:  # the interpreter would multiply the bits of bf16 numbers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def to_dtype(value, dtype: tl.constexpr):
    """float32 `value` rounded to nearest even; the interpreter's own conversion to bf16 truncates."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        # The lower half is cleared: the interpreter changes subnormal numbers.
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & -65536
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)
