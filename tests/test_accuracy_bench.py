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


def test_half_precision_is_measured_on_the_path_of_training(monkeypatch):
    """dT/dp in half precision: a gradient for each direction would leave it in float32."""
    gradients = []
    calls = accuracy_bench.sigreg

    def recorded(x, *arguments, reduction, **options):
        value = calls(x, *arguments, reduction=reduction, **options)
        gradients.extend([reduction] if value.requires_grad else [])
        return value

    monkeypatch.setattr(accuracy_bench, "sigreg", recorded)
    value, grad, *_ = errors(Variant("bf16", torch.bfloat16, "torch"), 17, 1.0, "cpu")
    assert gradients == ["sum"] * 3  # float64, plain float32, and the variant
    assert value < 1e-5
    assert grad < 2**-8


def test_plain_float32_is_measured_on_the_inputs_of_the_variant(monkeypatch):
    """In half precision: its x, rounded, and its directions."""
    taken = {}
    calls = accuracy_bench.evaluate

    def recorded(x, A, knots, *, scale, **options):
        taken[x.dtype] = x.double(), A.double(), scale
        return calls(x, A, knots, scale=scale, **options)

    monkeypatch.setattr(accuracy_bench, "evaluate", recorded)
    errors(Variant("bf16", torch.bfloat16, "torch"), 17, 10.0, "cpu")
    x, A, scale = taken[torch.bfloat16]
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(taken[dtype][0], x)
        assert torch.equal(taken[dtype][1], A)
        assert taken[dtype][2] is scale


def test_rows_beyond_the_rule_are_told(tmp_path, monkeypatch, capsys):
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
    assert [row["share_of_allowed"] is not None for row in rows] == [
        False,
        False,
        True,
        True,
        False,
        *3 * [True],
    ]
    nan = {**rows[2], "value_errors": [float("nan")]}
    assert accuracy_bench.share_of_allowed(nan) == float("inf")
    half = {**rows[3], "value_errors": [1e-4], "plain_value_errors": [0.0]}
    assert accuracy_bench.share_of_allowed(half) > 1  # by its own row, whatever the others are


def test_the_recurrence_is_right_where_it_has_few_steps():
    variant = Variant("recurrence", torch.float32, None)
    assert max(errors(variant, 5, 1.0, "cpu")[:2]) < 1e-6


def test_every_precision_is_measured_on_a_gpu():
    precisions = {v.precision for v in accuracy_bench.variants("cuda") if v.dtype == torch.float32}
    assert precisions >= {"ieee", "tf32", "tf32x3"}
    dtypes = {v.dtype for v in accuracy_bench.variants("cuda")}
    assert dtypes == {torch.float32, torch.bfloat16, torch.float16}
