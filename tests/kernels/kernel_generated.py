"""Generated cases of the Triton kernels against float64 truth (see `kernel_helpers.py`).

In the interpreter every size, layout and option is drawn freely, and every launch is checked for accesses out
of bounds and for races. On a GPU each combination of options and sizes is a compilation of several seconds:
there they come from a short list, and the numbers of samples and what is in them vary.
"""

import math
from typing import NamedTuple

import pytest
import torch
from accuracy import arbitrary_knots, functional, plain_float32, truth, value_error
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, directions, normal, sanitized

from lejepa_fast import sample_unit_directions, standard_normal_knots


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
    unbiased: bool
    scale_by_n: bool
    reduction: str | None


if DEVICE == "cuda":
    # Both backward paths (K up to 64 or more), both kinds of knots, far giant steps, every dtype.
    single, bf16, half = torch.float32, torch.bfloat16, torch.float16
    CASES = st.sampled_from(
        [
            Case(single, 33, 70, 17, True, False, False, "contiguous", False, False, True, "mean"),
            Case(bf16, 100, 70, 17, True, False, True, "transposed", False, True, True, "mean"),
            Case(half, 64, 129, 9, True, True, True, "sliced", False, False, False, "sum"),
            Case(single, 100, 33, 5, False, False, False, "sliced", True, True, False, None),
            Case(bf16, 17, 33, 25, True, False, False, "contiguous", False, False, True, "mean"),
            Case(single, 1, 7, 2, True, False, False, "transposed", False, False, True, None),
        ]
    )
    # The compiler specializes on a 1, and on multiples of 16. 128 samples are whole tiles.
    SAMPLES = st.integers(1, 200).map(lambda i: 2 * i + 1) | st.sampled_from([1, 128, 256])
    LEADING = st.sampled_from([(3,), (5,), (3, 3)])
else:
    CASES = st.builds(
        Case,
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        K=st.sampled_from([1, 5, 16, 17, 32, 33]),  # one backward kernel up to 24
        M=st.sampled_from([1, 3, 16, 17]),  # around the tile's 16
        J=st.sampled_from([1, 2, 3, 4, 5, 11, 12, 17, 20]),
        equidistant=st.booleans(),
        per_direction=st.booleans(),
        native=st.booleans(),
        layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
        transposed_directions=st.booleans(),
        unbiased=st.booleans(),
        scale_by_n=st.booleans(),
        reduction=st.sampled_from(["mean", "sum", None]),
    )
    SAMPLES = st.sampled_from([0, 1, 2, 7, 15, 16, 17])
    LEADING = st.sampled_from([(), (), (), (1,), (2,)])


def make_input(case, leading, N, size):
    shape = (*leading, N, case.K)
    if case.layout == "transposed":
        return (size * normal(*leading, case.K, N)).to(case.dtype).mT
    if case.layout == "sliced":
        return (size * normal(*leading, 2 * N, case.K + 3)).to(case.dtype)[..., ::2, 1:-2]
    if case.layout == "expanded" and leading:
        return (size * normal(N, case.K)).to(case.dtype).expand(shape)
    return (size * normal(*shape)).to(case.dtype)


def make_knots(case, strength):
    # Of arbitrary knots nine are enough, for a program takes eight (more: kernel_accuracy.py).
    knots = standard_normal_knots(3.0, case.J) if case.equidistant else arbitrary_knots(min(case.J, 9))
    if case.per_direction:
        phi = torch.exp(-knots.t[:, None] * torch.linspace(0.5, 2, case.M).double())
        knots = knots._replace(phi=phi, weights=torch.rand(case.M, len(knots.t), dtype=torch.float64).t())
    return knots._replace(weights=strength * knots.weights)


def check_rule(x, A, knots, options):
    """The accuracy rule for the statistic of every direction, and for the gradient.

    A reduced statistic may have the errors of all directions added up. Plain float32 can be right by luck
    where the result is a few numbers: there its largest error at several inputs near x counts.
    """
    each, mean = {**options, "reduction": None}, options["reduction"] == "mean"
    exact = truth(x, A, knots, **each)
    count = exact.value.numel()
    plain_errors = []
    for i in range(min(6, -(-48 // (x[..., 0].numel() * A.shape[1])))):
        z = ((1 + i / 100) * x).to(x.dtype)
        pairs = zip(plain_float32(z, A, knots, **each), truth(z, A, knots, **each), strict=True)
        plain_errors.append([(plain.double() - right).norm() for plain, right in pairs])
    plain_value, plain_grad = torch.tensor(plain_errors).amax(0).tolist()

    # The loss times a power of two that brings gradients near 1, as loss scaling does.
    largest = exact.grad.abs().max().item() / (count if mean else 1)
    scale = 2.0 ** -math.floor(math.log2(largest)) if largest else 1.0
    z = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = functional(z, A, knots, impl="triton", **options)
    value.backward(torch.full_like(value, scale))
    factor = count if mean else 1

    if options["reduction"] is None:
        assert (value - exact.value).norm() <= 2 * plain_value + value_error(x) * exact.value.norm()
    else:
        allowed = 2 * plain_value * count**0.5 + value_error(x) * exact.value.abs().sum()
        assert (factor * value.double() - exact.value.sum()).abs() <= allowed
    rounding = 1e-6 * exact.grad.norm()
    if x.dtype != torch.float32:  # also of numbers so small beside the largest that they have fewer digits
        info, most = torch.finfo(x.dtype), 2 * exact.grad.abs().max()
        rounding += info.eps / 2 * (exact.grad.norm() + info.smallest_normal * most * x.numel() ** 0.5)
    assert (factor * z.grad.double() / scale - exact.grad).norm() <= 2 * plain_grad + rounding


@pytest.mark.timeout(1800)  # a GPU compiles several kernels for each case
@pytest.mark.usefixtures("poisoned_memory")
@settings(  # Always the same cases. A failing one is small already: shrinking it would take minutes.
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=HealthCheck,
)
@given(
    case=CASES,
    leading=LEADING,
    N=SAMPLES,
    size=st.sampled_from([1e-2, 1.0, 1.0, 30.0, 1e4]),
    strength=st.sampled_from([1.0, 1.0, 1e-7, 1e6]),  # of the weights, and so of dT/dp
    bad=st.sampled_from([None, None, None, None, None, float("nan"), float("inf")]),
    seed=st.integers(0, 1 << 20),
)
def test_generated_cases(case, leading, N, size, strength, bad, seed):
    torch.manual_seed(seed)
    x, knots = make_input(case, leading, N, size), make_knots(case, strength)
    options = {name: getattr(case, name) for name in ("unbiased", "scale_by_n", "reduction")}
    A = directions(case.K, case.M)
    with sanitized():
        if case.native:
            A, options["scale"] = sample_unit_directions(
                case.K, case.M, step=2, device=DEVICE, dtype=case.dtype, impl="triton"
            )
        if case.transposed_directions:
            A = A.t().contiguous().t()
        if 1 + case.unbiased > N:
            with pytest.raises(ValueError, match=f"^x: expected at least .* got N = {N}"):
                functional(x, A, knots, impl="triton", **options)
        elif bad is None:
            check_rule(x, A, knots, options)
        else:
            x = x.contiguous()
            x.view(-1, N, case.K)[-1, N // 2, case.K // 2] = bad
            x.requires_grad_()
            value = functional(x, A, knots, impl="triton", **{**options, "reduction": None})
            assert value.view(-1, case.M)[-1].isnan().all()
            assert value.view(-1, case.M)[:-1].isfinite().all(), "the other views are not touched"
            value.sum().backward()
            assert x.grad.view(-1, N, case.K)[-1].isnan().any()
            assert x.grad.view(-1, N, case.K)[:-1].isfinite().all()
