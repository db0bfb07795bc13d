"""Probes of frozen features: k nearest neighbors and a linear classifier, for features of any encoder.

Both are deterministic and leave the global random state and the caller's autocast and gradient mode alone.

Sources: kNN weighting, k = 20 and temperature 0.07 from DINO (Caron et al., arXiv 2104.14294) after Wu et al.
(arXiv 1805.01978); LayerNorm + linear layer + AdamW with weight decay 1e-6 from LeJEPA (arXiv 2511.08544).
docs/evaluation.md states the protocols.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Steps of about 3 around AdamW's usual 1e-3. Features are standardized, so one grid fits all encoders.
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HOLDOUT_FRACTION = 0.2
MAX_STEPS = 12_500
SMALL_STEP = 2**28  # multiply-adds
WEIGHT_DECAY = 1e-6


class LinearProbe(NamedTuple):
    """Result of a linear probe."""

    accuracy: float
    """Top-1 on the test set, in percent."""
    learning_rate: float
    """The rate that was chosen on the held-out training samples."""


# ---- k nearest neighbors --------------------------------------------------------------------------------


@torch.no_grad()
def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float | None = 0.07,
    device: torch.device | str | None = None,
    test_chunk: int = 1024,
    train_chunk: int = 65536,
) -> float:
    """Top-1 accuracy in percent of the k-nearest-neighbor classifier under cosine similarity.

    The device holds one chunk of training and of test features at a time and their similarities, so its
    memory does not grow with the data set, except for the (m, k) neighbors.

    Args:
        train_x, train_y: features (n, D) of any float dtype and classes (n,) that vote.
        test_x, test_y: features (m, D) and classes (m,) to predict.
        num_classes: classes are 0 .. num_classes - 1. If classes get equal votes, the lowest wins.
        k: number of neighbors that vote; n if n < k.
        temperature: a neighbor of similarity s votes with weight exp(s / temperature); None: equal votes.
        device: where to compute; None: the device of `train_x`.
        test_chunk, train_chunk: sizes of the chunks; the result does not depend on them.

    Raises:
        ValueError: empty, mismatched or non-finite inputs, classes out of range, k < 1, temperature <= 0.
    """
    _check_inputs(train_x, train_y, test_x, test_y, num_classes)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive, or None for equal votes, got {temperature}")
    device = torch.device(device or train_x.device)

    def unit_rows(x: Tensor) -> Tensor:
        return F.normalize(x.to(device, torch.float32), dim=1)

    k = min(k, len(train_x))
    similarity = torch.full((len(test_x), k), -math.inf, device=device)
    labels = torch.zeros(len(test_x), k, dtype=torch.int64, device=device)
    with torch.autocast(device.type, enabled=False):
        for x, y in zip(train_x.split(train_chunk), train_y.split(train_chunk), strict=True):
            x, y = unit_rows(x), y.to(device)
            parts = (tensor.split(test_chunk) for tensor in (test_x, similarity, labels))
            for queries, best, best_labels in zip(*parts, strict=True):
                found, index = (unit_rows(queries) @ x.T).topk(min(k, len(x)))
                best[:], kept = torch.cat([best, found], dim=1).topk(k)
                best_labels[:] = torch.cat([best_labels, y[index]], dim=1).gather(1, kept)
    if temperature is None:
        votes = torch.ones_like(similarity)
    else:  # relative to the largest, so that no exponential overflows
        votes = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
    tally = votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels, votes)
    return _percent(tally.argmax(dim=1), test_y)


# ---- linear probe ----------------------------------------------------------------------------------------


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    seed: int = 0,
    epochs: int = 100,
    batch_size: int = 256,
    max_steps: int = MAX_STEPS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    device: torch.device | str | None = None,
) -> LinearProbe:
    """Fit LayerNorm + linear layer on frozen features and score it on the test set.

    AdamW minimizes cross-entropy from zero weights; the rate warms up linearly over a tenth of the steps and
    falls to 0 along a cosine. After the LayerNorm each feature is standardized by its mean and deviation over
    the training set: the same family of classifiers, but well conditioned for features of any scale.

    The learning rate is chosen on a stratified fifth of the TRAINING set; then the probe is fitted again on
    all of it. Test samples take no part in any choice.

    Args:
        train_x, train_y: features (n, D) of any float dtype and classes (n,).
        test_x, test_y: features (m, D) and classes (m,).
        num_classes: classes are 0 .. num_classes - 1.
        seed: of the held-out choice and the order of batches.
        epochs: passes over the training set, cut at `max_steps` steps. Of a training set that so many steps
            cannot reach, a random part is used, so memory on the device is bounded.
        batch_size: samples per step; all if there are fewer.
        learning_rates: positive candidates; a single one is used without a search.
        device: where to compute; None: the device of `train_x`.

    Raises:
        ValueError: empty, mismatched or non-finite inputs, classes out of range, no positive learning rate.
    """
    _check_inputs(train_x, train_y, test_x, test_y, num_classes)
    if not learning_rates or not all(rate > 0 for rate in learning_rates):
        raise ValueError(f"learning_rates must be positive numbers, at least one, got {learning_rates!r}")
    device = torch.device(device or train_x.device)
    if len(train_x) > max_steps * batch_size:
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
        rows = order[: max_steps * batch_size]
        train_x, train_y = train_x[rows.to(train_x.device)], train_y[rows.to(train_y.device)]

    def fit(x: Tensor, y: Tensor, rates: Sequence[float]) -> Callable[[Tensor], list[Tensor]]:
        """Fit a head for each rate on x (n, D) and y (n,); returns what predicts classes, by rate."""
        standardize = _standardizer(x)
        batch = min(batch_size, len(x))
        steps = min(epochs * (len(x) // batch), max_steps)
        heads = _fit(standardize(x), y, rates, num_classes, batch, steps, seed)

        def predict(x: Tensor) -> list[Tensor]:
            parts = (standardize(part.to(device, torch.float32)) for part in x.split(8192))
            found = [[F.linear(part, *head).argmax(dim=1) for head in heads] for part in parts]
            return [torch.cat(classes) for classes in zip(*found, strict=True)]

        return predict

    # The caller may be inside no_grad, inference_mode or autocast.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        # A copy, because a tensor made in inference mode cannot take part in a backward pass.
        x, y = train_x.detach().to(device, torch.float32, copy=True), train_y.to(device, copy=True)
        rates = sorted(learning_rates)
        held_out = _stratified_holdout(y.cpu(), seed).to(device)
        if len(rates) > 1 and held_out.any():
            predictions = fit(x[~held_out], y[~held_out], rates)(x[held_out])
            correct = [int((predicted == y[held_out]).sum()) for predicted in predictions]
            rate = rates[correct.index(max(correct))]  # of equal ones the smallest
        else:  # there is no choice, or every class has a single sample
            rate = min(rates, key=lambda rate: abs(math.log(rate / 1e-3)))
        (predicted,) = fit(x, y, [rate])(test_x)
    return LinearProbe(_percent(predicted, test_y), rate)


@torch.enable_grad()
def _fit(
    x: Tensor, y: Tensor, rates: Sequence[float], num_classes: int, batch: int, steps: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Fit one linear head for each learning rate, all on the same batches of x (n, D) and y (n,)."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    weights = [x.new_zeros(num_classes, x.shape[1]).requires_grad_() for _ in rates]
    biases = [x.new_zeros(num_classes).requires_grad_() for _ in rates]
    heads = list(zip(weights, biases, strict=True))
    groups = [{"params": head, "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(x) // batch  # an incomplete batch is dropped; the next shuffle drops another
    threads = torch.get_num_threads()
    if batch * x.shape[1] * num_classes * len(rates) < SMALL_STEP:
        torch.set_num_threads(1)  # on a busy machine, waiting for other threads takes 10 times longer
    try:
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(x), generator=generator).to(x.device)
            rows = order[step % per_epoch * batch :][:batch]
            # The heads share no parameter, so the gradient of the sum is each head's own gradient.
            logits = F.linear(x[rows], torch.cat(weights), torch.cat(biases)).view(-1, num_classes)
            loss = len(heads) * F.cross_entropy(logits, y[rows].repeat_interleave(len(heads)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return [(weight.detach(), bias.detach()) for weight, bias in heads]


def _standardizer(x: Tensor) -> Callable[[Tensor], Tensor]:
    """LayerNorm, then standardization by the mean and deviation of the layer-normalized x (n, D).

    A feature that never varies is set to 0: its rounding noise must not become input.
    """
    deviation, mean = torch.std_mean(F.layer_norm(x, x.shape[1:]), dim=0, correction=0)
    scale = torch.where(deviation > 1e-6, 1 / deviation, torch.zeros_like(deviation))
    return lambda rows: (F.layer_norm(rows, rows.shape[1:]) - mean) * scale


def _stratified_holdout(y: Tensor, seed: int) -> Tensor:
    """Mask (n,) of the held-out samples: a fixed share of each class, but never all of it."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        members = (y == label).nonzero().flatten()
        count = min(len(members) - 1, max(1, round(len(members) * HOLDOUT_FRACTION)))
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def _percent(predicted: Tensor, truth: Tensor) -> float:
    return 100.0 * (predicted.cpu() == truth.cpu()).double().mean().item()


def _check_inputs(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, num_classes: int) -> None:
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
            raise ValueError(f"{name}_x and {name}_y must be of shape (n, D) and (n,), got {shapes}")
        if len(x) == 0:
            raise ValueError(f"{name}_x holds no samples; expected at least one")
        if not x.isfinite().all():
            raise ValueError(f"{name}_x holds NaN or infinite values; the encoder has diverged")
        if y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= num_classes:
            found = f"{y.dtype} from {y.min().item()} to {y.max().item()}"
            raise ValueError(f"{name}_y must hold integer classes in 0 .. {num_classes - 1}, got {found}")
    if (width := train_x.shape[1]) != test_x.shape[1]:
        raise ValueError(f"test_x must have the {width} features of train_x, got {test_x.shape[1]}")
