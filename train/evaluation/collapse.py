"""Label-free statistics of embeddings, and the verdict "healthy", "low rank" or "collapsed".

LeJEPA drives the embeddings z (n, K) toward the isotropic Gaussian N(0, I). A healthy run shows standard
deviations near 1, a flat eigenvalue spectrum and a small SIGReg statistic; a collapsed one has (nearly) the
same embedding for every image. All statistics are computed in float64, but SIGReg in float32.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lejepa_fast import SIGReg, standard_normal_knots

COLLAPSE_STD, COLLAPSE_STD_FREE = 0.1, 0.03  # with a Gaussian as the target, and without one
COLLAPSE_RANK = 1.2  # one direction holds 96 % of the variance
COLLAPSE_RANK_SHARE = 0.02
LOW_RANK_SHARE = 0.5  # samples of N(0, I) reach 0.57 or more, from 20 of them on
# A spread below this share of the embeddings' magnitude is float32 rounding, not information.
_NUMERICALLY_CONSTANT = 1e-6


State = Literal["healthy", "low rank", "collapsed"]


class Verdict(NamedTuple):
    """The state of the embeddings, and a sentence that states the rule and the figures."""

    state: State
    sentence: str


class SIGRegLevels(NamedTuple):
    """Reference values of the SIGReg statistic: its expectation under N(0, I), and its value at z = 0."""

    gaussian: float
    collapsed: float


def embedding_std(z: Tensor) -> float:
    """Standard deviation of z (n, K) over its n samples, averaged over dimensions; 1 for N(0, I)."""
    return z.double().std(dim=0, correction=0).mean().item()


def covariance_eigenvalues(z: Tensor) -> Tensor:
    """Eigenvalues of the covariance of z (n, K) over its samples: (K,) float64, descending, none below 0.

    They are the squared singular values of the centered embeddings, which keeps small ones accurate. Where
    n is far above K and the singular value decomposition slow, they come from the covariance matrix.
    """
    return _squared_singular_values(z.double() - z.double().mean(dim=0)) / len(z)


def _squared_singular_values(x: Tensor) -> Tensor:
    """Of x (n, K): (K,), descending, none below 0."""
    n, dim = x.shape
    if n > 8 * dim:
        return torch.linalg.eigvalsh(x.T @ x).flip(0).clamp_min(0)
    values = torch.linalg.svdvals(x).square()
    return torch.cat([values, values.new_zeros(dim - len(values))])


def effective_rank(z: Tensor) -> float:
    """exp(entropy of the normalized covariance eigenvalues) of z (n, K), in 0 .. min(K, n - 1).

    It is K if all directions vary alike, 1 if only one varies, and 0 if z is constant up to float32 rounding.
    Source: Roy & Vetterli, "The effective rank" (2007), applied to covariance eigenvalues.
    """
    values = covariance_eigenvalues(z)
    total = values.sum()
    if total <= _NUMERICALLY_CONSTANT**2 * z.double().square().sum(dim=1).mean():
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()


def rankme(z: Tensor) -> float:
    """exp(entropy of the normalized singular values) of embeddings z (n, K), not centered; in 1 .. min(n, K).

    It is 0 if z is all zero. Source: Garrido et al., "RankMe" (arXiv 2210.02885).
    """
    values = _squared_singular_values(z.double()).sqrt()
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total > 0 else 0.0


def sigreg_statistic(z: Tensor) -> float:
    """SIGReg of z (n, K) over 1,024 fixed random directions; see `sigreg_levels` to read it."""
    with torch.no_grad():
        return SIGReg(num_slices=1024, sync=False).eval()(z.float()).item()


def sigreg_levels(n: int, *, t_max: float = 3.0, n_points: int = 17) -> SIGRegLevels:
    """Expectation of SIGReg for n samples of N(0, I) (the same for every n), and its value if all are 0."""
    knots = standard_normal_knots(t_max, n_points)
    gaussian = (knots.weights * (1 - knots.phi.square())).sum().item()
    return SIGRegLevels(gaussian, n * (knots.weights * (1 - knots.phi).square()).sum().item())


def rank_limit(n: int, dim: int) -> int:
    """The largest effective rank that n embeddings in `dim` dimensions can have; 1 at least."""
    return max(1, min(dim, n - 1))


def rank_floors(n: int, dim: int, *, gaussian: bool = True) -> tuple[float, float]:
    """The effective ranks below which n embeddings in `dim` dimensions are collapsed, and of low rank."""
    low = LOW_RANK_SHARE * rank_limit(n, dim)
    share = COLLAPSE_RANK_SHARE * rank_limit(n, dim) if gaussian else 0.0
    return min(max(COLLAPSE_RANK, share), low), low


def std_floor(*, gaussian: bool = True) -> float:
    """The standard deviation below which embeddings are collapsed."""
    return COLLAPSE_STD if gaussian else COLLAPSE_STD_FREE


def verdict(std: float, rank: float, n: int, dim: int, *, gaussian: bool = True) -> Verdict:
    """Judge n embeddings in `dim` dimensions by their `embedding_std` and `effective_rank`.

    Collapsed: the std is below 0.1 (all images share one embedding), or the effective rank is below 1.2 (all
    images lie on a line) or below 2 % of its maximum min(dim, n - 1). Low rank: the effective rank is below
    half of that maximum. Where half of it is below 1.2, it is the only floor. Unless the training draws the
    embeddings to a standard `gaussian`, the std may fall to 0.03, and the 2 % do not count. Of fewer than 10
    embeddings the verdict may be wrong.
    """
    collapsed, low = rank_floors(n, dim, gaussian=gaussian)
    least = std_floor(gaussian=gaussian)
    rule = f"collapsed below std {least:g} or rank {collapsed:.3g}, low rank below {low:.3g}"
    figures = f"embedding std {std:.3g}, effective rank {rank:.3g} of at most {rank_limit(n, dim)}"
    state: State = "healthy"
    found = "Healthy: the embeddings vary in most directions"
    if not rank >= low:
        state, found = "low rank", "Low rank: no collapse, but few directions hold most of the variance"
    if not rank >= collapsed:
        state, found = "collapsed", "Collapsed: the embeddings vary in too few directions"
    if not std >= least:
        state, found = "collapsed", "Collapsed: all images share nearly the same embedding"
    return Verdict(state, f"{found} ({figures}; rule: {rule}).")
