r"""SIGReg sums and their gradient on any device in plain PyTorch operations, in small tiles.

The projected matrix is formed tile by tile, so memory beyond the inputs and `dx` is a few megabytes
whatever N, M and J are. The derivation of what is computed stands in `reference.py`.

Equidistant knots `t_j = j * dt` need two sines and cosines per projection instead of J. With
`u = dt * p` and `z = exp(iu)`, every `z^j` is a small power times a large one (baby steps, giant steps):

    j = s*a + b,    b in [-B, B],  a in [0, G],  s = 2B + 1

so B + G complex powers replace J of them (G = 0 where the babies suffice), and the sums over samples
of all products

    cos(ju) = cos(sau) cos(bu) - sin(sau) sin(bu)      sin(ju) = sin(sau) cos(bu) + cos(sau) sin(bu)

are one small matrix product per direction, [giants] x [samples] times [samples] x [babies]. The
gradient series sum_j alpha_j cos(ju) + beta_j sin(ju) is the same bilinear form with the roles
turned round. Babies are powers of z and giants powers of z^s, each from one sine and cosine and then
by complex multiplication. Its rounding error grows like a + b; that of the Chebyshev recurrence
c_{k+1} = 2 c_1 c_k - c_{k-1}, which costs the same here, like j^2.

Knots that are not equidistant take one sine and cosine each.
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
    series = _make_series(t, spacing)
    raw = series.new_sums(x.shape[0], A.shape[1])
    with full_precision(x.device):
        for v, _, slab, p in _projection_tiles(x, A):
            for sub, p_tile in _split_slab(p):
                series.accumulate(raw[v, slab.start + sub.start : slab.start + sub.stop], p_tile)
    return series.finish_sums(raw, x.shape[1])


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
    series = _make_series(t, spacing)
    # d cos(t p)/dp = -t sin(t p) and d sin(t p)/dp = t cos(t p)
    t_column = t.unsqueeze(-1)
    coefficients = series.prepare_gradient(alpha=grad[:, 1] * t_column, beta=-grad[:, 0] * t_column)
    dx = torch.zeros(x.shape, dtype=A.dtype, device=x.device)
    with full_precision(x.device):  # users do call backward() under autocast
        for v, rows, slab, p in _projection_tiles(x, A):
            for sub, p_tile in _split_slab(p):
                series.gradient_(coefficients[v, slab.start + sub.start : slab.start + sub.stop], p_tile)
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


def _split_slab(p: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Split projections (directions, samples) into tiles of about `_TILE_ELEMENTS`."""
    directions, samples = p.shape
    height = max(1, _tile_elements(p) // samples)
    for m in range(0, directions, height):
        sub = slice(m, min(m + height, directions))
        yield sub, p[sub]


def _tile_elements(tensor: Tensor) -> int:
    return _TILE_ELEMENTS.get(tensor.device.type, _TILE_ELEMENTS_ACCELERATOR)


def _make_series(t: Tensor, spacing: float | None) -> "_DirectSeries | _EquidistantSeries":
    if spacing is None or t.shape[0] < 2:
        return _DirectSeries(t)
    return _EquidistantSeries(t, spacing)


class _DirectSeries:
    """One sine and cosine per knot: knots at arbitrary places."""

    def __init__(self, t: Tensor):
        self.t = t

    def new_sums(self, views: int, M: int) -> Tensor:
        return self.t.new_zeros(views, M, 2, self.t.shape[0])

    def accumulate(self, sums: Tensor, p: Tensor) -> None:
        for j in range(self.t.shape[0]):
            phase = p * self.t[j]
            sums[:, 0, j] += phase.cos().sum(1)
            sums[:, 1, j] += phase.sin_().sum(1)

    def finish_sums(self, sums: Tensor, count: int) -> Tensor:
        return sums.permute(0, 2, 3, 1).contiguous()

    def prepare_gradient(self, alpha: Tensor, beta: Tensor) -> Tensor:
        return torch.stack([alpha, beta], dim=1).permute(0, 3, 1, 2).contiguous()  # (V, M, 2, J)

    def gradient_(self, coefficients: Tensor, p: Tensor) -> None:
        """Overwrite projections by sum_j alpha_j cos(t_j p) + beta_j sin(t_j p)."""
        total = torch.zeros_like(p)
        for j in range(self.t.shape[0]):
            phase = p * self.t[j]
            total.addcmul_(coefficients[:, 0, j, None], phase.cos())
            total.addcmul_(coefficients[:, 1, j, None], phase.sin_())
        p.copy_(total)


class _EquidistantSeries:
    """Knots j * dt by baby steps and giant steps (module docstring).

    Per direction, `baby` holds the rows [1, cos u .. cos Bu, sin u .. sin Bu] and `giant` the rows
    [1, cos su .. cos Gsu, sin su .. sin Gsu], each over the samples of the tile. The tables of sums
    and of coefficients have shape (1 + 2G, 1 + 2B), one entry for each product of a giant and a baby.
    """

    def __init__(self, t: Tensor, spacing: float):
        self.J = t.shape[0]
        self.like = t
        self.B, self.G = _baby_giant_split(self.J - 1)
        self.stride = 2 * self.B + 1
        self.spacing = spacing
        self.buffers: tuple[Tensor, Tensor] | None = None

    def new_sums(self, views: int, M: int) -> Tensor:
        return self.like.new_zeros(views, M, 1 + 2 * self.G, 1 + 2 * self.B)

    def accumulate(self, table: Tensor, p: Tensor) -> None:
        baby, giant = self._powers(p)
        table.baddbmm_(giant, baby.transpose(1, 2))

    def finish_sums(self, table: Tensor, count: int) -> Tensor:
        """(V, M, 1 + 2G, 1 + 2B) products -> (V, 2, J, M) sums of cos(ju) and sin(ju)."""
        B, G = self.B, self.G
        cos_cos, cos_sin = table[..., 1 : 1 + G, 1 : 1 + B], table[..., 1 : 1 + G, 1 + B :]
        sin_cos, sin_sin = table[..., 1 + G :, 1 : 1 + B], table[..., 1 + G :, 1 + B :]
        center_cos, center_sin = table[..., 1 : 1 + G, :1], table[..., 1 + G :, :1]
        # Blocks of 2B + 1 knots around each giant step: s*a - B .. s*a + B.
        block_cos = torch.cat([(cos_cos + sin_sin).flip(-1), center_cos, cos_cos - sin_sin], dim=-1)
        block_sin = torch.cat([(sin_cos - cos_sin).flip(-1), center_sin, sin_cos + cos_sin], dim=-1)
        one = torch.full_like(table[..., 0, :1], count)
        cos = torch.cat([one, table[..., 0, 1 : 1 + B], block_cos.flatten(-2)], dim=-1)
        sin = torch.cat([torch.zeros_like(one), table[..., 0, 1 + B :], block_sin.flatten(-2)], dim=-1)
        return torch.stack([cos[..., : self.J], sin[..., : self.J]], dim=1).transpose(-1, -2).contiguous()

    def prepare_gradient(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """Coefficients (V, J, M) of cos(ju) and sin(ju) -> table (V, M, 1 + 2G, 1 + 2B)."""
        B, G = self.B, self.G
        padding = (0, 1 + B + G * self.stride - self.J)
        # To shape (V, M, L), L the number of knots that the blocks cover.
        alpha, beta = (torch.nn.functional.pad(c.transpose(1, 2), padding) for c in (alpha, beta))
        table = self.new_sums(alpha.shape[0], alpha.shape[1])
        table[..., 0, 0] = alpha[..., 0]
        table[..., 0, 1 : 1 + B], table[..., 0, 1 + B :] = alpha[..., 1 : 1 + B], beta[..., 1 : 1 + B]
        alpha, beta = (c[..., 1 + B :].unflatten(-1, (G, self.stride)) for c in (alpha, beta))
        a_minus, a_plus = alpha[..., :B].flip(-1), alpha[..., B + 1 :]
        b_minus, b_plus = beta[..., :B].flip(-1), beta[..., B + 1 :]
        table[..., 1 : 1 + G, 0], table[..., 1 + G :, 0] = alpha[..., B], beta[..., B]
        table[..., 1 : 1 + G, 1 : 1 + B], table[..., 1 + G :, 1 + B :] = a_plus + a_minus, a_minus - a_plus
        table[..., 1 + G :, 1 : 1 + B], table[..., 1 : 1 + G, 1 + B :] = b_plus + b_minus, b_plus - b_minus
        return table

    def gradient_(self, table: Tensor, p: Tensor) -> None:
        """Overwrite projections by sum_j alpha_j cos(ju) + beta_j sin(ju)."""
        baby, giant = self._powers(p)
        partial = torch.bmm(table, baby)  # (directions, 1 + 2G, samples)
        p.copy_(partial[:, 0])
        for g in range(1, 1 + 2 * self.G):
            p.addcmul_(partial[:, g], giant[:, g])

    def _powers(self, p: Tensor) -> tuple[Tensor, Tensor]:
        baby, giant = self._tile_buffers(p)
        cos, sin = baby[:, 1 : 1 + self.B].unbind(1), baby[:, 1 + self.B :].unbind(1)
        _cos_sin(p, self.spacing, out=(cos[0], sin[0]))
        _fill_powers(cos, sin)
        if self.G:
            cos, sin = giant[:, 1 : 1 + self.G].unbind(1), giant[:, 1 + self.G :].unbind(1)
            _cos_sin(p, self.stride * self.spacing, out=(cos[0], sin[0]))
            _fill_powers(cos, sin)
        return baby, giant

    def _tile_buffers(self, p: Tensor) -> tuple[Tensor, Tensor]:
        directions, samples = p.shape
        if self.buffers is None or self.buffers[0].shape[::2] != (directions, samples):
            self.buffers = (
                p.new_ones(directions, 1 + 2 * self.B, samples),
                p.new_ones(directions, 1 + 2 * self.G, samples),
            )
        return self.buffers


def _fill_powers(cos: tuple[Tensor, ...], sin: tuple[Tensor, ...]) -> None:
    """Given the cosine and sine of an angle at index 0, write those of its multiple i + 1 at index i."""
    for i in range(1, len(cos)):
        half = (i + 1) // 2  # the shortest chain of products keeps the error small
        _complex_mul(cos[half - 1], sin[half - 1], cos[i - half], sin[i - half], out=(cos[i], sin[i]))


def _complex_mul(
    cos_a: Tensor, sin_a: Tensor, cos_b: Tensor, sin_b: Tensor, out: tuple[Tensor, Tensor]
) -> None:
    """out = (cos, sin) of the sum of two angles."""
    torch.mul(cos_a, cos_b, out=out[0]).addcmul_(sin_a, sin_b, value=-1)
    torch.mul(sin_a, cos_b, out=out[1]).addcmul_(cos_a, sin_b)


def _cos_sin(p: Tensor, factor: float, out: tuple[Tensor, Tensor]) -> None:
    """out = (cos, sin) of factor * p."""
    phase = p * factor
    torch.cos(phase, out=out[0])
    torch.sin(phase, out=out[1])


def _baby_giant_split(degree: int) -> tuple[int, int]:
    """(B, G) with G (2B + 1) + B >= degree that costs least.

    A complex power costs four passes over the tile, an entry of the product table about a quarter.
    """
    candidates = []
    for B in range(1, degree + 1):
        G = max(0, -(-(degree - B) // (2 * B + 1)))
        candidates.append((4 * (B + G) + 0.25 * (1 + 2 * B) * (1 + 2 * G), B, G))
    _, B, G = min(candidates)
    return B, G
