"""Values and gradients of the Triton kernels against float64 truth, by every tile (`kernel_helpers.py`)."""

import contextlib

import pytest
import torch
from accuracy import arbitrary_knots, assert_within_rule, check_accuracy, functional
from kernel_helpers import DEVICE, ONE_KERNEL, TWO_KERNELS, directions, normal

from lejepa_fast import sample_unit_directions, standard_normal_knots
from lejepa_fast.kernels import autotune, backward, epilogue, forward
from lejepa_fast.kernels.configs import ANY, get_config
from lejepa_fast.kernels.table import make_plan

pytestmark = pytest.mark.usefixtures("poisoned_memory")
t = torch.arange(17, device=DEVICE) * 0.1875
PHI = torch.exp(-t.square() / 2)
PLAN = make_plan(17, 0.1875)


@pytest.mark.parametrize(
    ("shape", "M", "options"),
    [
        ((2, 32, 16), 32, {}),  # whole tiles only
        ((1, 16), 8, {}),  # one sample
        ((2, 19, 5), 7, {"unbiased": True}),  # nothing a multiple of a tile, K below the least tile
        ((33, 1), 1, {"reduction": "sum"}),  # one dimension, one direction
        # three splits, one direction more than a tile, K not a multiple of the tile
        ((70, 20), 17, {"unbiased": True, "scale_by_n": False}),
        ((20, 33), 20, {}),  # K above the limit of the fused backward, not a multiple of the tile
        ((2, 1, 17, 48), 17, {"unbiased": True}),  # two leading dimensions, K of three whole tiles
        ((3, 2100), 5, {"scale_by_n": False}),  # K > 2048
    ],
)
def test_accuracy_over_shapes(shape, M, options):
    check_accuracy(
        normal(*shape), directions(shape[-1], M), standard_normal_knots(), impl="triton", **options
    )


@pytest.mark.parametrize(
    ("J", "spaced", "K", "size"),
    [
        # several chunks of the table, the last not full; fewer knots are among the generated cases
        *((J, True, 8, 1.0) for J in (18, 19, 25, 33, 65)),
        *((17, True, 16, 10.0**e) for e in (-4, -2, 1, 3, 4)),
        (65, True, 16, 1e-4),
        (65, True, 16, 1e4),
        (17, False, ONE_KERNEL, 1.0),
        (17, False, TWO_KERNELS, 1.0),
    ],
)
def test_accuracy_over_knots_and_sizes_of_projections(J, spaced, K, size):
    knots = standard_normal_knots(3.0, J) if spaced else arbitrary_knots(J)
    check_accuracy(size * normal(20, K), directions(K, 12), knots, impl="triton", reduction=None)


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


@pytest.mark.parametrize(("K", "dtype"), [(13, torch.bfloat16), (TWO_KERNELS, torch.float32)])
def test_every_candidate_gives_the_same_result(K, dtype):
    x = torch.randn(1, 35, K).to(DEVICE, dtype)
    A, scale = sample_unit_directions(K, 9, step=1, device=DEVICE, dtype=dtype)
    shipped = get_config(x.device, dtype.itemsize)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2

    def forward_backward(config):
        table = forward.table_sums(x, A, scale, t, PLAN, config, "ieee")
        options = {"unbiased": False, "scale_by_n": True, "factor": 1.0}
        value, coef = epilogue.statistic(table, 35, scale, t, PHI, PHI, PLAN, **options)
        one = torch.ones((), device=DEVICE)
        return value, backward.gradient(one, 1.0, coef, x, A, scale, t, PLAN, config, "ieee")

    value, grad = forward_backward(shipped)
    kernels = ("forward", "fused") if K == 13 else ("forward", "gradient", "product")
    tiles = [(kernel, tile) for kernel in kernels for tile in shipped.candidates(kernel, K)[1:]]
    ran = 0
    for kernel, tile in tiles:
        with contextlib.suppress(autotune.CANNOT_RUN):  # too large for this GPU
            got = forward_backward(shipped._replace(**{kernel: {ANY: tile}}))
            ran += 1
            torch.testing.assert_close(got[0], value, rtol=1e-5, atol=0)
            atol = tolerance * grad.abs().max().item()
            torch.testing.assert_close(got[1], grad, rtol=tolerance, atol=atol)
    assert ran >= 2


@pytest.mark.parametrize("K", [ONE_KERNEL, TWO_KERNELS])
@pytest.mark.parametrize("size", [1e-12, 1e8])  # 1: kernel_generated.py
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

    def gradient(impl, dtype):
        v = x.detach().clone().to(dtype).requires_grad_()
        value = functional(v, A.to(dtype), knots, reduction=None, impl=impl)
        return torch.autograd.grad(value, v, upstream.to(dtype))[0]

    got, plain = gradient("triton", torch.float32), gradient("reference", torch.float32)
    exact = gradient("reference", torch.float64)
    size = exact[..., :M].norm(dim=1, keepdim=True)  # as if all directions had gradients of one size
    assert_within_rule(*(g[..., :M] / size for g in (got, plain, exact)), "gradient")
    assert (got[..., M:] == 0).all()


def test_projections_without_a_phase_stay_bounded():
    """Beyond 2**22 half turns float32 has no phase: |C|, |S| <= 1 must still hold."""
    knots = standard_normal_knots()
    value = functional(1e12 * normal(20, 4), directions(4, 6), knots, impl="triton")
    bound = 20 * (knots.weights * (1 + knots.phi).square() + knots.weights).sum()
    assert 0 <= value <= bound


def test_many_partial_sums_lose_no_digit():
    """Of a view so large that an error of the mean counts: as from sums in float64, also of the division."""
    splits, count = 600, 600 * 1001.0
    torch.manual_seed(0)
    table = torch.zeros(splits, 1, PLAN.rows, 3)
    table[:, :, 0] = 1001.0
    means = torch.rand(1, PLAN.rows - 1, 3, dtype=torch.float64) - 0.5
    table[:, :, 1:] = (1001 * means).float()  # the same everywhere: roundings go one way
    options = {"unbiased": False, "scale_by_n": False, "factor": None}

    def statistic(sums, count):
        return epilogue.statistic(sums.to(DEVICE), count, None, t, PHI, PHI, PLAN, **options)[0].cpu()

    exact = statistic((table.double().sum(0, keepdim=True) / count).float(), 1.0)
    one_after_another = table[0]
    for part in table[1:]:
        one_after_another = one_after_another + part
    naive = (statistic(one_after_another[None], count) - exact).norm()
    assert (statistic(table, count) - exact).norm() <= 2e-7 * exact.norm()
    assert naive > 4e-7 * exact.norm(), "what it would be without compensation"
