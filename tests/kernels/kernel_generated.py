"""Generated cases of the Triton kernels against float64 truth (see `kernel_helpers.py`).

In the interpreter every size, layout and option is drawn freely, and every launch is checked for accesses out
of bounds and for races. On a GPU each combination of options and sizes is a compilation of several
seconds: there they come from a short list, each a test of its own, and the numbers of samples and what is in
them vary.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from accuracy import Result, arbitrary_knots, evaluate, functional, plain_float32, truth, value_error
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, directions, normal, sanitized

from lejepa_fast import Knots, sample_unit_directions, standard_normal_knots

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


class Case(NamedTuple):
    """What decides which kernels are compiled."""

    dtype: torch.dtype
    K: int
    M: int
    J: int
    equidistant: bool
    per_direction: bool  # weights and target characteristic function
    native: bool  # directions in the dtype of x, with their scale
    layout: str
    transposed_directions: bool
    options: dict[str, Any]


def _options(unbiased: bool, scale_by_n: bool, reduction: str | None) -> dict[str, Any]:
    return {"unbiased": unbiased, "scale_by_n": scale_by_n, "reduction": reduction}


# On a GPU: both backward paths (K up to 64 or more), both kinds of knots, far giant steps, every dtype.
COMPILED = [
    Case(torch.float32, 33, 70, 17, True, False, False, "contiguous", False, _options(False, True, "mean")),
    Case(torch.bfloat16, 100, 70, 17, True, False, True, "transposed", False, _options(True, True, "mean")),
    Case(torch.float16, 64, 129, 9, True, True, True, "sliced", False, _options(False, False, "sum")),
    Case(torch.float32, 100, 33, 5, False, False, False, "sliced", True, _options(True, False, None)),
    Case(torch.bfloat16, 17, 33, 25, True, False, False, "contiguous", False, _options(False, True, "mean")),
    Case(torch.float32, 1, 7, 2, True, False, False, "transposed", False, _options(False, True, None)),
]
FREE = st.builds(
    Case,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    K=st.sampled_from([1, 5, 16, 17, 32, 33]),  # one backward kernel up to 24, or 32 with an M of 32
    M=st.sampled_from([1, 3, 16, 17, 32]),  # around the tile's 16
    J=st.sampled_from([1, 2, 3, 4, 5, 11, 12, 17, 20]),
    equidistant=st.booleans(),
    per_direction=st.booleans(),
    native=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    transposed_directions=st.booleans(),
    options=st.builds(_options, st.booleans(), st.booleans(), st.sampled_from(["mean", "sum", None])),
)
if DEVICE == "cuda":
    # The compiler specializes on a 1, and on multiples of 16. 128 samples are whole tiles.
    SAMPLES = st.integers(1, 200).map(lambda i: 2 * i + 1) | st.sampled_from([1, 128, 256])
    LEADING = st.sampled_from([(3,), (5,), (3, 3)])
else:
    SAMPLES = st.sampled_from([0, 1, 2, 7, 15, 16, 17])
    LEADING = st.sampled_from([(), (), (), (1,), (2,)])


def make_input(case: Case, leading: tuple[int, ...], N: int, size: float) -> torch.Tensor:
    shape = (*leading, N, case.K)
    if case.layout == "transposed":
        return (size * normal(*leading, case.K, N)).to(case.dtype).mT
    if case.layout == "sliced":
        return (size * normal(*leading, 2 * N, case.K + 3)).to(case.dtype)[..., ::2, 1:-2]
    if case.layout == "expanded" and leading:
        return (size * normal(N, case.K)).to(case.dtype).expand(shape)
    return (size * normal(*shape)).to(case.dtype)


def make_knots(case: Case) -> Knots:
    # Of arbitrary knots nine are enough: a program takes eight (more: `test_accuracy_of_arbitrary_knots`).
    knots = standard_normal_knots(3.0, case.J) if case.equidistant else arbitrary_knots(min(case.J, 9))
    if case.per_direction:
        phi = torch.exp(-knots.t[:, None] * torch.linspace(0.5, 2, case.M).double())
        knots = knots._replace(phi=phi, weights=torch.rand(case.M, len(knots.t), dtype=torch.float64).t())
    return knots


def loss_scaled(
    x: torch.Tensor, A: torch.Tensor, knots: Knots, largest: float, options: dict[str, Any]
) -> Result:
    """`evaluate`, the loss times a power of two that brings gradients near 1, as loss scaling does."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = functional(x, A, knots, impl="triton", **options)
    if options["reduction"] == "mean":
        largest /= x[..., 0, 0].numel() * A.shape[1]
    scale = 2.0 ** -math.floor(math.log2(largest)) if largest else 1.0
    value.backward(torch.full_like(value, scale))
    assert x.grad is not None
    return Result(value.detach(), x.grad.double() / scale)


def check_rule(x: torch.Tensor, A: torch.Tensor, knots: Knots, options: dict[str, Any]) -> None:
    """The accuracy rule for the statistic of every direction, and for the gradient.

    Plain float32 can be right by luck where the result is a few numbers, so a case of few projections is held
    to the rule at several inputs near x together. A reduced statistic may have the errors of all directions
    added up.
    """
    inputs = min(6, -(-48 // (x[..., 0].numel() * A.shape[1])))
    errors, sizes = [], []
    for i in range(inputs):
        z = ((1 + i / 100) * x).to(x.dtype) if i else x  # x itself keeps its layout
        near = _errors(z, A, knots, options)
        errors.append(near[:4])
        sizes.append(near[4:])
    plain_value, value, plain_grad, grad = torch.tensor(errors).norm(dim=0).tolist()
    value_size, grad_size = torch.tensor(sizes).norm(dim=0).tolist()
    assert value <= 2 * plain_value + value_size
    assert grad <= 2 * plain_grad + grad_size


def _errors(x: torch.Tensor, A: torch.Tensor, knots: Knots, options: dict[str, Any]) -> tuple[float, ...]:
    """Norms: errors of plain float32 and of the kernels in value and gradient, and what rounding may add."""
    each = {**options, "reduction": None}
    plain, exact = (f(x, A, knots, **each) for f in (plain_float32, truth))
    plain_value, plain_grad = ((p.double() - e).norm() for p, e in zip(plain, exact, strict=True))
    value, count = exact.value, exact.value.numel()
    got = loss_scaled(x, A, knots, exact.grad.abs().max().item(), options)
    if options["reduction"] is None:
        error, size = (got.value - value).norm(), value.norm()
    else:
        summed = got.value.double() * (count if options["reduction"] == "mean" else 1)
        error, size = (summed - value.sum()).abs(), value.abs().sum()
        plain_value = plain_value * count**0.5
    grad = got.grad * (count if options["reduction"] == "mean" else 1)
    rounding = 1e-6 * exact.grad.norm()
    if x.dtype != torch.float32:  # also of numbers so small beside the largest that they have fewer digits
        info, largest = torch.finfo(x.dtype), 2 * exact.grad.abs().max()
        rounding += info.eps / 2 * (exact.grad.norm() + info.smallest_normal * largest * x.numel() ** 0.5)
    norms = (plain_value, error, plain_grad, (grad - exact.grad).norm(), value_error(x) * size, rounding)
    return tuple(float(norm) for norm in norms)


def check_case(case, leading, N, size, strength, bad, seed):
    torch.manual_seed(seed)
    x, knots, options = make_input(case, leading, N, size), make_knots(case), dict(case.options)
    knots = knots._replace(weights=strength * knots.weights)
    if case.native:
        with sanitized():
            A, options["scale"] = sample_unit_directions(
                case.K, case.M, step=2, device=DEVICE, dtype=case.dtype, impl="triton"
            )
    else:
        A = directions(case.K, case.M)
    if case.transposed_directions:
        A = A.t().contiguous().t()
    with sanitized():
        if 1 + options["unbiased"] > N:
            with pytest.raises(ValueError, match=f"^x: expected at least .* got N = {N}"):
                evaluate(x, A, knots, impl="triton", **options)
        elif bad is None:
            check_rule(x, A, knots, options)
        else:
            x = x.contiguous()
            x.view(-1, N, case.K)[-1, N // 2, case.K // 2] = bad
            value = evaluate(x, A, knots, impl="triton", **{**options, "reduction": None}).value
            value = value.view(-1, case.M)
            assert value[-1].isnan().all()
            assert value[:-1].isfinite().all(), "the other views are not touched"


DRAWN = {
    "leading": LEADING,
    "N": SAMPLES,
    "size": st.sampled_from([1e-2, 1.0, 1.0, 30.0, 1e4]),
    "strength": st.sampled_from([1.0, 1.0, 1e-7, 1e6]),  # of the weights, and so of dT/dp
    "bad": st.sampled_from([None, None, None, None, None, float("nan"), float("inf")]),
    "seed": st.integers(0, 1 << 20),
}
# Always the same cases. A failing one is small already: shrinking it would take minutes.
ALL = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=HealthCheck,
)

if DEVICE == "cuda":

    @pytest.mark.parametrize("case", COMPILED)
    @settings(ALL, max_examples=200 // len(COMPILED))
    @given(**DRAWN)
    def test_generated_cases(case, **drawn):
        check_case(case, **drawn)

else:

    @ALL
    @given(case=FREE, **DRAWN)
    def test_generated_cases(case, **drawn):
        check_case(case, **drawn)
