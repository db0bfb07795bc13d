"""Random directions on the unit sphere, from a counter-based generator.

The directions are a pure function of (seed, step, k, m): Philox-4x32-10 (Salmon et al., SC 2011)
with the seed as key and (m, k // 4, step low word, step high word) as counter, four normals per call
by Box-Muller for rows 4q .. 4q+3 of column m. So every rank and every device draws the same
directions without communication, a checkpoint needs only the step, and nothing waits for the GPU: `step` may
be a tensor on it. Column m does not depend on how many columns are asked for.
"""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import triton_operators
from .checks import check_integer
from .dispatch import compiled_tiles
from .reference import transforming

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_STEP_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Philox multipliers, written as 2**32 minus a 30-bit number so that int64 products cannot overflow.
_MUL_0 = (1 << 32) - 0xD2511F53
_MUL_1 = (1 << 32) - 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85


def sample_directions(
    dim: int,
    num_slices: int,
    *,
    step: int | Tensor,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Directions uniform on the unit sphere, the same for the same (seed, step) on every device.

    Args:
        dim: dimension K of the embeddings, >= 1.
        num_slices: number of directions M, >= 1.
        step: training step, an int >= 0 or a 0-dim integer tensor. A tensor is never read on the host
            when it lives on `device`, so the call can be captured in a CUDA graph.
        seed: any integer; its low 64 bits are the Philox key.
        device: where the result lives; default: the device of `step`, or the CPU for an int.
        dtype: floating dtype of the result. Normals are drawn in float32; float64 normalizes in float64,
            bf16 and fp16 round the float32 unit vectors.

    Returns:
        shape (dim, num_slices), columns of unit length. Values agree between devices to float32 rounding.

    Raises:
        ValueError: dim or num_slices < 1, step negative or not a scalar integer, dtype not floating.
        TypeError: dim, num_slices, seed or step of another type.

    Source: LeJEPA, arXiv 2511.08544, Algorithm 1 (random slices, resampled at every step).
    """
    return sample_unit_directions(dim, num_slices, step=step, seed=seed, device=device, dtype=dtype)[0]


def sample_unit_directions(
    dim: int,
    num_slices: int,
    *,
    step: int | Tensor,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`sample_directions` and the scale that makes the rounded columns unit vectors again.

    For `sigreg(x, A, ..., scale=scale)` with half-precision x: tensor cores multiply by A as it is and the
    scale corrects the projections. So rounding A costs no accuracy; it only changes the direction slightly,
    by 2^-9 in bf16.

    Args:
        dim, num_slices, step, seed, device, dtype: as in `sample_directions`.
        impl: "auto" draws by the Triton kernel on GPUs that can run it, "triton" also in Triton's
            interpreter; any other name draws in PyTorch operations.

    Returns:
        directions (dim, num_slices) in `dtype`; scale (num_slices,), float32 or float64.

    Raises:
        ValueError, TypeError: as `sample_directions`.
    """
    check_integer("dim", dim, at_least=1)
    check_integer("num_slices", num_slices, at_least=1)
    check_integer("seed", seed)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
    signed_seed = (int(seed) + (1 << 63)) % (1 << 64) - (1 << 63)  # operators take signed 64-bit integers
    step = _step_tensor(step, device)
    by_kernel = impl == "triton" or (impl == "auto" and step.is_cuda)
    by_kernel = by_kernel and triton_operators.why_not(step.device, dtype) is None
    draw = torch.ops.lejepa_fast.sample_directions if triton_operators.tracing(step) else _draw
    return draw(step, dim, num_slices, signed_seed, dtype, by_kernel)


def _draw(
    step: Tensor, dim: int, num_slices: int, seed: int, dtype: torch.dtype, by_kernel: bool
) -> tuple[Tensor, Tensor]:
    """`sample_unit_directions` for checked arguments and a 0-dim int64 step on the target device."""
    if by_kernel:
        return triton_operators.kernels().philox.draw_directions(step, dim, num_slices, seed, dtype)
    quads = (dim + 3) // 4
    u = _uniforms(quads, num_slices, step, seed)
    rows = [*_box_muller(u[0], u[1]), *_box_muller(u[2], u[3])]  # 4 x (quads, num_slices)
    normals = torch.stack(rows, dim=1).view(quads * 4, num_slices)[:dim]
    if dtype == torch.float64:
        normals = normals.double()
    norm = torch.linalg.vector_norm(normals, dim=0, keepdim=True)
    # K of 1 or 2, once in 2**24 columns: the first axis.
    normals[:1] = torch.where(norm == 0, 1, normals[:1])
    A = (normals / torch.where(norm == 0, 1, norm)).to(dtype)
    if dtype.itemsize > 2:  # unit vectors already, to their own rounding
        return A, A.new_ones(num_slices)
    return A, 1 / torch.linalg.vector_norm(A.float(), dim=0)


# An operator of its own, so that torch.compile does not look inside: its CPU code generator (seen with
# torch 2.15) evaluates products of an arange in too few bits, and the directions would differ.
_sample_directions = torch.library.custom_op("lejepa_fast::sample_directions", _draw, mutates_args=())


@_sample_directions.register_fake
def _(
    step: Tensor, dim: int, num_slices: int, seed: int, dtype: torch.dtype, by_kernel: bool
) -> tuple[Tensor, Tensor]:
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return step.new_empty(dim, num_slices, dtype=dtype), step.new_empty(num_slices, dtype=scale_dtype)


def _step_tensor(step: int | Tensor, device: torch.device | str | None) -> Tensor:
    """`step` as a 0-dim int64 tensor on the target device, without a host synchronization."""
    if isinstance(step, Tensor):
        if step.dim() != 0 or step.dtype not in _STEP_DTYPES:
            got = f"{step.dtype} of shape {tuple(step.shape)}"
            raise ValueError(f"step: expected an int or a 0-dim integer tensor, got {got}")
        target = step.device if device is None else torch.device(device)
        value = _host_value(step)
        if value is not None:
            check_integer("step", value, at_least=0)
        if value is None or target.type == "cpu":
            return step.to(target, torch.int64)
        step, device = value, target
    check_integer("step", step, at_least=0)
    if step >= 1 << 63:
        raise ValueError(f"step: expected at most 2**63 - 1, got {step}")
    return torch.full((), step, dtype=torch.int64, device=device)


def _host_value(step: Tensor) -> int | None:
    """The value of `step` in the memory of the host: None on a GPU, in a trace, and in a transform of
    torch.func. Not by an operator: those that read show up in profiles, as a wait for a GPU would."""
    if step.device.type != "cpu" or triton_operators.tracing(step) or transforming():
        return None
    step = step.to(torch.int64)
    return ctypes.c_int64.from_address(step.data_ptr()).value


def _uniforms(quads: int, num_slices: int, step: Tensor, seed: int) -> Sequence[Tensor] | Tensor:
    """Four float32 matrices (quads, num_slices) of multiples of 2^-24: the first and third in (0, 1], where
    the logarithm is finite and 0 at 1, the second and fourth in [0, 1)."""
    value = _host_value(step)
    if value is not None and (tiles := compiled_tiles()):
        return tiles.uniforms(quads, num_slices, value, seed)
    column = torch.arange(num_slices, dtype=torch.int64, device=step.device)
    quad = torch.arange(quads, dtype=torch.int64, device=step.device).unsqueeze(1)
    words = philox_4x32(column, quad, step & _MASK, step >> 32, key=(seed & _MASK, (seed >> 32) & _MASK))
    return [((word >> 8) + first).float() * 2.0**-24 for word, first in zip(words, (1, 0, 1, 0), strict=True)]


def philox_4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four 32-bit words per counter, as int64 tensors with values in [0, 2**32).

    Args:
        c0, c1, c2, c3: counter words, int64 tensors in [0, 2**32) that broadcast against each other.
        key: two 32-bit integers.

    Returns:
        four int64 tensors of the broadcast shape.
    """
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _MUL_0)
        hi1, lo1 = _mul_hi_lo(c2, _MUL_1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))


def _mul_hi_lo(a: Tensor, complement: int) -> tuple[Tensor, Tensor]:
    """High and low word of `a * (2**32 - complement)`; no intermediate exceeds 62 bits."""
    negative = a * -complement
    return a + (negative >> 32), negative & _MASK


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two uniform numbers, in float32."""
    radius = torch.sqrt(-2 * torch.log(u1))
    angle = (2 * math.pi) * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)
