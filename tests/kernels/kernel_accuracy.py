"""Values and gradients of the Triton kernels against float64 truth (see `kernel_helpers.py`)."""

import pytest
import torch
from accuracy import arbitrary_knots, assert_within_rule, check_accuracy, check_non_finite, functional
from kernel_helpers import DEVICE, ONE_KERNEL, TWO_KERNELS, directions, normal

from lejepa_fast import SIGReg, sample_unit_directions, standard_normal_knots
from lejepa_fast.kernels.configs import get_config

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [
    ((2, 32, 16), 32, False),  # whole tiles only
    ((1, 16), 8, False),  # one sample
    ((2, 19, 5), 7, True),  # nothing a multiple of a tile, K below the least tile
    ((33, 1), 1, False),  # one dimension, one direction
    ((70, 20), 17, True),  # three splits, one direction more than a tile, K not a multiple of the tile
    ((20, 33), 20, False),  # K above the limit of the fused backward, not a multiple of the tile
    ((2, 1, 17, 48), 17, True),  # two leading dimensions, K of three whole tiles
    ((3, 2100), 5, False),  # K > 2048
]


@pytest.mark.parametrize(("shape", "M", "unbiased"), SHAPES)
def test_accuracy_over_shapes(shape, M, unbiased):
    x, A = normal(*shape), directions(shape[-1], M)
    check_accuracy(x, A, standard_normal_knots(), impl="triton", unbiased=unbiased)


# Around each change of the table: baby steps only, one giant step, two, several chunks, the last not full.
@pytest.mark.parametrize("J", [1, 2, 3, 4, 5, 11, 12, 17, 18, 19, 25, 33, 65])
def test_accuracy_over_numbers_of_knots(J):
    knots = standard_normal_knots(3.0, J)
    check_accuracy(normal(20, 8), directions(8, 12), knots, impl="triton", reduction=None)


@pytest.mark.parametrize("J", [1, 7, 8, 9, 17])  # around the eight knots of a chunk
@pytest.mark.parametrize("K", [ONE_KERNEL, TWO_KERNELS])
def test_accuracy_of_arbitrary_knots(J, K):
    check_accuracy(normal(20, K), directions(K, 9), arbitrary_knots(J), impl="triton")


@pytest.mark.parametrize(("J", "scale"), [*((17, 10.0**e) for e in (-4, -2, 1, 3, 4)), (65, 1e-4), (65, 1e4)])
def test_accuracy_over_sizes_of_projections(J, scale):
    x, A = scale * normal(20, 16), directions(16, 12)
    check_accuracy(x, A, standard_normal_knots(3.0, J), impl="triton", reduction=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [16, TWO_KERNELS])
@pytest.mark.parametrize("exact_directions", [False, True])
def test_accuracy_of_half_precision_inputs(dtype, K, exact_directions):
    """float32 directions multiply as float32; half-precision ones with their scale on the tensor cores."""
    x, knots = normal(2, 20, K, dtype=dtype), standard_normal_knots()
    if not exact_directions:
        check_accuracy(x, directions(K, 20), knots, impl="triton")
        return
    A, scale = sample_unit_directions(K, 20, step=1, device=DEVICE, dtype=dtype)
    for reduction in ("mean", None):
        check_accuracy(x, A, knots, impl="triton", scale=scale, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_of_every_shipped_tile_of_the_fused_backward(dtype):
    """Each at the largest K that it holds, where registers and shared memory are fullest."""
    config = get_config(torch.device(DEVICE), dtype.itemsize)
    for K, tile in config.fused.items():
        M = 2 * tile.block_m
        assert config.fuses(K, M)
        assert config.tile("fused", K) == tile
        x = normal(1, 2 * tile.block_n + 5, K, dtype=dtype)
        A, scale = sample_unit_directions(K, M, step=1, device=DEVICE, dtype=dtype)
        scale = scale if dtype.itemsize == 2 else None
        check_accuracy(x, A, standard_normal_knots(), impl="triton", scale=scale, reduction="sum")


@pytest.mark.parametrize("K", [ONE_KERNEL, TWO_KERNELS])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e8])
def test_float16_gradient_of_any_size(K, size):
    """dT/dp passes through float16 whose range it does not fit; views differ in size, too."""
    x = torch.cat([normal(1, 20, K), 0.1 * normal(1, 20, K)]).half()
    A, scale = sample_unit_directions(K, 9, step=1, device=DEVICE, dtype=torch.float16)
    knots = standard_normal_knots()
    knots = knots._replace(weights=knots.weights * size)

    def gradient(x, A, impl):
        x = x.detach().clone().requires_grad_()
        loss = functional(x, A, knots, scale=scale, scale_by_n=False, impl=impl)
        return torch.autograd.grad(loss * (2.0**16 / size), x)[0]

    got = gradient(x, A, "triton")
    exact, plain = gradient(x.double(), A.double(), "reference"), gradient(x.float(), A, "reference")
    for view in range(2):
        assert_within_rule(got[view], plain[view], exact[view], "gradient", ulp=2.0**-11)


@pytest.mark.parametrize("K", [ONE_KERNEL, TWO_KERNELS])
def test_gradient_per_direction(K):
    """reduction=None with an arbitrary gradient for every view and direction, of very different sizes.

    The directions are columns of the identity, so each has a column of dx to itself, and all count alike.
    """
    M = K - 3
    x, A, knots = normal(2, 20, K), torch.eye(K, M, device=DEVICE), standard_normal_knots()
    upstream = torch.logspace(-6, 6, 2 * M).view(2, M).to(DEVICE)
    grads = {}
    runs = [("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]
    for impl, dtype in runs:
        v = x.detach().clone().to(dtype).requires_grad_()
        value = functional(v, A.to(dtype), knots, reduction=None, impl=impl)
        (grads[impl, dtype],) = torch.autograd.grad(value, v, upstream.to(dtype))
    exact = grads["reference", torch.float64]
    got, reference = grads["triton", torch.float32], grads["reference", torch.float32]
    size = exact[..., :M].norm(dim=1, keepdim=True)  # as if all directions had gradients of one size
    got_each, reference_each, exact_each = (g[..., :M] / size for g in (got, reference, exact))
    assert_within_rule(got_each, reference_each, exact_each, "gradient")
    assert (got[..., M:] == 0).all()


@pytest.mark.parametrize(
    "options", [{"scale_by_n": False}, {"scale_by_n": False, "unbiased": True}, {"reduction": "sum"}]
)
def test_options(options):
    check_accuracy(normal(2, 20, 6), directions(6, 9), standard_normal_knots(), impl="triton", **options)


def test_target_and_weights_per_direction():
    knots = standard_normal_knots()
    phi = torch.exp(-knots.t[:, None] * torch.linspace(0.5, 2, 9).double())
    knots = knots._replace(phi=phi, weights=torch.rand(9, 17, dtype=torch.float64).t())  # also transposed
    check_accuracy(normal(2, 20, 6), directions(6, 9), knots, impl="triton")


@pytest.mark.parametrize("J", [1, 2, 17, 25])
def test_non_finite_input_gives_nan(J):
    check_non_finite(normal(4, 20, 4), SIGReg(6, n_points=J, impl="triton", reduction=None).to(DEVICE))


def test_projections_without_a_phase_stay_bounded():
    """Beyond 2**22 half turns float32 has no phase: |C|, |S| <= 1 must still hold."""
    knots = standard_normal_knots()
    value = functional(1e12 * normal(20, 4), directions(4, 6), knots, impl="triton")
    bound = 20 * (knots.weights * (1 + knots.phi).square() + knots.weights).sum()
    assert 0 <= value <= bound
