"""The accuracy benchmark tells a good implementation from a bad one."""

import sys

import accuracy_bench
import benchlib
import numpy as np
import pytest
import torch
from accuracy_bench import Variant, errors, tensor_core_product


def test_half_precision_is_measured_on_the_path_of_training_and_on_its_own_inputs(monkeypatch):
    """dT/dp is rounded: a gradient for each direction would leave it in float32."""
    taken, sigreg = {}, accuracy_bench.sigreg

    def recorded(x, A, *knots, reduction, scale, **options):
        value = sigreg(x, A, *knots, reduction=reduction, scale=scale, **options)
        if value.requires_grad:
            taken[x.dtype, reduction] = x.double(), A.double(), scale
        return value

    monkeypatch.setattr(accuracy_bench, "sigreg", recorded)
    value, grad, *plain = errors(Variant("bf16", torch.bfloat16, "torch"), 17, 1.0, "cpu")
    assert all(0 < error < 1e-5 for error in plain)
    assert value < 1e-5
    assert grad < 2**-8
    assert taken.keys() == {(dtype, "sum") for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    for inputs in taken.values():
        assert all(map(torch.equal, inputs, taken[torch.bfloat16, "sum"]))


def test_rows_beyond_the_rule_are_an_error(tmp_path, monkeypatch, capsys):
    measured = [
        Variant("plain float32", torch.float32, "reference", judged=False),
        Variant("streaming", torch.float32, "torch"),
        Variant("streaming, bf16", torch.bfloat16, "torch"),
    ]
    changes = {"interpreting": lambda: True, "variants": lambda device: measured}
    for name, value in {**changes, "KNOTS": (65,), "SCALES": (1.0,)}.items():
        monkeypatch.setattr(accuracy_bench, name, value)
    monkeypatch.setattr(sys, "argv", ["accuracy_bench.py", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accuracy_bench.main() == 0
    evaluate = accuracy_bench.evaluate

    def wrong(x, A, knots, *, impl, **options):
        value, grad = evaluate(x, A, knots, impl=impl, **options)
        return value * (1 + 1e-5 * (impl == "torch")), grad

    monkeypatch.setattr(accuracy_bench, "evaluate", wrong)
    assert accuracy_bench.main() == 1
    assert "error: streaming, J 65: " in capsys.readouterr().err
    rows = benchlib.read_rows(tmp_path / "sigreg_accuracy.jsonl")
    assert [row["share_of_allowed"] is not None for row in rows] == 2 * [False, True, True]


def test_only_the_value_of_half_precision_on_tensor_cores_may_be_off_by_more():
    good = {part: [0.0] for part in accuracy_bench.PARTS} | {"dtype": "bfloat16", "kernels": "compiled"}
    for changes, share in (
        ({"value_errors": [4e-5]}, 0.8),
        ({"value_errors": [4e-5], "kernels": "interpreted"}, 40),
        ({"value_errors": [4e-5], "dtype": "float32"}, 40),
        ({"gradient_errors": [2**-8]}, 1),
        ({"value_errors": [9e-5], "plain_value_errors": [2e-5]}, 1),
        ({"value_errors": [float("nan")]}, float("inf")),
    ):
        assert accuracy_bench.share_of_allowed(good | changes) == pytest.approx(share, rel=1e-3), changes


def test_the_model_of_tensor_cores_cuts_off_where_float32_rounds():
    """Of 1 + 2**-26 and 1 - 2**-26 the small term is below what is kept; 1 - 2**-25 loses its last bit."""
    left = np.array([[1.0, 2.0**-13], [1.0, -(2.0**-13)], [1.0, -(2.0**-12)]])
    right = np.array([[1.0], [2.0**-13]])
    assert tensor_core_product(left, right)[:2, 0].tolist() == [1.0, 1.0]
    assert tensor_core_product(left[2:], right)[0, 0] == 1 - 2.0**-24
    integers = np.arange(-80.0, 80.0).reshape(4, 40)
    assert (tensor_core_product(integers, integers.T) == integers @ integers.T).all(), "exact sums stay exact"


def test_one_sum_over_k_on_tensor_cores_keeps_the_rule():
    row = accuracy_bench.tensor_core_row(N=64, K=512, M=8)
    assert max(row["value_errors"]) > 1e-8
    assert row["share_of_allowed"] < 1
