"""Probes with a bandwidth and for numbers: equal to scikit-learn, chosen without the test set, small."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsRegressor, RadiusNeighborsClassifier, RadiusNeighborsRegressor
from torch.distributed._tools.mem_tracker import MemTracker
from training import randn

from lejepa_fast.train.evaluation import kernel_methods, probes
from lejepa_fast.train.evaluation.kernel_methods import kernel_ridge, nadaraya_watson, radius_neighbors
from lejepa_fast.train.evaluation.probes import knn_predict
from lejepa_fast.train.evaluation.regression import linear_ridge, regression_score


def samples(n, *, seed, dim=8):
    """Features around one center for each of 3 classes, classes, and numbers that depend on the features."""
    y = torch.arange(n) % 3
    x = 1.2 * randn(3, dim, seed=99)[y] + randn(n, dim, seed=seed)
    return x, y, 500 + x[:, 0].sin() + 0.3 * x[:, 1] + 0.1 * randn(n, seed=seed + 1)


def unit(x):
    x = x.double().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def columns(y):
    return np.eye(3)[y.numpy()]


@pytest.mark.parametrize("memory", [2_000_000_000, 200_000])  # in one block and in many
def test_nadaraya_watson_and_radius_neighbors_equal_scikit_learn(memory, monkeypatch):
    monkeypatch.setattr(probes, "MEMORY", memory)
    (train_x, train_y, numbers), (test_x, _, _) = samples(301, seed=1), samples(83, seed=2)
    a, b = unit(train_x), unit(test_x)
    weights = rbf_kernel(b, a, gamma=0.5 / 0.15**2)
    found = nadaraya_watson(train_x, train_y, test_x, num_classes=3, bandwidths=[0.15])
    assert (found.numpy() == (weights @ columns(train_y)).argmax(axis=1)).mean() >= 0.995
    found = nadaraya_watson(train_x, numbers, test_x, num_classes=None, bandwidths=[0.15])
    np.testing.assert_allclose(found, weights @ numbers.numpy() / weights.sum(axis=1), atol=1e-4)

    theirs = RadiusNeighborsClassifier(radius=0.9).fit(a, train_y.numpy()).predict(b)
    found = radius_neighbors(train_x, train_y, test_x, num_classes=3, radii=[0.9])
    assert (found.numpy() == theirs).mean() >= 0.995
    theirs = RadiusNeighborsRegressor(radius=0.9).fit(a, numbers.numpy()).predict(b)
    found = radius_neighbors(train_x, numbers, test_x, num_classes=None, radii=[0.9])
    np.testing.assert_allclose(found, theirs, atol=1e-4)


def test_radius_without_neighbors_and_tiny_bandwidth_give_the_nearest_sample():
    train_x, train_y, _ = samples(60, seed=1)
    test_x = samples(20, seed=2)[0]
    nearest = train_y[(unit(test_x) @ unit(train_x).T).argmax(axis=1)]
    for probe, name in ((nadaraya_watson, "bandwidths"), (radius_neighbors, "radii")):
        assert torch.equal(probe(train_x, train_y, test_x, num_classes=3, **{name: [1e-3]}), nearest), name


def test_kernel_ridge_equals_scikit_learn():
    (train_x, train_y, numbers), (test_x, _, _) = samples(301, seed=1), samples(83, seed=2)
    options = {"bandwidths": [0.5], "penalties": [1e-2]}
    for y, classes in ((columns(train_y), 3), (numbers.double().numpy()[:, None], None)):
        model = KernelRidge(kernel="rbf", gamma=0.5 / 0.5**2, alpha=1e-2)
        expected = model.fit(unit(train_x), y - y.mean(axis=0)).predict(unit(test_x)) + y.mean(axis=0)
        found = kernel_ridge(train_x, train_y if classes else numbers, test_x, num_classes=classes, **options)
        if classes:
            assert (found.numpy() == expected.argmax(axis=1)).mean() >= 0.995
        else:
            np.testing.assert_allclose(found, expected[:, 0], atol=1e-4)


def test_widths_and_penalties_are_chosen_by_leave_one_out():
    """Against refits that leave out one training sample each."""
    (train_x, train_y, numbers), (test_x, _, _) = samples(40, seed=1), samples(30, seed=2)
    a, truth = unit(train_x), train_y.numpy()
    others = ~np.eye(len(a), dtype=bool)
    widths, scores = [0.02, 0.1, 0.4, 3.0], []
    for h in widths:
        weights = rbf_kernel(a, a, gamma=0.5 / h**2) * others
        scores.append(((weights @ columns(train_y)).argmax(axis=1) == truth).mean())
    assert len(set(scores)) > 2
    options: dict[str, Any] = {"num_classes": 3}
    each = [nadaraya_watson(train_x, train_y, test_x, bandwidths=[h], **options) for h in widths]
    found = nadaraya_watson(train_x, train_y, test_x, bandwidths=widths, **options)
    assert [torch.equal(found, one) for one in each] == [h == np.argmax(scores) for h in range(4)]

    centered = (numbers - numbers.mean()).double().numpy()
    widths, penalties = [0.2, 0.7, 3.0], [1e-3, 1e-1, 10.0]
    errors = {}
    for h, p in itertools.product(widths, penalties):
        model = KernelRidge(kernel="rbf", gamma=0.5 / h**2, alpha=p)
        errors[h, p] = np.square(cross_val_predict(model, a, centered, cv=LeaveOneOut()) - centered).mean()

    def ridge(bandwidths, penalties):
        given = {"bandwidths": bandwidths, "penalties": penalties}
        return kernel_ridge(train_x, numbers, test_x, num_classes=None, **given)

    found = ridge(widths, penalties)
    same = [pair for pair in errors if torch.equal(found, ridge(pair[:1], pair[1:]))]
    assert same == [min(errors, key=errors.__getitem__)]


def test_default_widths_suit_features_of_any_scale_and_single_samples_of_a_class():
    for scale in (1e-3, 1e3):
        (train_x, train_y, _), (test_x, test_y, _) = samples(300, seed=1), samples(200, seed=2)
        for probe in (nadaraya_watson, radius_neighbors, kernel_ridge):
            found = probe(scale * train_x, train_y, scale * test_x, num_classes=3)
            assert (found == test_y).double().mean() > 0.8, probe
    x, y = torch.eye(3), torch.arange(3)
    for probe in (nadaraya_watson, radius_neighbors, kernel_ridge):
        assert torch.equal(probe(x, y, x, num_classes=3), y)
        alike = probe(torch.ones(3, 2), y, torch.ones(2, 2), num_classes=3)
        assert set(alike.tolist()) <= {0, 1, 2}


def moderated(x: np.ndarray) -> np.ndarray:
    """Deviations (D,) of x (n, D), as if the mean variance had been seen in 4 more samples."""
    return np.sqrt((len(x) * x.var(axis=0) + 4 * x.var(axis=0).mean()) / (len(x) + 4))


def test_linear_ridge_equals_scikit_learn_and_chooses_by_leave_one_out(monkeypatch):
    (train_x, _, numbers), (test_x, _, _) = samples(60, seed=1, dim=40), samples(50, seed=2, dim=40)
    x, queries = (torch.nn.functional.layer_norm(each, (40,)).double().numpy() for each in (train_x, test_x))
    mean, std = x.mean(axis=0), moderated(x)
    x, queries, y = (x - mean) / std, (queries - mean) / std, numbers.double().numpy()
    with monkeypatch.context() as patch:
        patch.setattr(probes, "MEMORY", 500_000)
        found = linear_ridge(train_x, numbers, test_x, penalties=[0.1])
    np.testing.assert_allclose(found, Ridge(alpha=0.1).fit(x, y).predict(queries), atol=1e-4)
    # Of few samples the leverage of the mean, 1/n, decides.
    y, few = y[:12], train_x[:12]
    x = torch.nn.functional.layer_norm(few, (40,)).double().numpy()
    x = (x - x.mean(axis=0)) / moderated(x)
    penalties = [10.0 ** (power / 2) for power in range(-4, 9)]
    errors = [
        np.square(cross_val_predict(Ridge(alpha=p), x, y, cv=LeaveOneOut()) - y).mean() for p in penalties
    ]
    found = linear_ridge(few, numbers[:12], test_x, penalties=penalties)
    same = [
        p for p in penalties if torch.equal(found, linear_ridge(few, numbers[:12], test_x, penalties=[p]))
    ]
    assert same == [penalties[int(np.argmin(errors))]]


def test_knn_of_numbers_and_the_scores_equal_scikit_learn():
    (train_x, _, numbers), (test_x, _, truth) = samples(200, seed=1), samples(60, seed=2)
    a, b, y = unit(train_x), unit(test_x), numbers.double().numpy()
    theirs = KNeighborsRegressor(5, weights="uniform", metric="cosine").fit(a, y).predict(b)
    found = knn_predict(train_x, numbers, test_x, num_classes=None, k=5, temperature=None)
    np.testing.assert_allclose(found, theirs, atol=1e-4)
    weighted = KNeighborsRegressor(5, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine").fit(a, y)
    np.testing.assert_allclose(
        knn_predict(train_x, numbers, test_x, num_classes=None, k=5), weighted.predict(b), atol=1e-4
    )
    score, truth = regression_score(found, truth), truth.double().numpy()
    assert score == pytest.approx(
        (r2_score(truth, found.double()), mean_absolute_error(truth, found.double()))
    )


@pytest.mark.parametrize("probe", [nadaraya_watson, radius_neighbors, kernel_ridge, linear_ridge])
def test_memory_on_the_device_is_bounded(probe, monkeypatch):
    """All 500 times smaller, the matrices of pairs too."""
    memory = probes.MEMORY // 500
    monkeypatch.setattr(probes, "MEMORY", memory)
    monkeypatch.setattr(kernel_methods, "CHOICE_SAMPLES", 45)
    monkeypatch.setattr(kernel_methods, "RIDGE_SAMPLES", 360)
    n, dim = (30_000, 64) if probe is linear_ridge else (8_000, 256)
    y = torch.arange(n) % 4
    x = (randn(4, dim)[y] + randn(n, dim, seed=1)).half()
    assert x.numel() * 4 > 1.5 * memory
    options = {} if probe is linear_ridge else {"num_classes": 4}
    with MemTracker() as tracker:
        found = probe(x, y if options else 2 * x[:, 0].double(), x[:100], **options)
    peak = tracker.get_tracker_snapshot("peak")[x.device]["Total"] - x.nbytes
    assert memory / 8 < peak < memory
    if options:
        assert (found == y[:100]).double().mean() > 0.9
    else:
        assert regression_score(found, 2 * x[:100, 0]).r2 > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidths": []}, "bandwidths: expected positive numbers, at least one"),
        ({"bandwidths": [0.0]}, "bandwidths: expected positive"),
        ({"radii": [-1.0]}, "radii: expected positive"),
        ({"penalties": [0.0]}, "penalties: expected positive"),
        ({"train_y": torch.tensor([0, 1, 5])}, r"train_y: expected integer classes in 0 \.\. 1"),
        ({"num_classes": None}, "train_y: expected finite floating-point numbers"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "train_x": torch.eye(3),
        "train_y": torch.tensor([0, 1, 0]),
        "test_x": torch.eye(3),
        "num_classes": 2,
    }
    probe = radius_neighbors if "radii" in change else kernel_ridge
    with pytest.raises(ValueError, match=message):
        probe(**{**arguments, **change})
