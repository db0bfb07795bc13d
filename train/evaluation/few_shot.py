"""All probes on frozen features, with all labels or with few: mean and spread over random draws of them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lejepa_fast.train.evaluation.kernel_methods import kernel_ridge, nadaraya_watson, radius_neighbors
from lejepa_fast.train.evaluation.probes import MAX_STEPS, knn_predict, linear_probe, percent
from lejepa_fast.train.evaluation.regression import Score, linear_ridge, regression_score

PROBES = ("linear", "knn", "knn_plain", "knn_radius", "nadaraya_watson", "kernel")

Table = dict[str, dict[str, list[float]]]


class Samples(NamedTuple):
    """Images seen through a frozen encoder, with their labels."""

    features: Tensor
    """Input of kNN and of the kernel methods, (n, D)."""
    probe: Tensor
    """Input of the linear probe, (n, D')."""
    y: Tensor
    """Classes (n,) int64, or numbers (n,) float64."""
    numbers: Tensor
    """Numbers of the images in their source, (n,)."""

    def take(self, rows: Tensor) -> "Samples":
        """These rows (b,) of all."""
        return Samples(*(tensor[rows] for tensor in self))


def score_probes(
    train: Samples,
    val: Samples,
    *,
    num_classes: int | None,
    probes: Sequence[str] = PROBES,
    k: int = 20,
    temperature: float = 0.07,
    linear_steps: int = MAX_STEPS,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Fit probes on the training samples and score them on the validation samples.

    Args:
        train, val: samples of both splits.
        num_classes: classes are 0 .. num_classes - 1; None: the labels are numbers.
        probes: some of `PROBES`: linear probe, kNN with weighted and with equal votes, neighbors within a
            radius, Nadaraya-Watson, kernel ridge regression.
        k, temperature: of kNN.
        linear_steps: upper limit of the steps of the linear probe for classes.
        seed: of the linear probe, and of the samples that the kernel methods choose by.
        device: where to compute; None: where the features are.

    Returns:
        By the name of the probe, top-1 accuracy in percent, or a `Score` of numbers.
    """
    found: dict[str, Any] = {}
    x = train.features, train.y, val.features
    shared: dict[str, Any] = {"num_classes": num_classes, "device": device}
    fits: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: linear_ridge(train.probe, train.y, val.probe, device=device),
        "knn": lambda: knn_predict(*x, k=k, temperature=temperature, **shared),
        "knn_plain": lambda: knn_predict(*x, k=k, temperature=None, **shared),
        "knn_radius": lambda: radius_neighbors(*x, seed=seed, **shared),
        "nadaraya_watson": lambda: nadaraya_watson(*x, seed=seed, **shared),
        "kernel": lambda: kernel_ridge(*x, seed=seed, **shared),
    }
    for name in probes:
        if num_classes is None:
            found[name] = regression_score(fits[name](), val.y)
        elif name == "linear":
            samples = train.probe, train.y, val.probe, val.y
            found[name] = linear_probe(*samples, seed=seed, max_steps=linear_steps, **shared)
        else:
            found[name] = percent(fits[name](), val.y)
    return found


def few_shot(
    train: Samples,
    val: Samples,
    shots: Sequence[int | None],
    *,
    num_classes: int | None,
    draws: int = 3,
    k: int = 20,
    seed: int = 0,
    known: Mapping[str, float] | None = None,
    fine_tune: Callable[[Samples], float] | None = None,
    **options: Any,
) -> Table:
    """Score probes that are fitted on few labels.

    Args:
        train, val: samples of both splits; all of `val` are scored.
        shots: labels per class, of numbers labels in all; None: all labels, in a single draw.
        num_classes: as for `score_probes`, as are `options`.
        draws: random draws of the labels, the same ones for every encoder.
        k: neighbors of kNN, at most as many as there are labels per class.
        seed: of the draws, and as for `score_probes`.
        known: figures of probes on all labels, which are not computed again.
        fine_tune: returns a figure of one more protocol, "fine_tuned", for some of the training samples.

    Returns:
        {"1": {"knn": [mean, standard deviation], ...}, ..., "all": ...}: accuracy in percent, or R2 of
        numbers. The deviation of a single draw is 0.
    """
    table: Table = {}
    for count in shots:
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, list[float]] = {}
        for _ in range(1 if count is None else draws):
            drawn = train if count is None else train.take(draw_labels(train.y, count, generator))
            neighbors = k if count is None or num_classes is None else min(k, count)
            scores: dict[str, Any] = dict(known or {}) if count is None else {}
            wanted = [name for name in options.get("probes", PROBES) if name not in scores]
            more = {**options, "probes": wanted, "k": neighbors, "seed": seed}
            scores |= score_probes(drawn, val, num_classes=num_classes, **more)
            if fine_tune is not None and "fine_tuned" not in scores:
                scores["fine_tuned"] = fine_tune(drawn)
            for name, score in scores.items():
                found.setdefault(name, []).append(score.r2 if isinstance(score, Score) else score)
        table["all" if count is None else str(count)] = {
            name: [statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0]
            for name, each in found.items()
        }
    return table


def draw_labels(y: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of `count` random samples of each class in y (n,), or of all if y are numbers."""
    if y.is_floating_point():
        return torch.randperm(len(y), generator=generator)[:count]
    order = torch.randperm(len(y), generator=generator)
    return torch.cat([order[y[order] == label][:count] for label in y.unique()])


def few_shot_note(y: Tensor, shots: Sequence[int | None], names: Sequence[str]) -> str:
    """Which classes of `names`, or in y (n,), have fewer samples than the shots ask for; "" if none has."""
    most = max((count for count in shots if count is not None), default=0)
    if y.is_floating_point():
        return f"There are {len(y)} training images; more labels mean all of them." if len(y) < most else ""
    counts = enumerate(y.bincount(minlength=len(names)).tolist())
    lacking = [(label, n) for label, n in counts if n < most and (n or names)]
    few = [f"{names[label] if names else label} ({n})" for label, n in lacking]
    listed = f"{', '.join(few[:10])}{', ...' if len(few) > 10 else ''}"
    return f"Classes with fewer than {most} training images give all that they have: {listed}." if few else ""
