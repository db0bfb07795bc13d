"""Has the representation collapsed? Statistics of embeddings that need no labels.

LeJEPA drives the embeddings z (n, K) towards an isotropic Gaussian N(0, I). A healthy run therefore
shows deviations near 1 in every dimension, a flat eigenvalue spectrum, and a small SIGReg statistic;
a collapsed one has (nearly) the same embedding for every image. All statistics are taken in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lejepa_fast import SIGReg, standard_normal_knots

COLLAPSE_STD = 0.1  # a tenth of the deviation 1 that the loss asks for
COLLAPSE_RANK_SHARE = 0.02  # of the largest rank that n samples in K dimensions can show
COLLAPSE_RANK = 2.0
# Spread below this share of the embeddings' magnitude is float32 rounding, not information.
_NUMERICALLY_CONSTANT = 1e-6


class Verdict(NamedTuple):
    """`collapsed`, and a sentence that states the rule and the figures behind it."""

    collapsed: bool
    sentence: str


def embedding_std(z: Tensor) -> float:
    """Mean over dimensions of the standard deviation of z (n, K) over its n samples; 1 for N(0, I)."""
    _check(z)
    return z.double().std(dim=0, correction=0).mean().item()


def covariance_eigenvalues(z: Tensor) -> Tensor:
    """Eigenvalues (K,) of the covariance of z (n, K) over samples, float64, descending, none below 0.

    They come from the singular values of the centred embeddings, which keeps small ones accurate (the
    covariance matrix would square the condition number), or, where n is far above K and the singular
    value decomposition costly, from the covariance. For n <= K the last ones are 0.
    """
    _check(z)
    centred = z.double() - z.double().mean(dim=0)
    n, dim = centred.shape
    if n > 8 * dim:
        values = torch.linalg.eigvalsh(centred.T @ centred / n).flip(0).clamp_min(0)
    else:
        values = torch.linalg.svdvals(centred).square() / n
    return torch.cat([values, values.new_zeros(dim - len(values))])


def effective_rank(z: Tensor) -> float:
    """exp(entropy of the normalised eigenvalues of the covariance of z (n, K)): from 0 to min(K, n - 1).

    Roy & Vetterli, "The effective rank" (2007), on covariance eigenvalues. It is K where all directions
    vary alike, 1 where only one varies, and 0 where z is constant to float32 rounding.
    """
    values = covariance_eigenvalues(z)
    total = values.sum()
    magnitude = z.double().square().sum(dim=1).mean()
    if total <= _NUMERICALLY_CONSTANT**2 * magnitude or total == 0:
        return 0.0
    share = values / total
    return torch.special.entr(share).sum().exp().item()


def sigreg_statistic(
    z: Tensor, *, num_slices: int = 1024, t_max: float = 3.0, n_points: int = 17, seed: int = 0
) -> float:
    """SIGReg of z (n, K) over `num_slices` directions drawn from `seed`.

    Its expectation is `sigreg_levels(n).gaussian` for exact N(0, I) samples at any n, and it reaches
    `sigreg_levels(n).collapsed` when every embedding is 0. In between it grows with n.
    """
    _check(z)
    reg = SIGReg(num_slices=num_slices, t_max=t_max, n_points=n_points, sync=False, seed=seed)
    with torch.no_grad():
        return reg.eval()(z.float()).item()


class SIGRegLevels(NamedTuple):
    """Values of the SIGReg statistic to read it against."""

    gaussian: float
    collapsed: float


def sigreg_levels(n: int, *, t_max: float = 3.0, n_points: int = 17) -> SIGRegLevels:
    """Expectation of SIGReg under N(0, I), and its value when all n embeddings are 0."""
    knots = standard_normal_knots(t_max, n_points)
    gaussian = (knots.weights * (1 - knots.phi.square())).sum().item()
    return SIGRegLevels(gaussian, n * (knots.weights * (1 - knots.phi).square()).sum().item())


def verdict(std: float, rank: float, n: int, dim: int) -> Verdict:
    """Judge embeddings of n samples in `dim` dimensions by their `embedding_std` and `effective_rank`.

    Collapsed: the deviation is below 0.1 (all images share one embedding), or the effective rank is
    below 2 % of the most that can be seen, min(dim, n - 1), or below 2 (all images lie on a line).
    Where fewer than 4 directions can be seen at all, half of them is the floor.
    """
    attainable = max(1, min(dim, n - 1))
    least_rank = min(max(COLLAPSE_RANK, COLLAPSE_RANK_SHARE * attainable), 0.5 * attainable)
    rule = f"rule: embedding std at least {COLLAPSE_STD:g} and effective rank at least {least_rank:.3g}"
    figures = f"embedding std {std:.3g}, effective rank {rank:.3g} of at most {attainable}"
    if not std >= COLLAPSE_STD:
        return Verdict(True, f"Collapsed: all images share nearly the same embedding ({figures}; {rule}).")
    if not rank >= least_rank:
        return Verdict(True, f"Collapsed: the embeddings vary in too few directions ({figures}; {rule}).")
    return Verdict(False, f"Healthy, no collapse ({figures}; {rule}).")


def _check(z: Tensor) -> None:
    if z.ndim != 2 or z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(
            f"z must be embeddings of shape (n, K), n at least 2 and K at least 1, got {tuple(z.shape)}"
        )
