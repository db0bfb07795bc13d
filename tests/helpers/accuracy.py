"""Holds SIGReg implementations to the accuracy rule (`accuracy_bench.allowed_error`); float64 truth."""

import shutil
from typing import NamedTuple

import torch
from accuracy_bench import HALF_PRECISION_ERROR, RELATIVE_ERROR, allowed_error
from torch import Tensor

from lejepa_fast import Knots, sigreg

# Inductor needs a C++ compiler; what the tests ask of torch.compile (one graph, the same numbers) does not.
COMPILE_BACKEND = "inductor" if shutil.which("c++") or shutil.which("g++") else "aot_eager"


class Result(NamedTuple):
    value: Tensor
    grad: Tensor


def arbitrary_knots(J: int = 7) -> Knots:
    t = torch.rand(J, dtype=torch.float64).cumsum(0)
    return Knots(t, torch.exp(-t.square() / 2), torch.rand(J, dtype=torch.float64), None)


def functional(x: Tensor, A: Tensor, knots: Knots, **options) -> Tensor:
    return sigreg(x, A, knots.t, knots.phi, knots.weights, spacing=knots.spacing, **options)


def authors_sigreg(z: Tensor, A: Tensor, t_max: float = 3.0, J: int = 17) -> Tensor:
    """The authors' formulation, written from its formula: z (..., N, K), A (K, M)."""
    t = torch.linspace(0, t_max, J, dtype=z.dtype)
    weights = torch.full_like(t, 2 * t_max / (J - 1))
    weights[[0, -1]] /= 2
    phi = torch.exp(-t.square() / 2)
    phase = (z @ A).unsqueeze(-1) * t
    error = (phase.cos().mean(-3) - phi).square() + phase.sin().mean(-3).square()
    return (z.shape[-2] * (error @ (weights * phi))).mean()


def evaluate(x: Tensor, A: Tensor, knots: Knots, **options) -> Result:
    """Value and gradient of `sigreg` at x; the loss that is differentiated is the sum of the value."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = functional(x, A, knots, **options)
    value.sum().backward()
    assert x.grad is not None
    return Result(value.detach(), x.grad)


def truth(x: Tensor, A: Tensor, knots: Knots, **options) -> Result:
    """The reference in float64 on the same numbers: rounding of the inputs is taken as given."""
    with torch.autocast(x.device.type, enabled=False):
        return evaluate(x.double(), A.double(), knots, **{**options, "impl": "reference"})


def plain_float32(x: Tensor, A: Tensor, knots: Knots, **options) -> Result:
    """The reference in float32, whose error sets the scale; never under autocast, which would inflate it."""
    with torch.autocast(x.device.type, enabled=False):
        return evaluate(x.float(), A, knots, **{**options, "impl": "reference"})


def assert_within_rule(
    got: Tensor,
    reference: Tensor,
    exact: Tensor,
    what: str,
    *,
    ulp: float = 0.0,
    relative: float = RELATIVE_ERROR,
) -> None:
    """|got - exact| <= 2 |reference - exact| + 1e-6 |exact| in the Euclidean norm: `allowed_error`."""
    error, plain = ((r.double() - exact).norm().item() for r in (got, reference))
    allowed = allowed_error(plain, exact.norm().item(), ulp=ulp, relative=relative)
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}, size {exact.norm():.3e}"


def value_error(x: Tensor) -> float:
    """The relative error allowed for the value: only tensor cores need the larger one of half precision."""
    return HALF_PRECISION_ERROR if x.is_cuda and x.dtype.itemsize == 2 else RELATIVE_ERROR


def check_accuracy(x: Tensor, A: Tensor, knots: Knots, **options) -> None:
    """Hold value and gradient of an implementation to the rule."""
    exact, reference = truth(x, A, knots, **options), plain_float32(x, A, knots, **options)
    got = evaluate(x, A, knots, **options)
    assert got.value.dtype == torch.float32
    assert got.grad.dtype == x.dtype
    ulp = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
    assert_within_rule(got.value, reference.value, exact.value, "value", relative=value_error(x))
    assert_within_rule(got.grad, reference.grad, exact.grad, "gradient", ulp=ulp)
