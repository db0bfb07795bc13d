"""SIGReg sums and their gradient on any device in plain PyTorch operations, in small tiles.

The projected matrix is formed tile by tile, so memory beyond the inputs and `dx` is a few megabytes
whatever N, M and J are. The derivation of what is computed stands in `reference.py`. On a CPU, `cpu_tiles.py`
takes float32 and equidistant knots.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .checks import refuse_double_backward
from .dispatch import compiled_tiles
from .reference import full_precision

# Elements of one tile (directions x samples): about ten such arrays stay in a CPU's last-level cache, and
# an operation is long enough for its threads to be worth waking. A GPU needs larger ones to fill it.
_TILE_ELEMENTS = {"cpu": 1 << 18}
_TILE_ELEMENTS_ACCELERATOR = 1 << 22
_TILE_SAMPLES = 2048
# Directions that share one pair of matrix products with x and dx: thin products waste the BLAS.
_SLAB_SLICES = 512


@torch.library.custom_op("lejepa_fast::ecf_sums", mutates_args=())
def ecf_sums(x: Tensor, A: Tensor, t: Tensor, spacing: float | None) -> Tensor:
    """Sums over samples of cos(t_j p) and sin(t_j p) for p = x A.

    Args:
        x: embeddings, shape (V, N, K), any floating dtype; computed in the dtype of `A`.
        A: unit directions, shape (K, M), float32 or float64.
        t: knots, shape (J,), dtype of `A`.
        spacing: `dt` when `t[j] = j * dt`, else None.

    Returns:
        shape (V, 2, J, M), dtype of `A`: cosine sums, then sine sums.
    """
    if spacing is not None and (tiles := _tiles_for(A, t)):
        return tiles.ecf_sums(x, A, t, spacing)
    sums = A.new_zeros(x.shape[0], 2, t.shape[0], A.shape[1])
    with full_precision(x.device):
        for v, _, slab, p in _projection_tiles(x, A):
            for tile, (cos, sin) in _split(p, sums[v, :, :, slab]):
                for j in range(t.shape[0]):
                    phase = tile * t[j]
                    cos[j] += phase.cos().sum(1)
                    sin[j] += phase.sin_().sum(1)
    return sums


@ecf_sums.register_fake
def _(x: Tensor, A: Tensor, t: Tensor, spacing: float | None) -> Tensor:
    return A.new_empty(x.shape[0], 2, t.shape[0], A.shape[1])


@torch.library.custom_op("lejepa_fast::ecf_sums_backward", mutates_args=())
def ecf_sums_backward(grad: Tensor, x: Tensor, A: Tensor, t: Tensor, spacing: float | None) -> Tensor:
    """Gradient of `ecf_sums` with respect to `x`; the projections are recomputed.

    Args:
        grad: gradient of the sums, shape (V, 2, J, M), dtype of `A`.
        x, A, t, spacing: as in `ecf_sums`.

    Returns:
        shape (V, N, K), dtype of `x`.
    """
    if spacing is not None and (tiles := _tiles_for(A, t)):
        return tiles.ecf_sums_backward(grad, x, A, t, spacing)
    # d cos(t p)/dp = -t sin(t p) and d sin(t p)/dp = t cos(t p)
    coefficients = torch.stack([grad[:, 1], -grad[:, 0]], dim=1) * t.unsqueeze(-1)
    dx = torch.zeros(x.shape, dtype=A.dtype, device=x.device)
    with full_precision(x.device):  # users do call backward() under autocast
        for v, rows, slab, p in _projection_tiles(x, A):
            for tile, (of_cos, of_sin) in _split(p, coefficients[v, :, :, slab]):
                gradient = torch.zeros_like(tile)
                for j in range(t.shape[0]):
                    phase = tile * t[j]
                    gradient.addcmul_(of_cos[j, :, None], phase.cos())
                    gradient.addcmul_(of_sin[j, :, None], phase.sin_())
                tile.copy_(gradient)
            dx[v, rows].addmm_(p.t(), A[:, slab].t())
    return dx.to(x.dtype)


@ecf_sums_backward.register_fake
def _(grad: Tensor, x: Tensor, A: Tensor, t: Tensor, spacing: float | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, A, t, ctx.spacing = inputs
    ctx.save_for_backward(x, A, t)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    x, A, t = ctx.saved_tensors
    return torch.ops.lejepa_fast.ecf_sums_backward(grad, x, A, t, ctx.spacing), None, None, None


ecf_sums.register_autograd(_backward, setup_context=_setup_context)
ecf_sums_backward.register_autograd(refuse_double_backward)


def _tiles_for(A: Tensor, t: Tensor) -> Any:
    """The module `cpu_tiles` where it can stand in for what is here, else None."""
    able = A.device.type == "cpu" and A.dtype == t.dtype == torch.float32 and t.shape[0] > 1
    return compiled_tiles() if able else None


def _projection_tiles(x: Tensor, A: Tensor) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Yield (view, sample slice, direction slice, projections (directions, samples)).

    Directions come first so that sums over samples run along contiguous memory.
    """
    views, N, _ = x.shape
    M = A.shape[1]
    tile_samples = max(_TILE_SAMPLES, _tile_elements(x) // _SLAB_SLICES)
    for v in range(views):
        for n in range(0, N, tile_samples):
            rows = slice(n, min(n + tile_samples, N))
            x_tile = x[v, rows].to(A.dtype)
            for m in range(0, M, _SLAB_SLICES):
                slab = slice(m, min(m + _SLAB_SLICES, M))
                yield v, rows, slab, A[:, slab].t() @ x_tile.t()


def _split(p: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Projections (directions, samples) in tiles of about `_TILE_ELEMENTS`, each with its values of those in
    (2, J, directions)."""
    height = max(1, _tile_elements(p) // p.shape[1])
    return zip(p.split(height), values.split(height, dim=2), strict=True)


def _tile_elements(tensor: Tensor) -> int:
    return _TILE_ELEMENTS.get(tensor.device.type, _TILE_ELEMENTS_ACCELERATOR)
