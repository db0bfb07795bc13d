"""The Triton kernels as operators and in the module (see `kernel_helpers.py`)."""

import pytest
import torch
from accuracy import evaluate
from host_reads import host_reads
from kernel_helpers import DEVICE, directions, normal
from torch.utils.checkpoint import checkpoint

from lejepa_fast import Knots, SIGReg, functional, sample_unit_directions, sigreg, standard_normal_knots
from lejepa_fast.kernels import philox

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "M"), [(1, 1), (3, 5), (70, 17)])  # the last above every block
def test_directions_are_those_of_the_torch_implementation(K, M, dtype):
    for step, seed in ((0, 0), (5 + (1 << 33), -7), (2, (1 << 40) + 1)):
        got, scale = philox.draw_directions(torch.tensor(step, device=DEVICE), K, M, seed, dtype)
        expected, expected_scale = sample_unit_directions(K, M, step=step, seed=seed, dtype=dtype)
        got, scale = got.cpu().double(), scale.cpu().double()
        # A few roundings of float32: logarithm, phase, norm, quotient. In half precision they can tip an
        # entry to the next number, a rare one.
        ulp = 4e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected.double(), rtol=ulp, atol=4e-7)
        if dtype != torch.float32:
            assert (got != expected).sum() <= max(1, 0.01 * got.numel())
        for unit in (got * scale, expected.double() * expected_scale):
            torch.testing.assert_close(unit.norm(dim=0), torch.ones(M).double(), rtol=0, atol=4e-7)


def test_operators_contract():
    x, A, scale = normal(2, 5, 4).requires_grad_(), directions(4, 6), torch.ones(6, device=DEVICE)
    t, phi, weights = (a.float().to(DEVICE) for a in standard_normal_knots(0.5625, 4)[:3])
    registered = torch.ops.lejepa_fast
    torch.library.opcheck(registered.triton_table, (x.detach(), A, scale, t, 0.1875, "ieee"))
    table = registered.triton_table(x.detach(), A, None, t, 0.1875, "ieee")
    for factor in (None, 0.5):
        arguments = (x, A, None, table, None, 5, t, phi, weights, 0.1875, False, True, factor, "ieee")
        torch.library.opcheck(registered.triton_statistic, arguments)
        _, coef = registered.triton_statistic(*arguments)
    grad = torch.ones((), device=DEVICE)
    arguments = (grad, 0.5, coef, x.detach(), A, None, t, 0.1875, "ieee")
    torch.library.opcheck(registered.triton_gradient, arguments)


def test_compiles_to_one_graph():
    x = normal(2, 5, 4).requires_grad_()
    eager, module = (SIGReg(8, n_points=4, impl="triton", reduction=None).to(DEVICE) for _ in range(2))
    # Without a GPU the C++ compiler would work on what is not ours.
    compiled = torch.compile(module, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for _ in range(2):
        expected, got = eager(x), compiled(x)
        assert torch.equal(got, expected)
        (g,), (h,) = (torch.autograd.grad(v.sum(), x) for v in (expected, got))
        assert torch.equal(h, g)
    assert module.step.item() == 2


def test_autocast_and_checkpointing_change_nothing():
    x, weight = normal(20, 4), torch.eye(4, device=DEVICE, requires_grad=True)
    plain, other = (SIGReg(num_slices=8, impl="triton").to(DEVICE) for _ in range(2))
    expected = plain(x @ weight)
    (grad,) = torch.autograd.grad(expected, weight)
    got = checkpoint(lambda w: other(x @ w), weight, use_reentrant=False)
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got, weight)[0], grad)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(plain(x, step=0), expected.detach())


def test_views_whose_memory_has_the_other_sign():
    """The imaginary part of a conjugate is a lazy negation, which kernels would not see."""
    x, knots = torch.complex(normal(9, 5), normal(9, 5)).conj().imag, standard_normal_knots()
    A = directions(5, 6)
    assert x.is_neg()
    gradients = []
    for samples in (x, x.resolve_neg().clone()):
        samples = samples.detach().requires_grad_()
        sigreg(samples, A, *knots[:3], impl="triton").backward()
        gradients.append(samples.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("spacing", [0.1875, None])
def test_knots_and_scale_may_have_any_strides(spacing):
    x, A = normal(7, 5), directions(5, 6)
    t, phi, weights = (a.float().to(DEVICE) for a in standard_normal_knots(1.5, 9)[:3])
    scale, one = torch.rand(6, device=DEVICE) + 0.5, torch.ones(6, device=DEVICE)

    def result(t, scale):
        return evaluate(x, A, Knots(t, phi, weights, spacing), impl="triton", scale=scale)

    every_other = torch.stack([t, t], dim=1)[:, 0]
    for got, expected in (
        (result(every_other, torch.stack([scale, scale], dim=1)[:, 0]), result(t, scale)),
        (result(t, scale[:1].double().expand(6)), result(t, scale[0] * one)),
    ):
        assert torch.equal(got.value, expected.value)
        assert torch.equal(got.grad, expected.grad)


def test_torch_func_and_double_backward_are_refused_clearly():
    reg, x = SIGReg(num_slices=4, impl="triton").to(DEVICE), normal(2, 10, 3).requires_grad_()
    for transformed in (torch.func.grad(reg), torch.func.vmap(reg)):
        with pytest.raises(RuntimeError, match=r"^sigreg: .* impl='reference' only, got impl='triton'"):
            transformed(x.detach())
    (grad,) = torch.autograd.grad(reg(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        grad.sum().backward()


@pytest.mark.skipif(DEVICE != "cpu", reason="the GPU's own check is in test_kernels_gpu.py")
def test_the_host_never_reads_from_the_device(monkeypatch):
    monkeypatch.setattr(functional, "host_can_read", lambda t: False)  # knots on a GPU are not looked at
    reg, x = SIGReg(num_slices=9, impl="triton"), normal(2, 20, 4).requires_grad_()
    assert host_reads(lambda: reg(x).backward()) == set()
    assert host_reads(lambda: reg.step.item()), "reads are not seen"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(9, 3, device=DEVICE).double()}, TypeError, "^x: expected float32, .*float64"),
        ({"precision": "fp32"}, ValueError, "^precision: expected one of .* got 'fp32'"),
        ({"scale": torch.ones(5)}, ValueError, r"^scale: expected .* of shape \(4,\), got .*\(5,\)"),
        ({"scale": torch.ones(4, device="meta")}, ValueError, "^scale: expected on the device of x"),
        ({"scale": torch.ones(4, device=DEVICE).requires_grad_()}, ValueError, "^scale: .*impl='reference'"),
        ({"phi": torch.ones(17, requires_grad=True)}, ValueError, "^phi: .*without gradient.*impl='torch'"),
        ({"weights": torch.ones(17, requires_grad=True)}, ValueError, "^weights: .*impl='torch'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    knots = standard_normal_knots()
    arguments = {"x": normal(9, 3), "A": directions(3, 4), "t": knots.t, "phi": knots.phi}
    arguments |= {"weights": knots.weights} | changes
    with pytest.raises(error, match=message):
        sigreg(**arguments, impl="triton")


def test_the_kernel_draws_no_column_of_zeros():
    """At step 1205178 the only normal of column 0 is exactly 0."""
    A, scale = sample_unit_directions(1, 16, step=1205178, device=DEVICE, impl="triton")
    assert A[0, 0].item() == scale[0].item() == 1
    assert A.abs().eq(1).all()
