"""kNN and linear probe: right against brute force and planted data, and without a trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.overrides
from torch import Tensor

from lejepa_fast.train.evaluation import probes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# ---- kNN -----------------------------------------------------------------------------------------


def brute_force_knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float | None, num_classes: int
) -> list[int]:
    """DINO's vote, sample by sample, in float64."""
    train = train_x.double().numpy()
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    predictions = []
    for query in test_x.double().numpy():
        similarity = train @ (query / np.linalg.norm(query))
        votes = np.zeros(num_classes)
        for index in np.argsort(-similarity)[:k]:
            weight = 1.0 if temperature is None else np.exp(similarity[index] / temperature)
            votes[train_y[index]] += weight
        predictions.append(int(votes.argmax()))
    return predictions


@pytest.mark.parametrize(
    ("n", "m", "dim", "k", "temperature"),
    [
        (101, 37, 5, 20, 0.07),  # nothing divides the chunks
        (64, 16, 8, 7, 1.0),  # chunks divide everything
        (9, 11, 3, 20, 0.07),  # fewer training samples than k
        (50, 20, 2, 1, 0.07),  # one neighbour
        (40, 30, 6, 5, None),  # equal votes
    ],
)
def test_knn_equals_brute_force_float64(n: int, m: int, dim: int, k: int, temperature: float | None) -> None:
    train_x, test_x = randn(n, dim), randn(m, dim, seed=1)
    train_y = torch.randint(0, 4, (n,), generator=generator(2))
    expected = brute_force_knn(train_x, train_y, test_x, k, temperature, 4)
    chunked = probes.knn_predict(
        train_x, train_y, test_x, k=k, temperature=temperature, num_classes=4, test_chunk=16, train_chunk=32
    )
    assert chunked.tolist() == expected
    whole = probes.knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=4)
    assert whole.tolist() == expected


def test_knn_weights_votes_by_similarity() -> None:
    # One neighbour of class 0 in the very direction of the query, two of class 1 at 60 degrees.
    train_x = torch.tensor([[1.0, 0.0], [0.5, 3**0.5 / 2], [0.5, -(3**0.5) / 2]])
    train_y, query = torch.tensor([0, 1, 1]), torch.tensor([[7.0, 0.0]])
    answer = torch.tensor([0])
    assert probes.knn_accuracy(train_x, train_y, query, answer, k=3, num_classes=2) == 100.0
    assert probes.knn_accuracy(train_x, train_y, query, answer, k=3, temperature=None, num_classes=2) == 0.0
    assert probes.knn_accuracy(train_x, train_y, query, answer, k=1, temperature=None, num_classes=2) == 100.0


def test_knn_tie_goes_to_the_lowest_class_and_tiny_temperature_does_not_overflow() -> None:
    train_x, train_y = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([2, 1])
    predicted = probes.knn_predict(
        train_x, train_y, torch.tensor([[1.0, 0.0]]), temperature=1e-4, num_classes=3
    )
    assert predicted.tolist() == [1]


def test_knn_takes_half_precision_and_ignores_length() -> None:
    x = randn(80, 6)
    y = (x[:, 0] > 0).long()
    scaled = (x * torch.rand(80, 1, generator=generator(3)).add(0.1)).bfloat16()
    exact = probes.knn_predict(scaled.double(), y, x, num_classes=2)
    assert torch.equal(probes.knn_predict(scaled, y, x, num_classes=2), exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"test_x": torch.ones(3, 9)}, "test_x must have the 4 features"),
        ({"test_y": torch.zeros(2, dtype=torch.int64)}, "test_x and test_y must be of shape"),
        ({"test_y": torch.tensor([0, 1, 2])}, "test_y must hold integer classes in 0 .. 1"),
        ({"train_y": torch.tensor([0, -1, 0])}, "train_y must hold integer classes"),
        ({"train_x": torch.full((3, 4), float("nan"))}, "train_x holds NaN"),
        ({"train_x": torch.ones(0, 4), "train_y": torch.zeros(0)}, "train_x holds no samples"),
    ],
)
def test_probes_refuse_bad_input(change: dict, message: str) -> None:
    y = torch.tensor([0, 1, 0])
    good = {
        "train_x": torch.eye(3, 4),
        "train_y": y,
        "test_x": torch.eye(3, 4),
        "test_y": y,
        "num_classes": 2,
    }
    with pytest.raises(ValueError, match=message):
        probes.knn_accuracy(**{**good, **change})
    if not {"k", "temperature"} & set(change):
        with pytest.raises(ValueError, match=message):
            probes.linear_probe(**{**good, **change})


# ---- linear probe --------------------------------------------------------------------------------


def blobs(
    n: int, *, seed: int, spread: float = 0.3, dim: int = 16, classes: int = 4
) -> tuple[Tensor, Tensor]:
    """Features around one centre per class; separable by a linear classifier when `spread` is small."""
    centres = randn(classes, dim, seed=99)
    y = torch.arange(n) % classes
    return centres[y] + spread * randn(n, dim, seed=seed), y


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 300.0)])
def test_linear_probe_separates_separable_features_of_any_scale(scale: float, shift: float) -> None:
    (train_x, train_y), (test_x, test_y) = blobs(400, seed=1), blobs(200, seed=2)
    offset = shift * randn(1, 16, seed=5)
    accuracy = probes.linear_probe(
        train_x * scale + offset, train_y, test_x * scale + offset, test_y, num_classes=4, epochs=30
    )
    assert accuracy > 99.0


def test_linear_probe_finds_nothing_in_random_labels() -> None:
    train_x, test_x = randn(400, 16), randn(800, 16, seed=1)
    train_y, test_y = (torch.randint(0, 4, (n,), generator=generator(n)) for n in (400, 800))
    accuracy = probes.linear_probe(train_x, train_y, test_x, test_y, num_classes=4, epochs=30)
    assert 18.0 < accuracy < 32.0  # 25 % guessing, four standard errors


def correlated(n: int, *, seed: int) -> Tensor:
    """Class i % 2 shows only in a small difference of two large correlated features: needs many steps."""
    common = randn(n, 8, seed=seed)
    twin = common + 0.05 * randn(n, 8, seed=seed + 1)
    twin[:, 0] += 0.3 * (2.0 * (torch.arange(n) % 2) - 1)
    return torch.cat([common, twin], dim=1)


def test_linear_probe_chooses_the_rate_without_the_test_set() -> None:
    train_x, test_x = (correlated(n, seed=n) for n in (400, 200))
    train_y, test_y = (torch.arange(n) % 2 for n in (400, 200))
    options = {"num_classes": 2, "epochs": 60}
    alone = [
        probes.fit_linear_probe(train_x, train_y, test_x, test_y, learning_rates=(rate,), **options).accuracy
        for rate in (1e-9, 3e-2)
    ]
    assert alone[1] > alone[0] + 10  # the choice matters here
    both = {**options, "learning_rates": (1e-9, 3e-2)}
    assert probes.fit_linear_probe(train_x, train_y, test_x, test_y, **both) == (alone[1], 3e-2)
    # Wrong test labels, which the small rate would suit better, change the score and not the choice.
    wrong = probes.fit_linear_probe(train_x, train_y, test_x, 1 - test_y, **both)
    assert wrong == (pytest.approx(100 - alone[1]), 3e-2)


def test_linear_probe_is_deterministic_and_leaves_the_process_as_it_was() -> None:
    train_x, test_x = (correlated(n, seed=n) for n in (400, 200))
    train_y, test_y = (torch.arange(n) % 2 for n in (400, 200))

    def fit() -> float:
        return probes.linear_probe(train_x, train_y, test_x, test_y, num_classes=2, epochs=10)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    try:
        first = fit()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.no_grad():
        assert fit() == first
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        train_x = train_x.clone()  # a tensor that no backward pass may keep
        assert fit() == first


def test_probes_compute_in_float32_under_the_callers_autocast() -> None:
    (train_x, train_y), (test_x, test_y) = blobs(80, seed=1), blobs(40, seed=2)
    products: list[torch.dtype] = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function in (torch.nn.functional.linear, Tensor.matmul, Tensor.__matmul__):
                products.append(out.dtype)
            return out

    with torch.autocast("cpu", dtype=torch.bfloat16), Recorder():
        probes.linear_probe(train_x, train_y, test_x, test_y, num_classes=4, epochs=1)
        count = len(products)
        probes.knn_accuracy(train_x, train_y, test_x, test_y, num_classes=4)
    assert 0 < count < len(products)  # both were seen
    assert set(products) == {torch.float32}


def test_linear_probe_manages_classes_of_one_sample() -> None:
    x, y = torch.eye(3), torch.arange(3)
    assert probes.linear_probe(x, y, x, y, num_classes=3) == 100.0


def test_linear_probe_refuses_rates_that_cannot_learn() -> None:
    x, y = torch.eye(3), torch.arange(3)
    for rates in ((), (1e-3, 0.0)):
        with pytest.raises(ValueError, match="learning_rates must be positive"):
            probes.fit_linear_probe(x, y, x, y, num_classes=3, learning_rates=rates)


def test_what_the_steps_cannot_reach_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 samples, 10 steps of 16 see 160 at most: no more of them go to the device."""
    taken: list[int] = []
    normaliser = probes._normaliser
    monkeypatch.setattr(probes, "_normaliser", lambda x: (taken.append(len(x)), normaliser(x))[1])
    x, y = blobs(1000, seed=0)
    options = {"num_classes": int(y.max()) + 1, "batch_size": 16}
    short = probes.fit_linear_probe(x, y, x, y, max_steps=10, **options)
    assert max(taken) == 160
    assert short.accuracy > 90
    taken.clear()
    probes.fit_linear_probe(x, y, x, y, max_steps=100, learning_rates=[1e-2], **options)
    assert taken == [1000]
