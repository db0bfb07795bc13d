"""Probes of frozen features: weighted k nearest neighbours and a linear classifier.

Both take plain tensors, so they serve any encoder. Neither touches the global random state, the
caller's autocast or gradient mode, and both give the same answer on every call.

Sources: kNN weighting, k = 20 and temperature 0.07 from DINO (Caron et al., arXiv 2104.14294) after
Wu et al. (arXiv 1805.01978); LayerNorm + linear layer + AdamW with weight decay 1e-6 from LeJEPA
(arXiv 2511.08544). docs/evaluation.md states the protocols in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Threefold steps around AdamW's usual 1e-3. Every feature is standardised before the linear layer,
# therefore one grid fits all encoders.
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HOLDOUT_FRACTION = 0.2
SMALL_STEP = 2**28  # multiply-adds of an optimiser step

Head = tuple[Tensor, Tensor]  # weight (C, D) and bias (C,)


class LinearProbe(NamedTuple):
    """What a linear probe found: top-1 accuracy in percent on the test set, and the rate chosen for it."""

    accuracy: float
    learning_rate: float


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    num_classes: int,
    device: torch.device | str | None = None,
) -> float:
    """Top-1 accuracy in percent of the k-nearest-neighbour classifier under cosine similarity.

    Args:
        train_x, train_y: features (n, D) of any float dtype and classes (n,) that vote.
        test_x, test_y: features (m, D) and classes (m,) that are predicted.
        k: neighbours that vote; all n of them where n < k.
        temperature: a neighbour of similarity s votes with weight exp(s / temperature), as in DINO;
            None gives every neighbour the same vote.
        num_classes: classes are 0 .. num_classes - 1. Of classes with equal votes the lowest wins.
        device: where to compute; None is where `train_x` lies.

    Raises:
        ValueError: empty, mismatched or non-finite inputs, classes out of range, k < 1, temperature <= 0.
    """
    _check_inputs(train_x, train_y, test_x, test_y, num_classes)
    predicted = knn_predict(
        train_x, train_y, test_x, k=k, temperature=temperature, num_classes=num_classes, device=device
    )
    return _percent(predicted, test_y)


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    num_classes: int,
    device: torch.device | str | None = None,
    test_chunk: int = 1024,
    train_chunk: int = 65536,
) -> Tensor:
    """Predicted classes (m,), int64 on the CPU; arguments as in `knn_accuracy`.

    At most a (test_chunk, train_chunk) block of similarities exists at a time, and of the training
    features one float32 chunk on the device: memory does not grow with the size of the data set.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive, or None for equal votes, got {temperature}")
    device = torch.device(device) if device is not None else train_x.device
    k = min(k, len(train_x))
    predictions = []
    with torch.autocast(device.type, enabled=False):
        for queries in test_x.split(test_chunk):
            similarity, labels = _nearest(_unit_rows(queries, device), train_x, train_y, k, train_chunk)
            if temperature is None:
                votes = torch.ones_like(similarity)
            else:  # less the largest, which changes no ratio of votes, so that no exponential overflows
                votes = ((similarity - similarity.amax(dim=1, keepdim=True)) / temperature).exp()
            tally = votes.new_zeros(len(queries), num_classes).scatter_add_(1, labels, votes)
            predictions.append(tally.argmax(dim=1).cpu())
    return torch.cat(predictions)


def _nearest(queries: Tensor, train_x: Tensor, train_y: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Similarities and classes, each (m, k), of the k training rows most similar to unit rows `queries`."""
    best = queries.new_empty(len(queries), 0)
    labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for part_x, part_y in zip(train_x.split(chunk), train_y.split(chunk), strict=True):
        similarity, index = (queries @ _unit_rows(part_x, queries.device).T).topk(min(k, len(part_x)), dim=1)
        best = torch.cat([best, similarity], dim=1)
        labels = torch.cat([labels, part_y.to(queries.device)[index]], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        labels = labels.gather(1, kept)
    return best, labels


def _unit_rows(x: Tensor, device: torch.device) -> Tensor:
    return F.normalize(x.to(device, torch.float32), dim=1)


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
    device: torch.device | str | None = None,
) -> float:
    """Top-1 accuracy in percent of a linear classifier on frozen features; see `fit_linear_probe`."""
    return fit_linear_probe(
        train_x,
        train_y,
        test_x,
        test_y,
        num_classes=num_classes,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        device=device,
    ).accuracy


def fit_linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    num_classes: int,
    seed: int = 0,
    epochs: int = 100,
    batch_size: int = 256,
    max_steps: int = 12_500,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decay: float = 1e-6,
    device: torch.device | str | None = None,
) -> LinearProbe:
    """Fit LayerNorm + linear layer on frozen features and score it on the test set.

    AdamW (weight decay 1e-6) minimises cross-entropy; the rate warms up linearly over a tenth of the
    steps and falls to 0 along a cosine. After the LayerNorm every feature is standardised by its mean
    and deviation over the training set: the same family of classifiers (an affine map before a linear
    layer is part of it), but well conditioned for features of any scale. Weights start at zero.

    The learning rate is chosen on a stratified fifth of the TRAINING set held out for it, then the
    probe is fitted anew on all training samples. Test samples take no part in any choice.

    Args:
        train_x, train_y: features (n, D) of any float dtype and classes (n,).
        test_x, test_y: features (m, D) and classes (m,).
        num_classes: classes are 0 .. num_classes - 1.
        seed: of the held-out choice and of the batches' order; the result is a function of the inputs
            and this seed.
        epochs: passes over the training features, cut at `max_steps` steps in all; what these cannot
            reach of a large set is left out at random, so memory on the device is bounded.
        batch_size: features per step; all of them where there are fewer.
        learning_rates: candidates, each positive; a single one is taken without a search.
        device: where to compute; None is where `train_x` lies.

    Raises:
        ValueError: empty, mismatched or non-finite inputs, classes out of range, no learning rate.
    """
    _check_inputs(train_x, train_y, test_x, test_y, num_classes)
    if not learning_rates or not all(rate > 0 for rate in learning_rates):
        raise ValueError(f"learning_rates must be positive numbers, at least one, got {learning_rates!r}")
    device = torch.device(device) if device is not None else train_x.device
    fit = _Fit(num_classes, epochs, batch_size, max_steps, weight_decay, seed)
    if len(train_x) > max_steps * batch_size:
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
        rows = order[: max_steps * batch_size].to(train_x.device)
        train_x, train_y = train_x[rows], train_y[rows.to(train_y.device)]
    # A caller may be inside no_grad, inference_mode or autocast: an online probe has to fit all the same.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        # A copy, since a tensor made under inference_mode must not take part in a backward pass.
        x, y = train_x.detach().to(device, torch.float32, copy=True), train_y.to(device, copy=True)
        rate = _choose_rate(x, y, sorted(learning_rates), fit)
        mean, inverse_std = _normaliser(x)
        weight, bias = fit(_normalised(x, mean, inverse_std), y, [rate])[0]
        with torch.no_grad():
            scores = [
                F.linear(_normalised(part.to(device, torch.float32), mean, inverse_std), weight, bias)
                for part in test_x.split(8192)
            ]
    return LinearProbe(_percent(torch.cat(scores).argmax(dim=1).cpu(), test_y), rate)


def _choose_rate(x: Tensor, y: Tensor, rates: list[float], fit: _Fit) -> float:
    """The rate whose probe is right most often on the held-out fifth; of equal ones the smallest."""
    if len(rates) == 1:
        return rates[0]
    held_out = _stratified_holdout(y.cpu(), HOLDOUT_FRACTION, fit.seed).to(x.device)
    if not held_out.any():  # fewer than two samples of every class: nothing to choose on
        return min(rates, key=lambda rate: abs(math.log(rate / 1e-3)))
    mean, inverse_std = _normaliser(x[~held_out])
    heads = fit(_normalised(x[~held_out], mean, inverse_std), y[~held_out], rates)
    with torch.no_grad():
        held_x = _normalised(x[held_out], mean, inverse_std)
        right = [int((F.linear(held_x, *head).argmax(dim=1) == y[held_out]).sum()) for head in heads]
    return rates[right.index(max(right))]


@dataclass(frozen=True)
class _Fit:
    """Fits linear heads on normalised features, one per learning rate, all on the same batches."""

    num_classes: int
    epochs: int
    batch_size: int
    max_steps: int
    weight_decay: float
    seed: int

    def __call__(self, x: Tensor, y: Tensor, rates: Sequence[float]) -> list[Head]:
        """(weight (C, D), bias (C,)) for each rate."""
        batch = min(self.batch_size, len(x))
        # A rest smaller than a batch is left out; the next shuffle leaves out another.
        steps = min(self.epochs * (len(x) // batch), self.max_steps)
        heads = [
            (
                x.new_zeros(self.num_classes, x.shape[1]).requires_grad_(),
                x.new_zeros(self.num_classes).requires_grad_(),
            )
            for _ in rates
        ]
        groups = [{"params": list(head), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
        with _threads(one=batch * x.shape[1] * self.num_classes * len(rates) < SMALL_STEP):
            self._descend(x, y, heads, groups, batch, steps)
        return [(weight.detach(), bias.detach()) for weight, bias in heads]

    def _descend(
        self, x: Tensor, y: Tensor, heads: list[Head], groups: list[dict[str, Any]], batch: int, steps: int
    ) -> None:
        weights, biases = [head[0] for head in heads], [head[1] for head in heads]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
        generator = torch.Generator().manual_seed(self.seed)
        for step in range(steps):
            position = step % (len(x) // batch)
            if position == 0:
                order = torch.randperm(len(x), generator=generator).to(x.device)
            rows = order[position * batch : (position + 1) * batch]
            batch_x, batch_y = x[rows], y[rows]
            # The heads share no parameter: the gradient of the sum is each head's own gradient.
            logits = F.linear(batch_x, torch.cat(weights), torch.cat(biases)).view(-1, self.num_classes)
            labels = batch_y.repeat_interleave(len(heads))
            loss = len(heads) * F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()


@contextmanager
def _threads(*, one: bool) -> Iterator[None]:
    """Run on one CPU thread if `one`: waking a second costs more than a small step takes."""
    before = torch.get_num_threads()
    if one:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _normaliser(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation (D,) over samples of the layer-normalised features.

    A feature that never varies gets the inverse deviation 0: its rounding noise must not become input.
    """
    x = F.layer_norm(x, x.shape[1:])
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    return mean, torch.where(deviation > 1e-6, 1 / deviation, torch.zeros_like(deviation))


def _normalised(x: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    return (F.layer_norm(x, x.shape[1:]) - mean) * inverse_std


def _stratified_holdout(y: Tensor, fraction: float, seed: int) -> Tensor:
    """Mask (n,) of the held-out samples: `fraction` of each class, but never all of it."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        members = (y == label).nonzero().flatten()
        count = min(len(members) - 1, max(1, round(len(members) * fraction)))
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def _percent(predicted: Tensor, truth: Tensor) -> float:
    return 100.0 * (predicted == truth.cpu()).double().mean().item()


def _check_inputs(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, num_classes: int) -> None:
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
            raise ValueError(
                f"{name}_x and {name}_y must be of shape (n, D) and (n,), "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if len(x) == 0:
            raise ValueError(f"{name}_x holds no samples; expected at least one")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}_x holds NaN or infinite values; the encoder has diverged")
        if y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= num_classes:
            raise ValueError(
                f"{name}_y must hold integer classes in 0 .. {num_classes - 1}, "
                f"got {y.dtype} from {y.min().item()} to {y.max().item()}"
            )
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"test_x must have the {train_x.shape[1]} features of train_x, got {test_x.shape[1]}"
        )
