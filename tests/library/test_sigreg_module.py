"""The SIGReg module: its step, activation checkpointing, compilation, conversions, errors."""

import pytest
import torch
from accuracy import COMPILE_BACKEND
from host_reads import host_reads
from torch.utils.checkpoint import checkpoint

from lejepa_fast import (
    Knots,
    LeJEPALoss,
    SIGReg,
    dispatch,
    functional,
    regularizer,
    sample_directions,
    sigreg,
    standard_normal_knots,
    symmetric_knots,
)

both = pytest.mark.parametrize("impl", ["reference", "torch"])


def test_step_counts_training_calls_only():
    reg, x = SIGReg(num_slices=8), torch.randn(20, 4)
    first, second = reg(x), reg(x)
    assert first != second, "directions are fresh at every step"
    assert reg.step.item() == 2
    assert reg(x, step=5) == reg(x, step=torch.tensor(5))
    assert reg(x, step=5) != reg(x, step=6)
    reg.eval()
    assert reg(x) == reg(x)
    assert reg.step.item() == 2, "explicit steps and evaluation leave the counter"


def test_step_is_restored_from_a_checkpoint():
    reg, x = SIGReg(num_slices=8), torch.randn(20, 4)
    reg(x)
    state = {k: v.clone() for k, v in reg.state_dict().items()}
    assert set(state) == {"step"}
    expected = [reg(x) for _ in range(3)]
    fresh = SIGReg(num_slices=8)
    fresh.load_state_dict(state)
    assert [fresh(x) for _ in range(3)] == expected


# Directions of a recomputed call must be those of the call itself (trap 8).


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    """Recomputation sees the same directions and does not advance the step twice, after plain steps too."""
    x = torch.randn(20, 4)
    plain, recomputed = SIGReg(num_slices=8), SIGReg(num_slices=8)
    weight, weight_2 = (torch.eye(4, requires_grad=True) for _ in range(2))
    for step in range(5):
        expected = plain(x @ weight)
        expected.backward()
        if step < 2:
            got = recomputed(x @ weight_2)
        else:
            got = checkpoint(lambda w: recomputed(x @ w), weight_2, use_reentrant=use_reentrant)
        got.backward()
        assert got == expected
    assert torch.equal(weight.grad, weight_2.grad)
    assert recomputed.step.item() == plain.step.item() == 5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_several_calls_needs_explicit_steps(use_reentrant):
    """Two regions and one backward: which call is recomputed cannot be told, so it is not guessed."""
    x = torch.randn(2, 20, 4)

    def gradient(reg, steps, wrap):
        weight = torch.eye(4, requires_grad=True)
        losses = [wrap(lambda w, i=i: reg(x[i] @ w, step=steps[i]), weight) for i in range(2)]
        sum(losses).backward()
        return weight.grad

    def wrap(function, weight):
        return checkpoint(function, weight, use_reentrant=use_reentrant)

    with pytest.raises(RuntimeError, match=r"^step: expected an explicit step .* 2 calls"):
        gradient(SIGReg(num_slices=8), [None, None], wrap)
    expected = gradient(SIGReg(num_slices=8), [3, 4], lambda function, weight: function(weight))
    assert torch.equal(gradient(SIGReg(num_slices=8), [3, 4], wrap), expected)
    reg, y = SIGReg(num_slices=8), 2 * x[0].requires_grad_()
    y.register_hook(lambda grad: reg(grad))  # a call inside a backward pass
    with pytest.raises(RuntimeError, match="0 calls"):
        y.sum().backward()


def test_checkpointing_in_compiled_code_with_explicit_step():
    loss_fn, x = LeJEPALoss(sigreg=SIGReg(num_slices=8)), torch.randn(3, 20, 4)

    def loss(weight, step):
        z = x @ weight
        return loss_fn(z[:1], z, step).total

    def recomputed(weight, step):
        return checkpoint(loss, weight, step, use_reentrant=False)

    weight = torch.eye(4, requires_grad=True)
    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    for step in (torch.tensor(0), torch.tensor(1)):
        (expected,) = torch.autograd.grad(loss(weight, step), weight)
        (got,) = torch.autograd.grad(compiled(weight, step), weight)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@both
def test_compiles_to_one_graph(impl):
    """In float64, so that the comparison does not hang on the order of float32 sums."""
    eager, module = (SIGReg(num_slices=8, impl=impl) for _ in range(2))
    x = torch.randn(2, 20, 4, dtype=torch.float64, requires_grad=True)
    backend = COMPILE_BACKEND if impl == "torch" else "aot_eager"
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for _ in range(2):
        expected, got = eager(x), compiled(x)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)  # float32 scalars
        (g,), (h,) = (torch.autograd.grad(v, x) for v in (expected, got))
        torch.testing.assert_close(h, g, rtol=1e-10, atol=1e-14)
    assert module.step.item() == 2


class Modules(torch.nn.ModuleDict):
    """SIGReg and, to show what PyTorch's own modules do in the same place, BatchNorm."""

    def __init__(self):
        super().__init__({"batch_norm": torch.nn.BatchNorm1d(4), "sigreg": SIGReg(num_slices=8)})

    def train_step(self):
        z = torch.randn(20, 4, requires_grad=True)
        self["sigreg"](self["batch_norm"](z)).backward()
        assert z.grad.isfinite().all()
        return self

    def pointers(self):
        return [buffer.data_ptr() for buffer in self.buffers()]


def test_a_conversion_that_changes_nothing_leaves_the_buffers():
    modules = Modules()
    pointers = modules.pointers()
    with torch.inference_mode():
        modules.to("cpu").float()
    assert modules.pointers() == pointers
    modules.train_step()
    modules.share_memory()
    assert all(buffer.is_shared() for buffer in modules.buffers())


def test_knots_survive_dtype_and_meta_conversions():
    x = torch.randn(20, 4)
    expected = SIGReg(num_slices=8)(x)
    reg = SIGReg(num_slices=8).bfloat16()
    with torch.device("meta"):
        lazy = SIGReg(num_slices=8)
    for module in (reg, lazy.to_empty(device="cpu")):
        assert module(x) == expected


def test_a_meta_module_takes_a_state_dict_by_assignment():
    trained = Modules().train_step()
    with torch.device("meta"):
        lazy = Modules()
    lazy.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(lazy.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert lazy.train_step()["sigreg"].step.item() == 2
    x = torch.randn(20, 4)
    assert lazy["sigreg"](x, step=5) == trained["sigreg"](x, step=5)

    with torch.device("meta"):
        lazy = Modules()
    lazy.load_state_dict(trained.state_dict(), assign=True)
    compiled = torch.compile(lazy["sigreg"], fullgraph=True, backend="eager")
    assert compiled(x, step=5) == trained["sigreg"](x, step=5)


def test_module_returns_a_float32_scalar():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        loss = SIGReg(num_slices=4)(torch.randn(2, 10, 3).to(dtype))
        assert (loss.dtype, loss.shape) == (torch.float32, ())


def test_auto_is_readable_and_logged_once(caplog):
    dispatch.logged_choices.clear()
    with caplog.at_level("INFO", logger="lejepa_fast"):
        reg = SIGReg(num_slices=4)
        assert reg.chosen_impl == "torch"
        for _ in range(3):
            reg(torch.randn(5, 2))
    assert sum("impl='auto'" in r.message for r in caplog.records) == 1
    assert SIGReg(impl="reference").chosen_impl == "reference"
    assert "impl='auto' -> 'torch'" in repr(reg)


def test_float64_embeddings_get_float64_knots():
    """A third is no float32 number: with rounded knots the gradient would be off by 1e-8."""
    x = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    gradients = []
    for impl in ("reference", "torch"):
        reg = SIGReg(num_slices=8, n_points=10, impl=impl)
        (gradient,) = torch.autograd.grad(reg(x), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_knots_of_float64_are_on_the_device_already(monkeypatch):
    seen = []
    original = regularizer.sigreg_unchecked
    monkeypatch.setattr(
        regularizer, "sigreg_unchecked", lambda *args: seen.append(args[3]) or original(*args)
    )
    reg = SIGReg(num_slices=8).to("meta")
    reg(torch.empty(5, 4, dtype=torch.float64, device="meta"))
    assert {(knot.device.type, knot.dtype) for knot in seen[0][:3]} == {("meta", torch.float64)}


def test_another_default_device_changes_nothing():
    x, knots = torch.randn(20, 4), standard_normal_knots()
    A = sample_directions(4, 8, step=0)
    expected = sigreg(x, A, *knots[:3])
    with torch.device("meta"):
        assert torch.equal(sigreg(x, A, *knots[:3]), expected)
        SIGReg(num_slices=8, knots=knots._replace(spacing="auto"))


def test_float8_embeddings_get_unit_vectors():
    x = torch.randn(2000, 16)
    reg = SIGReg(num_slices=256).eval()
    expected = reg(x).item()
    # Three bits and two: the embeddings are rounded, and the directions turned a little.
    for dtype, tolerance in ((torch.float8_e4m3fn, 0.1), (torch.float8_e5m2, 0.2)):
        assert reg(x.to(dtype)).item() == pytest.approx(expected, rel=tolerance)


@both
def test_the_host_never_reads_from_the_device(impl, monkeypatch):
    """In eager mode, operators and backward pass included; a CPU stands for the device."""
    monkeypatch.setattr(functional, "host_can_read", lambda t: False)  # knots on a device are not looked at
    reg, x = SIGReg(num_slices=8, impl=impl), torch.randn(2, 20, 4, requires_grad=True)
    assert host_reads(lambda: reg(x).backward()) == set()
    assert host_reads(lambda: reg.step.item()), "reads are not seen"


def test_works_on_meta_and_fake_tensors():
    """Shapes can be worked out without data, as planning and tracing tools do."""
    loss = SIGReg(num_slices=8).to("meta")(torch.empty(2, 20, 4, device="meta"))
    assert loss.shape == ()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        z = torch.empty(2, 20, 4, requires_grad=True)
        SIGReg(num_slices=8)(z).backward()
    assert z.grad.shape == z.shape


def test_bad_embeddings_are_named():
    """As those of `sigreg`, by the name that they have here."""
    with pytest.raises(TypeError, match=r"^z: expected a tensor, got list"):
        SIGReg(num_slices=4)([[1.0]])
    with pytest.raises(ValueError, match=r"^z: expected at least 1 sample, got N = 0"):
        SIGReg(num_slices=4)(torch.ones(0, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"num_slices": 0}, ValueError, "num_slices"),
        ({"num_slices": 10.5}, TypeError, "num_slices"),
        ({"t_max": 0.0}, ValueError, "t_max"),
        ({"t_max": float("nan")}, ValueError, "t_max"),
        ({"t_max": "3"}, TypeError, "t_max"),
        ({"n_points": 0}, ValueError, "n_points"),
        ({"n_points": 17.0}, TypeError, "n_points"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"reduction": "none"}, ValueError, "reduction"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"precision": "bf16"}, ValueError, "precision"),
        ({"unbiased": "no"}, TypeError, "unbiased"),
        ({"pool_views": 1}, TypeError, "pool_views"),
        ({"knots": Knots(*standard_normal_knots()[:3], spacing=0.5)}, ValueError, "spacing"),
        ({"knots": Knots(*symmetric_knots(3, 10)[:3], spacing=2 / 3)}, ValueError, "spacing"),
    ],
)
def test_bad_module_arguments_are_named(arguments, error, named):
    """At construction, and when an attribute is changed later."""
    with pytest.raises(error, match=f"^{named}: expected"):
        SIGReg(**arguments)
    reg = SIGReg()
    if hasattr(reg, named):
        with pytest.raises(error, match=f"^{named}: expected"):
            setattr(reg, named, arguments[named])
