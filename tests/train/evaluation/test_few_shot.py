"""Few labels: which are drawn, what is fitted on them, and fine-tuning of the encoder."""

import copy
import statistics
from typing import Any

import pytest
import torch
from training import randn

from lejepa_fast.data import eval_loader
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import shots, validate
from lejepa_fast.train.evaluation import fine_tuning, protocol
from lejepa_fast.train.evaluation.few_shot import (
    PROBES,
    Samples,
    draw_labels,
    few_shot,
    few_shot_note,
    score_probes,
)
from lejepa_fast.train.evaluation.probes import knn_accuracy
from lejepa_fast.train.model.model import build_model


def samples(n, *, seed, numbers=False):
    """Features around one center for each of 3 classes; the numbers are linear in them."""
    y = torch.arange(n) % 3
    x = randn(3, 8, seed=99)[y] + 0.8 * randn(n, 8, seed=seed)
    return Samples(x, x, 2.0 * x[:, 0].double() + x[:, 1].double() if numbers else y, torch.arange(n))


def test_labels_are_drawn_for_each_class_and_depend_on_labels_and_seed_alone():
    y = torch.tensor([0] * 50 + [1] * 3 + [4] * 20)
    generator = torch.Generator().manual_seed(3)
    first, second = draw_labels(y, 5, generator), draw_labels(y, 5, generator)
    assert y[first].bincount().tolist() == [5, 3, 0, 0, 5]
    assert len(set(first.tolist())) == 13
    assert set(first.tolist()) != set(second.tolist())
    assert torch.equal(draw_labels(y, 5, torch.Generator().manual_seed(3)), first)
    assert len(draw_labels(y.double(), 7, generator)) == 7
    note = few_shot_note(y, [1, 5, None], ["ant", "bee", "cat", "dog", "fly"])
    assert note.endswith("that they have: bee (3), cat (0), dog (0).")
    assert few_shot_note(y, [1, 3, None], []) == few_shot_note(y.double(), [73, None], []) == ""
    assert (
        few_shot_note(y.double(), [74], []) == "There are 73 training images; more labels mean all of them."
    )


def test_table_holds_mean_and_deviation_over_draws_and_all_labels_once():
    train, val = samples(90, seed=1), samples(200, seed=2)
    calls = []

    def fine_tune(drawn):
        calls.append(len(drawn.y))
        return float(len(calls))

    options: dict[str, Any] = {"num_classes": 3, "probes": ["knn", "knn_plain", "kernel"]}
    table = few_shot(train, val, [1, 10, None], draws=3, known={"knn": 12.5}, fine_tune=fine_tune, **options)
    assert list(table) == ["1", "10", "all"]
    generator = torch.Generator().manual_seed(0)
    expected = []
    for _ in range(3):
        drawn = train.take(draw_labels(train.y, 10, generator))
        scored = drawn.features, drawn.y, val.features, val.y
        # Not 20 neighbors: only 10 of them can be of the right class.
        expected.append(knn_accuracy(*scored, num_classes=3, k=10, temperature=None))
    assert table["10"]["knn_plain"] == pytest.approx([statistics.fmean(expected), statistics.stdev(expected)])
    assert len(set(expected)) > 1
    assert table["all"]["knn"] == [12.5, 0.0]  # known
    everything = score_probes(train, val, num_classes=3, probes=["kernel"])
    assert table["all"]["kernel"] == [everything["kernel"], 0.0]
    assert table["10"]["kernel"][0] > table["1"]["kernel"][0]
    assert (calls, table["1"]["fine_tuned"]) == ([3] * 3 + [30] * 3 + [90], [2.0, 1.0])


def test_every_probe_scores_classes_and_numbers():
    train, val = samples(150, seed=1), samples(150, seed=2)
    scores = score_probes(train, val, num_classes=3, linear_steps=100)
    assert list(scores) == list(PROBES)
    assert min(scores.values()) > 60.0, scores  # a third is guessing
    train, val = samples(150, seed=1, numbers=True), samples(150, seed=2, numbers=True)
    scores = score_probes(train, val, num_classes=None)
    assert scores["linear"].r2 > 0.75  # the LayerNorm takes a part
    assert min(score.r2 for score in scores.values()) > 0.2, scores
    table = few_shot(train, val, [20], num_classes=None, draws=2, probes=["linear"])
    assert 0 < table["20"]["linear"][0] < scores["linear"].r2


def test_shots_are_parsed_and_bad_ones_refused(tiny):
    for text, parsed in (("", []), ("1, 10,all", [1, 10, None]), ("5,5", [5])):
        assert shots(text) == parsed
    for text in ("0", "1,,2", "-3", "some", "1.5"):
        with pytest.raises(UsageError, match=r"eval.few_shot: expected numbers from 1 and 'all', .* got '"):
            validate(tiny(eval={"few_shot": text}))


def test_fine_tuning_learns_and_leaves_the_encoder_alone(tiny, monkeypatch):
    monkeypatch.setattr(fine_tuning, "SMALLEST_NUMBER_OF_STEPS", 12)
    cfg = tiny(model={"name": "test_resnet"}, eval={"fine_tune": 1, "few_shot": "2", "draws": 1})
    model = build_model(cfg)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    train, val = protocol.open_evaluation(cfg)
    splits, options = (train.subset(range(0, 32, 4)), val), {"device": "cpu", "linear_steps": 0}
    result = protocol.evaluate_model(model, *splits, cfg, **options)
    assert (result.fine_tuned or 0) >= 90.0  # red against blue
    assert list((result.few_shot or {})["2"]) == ["knn", *PROBES[2:], "fine_tuned"]
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    during = protocol.evaluate_model(model, *splits, cfg, with_few_labels=False, **options)
    assert (during.fine_tuned, during.few_shot) == (None, None)


def fine_tuned(cfg, rows, y, *, frozen=False):
    """R2 of an encoder that is fine-tuned on these training images, whose numbers are y (32,)."""
    train, val = (protocol._numbered(source) for source in protocol.open_splits(cfg.data))
    return fine_tuning.fine_tune(
        build_model(cfg).encoder.requires_grad_(not frozen),
        train.subset(rows),
        y,
        lambda source: eval_loader(source, image_size=32, batch_size=8, backend="torchvision"),
        val,
        torch.arange(12).double(),
        cfg,
        num_classes=None,
        device=torch.device("cpu"),
        loading={"backend": "torchvision", "num_workers": 0},
    )


def test_fine_tuning_repeats_reads_drawn_labels_alone_and_takes_a_single_image(tiny, monkeypatch):
    monkeypatch.setattr(fine_tuning, "SMALLEST_NUMBER_OF_STEPS", 2)
    cfg, y = tiny(model={"name": "test_resnet"}), torch.arange(32).double()
    others = torch.where(y < 4, y, 1000 + 7 * y)
    assert fine_tuned(cfg, [0, 1, 2, 3], y) == fine_tuned(cfg, [0, 1, 2, 3], others)
    assert fine_tuned(cfg, [5], y) == pytest.approx(fine_tuned(cfg, [5, 5], y))
    assert fine_tuned(cfg, [0, 1, 2, 3], y, frozen=True) == fine_tuned(cfg, [0, 1, 2, 3], y)
