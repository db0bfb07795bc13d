"""The accuracy benchmark tells a good implementation from a bad one."""

from __future__ import annotations

import sys

import accuracy_bench
import benchlib
import torch
from accuracy_bench import Variant, errors


def test_the_recurrence_breaks_the_rule_and_the_streaming_implementation_keeps_it():
    plain, recurrence, streaming = (
        errors(Variant(name, torch.float32, impl), 65, 1.0, "cpu")
        for name, impl in (("plain", "reference"), ("recurrence", None), ("streaming", "torch"))
    )
    assert plain[:2] == plain[2:] == recurrence[2:] == streaming[2:]
    for part in range(2):  # value, gradient
        assert streaming[part] <= 2 * plain[part] + 1e-6
        assert recurrence[part] > 2 * plain[part] + 1e-6
    few = errors(Variant("recurrence", torch.float32, None), 5, 1.0, "cpu")
    assert max(few[:2]) < 1e-6, "it is right where it has few steps"


def test_half_precision_is_measured_on_the_path_of_training_and_on_its_own_inputs(monkeypatch):
    """dT/dp is rounded: a gradient for each direction would leave it in float32."""
    taken, gradients = {}, []
    sigreg, evaluate = accuracy_bench.sigreg, accuracy_bench.evaluate

    def recorded_call(x, *arguments, reduction, **options):
        value = sigreg(x, *arguments, reduction=reduction, **options)
        gradients.extend([reduction] if value.requires_grad else [])
        return value

    def recorded(x, A, knots, *, scale, **options):
        taken[x.dtype] = x.double(), A.double(), scale
        return evaluate(x, A, knots, scale=scale, **options)

    monkeypatch.setattr(accuracy_bench, "sigreg", recorded_call)
    monkeypatch.setattr(accuracy_bench, "evaluate", recorded)
    value, grad, *_ = errors(Variant("bf16", torch.bfloat16, "torch"), 17, 1.0, "cpu")
    assert gradients == ["sum"] * 3  # float64, plain float32, and the variant
    assert value < 1e-5
    assert grad < 2**-8
    x, A, scale = taken[torch.bfloat16]
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(taken[dtype][0], x)
        assert torch.equal(taken[dtype][1], A)
        assert taken[dtype][2] is scale


def test_rows_beyond_the_rule_are_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy_bench, "interpreting", lambda: True)
    monkeypatch.setattr(accuracy_bench, "KNOTS", (65,))
    monkeypatch.setattr(accuracy_bench, "SCALES", (1.0,))
    monkeypatch.setattr(sys, "argv", ["accuracy_bench.py", "--out", str(tmp_path)])
    good = [
        Variant("plain float32", torch.float32, "reference", judged=False),
        Variant("recurrence", torch.float32, None, judged=False),
        Variant("streaming", torch.float32, "torch"),
        Variant("streaming, bf16", torch.bfloat16, "torch"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(accuracy_bench, "variants", lambda device: good)
    assert accuracy_bench.main() == 0
    good[1] = good[1]._replace(judged=True)
    assert accuracy_bench.main() == 1
    assert "error: recurrence, J 65: " in capsys.readouterr().err
    rows = benchlib.read_rows(tmp_path / "sigreg_accuracy.jsonl")
    judged = [False, False, True, True, False, True, True, True]
    assert [row["share_of_allowed"] is not None for row in rows] == judged
    nan = {**rows[2], "value_errors": [float("nan")]}
    assert accuracy_bench.share_of_allowed(nan) == float("inf")
    half = {**rows[3], "value_errors": [1e-4], "plain_value_errors": [0.0]}
    assert accuracy_bench.share_of_allowed(half) > 1, "by its own row, whatever the others are"


def test_every_precision_is_measured_on_a_gpu():
    variants = list(accuracy_bench.variants("cuda"))
    assert {v.precision for v in variants if v.dtype == torch.float32} >= {"ieee", "tf32", "tf32x3"}
    assert {v.dtype for v in variants} == {torch.float32, torch.bfloat16, torch.float16}
