"""Kept launches: the kernels get what Triton would give them, told by a stand-in for a GPU's driver."""

import pytest
import torch
from standin_driver import standing_in
from torch import Tensor

from lejepa_fast import sigreg, standard_normal_knots
from lejepa_fast.kernels import runtime

pytestmark = [
    pytest.mark.skipif(runtime.interpreting(), reason="the interpreter replaces the compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a driver of its own"),
]
KNOTS = standard_normal_knots()


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((4, 256, 16), torch.float32, {}),
        ((2, 64, 32), torch.bfloat16, {"reduction": None}),
        ((2, 64, 600), torch.bfloat16, {"unbiased": True}),
        ((2, 64, 16), torch.float16, {"spacing": None}),
    ],
    ids=["float32", "a gradient for each direction", "backward in two kernels", "knots at any place"],
)
def test_kept_launches_pass_the_arguments_of_the_first(shape, dtype, options):
    """Steps on other tensors of the same sizes, and what a step that Triton looks at passes for them."""
    torch.manual_seed(0)

    def inputs():
        x, A = torch.randn(shape, dtype=dtype), torch.randn(shape[2], 32).to(dtype)
        return x, A, torch.rand(32), torch.rand(17), torch.rand(17)

    def step(x, A, scale, phi, weights):
        """Its launches. A tensor is told by its type, and by its place among the inputs."""
        places = {t.data_ptr(): place for place, t in enumerate((x, A, scale, phi, weights))}
        launches.clear()
        x = x.requires_grad_()
        sigreg(x, A, KNOTS.t, phi, weights, impl="triton", scale=scale, **options).sum().backward()
        return [(name, grid, [told(value, places) for value in values]) for name, grid, values in launches]

    def told(value, places):
        if not isinstance(value, Tensor):
            return value
        return value.dtype, value.shape, value.stride(), places.get(value.data_ptr())

    launches: list[tuple] = []
    first, second = inputs(), inputs()
    with standing_in(lambda *launch: launches.append(launch)):
        expected = step(*second)
        runtime._launches.clear()
        step(*first[:4], first[3])  # one tensor for two arguments
        assert step(*second) == expected
        assert len(runtime._launches) == len(expected)
    named = {value[3] for _, _, values in expected for value in values if isinstance(value, tuple)}
    assert named >= {0, 1, 2, 3, 4}  # all inputs were told apart
