"""The accuracy benchmark tells a good implementation from a bad one."""

from __future__ import annotations

import accuracy_bench
import torch
from accuracy_bench import Variant, errors


def test_the_recurrence_breaks_the_rule_and_the_streaming_implementation_keeps_it():
    plain, recurrence, streaming = (
        errors(Variant(name, torch.float32, impl), 65, 1.0, "cpu")
        for name, impl in (("plain", "reference"), ("recurrence", None), ("streaming", "torch"))
    )
    for part in range(2):  # value, gradient
        assert streaming[part] <= 2 * plain[part] + 1e-6
        assert recurrence[part] > 2 * plain[part] + 1e-6


def test_the_recurrence_is_right_where_it_has_few_steps():
    variant = Variant("recurrence", torch.float32, None)
    assert max(errors(variant, 5, 1.0, "cpu")) < 1e-6


def test_every_precision_is_measured_on_a_gpu():
    precisions = {v.precision for v in accuracy_bench.variants("cuda") if v.dtype == torch.float32}
    assert precisions >= {"ieee", "tf32", "tf32x3"}
    dtypes = {v.dtype for v in accuracy_bench.variants("cuda")}
    assert dtypes == {torch.float32, torch.bfloat16, torch.float16}
