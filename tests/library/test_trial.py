"""impl="auto" tries the kernels once, and takes the streaming implementation where they fail."""

import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from lejepa_fast import SIGReg, functional, standard_normal_knots, triton_operators


def by_reference(x, A, scale, knots, *, unbiased, scale_by_n, factor, precision, reduce):
    """What the kernels compute."""
    reduction = {None: None, 1.0: "sum"}.get(factor, "mean")
    options = functional.Options(unbiased, reduction, scale_by_n, None)
    return functional.sigreg_unchecked(x, A, scale, knots, options, None, "reference")


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


@pytest.fixture(params=["float32", "bfloat16"])
def z(request, monkeypatch):
    """Embeddings on a device for which "auto" means the kernels."""
    monkeypatch.setattr(functional, "_trials", {})
    monkeypatch.setattr(functional, "_failed", set())
    monkeypatch.setattr(
        "lejepa_fast.regularizer.choose", lambda impl, *_, **__: {"auto": "triton"}.get(impl, impl)
    )
    return torch.randn(2, 40, 8).to(getattr(torch, request.param)).requires_grad_()


def value_and_gradient(z, impl):
    value = SIGReg(num_slices=16, impl=impl, unbiased=True)(z)
    return value.detach(), *torch.autograd.grad(value, z)


def test_kernels_that_agree_are_taken_after_one_trial(z, monkeypatch, caplog):
    sizes = []

    def counted(x, *arguments, **options):
        sizes.append(x.shape[-2])
        return by_reference(x, *arguments, **options)

    monkeypatch.setattr(triton_operators, "sigreg_value", counted)
    generator = torch.get_rng_state()
    with torch.inference_mode():
        SIGReg(num_slices=16, unbiased=True)(z)
    value_and_gradient(z, "auto")
    assert sizes == [functional._TRIAL_SAMPLES, 40, 40]
    assert torch.equal(torch.get_rng_state(), generator)
    assert not caplog.records


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        (raising(OutOfResources(300_000, 232_448, "shared memory")), "OutOfResources: out of resource"),
        (raising(CompilationError(None, None, "no such layout")), "CompilationError"),
        (raising(RuntimeError("PassManager::run failed\nmore")), r"RuntimeError: PassManager::run failed\)"),
        (lambda *args, **options: 1.1 * by_reference(*args, **options), "the value is off by 1.0e-01"),
        (lambda *args, **options: torch.nan * by_reference(*args, **options), "the value is off by nan"),
        (
            lambda x, *args, **options: by_reference(x.detach(), *args, **options) + 0 * x.sum(),
            "the gradient is off by 1.0e\\+00",
        ),
    ],
)
def test_kernels_that_fail_are_named_once_and_not_taken(z, monkeypatch, caplog, kernels, reason):
    monkeypatch.setattr(triton_operators, "sigreg_value", kernels)
    expected = value_and_gradient(z, "torch")
    for _ in range(2):
        assert all(map(torch.equal, value_and_gradient(z, "auto"), expected))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(reason, record.message)
    assert f"{z.dtype} embeddings of 8 dimensions and 16 directions" in record.message


def test_a_cuda_error_is_raised(z, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(triton_operators, "sigreg_value", raising(error))
    for _ in range(2):  # it is no answer, so nothing is kept
        with pytest.raises(RuntimeError, match="illegal memory access"):
            value_and_gradient(z, "auto")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("step", [None, 5])
def test_the_first_call_may_be_inside_activation_checkpointing(z, monkeypatch, caplog, use_reentrant, step):
    monkeypatch.setattr(triton_operators, "sigreg_value", by_reference)
    module, other = (SIGReg(num_slices=16, impl=impl) for impl in ("auto", "torch"))
    found = checkpoint(module, z, step, use_reentrant=use_reentrant)
    expected = other(z, step)
    torch.testing.assert_close(found, expected)
    gradients = []
    for value in (found, expected):
        z.grad = None
        value.backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)
    assert not caplog.records


def test_a_failed_trial_counts_while_operators_are_watched_and_compiled(z, monkeypatch):
    monkeypatch.setattr(triton_operators, "sigreg_value", lambda *args, **kw: 7 * by_reference(*args, **kw))
    module = SIGReg(num_slices=16).eval()
    assert module.chosen_impl == "torch"  # on a CPU
    expected = SIGReg(num_slices=16, impl="torch").eval()(z)
    assert torch.equal(module(z), expected)
    with FlopCounterMode(display=False):
        assert torch.equal(module(z), expected)
    monkeypatch.setattr("lejepa_fast.regularizer.resolve_implementation", lambda *_: "triton")
    assert module.chosen_impl == "torch"
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), expected)


def test_a_right_value_and_gradient_of_0_or_beyond_float16_pass(z, monkeypatch, caplog):
    monkeypatch.setattr(triton_operators, "sigreg_value", by_reference)
    knots = standard_normal_knots()
    small = knots._replace(weights=1e-4 * knots.weights)
    for x, options in ((z, {"n_points": 1}), (z.half(), {"knots": small, "scale_by_n": False})):
        SIGReg(num_slices=16, **options)(x)
    assert not caplog.records


def test_a_failure_counts_in_a_captured_graph_and_where_hooks_are_disabled(z, monkeypatch, caplog):
    monkeypatch.setattr(triton_operators, "sigreg_value", by_reference)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks"):
        SIGReg(num_slices=16)(z)
    assert not caplog.records
    monkeypatch.setattr(triton_operators, "sigreg_value", lambda *args, **kw: 7 * by_reference(*args, **kw))
    arguments = standard_normal_knots(), functional.Options(False, "mean", True, None), None
    assert functional.after_trial(z, 8, *arguments) == "torch"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = mock.Mock(wraps=z, is_cuda=True, device=z.device, dtype=z.dtype, shape=z.shape)
    captured.stride.side_effect = z.stride
    assert functional.after_trial(captured, 9, *arguments) == "torch"  # another kind, untried
    monkeypatch.setattr(functional, "_failed", set())
    assert functional.after_trial(captured, 9, *arguments) == "triton"


def test_too_little_memory_is_no_fault_of_the_kernels(z, monkeypatch):
    monkeypatch.setattr(triton_operators, "sigreg_value", raising(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        SIGReg(num_slices=16)(z)
    assert not functional._trials


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (raising(RuntimeError("no compiler")), "RuntimeError: no compiler"),
        (lambda step, dim, count, *_: (torch.ones(dim, count), torch.ones(count)), "the value is off by"),
    ],
)
def test_the_kernel_that_draws_directions_is_tried_too(z, monkeypatch, caplog, draw, reason):
    monkeypatch.setattr(triton_operators, "sigreg_value", by_reference)
    monkeypatch.setattr(triton_operators, "why_not", lambda device, dtype: None)
    launchers = SimpleNamespace(philox=SimpleNamespace(draw_directions=draw))
    monkeypatch.setattr(triton_operators, "kernels", lambda: launchers)
    expected = value_and_gradient(z, "torch")
    assert all(map(torch.equal, value_and_gradient(z, "auto"), expected))
    assert reason in caplog.text
