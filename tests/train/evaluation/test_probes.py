"""kNN and linear probe: equal to independent formulations, and without side effects."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.overrides
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from training import randn

from lejepa_fast.train.evaluation import probes
from lejepa_fast.train.evaluation.probes import (
    LEARNING_RATES,
    held_out_losses,
    knn_accuracy,
    knn_predict,
    linear_probe,
)


def classes_of(n, *, seed):
    return torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed))


class Calls(torch.overrides.TorchFunctionMode):
    """Records (name, dtype of the result, number of rows) of matrix products and norms."""

    WATCHED = (F.linear, F.layer_norm, F.normalize, Tensor.matmul, Tensor.__matmul__)

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in self.WATCHED:
            self.seen.append((function.__name__, out.dtype, len(out)))
        return out


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe])
def test_memory_on_the_device_is_bounded(probe, monkeypatch):
    """1.3 million x 2,048 features and 2 GB, both 1,000 times smaller; every new tensor counts."""
    n, dim, memory = 10_400, 256, 2_000_000
    assert n * dim * 4 / memory == pytest.approx(1.3e6 * 2048 * 4 / probes.MEMORY, rel=0.01)
    y = torch.arange(n) % 4
    x = (randn(4, dim)[y] + randn(n, dim, seed=1)).half()  # halves: what goes to the device is a new tensor
    options = {} if probe is knn_accuracy else {"max_steps": 45, "learning_rates": (1e-3, 1e-2)}
    found = []
    for given in (memory, 25 * memory):
        monkeypatch.setattr(probes, "MEMORY", given)
        with MemTracker() as tracker:
            found.append(probe(x, y, x[:300], y[:300], num_classes=4, **options))
        peak = tracker.get_tracker_snapshot("peak")[x.device]["Total"] - x.nbytes
        assert (memory / 4 < peak < memory) if given == memory else peak > memory
    assert found[0] == found[1]


# ---- kNN -----------------------------------------------------------------------------------------


def sklearn_knn(train_x, train_y, test_x, k, temperature):
    """DINO's vote by scikit-learn, in float64; of equal votes the similarity decides."""

    def votes(distances):
        return 1 - 1e-6 * distances if temperature is None else np.exp((1 - distances) / temperature)

    knn = KNeighborsClassifier(min(k, len(train_x)), metric="cosine", weights=votes)
    knn.fit(train_x.double(), train_y)
    return torch.from_numpy(knn.predict(test_x.double()))


@pytest.mark.parametrize(
    ("n", "m", "dim", "k", "temperature"),
    [
        (101, 37, 5, 20, 0.07),  # nothing divides the chunks
        (64, 16, 8, 7, 1.0),  # chunks divide everything
        (9, 11, 3, 20, 0.07),  # fewer training samples than k
        (50, 20, 2, 1, 0.07),  # one neighbor
        (40, 30, 6, 5, None),  # equal votes
    ],
)
def test_knn_equals_scikit_learn_in_float64(n, m, dim, k, temperature, monkeypatch):
    lengths = randn(n, 1, seed=3).abs().add(0.1)  # do not matter
    train_x, test_x = (randn(n, dim) * lengths).bfloat16(), randn(m, dim, seed=1)
    train_y = classes_of(n, seed=2)
    expected = sklearn_knn(train_x, train_y, test_x, k, temperature)
    options: dict[str, Any] = {"k": k, "temperature": temperature, "num_classes": 4}
    for chunk, block in ((1024, 10**6), (16, 32), (7, 3)):
        monkeypatch.setattr(probes, "CHUNK", chunk)
        monkeypatch.setattr(probes, "MEMORY", 2 * block * (12 * dim + 20 * min(chunk, m)))
        assert knn_accuracy(train_x, train_y, test_x, expected, **options) == 100.0
    expected[0] = (expected[0] + 1) % 4
    assert knn_accuracy(train_x, train_y, test_x, expected, **options) == pytest.approx(100 * (m - 1) / m)


def test_knn_tie_goes_to_the_lowest_class_and_a_tiny_temperature_does_not_overflow():
    train_x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    samples = train_x, torch.tensor([2, 1]), train_x[:1], torch.tensor([1])
    assert knn_accuracy(*samples, temperature=1e-4, num_classes=3) == 100.0
    assert knn_accuracy(*samples, temperature=None, num_classes=3) == 100.0


def test_of_equal_votes_the_more_similar_neighbors_win():
    angles = torch.tensor([0.3, 0.4, 0.1, 0.2, 0.05, 2.0])
    train_x, y = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 0, 2, 2, 1, 1])
    query = torch.tensor([[1.0, 0.0]])

    def found(k):
        return knn_predict(train_x, y, query, num_classes=3, k=k, temperature=None).tolist()

    assert [found(k) for k in (1, 2, 3, 4, 5)] == [[1], [1], [2], [2], [2]]
    assert found(6) == [2]  # two votes each


def test_knn_sends_each_block_of_training_features_once(monkeypatch):
    monkeypatch.setattr(probes, "CHUNK", 7)
    monkeypatch.setattr(probes, "MEMORY", 64 * (12 * 16 + 20 * 7))  # four blocks of 32 or fewer
    with Calls() as calls:
        knn_accuracy(*blobs(100, seed=1), *blobs(50, seed=2), num_classes=4)
    assert sum(rows for name, _, rows in calls.seen if name == "normalize") == 100 + 4 * 50


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_knn_of_large_numbers_loses_no_digits(temperature):
    """Times in seconds: float32 knows them to 128 only."""
    x, y = torch.randn(40, 8), torch.arange(40).double()
    small, large = (
        knn_predict(x, each, x + 0.1, num_classes=None, k=5, temperature=temperature)
        for each in (y, y + 1.7e9)
    )
    torch.testing.assert_close(large - 1.7e9, small, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: expected at least 1"),
        ({"temperature": 0.0}, "temperature: expected a positive"),
        ({"learning_rates": ()}, "learning_rates: expected positive"),
        ({"learning_rates": (1e-3, 0.0)}, "learning_rates: expected positive"),
        ({"test_x": torch.ones(3, 9)}, "test_x: expected the 4 features of train_x, got 9"),
        ({"test_y": torch.zeros(2, dtype=torch.int64)}, "test_x, test_y: expected shapes"),
        ({"test_y": torch.tensor([0, 1, 2])}, "test_y: expected integer classes in 0 .. 1"),
        ({"train_y": torch.tensor([0, -1, 0])}, "train_y: expected integer classes"),
        ({"train_x": torch.full((3, 4), float("nan"))}, "train_x holds NaN"),
        ({"train_x": torch.ones(0, 4), "train_y": torch.zeros(0)}, "train_x holds no samples"),
    ],
)
def test_probes_refuse_bad_input(change, message):
    x, y = torch.eye(3, 4), torch.tensor([0, 1, 0])
    arguments = {"train_x": x, "train_y": y, "test_x": x, "test_y": y, "num_classes": 2, **change}
    if "learning_rates" not in change:
        with pytest.raises(ValueError, match=message):
            knn_accuracy(**arguments)
    if not {"k", "temperature"} & set(change):
        with pytest.raises(ValueError, match=message):
            linear_probe(**arguments)


# ---- linear probe --------------------------------------------------------------------------------


def blobs(n, *, seed):
    """Features (n, 16) around one center for each of 4 classes, linearly separable."""
    y = torch.arange(n) % 4
    return randn(4, 16, seed=99)[y] + 0.3 * randn(n, 16, seed=seed), y


def correlated():
    """Two classes, told apart only by a small difference of two large features: needs many steps."""
    sides = []
    for n in (400, 200):
        y = torch.arange(n) % 2
        common = randn(n, 8, seed=n)
        twin = common + 0.05 * randn(n, 8, seed=n + 1)
        twin[:, 0] += 0.3 * (2.0 * y - 1)
        sides += [torch.cat([common, twin], dim=1), y]
    return sides[0], sides[1], sides[2], sides[3]


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 300.0)])
def test_linear_probe_separates_separable_features_of_any_scale(scale, shift):
    (train_x, train_y), (test_x, test_y) = blobs(400, seed=1), blobs(200, seed=2)
    offset = shift * randn(1, 16, seed=5)
    train_x, test_x = train_x * scale + offset, test_x * scale + offset
    assert linear_probe(train_x, train_y, test_x, test_y, num_classes=4, epochs=30) > 99.0


def test_linear_probe_of_two_samples_does_not_blow_up_small_features():
    """By the deviations of two samples, the 56 small features would decide: 71 % on average."""

    def side(n, seed):
        y = torch.arange(n) % 2
        x = 0.05 * randn(n, 64, seed=seed)
        x[:, :8] = 2 * randn(8, seed=7) * (2 * y[:, None] - 1) + randn(n, 8, seed=seed + 500)
        return x, y

    found = [linear_probe(*side(2, seed), *side(400, 99), num_classes=2) for seed in range(10)]
    assert min(found) > 90


def test_linear_probe_finds_nothing_in_random_labels_and_manages_single_samples():
    train_x, test_x = randn(400, 16), randn(800, 16, seed=1)
    train_y, test_y = (classes_of(n, seed=n) for n in (400, 800))
    accuracy = linear_probe(train_x, train_y, test_x, test_y, num_classes=4, epochs=30)
    assert 18.0 < accuracy < 32.0  # 25 % guessing, four standard errors
    x, y = torch.eye(3), torch.arange(3)  # one sample of each class: none can be held out
    assert linear_probe(x, y, x, y, num_classes=3) == 100.0


def test_linear_probe_equals_a_plain_training_loop_in_float64():
    """LayerNorm, standardization, linear layer, AdamW, warm-up and cosine, written down independently."""
    train_x, train_y, test_x, test_y = correlated()
    epochs, batch, rate = 12, 64, 3e-2
    norm = torch.nn.LayerNorm(16, elementwise_affine=False, dtype=torch.float64)
    x, queries = norm(train_x.double()), norm(test_x.double())
    mean, std = x.mean(dim=0), x.var(dim=0, unbiased=False).sqrt()
    x, queries = (x - mean) / std, (queries - mean) / std
    layer = torch.nn.Linear(16, 2, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=1e-6)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(epochs)]
    batches = [rows for order in orders for rows in order.split(batch)[: len(x) // batch]]
    steps, warmup = len(batches), len(batches) // 10
    for step, rows in enumerate(batches):
        progress = (step - warmup) / (steps - warmup)
        factor = (step + 1) / warmup if step < warmup else (1 + np.cos(np.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.zero_grad()
        F.cross_entropy(layer(x[rows]), train_y[rows]).backward()
        optimizer.step()
    expected = layer(queries).argmax(dim=1)
    assert 50 < 100 * (expected == test_y).double().mean() < 95  # some samples are hard to tell
    options: dict[str, Any] = {"epochs": epochs, "batch_size": batch, "learning_rates": [rate]}
    agreement = linear_probe(train_x, train_y, test_x, expected, num_classes=2, **options)
    assert agreement >= 99.5  # at most 1 of the 200 samples lies within rounding of the boundary


def test_linear_probe_is_as_accurate_as_scikit_learns_logistic_regression():
    """On random features, classes by a noisy linear rule."""
    sides, rule = [], randn(16, 4, seed=9)
    for seed in (1, 2):
        x = F.layer_norm(randn(2000, 16, seed=seed), (16,))
        sides += [x, (x @ rule + 2 * randn(2000, 4, seed=10 + seed)).argmax(dim=1)]
    train_x, train_y, test_x, test_y = sides
    theirs = LogisticRegression(C=1e6, max_iter=1000).fit(train_x.numpy(), train_y.numpy())
    expected = 100 * theirs.score(test_x.numpy(), test_y.numpy())
    assert 40 < expected < 95
    found = linear_probe(train_x, train_y, test_x, test_y, num_classes=4)
    assert found == pytest.approx(expected, abs=0.5)


def test_linear_probe_chooses_the_rate_without_the_test_set():
    train_x, train_y, test_x, test_y = correlated()

    def probe(test_y, *rates):
        return linear_probe(train_x, train_y, test_x, test_y, num_classes=2, epochs=60, learning_rates=rates)

    low, high = probe(test_y, 1e-9), probe(test_y, 3e-2)
    assert high > low + 10  # the choice matters here
    assert probe(test_y, 1e-9, 3e-2) == high
    # Wrong test labels, which the small rate would suit better, change the score and not the choice.
    assert probe(1 - test_y, 1e-9, 3e-2) == pytest.approx(100 - high)


def test_linear_probe_chooses_a_good_rate_on_few_held_out_samples():
    """80 of 400 are held out. By accuracy the choice would lose 3.8 points on average, once 14."""
    rule = randn(100, 4, seed=9)
    samples = []
    for n, seed in ((400, 1), (2000, 2)):
        x = F.layer_norm(randn(n, 100, seed=seed), (100,))
        samples += [x, (x @ rule + 2 * randn(n, 4, seed=50 + seed)).argmax(dim=1)]
    best = max(linear_probe(*samples, num_classes=4, learning_rates=[rate]) for rate in LEARNING_RATES)
    assert 70 < best < 80
    found = [linear_probe(*samples, num_classes=4, seed=seed) for seed in range(8)]
    assert best - sum(found) / len(found) < 2.5


def test_held_out_losses_are_those_of_scaled_logits():
    logits, y = 20 * randn(50, 3, seed=1), classes_of(50, seed=2) % 3
    temperatures = [1, 2**0.5, 2, 8**0.5, 4, 32**0.5, 8, 128**0.5, 16]
    scaled = [logits.double() / temperature for temperature in temperatures]
    expected = [-each.log_softmax(dim=1)[torch.arange(50), y].sum() for each in scaled]
    found = held_out_losses(logits, y)
    torch.testing.assert_close(found[:9], torch.stack(expected), rtol=1e-5, atol=0)
    assert 0 < int(found.argmin()) < 16  # too confident logits, and not the least confident ones


def test_linear_probe_is_deterministic_and_leaves_the_process_as_it_was():
    train_x, *others = correlated()

    def fit(train_x):
        return linear_probe(train_x, *others, num_classes=2, epochs=10)

    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = fit(train_x)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.no_grad():
        assert fit(train_x) == first
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert fit(train_x.clone()) == first  # a tensor that no backward pass may keep


def test_probes_compute_in_float32_under_the_callers_autocast():
    samples = *blobs(80, seed=1), *blobs(40, seed=2)
    for probe, options in ((linear_probe, {"epochs": 1}), (knn_accuracy, {})):
        with torch.autocast("cpu", dtype=torch.bfloat16), Calls() as calls:
            probe(*samples, num_classes=4, **options)
        assert {dtype for name, dtype, _ in calls.seen if name != "layer_norm"} == {torch.float32}


def test_training_samples_that_the_steps_cannot_reach_are_not_used():
    """Of 1,000 samples, 10 steps of 16 see 160 at most, so no more of them go to the device."""
    samples = *blobs(1000, seed=0), *blobs(8, seed=1)
    for max_steps, used in ((10, 160), (100, 1000)):
        with Calls() as calls:
            accuracy = linear_probe(
                *samples, num_classes=4, batch_size=16, max_steps=max_steps, learning_rates=[1e-2]
            )
        assert max(rows for name, _, rows in calls.seen if name == "layer_norm") == used
        assert accuracy > 80
