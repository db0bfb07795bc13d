r"""SIGReg in plain PyTorch: the definition that every other implementation is held against.

Nothing here is fast. The N x M x J tensor of phases is materialized and autograd keeps it, so
float64 inputs give a truth for values and gradients, and double backward works.

Notation (LeJEPA, arXiv 2511.08544, Algorithm 1). Embeddings `x` have shape (..., N, K), unit
directions `A` have shape (K, M), and `p = x A` are the projections. For knots `t_j` on the half
line, a target characteristic function `phi_j` and quadrature weights `w_j`:

    C_j = mean over n of cos(t_j p_n)          S_j = mean over n of sin(t_j p_n)
    T   = N * sum_j w_j * ((C_j - phi_j)^2 + S_j^2)

`C + iS` is the empirical characteristic function of the N samples along one direction, so T is the
Epps-Pulley statistic: N times a weighted squared distance to the target. The integrand is even in
t, hence the half line with doubled weights (`standard_normal_knots`).

Means are formed from sums, because sums are what ranks can add: `ecf_sums` is local to a rank,
`statistic_from_sums` takes the sums and the count of the whole batch. The square in T makes the
statistic of the whole batch different from the mean of the ranks' statistics.

Gradient, used by the implementations that write their own backward:

    dT/dp_n = sum_j 2 w_j t_j (S_j cos(t_j p_n) - (C_j - phi_j) sin(t_j p_n))
    dT/dx_n = sum_m dT/dp_nm * a_m

The factor N of T and the 1/N of the means cancel. |dT/dp| <= sum_j 4 w_j t_j whatever x is.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import check_integer, check_number


class Knots(NamedTuple):
    """Quadrature of the Epps-Pulley integral over t >= 0."""

    t: Tensor
    """Knots, shape (J,), non-negative."""
    phi: Tensor
    """Target characteristic function at the knots, shape (J,)."""
    weights: Tensor
    """Quadrature weight times window, shape (J,), already doubled for the half line."""
    spacing: float | None
    """Distance of the knots when `t[j] = j * spacing`, else None. Equidistant knots need one sine and cosine
    per projection instead of J."""


def standard_normal_knots(t_max: float = 3.0, n_points: int = 17) -> Knots:
    """Knots of the half line [0, t_max] for the standard normal target, as in the authors' code.

    The paper's Algorithm 1 writes `linspace(-5, 5, 17)`; that is `t_max=5, n_points=9` here,
    because the integrand is even: `symmetric_knots(5, 17)` returns the same knots.

    Args:
        t_max: right end of the half line, > 0.
        n_points: number of knots J on the half line, both ends included, >= 1.

    Returns:
        float64 knots on the CPU with `phi = exp(-t^2/2)` and trapezoid weights times `phi`.

    Raises:
        ValueError: t_max is not positive and finite, or n_points < 1.
    """
    _check_quadrature(t_max, n_points)
    if n_points == 1:
        one = _cpu_arange(1) + 1
        return Knots(_cpu_arange(1), one, one, None)
    dt = t_max / (n_points - 1)
    return _trapezoid_rule(_cpu_arange(n_points) * dt, dt, spacing=dt)


def symmetric_knots(t_max: float, n_points: int) -> Knots:
    """The trapezoid rule on `linspace(-t_max, t_max, n_points)`, folded onto the half line.

    An odd `n_points` contains t = 0 and equals `standard_normal_knots(t_max, (n_points + 1) // 2)`;
    an even one (eb_jepa uses 10) does not.

    Args:
        t_max: right end of the symmetric interval, > 0.
        n_points: number of knots on the whole interval, >= 2.

    Returns:
        float64 knots on the CPU; `spacing` is None when t = 0 is not a knot.

    Raises:
        ValueError: t_max is not positive and finite, or n_points < 2.
    """
    _check_quadrature(t_max, n_points)
    if n_points < 2:
        raise ValueError(f"n_points: expected at least 2 knots on the symmetric interval, got {n_points}")
    if n_points % 2:
        return standard_normal_knots(t_max, (n_points + 1) // 2)
    dt = 2 * t_max / (n_points - 1)
    return _trapezoid_rule((_cpu_arange(n_points // 2) + 0.5) * dt, dt, spacing=None)


def _trapezoid_rule(t: Tensor, dt: float, spacing: float | None) -> Knots:
    """Doubled for the half line; t = 0 has no mirror image."""
    q = torch.full_like(t, 2 * dt)
    q[-1] = dt
    q = torch.where(t > 0, q, dt)
    phi = torch.exp(-t.square() / 2)
    return Knots(t, phi, q * phi, spacing)


def _cpu_arange(n: int) -> Tensor:
    # On the CPU even under `torch.device("meta")`: modules rebuild their buffers from these values.
    return torch.arange(n, dtype=torch.float64, device="cpu")


def _check_quadrature(t_max: float, n_points: int) -> None:
    check_number("t_max", t_max)
    check_integer("n_points", n_points, at_least=1)
    if not 0 < t_max < float("inf"):
        raise ValueError(f"t_max: expected a positive finite number, got {t_max}")


def ecf_sums(x: Tensor, A: Tensor, t: Tensor) -> Tensor:
    """Sums over samples of cos(t_j p) and sin(t_j p), the unnormalized empirical characteristic function.

    Args:
        x: embeddings, shape (V, N, K), float32 or float64.
        A: unit directions, shape (K, M), same dtype.
        t: knots, shape (J,), same dtype.

    Returns:
        shape (V, 2, J, M): cosine sums at index 0, sine sums at index 1 of the second dimension.
    """
    # Transforms know plain operations only; under autocast their gradient of the product is then lowered.
    p = x @ A if transforming() else _Projection.apply(x, A)
    phase = p.unsqueeze(-1) * t  # (V, N, M, J)
    sums = torch.stack([phase.cos().sum(1), phase.sin().sum(1)], dim=1)  # (V, 2, M, J)
    return sums.transpose(-1, -2)


def transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Projection(torch.autograd.Function):
    """x @ A whose gradient is not lowered to bf16 when `backward()` is called under autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, A)
        return x @ A

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, A = ctx.saved_tensors
        with full_precision(x.device):
            return grad @ A.mT, (x.mT @ grad).sum(0)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off for `device`: statistics and their gradients stay in the dtype of their inputs."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # autocast knows no meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def statistic_from_sums(
    sums: Tensor,
    count: int | Tensor,
    phi: Tensor,
    weights: Tensor,
    *,
    unbiased: bool = False,
    scale_by_n: bool = True,
) -> Tensor:
    """Epps-Pulley statistic of every view and direction from the sums of the whole batch.

    The unbiased variant replaces `C^2 + S^2` by `(N (C^2 + S^2) - 1) / (N - 1)`, whose expectation is
    the squared modulus of the true characteristic function (LeJEPA, Theorem 6, names the O(1/N) bias).

    Args:
        sums: shape (V, 2, J, M), as returned by `ecf_sums` and summed over ranks.
        count: number of samples N behind the sums, an int or a 0-dim tensor.
        phi: target characteristic function, shape (J,) or one per direction (J, M).
        weights: quadrature weights, shape (J,) or (J, M).
        unbiased: remove the minibatch bias; needs N >= 2.
        scale_by_n: multiply by N, as the paper does.

    Returns:
        shape (V, M), same dtype as `sums`.
    """
    phi = phi.unsqueeze(-1) if phi.dim() == 1 else phi
    weights = weights.unsqueeze(-1) if weights.dim() == 1 else weights
    mean_cos, mean_sin = (sums / count).unbind(1)  # (V, J, M) each
    error = (mean_cos - phi).square() + mean_sin.square()
    if unbiased:
        error = error - (1 - mean_cos.square() - mean_sin.square()) / (count - 1)
    # A product and a sum, not a matmul: autocast would run a matmul in bf16.
    statistic = (error * weights).sum(1)
    return statistic * count if scale_by_n else statistic
