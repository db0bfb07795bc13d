"""Predicting numbers from frozen features: a linear probe in closed form, and how predictions are scored."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lejepa_fast.train.evaluation.probes import Standardized, check_positive, check_samples

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-4, 15))


class Score(NamedTuple):
    """How well numbers are predicted."""

    r2: float
    """Coefficient of determination: 1 is perfect, 0 what always predicting the mean of the truth gives."""
    mae: float
    """Mean absolute error, in the unit of the numbers."""


@torch.no_grad()
def linear_ridge(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    device: torch.device | str | None = None,
) -> Tensor:
    """Fit LayerNorm, standardization and ridge regression; predict the numbers (m,) float64 of the test set.

    Minimizes |y - Xw - b|^2 + penalty |w|^2. The penalty has the smallest leave-one-out error of all training
    samples, in closed form: residual / (1 - leverage).

    Args:
        train_x, train_y: features (n, D) of any float dtype and numbers (n,).
        test_x: features (m, D) of what to predict.
        penalties: positive candidates.
        device: where to compute; None: the device of `train_x`.

    Raises:
        ValueError: empty, mismatched or non-finite inputs, no positive penalty.
    """
    check_samples(train_x, train_y, test_x, None, None)
    check_positive("penalties", penalties)
    device = torch.device(device or train_x.device)
    rows = torch.arange(len(train_x))
    with torch.autocast(device.type, enabled=False):
        features = Standardized(train_x, rows, device)
        mean = train_y.double().mean().to(device)
        y = train_y.to(device).double() - mean
        dim = train_x.shape[1]
        gram, moment = y.new_zeros(dim, dim), y.new_zeros(dim)
        blocks = rows.split(features.block)
        for block in blocks:
            x = features.take(block).double()
            gram.addmm_(x.T, x)
            moment.addmv_(x.T, y[block.to(device)])
        values, vectors = torch.linalg.eigh(gram)
        inverse = 1 / (values.clamp_min(0)[:, None] + torch.tensor(penalties, device=device).double())
        weights = vectors @ (inverse * (vectors.T @ moment)[:, None])  # (D, candidates)
        errors = torch.zeros(len(penalties), dtype=torch.float64, device=device)
        for block in blocks:
            x = features.take(block).double()
            leverage = (x @ vectors).square() @ inverse + 1 / len(y)
            left_out = (y[block.to(device), None] - x @ weights) / (1 - leverage).clamp_min(1e-12)
            errors += left_out.square().sum(dim=0)
        best = weights[:, errors.argmin()]
        parts = [features.standardize(part).double() @ best for part in test_x.split(features.block)]
    return torch.cat(parts) + mean


def regression_score(predicted: Tensor, truth: Tensor) -> Score:
    """Score predictions (m,) against the truth (m,); R2 is 0 if the truth is constant."""
    error, truth = predicted.cpu().double() - truth.cpu().double(), truth.cpu().double()
    total = (truth - truth.mean()).square().sum().item()
    return Score(1 - error.square().sum().item() / total if total else 0.0, error.abs().mean().item())
