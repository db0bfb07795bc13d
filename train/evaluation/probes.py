"""Probes of frozen features: k nearest neighbors and a linear classifier, for features of any encoder.

`kernel_methods.py` holds those with a bandwidth, `regression.py` the linear one for numbers.

Both are deterministic and leave the global random state and the caller's autocast and gradient mode alone.
Features stay where they are, on the CPU in an evaluation, and go to the device in blocks: beyond the model
it holds 2 GB at most, also of 1.3 million samples with 2,048 features and 1,000 classes.

Sources: kNN weighting, k = 20 and temperature 0.07 from DINO (Caron et al., arXiv 2104.14294) after Wu et al.
(arXiv 1805.01978); LayerNorm + linear layer + AdamW with weight decay 1e-6 from LeJEPA (arXiv 2511.08544).
docs/evaluation.md states the protocols.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Steps of about 3 around AdamW's usual 1e-3. Features are standardized, so one grid fits all encoders.
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HOLDOUT_FRACTION = 0.2
TEMPERATURES = tuple(2.0 ** (step / 2) for step in range(17))
MAX_STEPS = 12_500
SMALL_STEP = 2**28  # multiply-adds
WEIGHT_DECAY = 1e-6
PRIOR_ROWS = 4
MEMORY = 2_000_000_000  # bytes on the device
CHUNK = 1024  # queries of kNN that are compared at a time


# ---- k nearest neighbors --------------------------------------------------------------------------------


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, num_classes: int, **options: Any
) -> float:
    """Top-1 accuracy in percent of `knn_predict` on classes `test_y` (m,), with its other arguments."""
    check_samples(train_x, train_y, test_x, test_y, num_classes)
    return percent(knn_predict(train_x, train_y, test_x, num_classes=num_classes, **options), test_y)


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    num_classes: int | None,
    k: int = 20,
    temperature: float | None = 0.07,
    device: torch.device | str | None = None,
) -> Tensor:
    """Predictions (m,) of k nearest neighbors under cosine similarity: classes, or weighted means of numbers.

    The device holds one chunk of training and of test features at a time and their similarities, so its
    memory does not grow with the data set, except for the (m, k) neighbors. Training features go there once.

    Args:
        train_x, train_y: features (n, D) of any float dtype, and classes or numbers (n,).
        test_x: features (m, D) of what to predict.
        num_classes: classes are 0 .. num_classes - 1. None: `train_y` are numbers.
        k: number of neighbors that vote; n if n < k.
        temperature: a neighbor of similarity s votes with weight exp(s / temperature). None: equal votes, and
            of classes with as many votes the one whose neighbors are more similar in all.
        device: where to compute; None: the device of `train_x`.

    Raises:
        ValueError: empty, mismatched or non-finite inputs, classes out of range, k < 1, temperature <= 0.
    """
    check_samples(train_x, train_y, test_x, None, num_classes)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: expected a positive number or None, got {temperature}")
    device = torch.device(device or train_x.device)

    def unit_rows(x: Tensor) -> Tensor:
        return F.normalize(x.to(device, torch.float32), dim=1)

    # In half of the memory: a sample as it is sent, converted and normalized, and its similarities.
    block = max(1, MEMORY // 2 // (12 * train_x.shape[1] + 20 * min(CHUNK, len(test_x))))
    k = min(k, len(train_x))
    similarity = torch.full((len(test_x), k), -math.inf, device=device)
    labels = torch.zeros(len(test_x), k, dtype=train_y.dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        for x, y in zip(train_x.split(block), train_y.split(block), strict=True):
            x, y = unit_rows(x), y.to(device)
            parts = (tensor.split(CHUNK) for tensor in (test_x, similarity, labels))
            for queries, best, best_labels in zip(*parts, strict=True):
                found, index = (unit_rows(queries) @ x.T).topk(min(k, len(x)))
                best[:], kept = torch.cat([best, found], dim=1).topk(k)
                best_labels[:] = torch.cat([best_labels, y[index]], dim=1).gather(1, kept)
    predicted = []
    for best, best_labels in zip(similarity.split(CHUNK), labels.split(CHUNK), strict=True):
        if temperature is None:  # less than half a vote for all similarities together
            votes = torch.ones_like(best) if num_classes is None else 1 + best / (2 * k + 1)
        else:  # relative to the largest, so that no exponential overflows
            votes = ((best - best.amax(dim=1, keepdim=True)) / temperature).exp()
        if num_classes is None:
            votes = votes.double()  # float32 would round large numbers, such as times in seconds
            predicted.append((votes * best_labels).sum(dim=1) / votes.sum(dim=1))
        else:
            tally = votes.new_zeros(len(votes), num_classes).scatter_add_(1, best_labels, votes)
            predicted.append(tally.argmax(dim=1))
    return torch.cat(predicted)


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
) -> float:
    """Fit LayerNorm + linear layer on frozen features; return its top-1 accuracy on the test set in percent.

    AdamW minimizes cross-entropy from zero weights; the rate warms up linearly over a tenth of the steps and
    falls to 0 along a cosine. After the LayerNorm each feature is standardized by its mean and deviation over
    the training set: the same family of classifiers, but well conditioned for features of any scale.

    The learning rate is chosen on a stratified fifth of the TRAINING set, by `held_out_losses`; then the
    probe is fitted again on all of it. Test samples take no part in any choice.

    Args:
        train_x, train_y: features (n, D) of any float dtype and classes (n,).
        test_x, test_y: features (m, D) and classes (m,).
        num_classes: classes are 0 .. num_classes - 1.
        seed: of the held-out choice and the order of batches.
        epochs: passes over the training set, cut at `max_steps` steps. Of a training set that so many steps
            cannot reach, a random part is used.
        batch_size: samples per step; all if there are fewer.
        learning_rates: positive candidates; a single one is used without a search.
        device: where to compute; None: the device of `train_x`.

    Raises:
        ValueError: empty, mismatched or non-finite inputs, classes out of range, no positive learning rate.
    """
    check_samples(train_x, train_y, test_x, test_y, num_classes)
    check_positive("learning_rates", learning_rates)
    device = torch.device(device or train_x.device)
    samples = torch.arange(len(train_x))
    if len(train_x) > max_steps * batch_size:
        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
        samples = order[: max_steps * batch_size]

    def fit(
        rows: Tensor, rates: Sequence[float]
    ) -> Callable[[Tensor, Tensor], Iterator[tuple[Tensor, list[Tensor]]]]:
        """Fit a head for each rate on these rows (n,). Returns a function that yields blocks of other rows
        with their logits, by rate."""
        features = Standardized(train_x, rows, device)
        batch = min(batch_size, len(rows))
        steps = min(epochs * (len(rows) // batch), max_steps)
        heads = _fit(features, y[rows.to(device)], rates, num_classes, batch, steps, seed)

        def logits(x: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
            for part in rows.split(features.block):
                standardized = features.standardize(x[part.to(x.device)])
                yield part, [F.linear(standardized, *head) for head in heads]

        return logits

    # The caller may be inside no_grad, inference_mode or autocast.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        # A copy, because a tensor made in inference mode cannot take part in a backward pass.
        y = train_y.to(device, copy=True)
        rates = sorted(learning_rates)
        held_out = stratified_holdout(train_y.cpu()[samples], seed)
        if len(rates) > 1 and held_out.any():
            losses = torch.zeros(len(rates), len(TEMPERATURES), dtype=torch.float64)
            for rows, by_rate in fit(samples[~held_out], rates)(train_x, samples[held_out]):
                targets = y[rows.to(device)]
                losses += torch.stack([held_out_losses(each, targets) for each in by_rate])
            rate = rates[int(losses.nan_to_num(nan=math.inf).amin(dim=1).argmin())]
        else:  # there is no choice, or every class has a single sample
            rate = min(rates, key=lambda rate: abs(math.log(rate / 1e-3)))
        blocks = fit(samples, [rate])(test_x, torch.arange(len(test_x)))
        predicted = [logits.argmax(dim=1) for _, (logits,) in blocks]
    return percent(torch.cat(predicted), test_y)


class Standardized:
    """Layer-normalizes and standardizes features x (N, D) on the device, by mean and deviation of some rows,
    which stay there if they fit.

    Variances are moderated (Smyth, 2004): drawn toward their mean, as if it had been seen in 4 rows more.
    The deviations of few rows are chance: of two, each feature would become 1 and -1, however small it is. A
    feature that never varies is set to 0: its rounding noise must not become input.
    """

    def __init__(self, x: Tensor, rows: Tensor, device: torch.device) -> None:
        self.x, self.rows, self.device = x, rows, device
        # Four copies of a block are alive at once: as sent, converted, and the operands of an operation.
        self.block = max(256, MEMORY // 4 // (16 * x.shape[1]))
        parts = rows.split(self.block)
        found = [torch.var_mean(self._normalize(x[part.to(x.device)]), dim=0, correction=0) for part in parts]
        variances, means = (torch.stack(each).double() for each in zip(*found, strict=True))
        shares = torch.tensor([len(part) for part in parts], device=device).double()[:, None] / len(rows)
        mean = (shares * means).sum(dim=0)
        variance = (shares * (variances + (means - mean).square())).sum(dim=0)
        moderated = (len(rows) * variance + PRIOR_ROWS * variance.mean()) / (len(rows) + PRIOR_ROWS)
        self.mean = mean.float()
        self.scale = torch.where(variance.sqrt() > 1e-6, moderated.rsqrt(), 0).float()
        self.whole: Tensor | None = None
        if len(rows) * x.shape[1] * 4 <= MEMORY // 2:
            self.whole = torch.empty(len(rows), x.shape[1], device=device)
            for into, part in zip(self.whole.split(self.block), parts, strict=True):
                into.copy_(self.standardize(x[part.to(x.device)]))

    def _normalize(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.device, torch.float32), x.shape[1:])

    def standardize(self, x: Tensor) -> Tensor:
        """Features (m, D) of the same kind, on any device."""
        return (self._normalize(x) - self.mean) * self.scale

    def take(self, places: Tensor) -> Tensor:
        """The standardized features of the rows at these places (m,), on the device."""
        if self.whole is not None:
            return self.whole[places.to(self.device)]
        return self.standardize(self.x[self.rows[places].to(self.x.device)])


@torch.enable_grad()
def _fit(
    features: Standardized,
    y: Tensor,
    rates: Sequence[float],
    num_classes: int,
    batch: int,
    steps: int,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """Fit one linear head for each learning rate, all on the same batches of features (n, D) and y (n,)."""
    width, zeros = features.x.shape[1], features.mean.new_zeros
    weights = [zeros(num_classes, width).requires_grad_() for _ in rates]
    biases = [zeros(num_classes).requires_grad_() for _ in rates]
    heads = list(zip(weights, biases, strict=True))
    groups = [{"params": head, "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(y) // batch  # an incomplete batch is dropped; the next shuffle drops another
    per_block = min(per_epoch, max(1, features.block // batch))
    threads = torch.get_num_threads()
    if batch * width * num_classes * len(rates) < SMALL_STEP:
        torch.set_num_threads(1)  # on a busy machine, waiting for other threads takes 10 times longer
    try:
        for step in range(steps):
            number = step % per_epoch
            if number == 0:
                order = torch.randperm(len(y), generator=generator)
            if number % per_block == 0:
                rows = order[number * batch : min(number + per_block, per_epoch) * batch]
                x, targets = features.take(rows), y[rows.to(y.device)]
            part = slice(number % per_block * batch, (number % per_block + 1) * batch)
            # The heads share no parameter, so the gradient of the sum is each head's own gradient.
            logits = F.linear(x[part], torch.cat(weights), torch.cat(biases)).view(-1, num_classes)
            loss = len(heads) * F.cross_entropy(logits, targets[part].repeat_interleave(len(heads)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return [(weight.detach(), bias.detach()) for weight, bias in heads]


def warmup_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: rises linearly over a tenth of the steps, then falls to 0 as a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def stratified_holdout(y: Tensor, seed: int) -> Tensor:
    """Mask (n,) of held-out samples of classes y (n,): a fifth of each class, but never all of it."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique().tolist():
        members = (y == label).nonzero().flatten()
        count = min(len(members) - 1, max(1, round(len(members) * HOLDOUT_FRACTION)))
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def held_out_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (n, C) over each of `TEMPERATURES`, summed over the samples: (T,) float64.

    The smallest one ranks classifiers that were fitted in different ways. Their accuracy would rank them by
    chance if few samples are held out, and their own cross-entropy would prefer those that were fitted too
    little, because it punishes confidence. Dividing by the best temperature (Guo et al., arXiv 1706.04599)
    corrects the confidence and leaves the predictions alone.
    """
    losses = [F.cross_entropy(logits / each, targets, reduction="sum") for each in TEMPERATURES]
    return torch.stack(losses).double().cpu()


def percent(predicted: Tensor, truth: Tensor) -> float:
    """Share of equal classes (n,), in percent."""
    return 100.0 * (predicted.cpu() == truth.cpu()).double().mean().item()


def check_positive(name: str, values: Sequence[float]) -> None:
    """Raise ValueError unless these are positive numbers, at least one."""
    if not values or not all(value > 0 for value in values):
        raise ValueError(f"{name}: expected positive numbers, at least one, got {values!r}")


def check_samples(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor | None, num_classes: int | None
) -> None:
    """Raise ValueError unless features (n, D) and classes, or numbers without `num_classes`, can be used."""
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        shapes = f"{tuple(x.shape)} and {None if y is None else tuple(y.shape)}"
        if x.ndim != 2 or (y is not None and (y.ndim != 1 or len(x) != len(y))):
            raise ValueError(f"{name}_x, {name}_y: expected shapes (n, D) and (n,), got {shapes}")
        if len(x) == 0:
            raise ValueError(f"{name}_x holds no samples; expected at least one")
        if not all(part.isfinite().all() for part in x.split(1024)):
            raise ValueError(f"{name}_x holds NaN or infinite values; the encoder has diverged")
        if y is None:
            continue
        if num_classes is None:
            if not y.is_floating_point() or not y.isfinite().all():
                raise ValueError(f"{name}_y: expected finite floating-point numbers, got {y.dtype}")
        elif y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= num_classes:
            found = f"{y.dtype} from {y.min().item()} to {y.max().item()}"
            raise ValueError(f"{name}_y: expected integer classes in 0 .. {num_classes - 1}, got {found}")
    if (width := train_x.shape[1]) != test_x.shape[1]:
        raise ValueError(f"test_x: expected the {width} features of train_x, got {test_x.shape[1]}")
