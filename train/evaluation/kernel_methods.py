"""Probes with a bandwidth: Nadaraya-Watson, radius neighbors and kernel ridge regression, on frozen features.

Features are scaled to unit length, as for kNN, so the methods differ by their rule alone; distances d are
Euclidean. A query x gets the mean of the training targets with weights

    exp(-d(x, x_i)^2 / (2 h^2))        Nadaraya-Watson with a Gaussian kernel of bandwidth h
    1 where d(x, x_i) <= r, else 0     radius neighbors; where there are none, the nearest one

or, in kernel ridge regression, mean + sum_i a_i K(x, x_i) with that kernel and (K + penalty I) a = y - mean.
The targets are one column of 0 and 1 for each class, of which the largest wins, or numbers.

Bandwidth, radius and penalty are chosen by leave-one-out on up to 1,000 samples of the TRAINING set, by
accuracy for classes and squared error for numbers; of equal ones the first is taken.

Sources: Nadaraya (1964), Watson (1964); closed-form leave-one-out of kernel ridge: Rasmussen & Williams,
"Gaussian Processes for Machine Learning" (2006), eq. 5.12.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lejepa_fast.train.evaluation import probes
from lejepa_fast.train.evaluation.probes import check_positive, check_samples

CHOICE_SAMPLES = 1_000
RIDGE_SAMPLES = 8_000
BANDWIDTHS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the median distance of two training samples
RIDGE_BANDWIDTHS = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
RADII = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # shares of all pairs of training samples that are closer
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FAR = 1e30  # a squared distance beyond all others; infinity would give NaN in differences
_CHUNK = 1024  # queries that are compared at a time


@torch.no_grad()
def nadaraya_watson(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    num_classes: int | None,
    bandwidths: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Predict classes (m,) int64 or numbers (m,): the mean of all training targets by a Gaussian kernel.

    Both sets go to the device in blocks, so that its memory does not grow with them.

    Args:
        train_x, train_y: features (n, D) of any float dtype, and classes or numbers (n,).
        test_x: features (m, D) of what to predict.
        num_classes: classes are 0 .. num_classes - 1; None: `train_y` are numbers.
        bandwidths: positive candidates; a single one is used without a choice. None: `BANDWIDTHS` times the
            median distance of two training samples.
        seed: of the training samples that the choice looks at.
        device: where to compute; None: the device of `train_x`.

    Raises:
        ValueError: empty, mismatched or non-finite inputs, classes out of range, bad candidates.
    """
    samples = _Samples(train_x, train_y, test_x, num_classes, seed, device)
    widths = samples.candidates("bandwidths", bandwidths, lambda d: [d.median() * b for b in BANDWIDTHS])
    return samples.smooth(widths, gaussian=True)


@torch.no_grad()
def radius_neighbors(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    num_classes: int | None,
    radii: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Predict by the mean of the training targets within a radius, or by the nearest one if there is none.

    `radii` are positive candidates; None: those that hold the shares `RADII` of all pairs of training
    samples. Everything else is as in `nadaraya_watson`.
    """
    samples = _Samples(train_x, train_y, test_x, num_classes, seed, device)
    shares = torch.tensor(RADII, dtype=torch.float64, device=samples.device)
    # Half the smallest distance asks for the nearest sample alone, as one sample for each class needs.
    widths = samples.candidates("radii", radii, lambda d: [d.min() / 2, *torch.quantile(d, shares)])
    return samples.smooth(widths, gaussian=False)


@torch.no_grad()
def kernel_ridge(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    num_classes: int | None,
    bandwidths: Sequence[float] | None = None,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Predict by kernel ridge regression with a Gaussian kernel, in float64.

    It needs the matrix of all pairs: of more than 8,000 training samples a random part of that size is used,
    or a smaller one for very many classes or features. `penalties` are positive candidates, as `bandwidths`
    are, which by default are `RIDGE_BANDWIDTHS` times the median distance. Everything else is as in
    `nadaraya_watson`.
    """
    samples = _Samples(train_x, train_y, test_x, num_classes, seed, device)
    check_positive("penalties", penalties)
    widths = samples.candidates(
        "bandwidths", bandwidths, lambda d: [d.median() * b for b in RIDGE_BANDWIDTHS]
    )
    few, y = samples.unit(samples.few).double(), samples.columns(samples.few)
    scores = {}
    for h in widths:
        values, vectors = torch.linalg.eigh(_gaussian(few, few, h))
        for p in penalties:
            inverse = 1 / (values.clamp_min(0) + p)
            a = vectors @ (inverse[:, None] * (vectors.T @ (y - y.mean(dim=0))))
            left_out = y - a / (vectors.square() @ inverse)[:, None]
            scores[h, p] = samples.score(samples.decide(left_out))
    width, penalty = max(scores, key=scores.__getitem__)  # of equal ones the first
    own = 16 * train_x.shape[1] + 32 * (num_classes or 1)  # bytes of a sample and its targets
    rows = samples.order[: min(RIDGE_SAMPLES, probes.MEMORY // 4 // own)]
    x, y = samples.unit(rows).double(), samples.columns(rows)
    mean = y.mean(dim=0)
    K = _gaussian(x, x, width)
    K.diagonal().add_(penalty)
    a = torch.cholesky_solve(y - mean, torch.linalg.cholesky(K))
    del K
    block = max(1, probes.MEMORY // 8 // (24 * len(x) + 32 * x.shape[1] + 16 * y.shape[1]))
    parts = torch.arange(len(test_x)).split(block)
    return torch.cat(
        [
            samples.decide(_gaussian(samples.unit(part, test_x).double(), x, width) @ a + mean)
            for part in parts
        ]
    )


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(m, n) between rows of a (m, D) and b (n, D)."""
    squares = a.square().sum(dim=1)[:, None], b.square().sum(dim=1)
    return torch.addmm(squares[1], a, b.T, alpha=-2).add_(squares[0]).clamp_min_(0)


def _gaussian(a: Tensor, b: Tensor, h: float) -> Tensor:
    return _squared_distances(a, b).mul_(-0.5 / h**2).exp_()


class _Samples:
    """Checked samples of a probe: features of unit length in blocks, targets as columns, and the choice."""

    def __init__(
        self,
        train_x: Tensor,
        train_y: Tensor,
        test_x: Tensor,
        num_classes: int | None,
        seed: int,
        device: torch.device | str | None,
    ) -> None:
        check_samples(train_x, train_y, test_x, None, num_classes)
        self.x, self.y, self.test_x = train_x, train_y, test_x
        self.num_classes = num_classes
        self.device = torch.device(device or train_x.device)
        self.order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
        self.few = self.order[:CHOICE_SAMPLES]
        self.center = torch.zeros((), device=self.device)
        self.center = self.unit(self.few).mean(dim=0)  # near 0, differences of float32 numbers are exact
        self.mean = 0.0 if num_classes else train_y.double().mean().item()

    def unit(self, rows: Tensor, of: Tensor | None = None) -> Tensor:
        """Rows (b,) of the training features, or `of` others, at unit length around the center: (b, D)."""
        x = self.x if of is None else of
        with torch.autocast(self.device.type, enabled=False):
            taken = x[rows.to(x.device)].to(self.device, torch.float32)
            return F.normalize(taken, dim=1) - self.center

    def columns(self, rows: Tensor) -> Tensor:
        """Targets of these training samples: (b, C) of 0 and 1, or centered numbers (b, 1), in float64."""
        y = self.y[rows.to(self.y.device)].to(self.device)
        if self.num_classes is None:
            return (y.double() - self.mean)[:, None]
        columns = torch.zeros(len(y), self.num_classes, dtype=torch.float64, device=self.device)
        return columns.scatter_(1, y[:, None], 1.0)

    def decide(self, columns: Tensor) -> Tensor:
        """Predictions (m,) from values of the columns (m, C)."""
        return columns[:, 0].double() + self.mean if self.num_classes is None else columns.argmax(dim=1)

    def score(self, predicted: Tensor) -> float:
        """How well the targets of the few samples are predicted; more is better."""
        truth = self.y[self.few.to(self.y.device)].to(self.device)
        if self.num_classes is None:
            return -(predicted - truth.double()).square().mean().item()
        return (predicted == truth).double().mean().item()

    def candidates(
        self, name: str, given: Sequence[float] | None, of_distances: Callable[[Tensor], list[Tensor]]
    ) -> list[float]:
        """The candidates that are given, or those that suit the distances of the few samples."""
        if given is not None:
            check_positive(name, given)
            return list(given)
        distances = torch.pdist(self.unit(self.few).double())
        if not len(distances) or not distances.any():
            return [1.0]  # a single sample, or all are alike
        found = [float(width) for width in of_distances(distances)]
        return [width for width in found if width > 0] or [distances.max().item()]

    def smooth(self, widths: list[float], *, gaussian: bool) -> Tensor:
        """Predictions (m,) of the test set with the width that predicts the few samples best."""
        width = widths[0]
        if len(widths) > 1:
            part = max(1, probes.MEMORY // 4 // (12 * len(widths) * ((self.num_classes or 1) + 1)))
            found = [
                [self.decide(means) for means in self._means(rows, self.x, widths, gaussian, leave_out=True)]
                for rows in self.few.split(part)
            ]
            scores = [self.score(torch.cat(parts)) for parts in zip(*found, strict=True)]
            width = widths[scores.index(max(scores))]
        part = max(1, probes.MEMORY // 4 // (8 * (self.num_classes or 1) + 32))
        parts = torch.arange(len(self.test_x)).split(part)
        return torch.cat(
            [self.decide(self._means(rows, self.test_x, [width], gaussian)[0]) for rows in parts]
        )

    def _means(
        self, rows: Tensor, of: Tensor, widths: list[float], gaussian: bool, *, leave_out: bool = False
    ) -> Tensor:
        """Weighted means (W, m, C) of the columns for W widths and these rows (m,) of the features `of`.
        With `leave_out` they are training samples, none of which has a weight for itself."""
        chunk = min(_CHUNK, len(rows))
        block = max(
            1, probes.MEMORY // 4 // (16 * self.x.shape[1] + 20 * chunk + 24 * (self.num_classes or 1))
        )
        low = torch.full((len(rows), 1), _FAR, device=self.device)  # squared distance of the nearest sample
        nearest = torch.zeros(len(rows), (self.num_classes or 1) + 1, device=self.device)
        sums = nearest.repeat(len(widths), 1, 1)
        for samples in torch.arange(len(self.x)).split(block):
            # The last column sums up the weights.
            x, y = self.unit(samples), F.pad(self.columns(samples).float(), (0, 1), value=1.0)
            for start in range(0, len(rows), chunk):
                at = slice(start, start + chunk)
                squared = _squared_distances(self.unit(rows[at], of), x)
                if leave_out:
                    squared.masked_fill_((rows[at, None] == samples).to(self.device), _FAR)
                least, index = squared.min(dim=1)
                nearest[at] = torch.where(least[:, None] < low[at], y[index], nearest[at])
                before, low[at] = low[at].clone(), torch.minimum(low[at], least[:, None])
                for sum_of, width in zip(sums, widths, strict=True):
                    if gaussian:  # relative to the nearest sample, so that not all weights vanish
                        scale = -0.5 / width**2
                        weights = ((squared - low[at]) * scale).exp_()
                        sum_of[at] *= ((before - low[at]) * scale).exp()
                    else:
                        weights = (squared <= width**2).float()
                    sum_of[at] += weights @ y
        sums = torch.where(sums[..., -1:] > 0, sums, nearest)
        return sums[..., :-1] / sums[..., -1:]
