"""SIGReg against closed forms and float64 truth, in every implementation."""

import pytest
import torch
from accuracy import (
    arbitrary_knots,
    assert_within_rule,
    check_accuracy,
    evaluate,
    functional,
    plain_float32,
    truth,
)

from lejepa_fast import SIGReg, sample_directions, sigreg, standard_normal_knots, symmetric_knots
from lejepa_fast.functional import resolve_spacing

both = pytest.mark.parametrize("impl", ["reference", "torch"])


@pytest.mark.parametrize(
    ("t_max", "n_points", "expected"), [(3, 17, 1.0524641548), (5, 9, 1.0594231238), (1, 17, 0.3845877649)]
)
def test_expectation_under_the_null(t_max, n_points, expected):
    """E[T] = sum_j w_j (1 - phi_j^2) for N(0, 1) samples: the formula, and a simulation of it."""
    knots = standard_normal_knots(t_max, n_points)
    assert (knots.weights * (1 - knots.phi**2)).sum().item() == pytest.approx(expected, abs=1e-9)
    batches = functional(torch.randn(4000, 16, 1), torch.ones(1, 1), knots, impl="torch", reduction=None)
    standard_error = batches.std().item() / batches.numel() ** 0.5
    assert abs(batches.mean().item() - expected) < 5 * standard_error


@both
@pytest.mark.parametrize(("t_max", "n_points", "per_sample"), [(3, 17, 0.4020475797), (5, 9, 0.4089207202)])
def test_collapse(impl, t_max, n_points, per_sample):
    """Every sample at 0: T = N sum_j w_j (1 - phi_j)^2, and a gradient of exactly zero."""
    knots, A = standard_normal_knots(t_max, n_points), sample_directions(6, 10, step=0)
    result = evaluate(torch.zeros(3, 50, 6), A, knots, impl=impl)
    assert result.value.item() == pytest.approx(50 * per_sample, rel=1e-6)
    assert torch.equal(result.grad, torch.zeros(3, 50, 6))


@both
@pytest.mark.parametrize(("t_max", "n_points", "bound"), [(3, 17, 7.8856), (5, 9, 7.7342)])
def test_gradient_bound(impl, t_max, n_points, bound):
    """|dT/dp| <= sum_j 4 w_j t_j, whatever the samples."""
    knots = standard_normal_knots(t_max, n_points)
    assert (4 * knots.weights * knots.t).sum().item() == pytest.approx(bound, abs=1e-4)
    for scale in (0.1, 1.0, 30.0):
        x = scale * torch.randn(5, 4, 1)
        grad = evaluate(x, torch.ones(1, 1), knots, impl=impl, reduction="sum").grad
        assert 0 < grad.abs().max() <= bound


def test_unbiased_formula():
    """C^2 + S^2 -> (N (C^2 + S^2) - 1) / (N - 1), written out."""
    knots, N = standard_normal_knots(), 9
    p = torch.randn(N, dtype=torch.float64)
    C, S = (f(p[:, None] * knots.t).mean(0) for f in (torch.cos, torch.sin))
    modulus = (N * (C**2 + S**2) - 1) / (N - 1)
    expected = N * (knots.weights * (modulus - 2 * C * knots.phi + knots.phi**2)).sum()
    got = functional(p[:, None], torch.ones(1, 1).double(), knots, unbiased=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_paper_and_code_conventions():
    """Algorithm 1's linspace(-5, 5, 17) is the half line t_max=5, n_points=9."""
    x, A = torch.randn(64, 8).double(), sample_directions(8, 12, step=0, dtype=torch.float64)
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)
    phi = torch.exp(-t.square() / 2)
    phase = (x @ A)[..., None] * t
    error = phi * ((phase.cos().mean(0) - phi) ** 2 + phase.sin().mean(0) ** 2)
    expected = (64 * torch.trapezoid(error, t, dim=-1)).mean()
    for knots in (standard_normal_knots(5, 9), symmetric_knots(5, 17)):
        torch.testing.assert_close(functional(x, A, knots), expected, rtol=1e-12, atol=0)
    reg = SIGReg(num_slices=12, t_max=5, n_points=9)
    torch.testing.assert_close(reg(x), expected.float(), rtol=1e-6, atol=0)


@both
def test_per_view_is_the_default_and_not_flattened(impl):
    x = torch.randn(4, 32, 8) + torch.arange(4).view(4, 1, 1)  # views that differ
    reg = SIGReg(num_slices=16, impl=impl).eval()
    per_view = torch.stack([reg(view) for view in x]).mean()
    torch.testing.assert_close(reg(x), per_view, rtol=1e-6, atol=0)
    assert abs(reg(x.flatten(0, -2)) - reg(x)) > 0.1 * reg(x)


@both
def test_reductions(impl):
    x = torch.randn(2, 3, 20, 8)
    regs = {r: SIGReg(num_slices=5, impl=impl, reduction=r).eval() for r in ("mean", "sum", None)}
    each = regs[None](x)
    assert each.shape == (2, 3, 5)
    assert not each.requires_grad, "x needs no gradient"
    torch.testing.assert_close(each[1, 2], regs[None](x[1, 2]), rtol=1e-6, atol=0)
    torch.testing.assert_close(regs["mean"](x), each.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(regs["sum"](x), each.sum(), rtol=1e-6, atol=0)


@both
def test_target_and_weights_per_direction(impl):
    x, A, knots = torch.randn(30, 4), sample_directions(4, 3, step=0), standard_normal_knots()
    phi = torch.stack([torch.exp(-knots.t * s) for s in (0.5, 1.0, 2.0)], dim=1)  # Cauchy targets
    weights = torch.rand(17, 3, dtype=torch.float64)
    got = sigreg(x, A, knots.t, phi, weights, reduction=None, impl=impl)
    for m in range(3):
        one = sigreg(x, A[:, m : m + 1], knots.t, phi[:, m], weights[:, m], reduction=None, impl=impl)
        torch.testing.assert_close(got[m : m + 1], one, rtol=1e-5, atol=1e-6)


def problem(*shape, M):
    return torch.randn(shape), sample_directions(shape[-1], M, step=1)


CASES = {
    "one sample": lambda: problem(1, 16, M=8),
    "one sample in each view, one dimension, one direction": lambda: problem(3, 1, 1, M=1),
    "odd everywhere": lambda: problem(3, 37, 5, M=7),
    "views that share a tile, a view in two tiles": lambda: problem(5, 700, 8, M=40),
    "as many samples as a tile, directions as a slab": lambda: problem(2048, 8, M=512),
    "one direction more than a slab, one sample more than a tile": lambda: problem(2049, 8, M=513),
    "more dimensions than samples, K > 2048": lambda: problem(8, 2500, M=9),
    "two leading dimensions": lambda: problem(2, 3, 20, 12, M=33),
    "views that lie apart": lambda: (torch.randn(4, 50, 12)[:, ::2, 1:7], sample_directions(6, 9, step=0)),
    "views as the second dimension": lambda: (
        torch.randn(20, 4, 6).transpose(0, 1),
        sample_directions(6, 9, step=0),
    ),
    "the same view twice": lambda: (torch.randn(1, 30, 6).expand(2, 30, 6), sample_directions(6, 9, step=0)),
    "directions with strides": lambda: (torch.randn(30, 6), sample_directions(6, 18, step=0)[:, ::2]),
}


@pytest.fixture(params=["Numba where it is there", "PyTorch alone"])
def compiler(request, monkeypatch):
    if request.param == "PyTorch alone":
        monkeypatch.setattr("lejepa_fast.streaming.compiled_tiles", lambda: None)


@pytest.mark.parametrize("case", CASES)
def test_accuracy_over_shapes(case, compiler):
    """By what Numba compiles, and by PyTorch operations, for equidistant knots and for those at any place."""
    x, A = CASES[case]()
    for knots in (standard_normal_knots(3.0, 5), arbitrary_knots(3)):
        for unbiased in (False, True) if x.shape[-2] > 1 else (False,):
            check_accuracy(x, A, knots, impl="torch", reduction=None, unbiased=unbiased)


@pytest.mark.parametrize("J", [*range(1, 13), 16, 17, 18, 31, 33, 64, 65])
def test_accuracy_over_numbers_of_knots(J, compiler):
    """Also the spacings 3/(J-1) that float32 cannot represent, slice by slice; and knots at any place."""
    check_accuracy(*problem(300, 8, M=12), standard_normal_knots(3.0, J), impl="torch", reduction=None)
    check_accuracy(*problem(2, 40, 8, M=12), arbitrary_knots(J), impl="torch")


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("J", [9, 17, 65])
def test_accuracy_over_sizes_of_projections(scale, J, compiler):
    """From nearly collapsed to |p| of 1e4, where sine and cosine need their range reduced.

    Each direction counts: in their mean the rounding errors of the reference may cancel by chance.
    """
    x, A = problem(200, 16, M=24)
    for knots in (standard_normal_knots(3.0, J), arbitrary_knots(J)):
        check_accuracy(scale * x, A, knots, impl="torch", reduction=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_accuracy_of_half_precision_inputs(dtype, autocast):
    """Over two slabs and two tiles."""
    x, A = problem(2, 1100, 4, M=520)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for knots in (standard_normal_knots(3.0, 5), arbitrary_knots(3)):
            check_accuracy(x.to(dtype), A, knots, impl="torch", reduction=None)


@both
def test_autocast_changes_nothing(impl):
    """Neither in the forward pass nor in a `backward()` that is called under autocast, as many do."""
    A, knots, x = sample_directions(8, 16, step=0), standard_normal_knots(), torch.randn(2, 50, 8)
    plain = evaluate(x, A, knots, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = torch.ones(8, 8) @ torch.ones(8, 8)
        under_autocast = evaluate(x, A, knots, impl=impl)
    assert lowered.dtype == torch.bfloat16, "autocast is not on: the test sees nothing"
    assert torch.equal(under_autocast.value, plain.value)
    assert torch.equal(under_autocast.grad, plain.grad)


@both
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    "knots", [standard_normal_knots(3.0, 17), standard_normal_knots(2.0, 1), arbitrary_knots()]
)
def test_gradcheck(impl, unbiased, knots):
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    A = sample_directions(3, 4, step=0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: functional(x, A, knots, impl=impl, unbiased=unbiased), x)


def test_reference_differentiates_twice_and_in_the_directions():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    A = sample_directions(3, 2, step=0, dtype=torch.float64).requires_grad_()
    knots = standard_normal_knots()
    assert torch.autograd.gradcheck(lambda x, A: functional(x, A, knots, impl="reference"), (x, A))
    assert torch.autograd.gradgradcheck(lambda x: functional(x, A, knots, impl="reference"), x)


def test_float64_value_and_gradient_are_float64():
    """Streaming in float64 agrees with the reference to float64 rounding: no hidden float32 step."""
    x, A = torch.randn(2, 500, 16).double(), sample_directions(16, 300, step=1, dtype=torch.float64)
    for knots in (standard_normal_knots(3.0, 23), arbitrary_knots()):
        got, exact = evaluate(x, A, knots, impl="torch"), truth(x, A, knots)
        torch.testing.assert_close(got.value, exact.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(got.grad, exact.grad, rtol=1e-10, atol=1e-15)


def test_spacing_is_found_in_given_knots():
    assert resolve_spacing("auto", standard_normal_knots(3.0, 17).t.float()) == 0.1875
    third = resolve_spacing("auto", standard_normal_knots(3.0, 10).t.float())
    assert third == pytest.approx(1 / 3, rel=1e-7)
    assert resolve_spacing("auto", symmetric_knots(3.0, 10).t) is None  # does not start at 0
    assert resolve_spacing("auto", arbitrary_knots().t) is None
    assert resolve_spacing("auto", torch.tensor([0.0, 1.0, 2.001])) is None


@both
@pytest.mark.parametrize("J", [1, 2, 17])
def test_non_finite_input_gives_nan(impl, J):
    """In its own view, and it touches no other view."""
    x = torch.randn(4, 30, 4)
    x[torch.arange(3), 7, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    each = SIGReg(num_slices=6, n_points=J, impl=impl, reduction=None)(x)
    assert each[:3].isnan().all()
    assert each[3].isfinite().all()
    assert SIGReg(num_slices=6, n_points=J, impl=impl)(x).isnan()


def test_streaming_never_forms_a_large_tensor():
    """No tensor of N x M (x J) elements is made, forward or backward, nor kept for the backward."""
    N, K, M, J = 8192, 8, 1024, 17
    x, A, knots = torch.randn(N, K).requires_grad_(), sample_directions(K, M, step=0), standard_normal_knots()
    kept: list[int] = []

    class LargestOutput(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
            return out

    def largest(impl):
        with LargestOutput() as mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            functional(x, A, knots, impl=impl).backward()
        return mode.largest

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    assert largest("torch") <= N * M / 4
    assert max(kept) <= max(x.numel(), 2 * J * M)
    x = x[:512].detach().requires_grad_()
    assert largest("reference") >= 512 * M * J, "the measurement sees nothing"


def test_operators_contract():
    x = torch.randn(2, 20, 4, requires_grad=True)
    A, t = sample_directions(4, 6, step=0), standard_normal_knots().t.float()
    torch.library.opcheck(torch.ops.lejepa_fast.ecf_sums, (x, A, t, 0.1875))
    grad = torch.randn(2, 2, 17, 6)
    torch.library.opcheck(torch.ops.lejepa_fast.ecf_sums_backward, (grad, x.detach(), A, t, None))


def test_gradients_that_only_the_reference_gives_are_refused_clearly():
    """Of the gradient, of directions and of knots."""
    x, A, knots = (
        torch.randn(10, 3).requires_grad_(),
        sample_directions(3, 4, step=0),
        standard_normal_knots(),
    )
    (grad,) = torch.autograd.grad(functional(x, A, knots, impl="torch"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        grad.sum().backward()
    with pytest.raises(ValueError, match=r"^A: expected .*impl='reference'"):
        functional(x, A.requires_grad_(), knots, impl="torch")
    with pytest.raises(ValueError, match=r"^t: expected .*impl='reference'"):
        sigreg(x, A.detach(), knots.t.requires_grad_(), knots.phi, knots.weights, impl="torch")
    with torch.no_grad():
        functional(x, A, knots, impl="torch")


def _bad(**changes):
    knots = standard_normal_knots()
    base = {"x": torch.randn(10, 3), "A": sample_directions(3, 4, step=0)}
    base |= {"t": knots.t, "phi": knots.phi, "weights": knots.weights}
    return {**base, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(x=torch.randn(3)), ValueError, r"^x: expected shape \(\.\.\., N, K\), got \(3,\)"),
        (_bad(x=torch.randn(0, 3)), ValueError, "^x: expected at least 1 sample.* got N = 0"),
        (_bad(x=torch.randn(1, 3), unbiased=True), ValueError, "^x: expected at least 2 .* got N = 1"),
        (_bad(x=torch.randn(0, 5, 3)), ValueError, "^x: expected non-empty"),
        (_bad(x=torch.ones(10, 3).long()), TypeError, "^x: expected a floating dtype, got torch.int64"),
        (_bad(A="A"), TypeError, "^A: expected a tensor, got str"),
        (_bad(weights=None), TypeError, "^weights: expected a tensor, got NoneType"),
        (_bad(scale=2.0), TypeError, "^scale: expected a tensor, got float"),
        (_bad(unbiased="no"), TypeError, "^unbiased: expected True or False, got 'no'"),
        (_bad(A=torch.randn(4, 4)), ValueError, r"^A: expected shape \(3, M\).*got \(4, 4\)"),
        (_bad(A=torch.randn(3, 0)), ValueError, r"^A: expected shape \(3, M\)"),
        (_bad(A=torch.randn(3, 4, device="meta")), ValueError, "^A: .* device of x, cpu, got meta"),
        (_bad(t=torch.zeros(0)), ValueError, r"^t: expected shape \(J,\)"),
        (_bad(phi=torch.ones(16)), ValueError, r"^phi: expected shape \(17,\) or \(17, 4\).*got \(16,\)"),
        (_bad(weights=torch.ones(17, 3)), ValueError, r"^weights: expected shape .*got \(17, 3\)"),
        (_bad(spacing=0.5), ValueError, r"^spacing: expected the distance of the knots .* got 0\.5"),
        (_bad(spacing=-0.1875), ValueError, r"^spacing: expected the distance .* got -0\.1875"),
        (_bad(spacing="no"), TypeError, "^spacing: expected a number, got 'no'"),
        (_bad(reduction="max"), ValueError, "^reduction: expected .* got 'max'"),
        (_bad(impl="cuda"), ValueError, "^impl: expected one of .* got 'cuda'"),
        (_bad(impl="triton"), ValueError, "^x: expected on a GPU for impl='triton' .* use impl='torch'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        sigreg(**arguments)


def test_the_accuracy_rule_can_fail():
    """Guard against a rule that accepts everything: a relative error of 1e-5 in x must not pass."""
    x, A, knots = torch.randn(200, 8), sample_directions(8, 12, step=0), standard_normal_knots()
    exact, reference = truth(x, A, knots), plain_float32(x, A, knots)
    wrong = evaluate(x * (1 + 1e-5), A, knots, impl="torch")
    for part in ("value", "grad"):
        with pytest.raises(AssertionError):
            assert_within_rule(getattr(wrong, part), getattr(reference, part), getattr(exact, part), part)
