"""sample_directions: the generator, its distribution, and what makes it safe to use in training."""

import math

import numpy as np
import pytest
import torch
from accuracy import COMPILE_BACKEND

from lejepa_fast import SIGReg, directions, sample_directions, sample_unit_directions
from lejepa_fast.directions import philox_4x32

GOLDEN = [
    [-0.7252887, -0.3659854, -0.1186915],
    [0.5947506, -0.8253826, 0.3153022],
    [-0.3323801, 0.017899, 0.8113593],
    [-0.0975478, 0.2929084, 0.3795836],
    [0.0153585, -0.3141377, -0.290016],
]


# Known answers of Philox-4x32-10 as published with the Random123 library.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox_4x32(*(torch.tensor(c) for c in counter), key=key)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 3, 4, 130])  # below, at and above the four rows of a generator call
def test_columns_are_unit_vectors(dim, dtype):
    """To the rounding of the dtype, and to that of float32 times the scale."""
    A, scale = sample_unit_directions(dim, 33, step=5, dtype=dtype)
    assert A.shape == (dim, 33)
    assert A.dtype == dtype
    assert torch.equal(A, sample_directions(dim, 33, step=5, dtype=dtype))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    one = torch.ones(33).double()
    torch.testing.assert_close(A.double().norm(dim=0), one, rtol=0, atol=tolerance)
    torch.testing.assert_close((A.double() * scale).norm(dim=0), one, rtol=0, atol=1e-6)
    if dtype.itemsize > 2:
        assert torch.equal(scale, torch.ones(33, dtype=dtype))


def test_directions_are_isotropic():
    K, M = 16, 1 << 15
    A = sample_directions(K, M, step=1, dtype=torch.float64)
    second_moment = A @ A.T / M * K  # expectation: identity; entries have a standard error of about 1/sqrt(M)
    assert (second_moment - torch.eye(K).double()).abs().max() < 6 / math.sqrt(M)
    assert A.mean(1).abs().max() < 6 / math.sqrt(M * K)
    fourth = (A**4).mean() * K * (K + 2) / 3  # uniform on the sphere: E a^4 = 3 / (K (K + 2))
    assert abs(fourth - 1) < 0.02
    other = sample_directions(K, M, step=0, dtype=torch.float64)
    assert (A * other).sum(0).mean().abs() < 6 / math.sqrt(K * M), "steps are uncorrelated"


def test_function_of_seed_and_step_alone():
    A = sample_directions(8, 16, step=3, seed=7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(A, sample_directions(8, 16, step=torch.tensor(3), seed=7))
    first = [sample_directions(8, 16, step=step, seed=7) for step in (0, torch.tensor(0))]
    assert torch.equal(*first)
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    for step, seed in [(4, 7), (3, 8), (3 + (1 << 32), 7), (3, 7 + (1 << 32)), (3, -7)]:
        other = sample_directions(8, 16, step=step, seed=seed)
        assert (A - other).abs().max() > 0.1, (step, seed)
    assert torch.equal(A, sample_directions(8, 50, step=3, seed=7)[:, :16]), "whatever their number"


@pytest.mark.parametrize(("step", "seed"), [(0, 0), ((1 << 40) + 3, (1 << 63) + 5), (7, -1)])
def test_numba_draws_the_same_bits(step, seed, monkeypatch):
    pytest.importorskip("numba")
    drawn = sample_directions(21, 34, step=step, seed=seed)
    assert directions.compiled_tiles() is not None
    monkeypatch.setattr(directions, "compiled_tiles", lambda: None)
    assert torch.equal(drawn, sample_directions(21, 34, step=step, seed=seed))


def test_steps_under_vmap_and_seeds_of_numpy():
    A = torch.vmap(lambda step: sample_directions(5, 3, step=step, seed=11))(torch.tensor([6, 7]))
    assert torch.equal(A[1], sample_directions(5, 3, step=7, seed=np.int64(11)))


def test_inside_transforms_of_torch_func():
    x, step = torch.randn(6, 4), torch.tensor(7)
    for of in (3, step):
        expected = SIGReg(num_slices=8, impl="reference")(x, of)
        wanted = x.clone().requires_grad_()
        SIGReg(num_slices=8, impl="reference")(wanted, of).backward()
        reg = SIGReg(num_slices=8, impl="reference")
        gradient, value = torch.func.grad_and_value(lambda z: reg(z, of))(x)  # noqa: B023
        assert torch.equal(value, expected)
        torch.testing.assert_close(gradient, wanted.grad)
    evaluated = SIGReg(num_slices=8, impl="reference").eval()
    assert torch.func.hessian(evaluated)(x).isfinite().all()
    each = torch.vmap(torch.func.grad(evaluated))(torch.stack([x, -x]))
    torch.testing.assert_close(each[0], -each[1])


def test_same_in_compiled_code():
    sample = lambda step: sample_directions(9, 12, step=step)  # noqa: E731
    compiled = torch.compile(sample, fullgraph=True, backend=COMPILE_BACKEND)
    assert torch.equal(compiled(torch.tensor(11)), sample(11))


def test_golden_values():
    """Checkpoints rely on the sequence of directions: it must not change between versions."""
    A = sample_directions(5, 3, step=7, seed=11, dtype=torch.float64)
    torch.testing.assert_close(A, torch.tensor(GOLDEN, dtype=torch.float64), rtol=0, atol=2e-7)


def test_operator_contract():
    step = torch.tensor(3)
    torch.library.opcheck(torch.ops.lejepa_fast.sample_directions, (step, 8, 16, 0, torch.float32, False))
    A = sample_directions(8, 16, step=step.to("meta"))
    assert (A.shape, A.device.type) == ((8, 16), "meta"), "it lives where the step does"


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"dim": 0}),
        (ValueError, {"num_slices": 0}),
        (ValueError, {"step": -1}),
        (ValueError, {"step": torch.tensor(-1)}),
        (ValueError, {"step": 1 << 63}),
        (ValueError, {"step": torch.zeros(2, dtype=torch.int64)}),
        (ValueError, {"step": torch.tensor(1.0)}),
        (ValueError, {"step": torch.tensor(True)}),
        (ValueError, {"dtype": torch.int32}),
        (ValueError, {"dtype": "float32"}),
        (TypeError, {"dim": 4.0}),
        (TypeError, {"num_slices": True}),
        (TypeError, {"seed": 0.5}),
        (TypeError, {"step": 1.5}),
    ],
)
def test_bad_arguments_are_named(error, arguments):
    (name,) = arguments
    with pytest.raises(error, match=f"^{name}: expected"):
        sample_directions(**{"dim": 4, "num_slices": 4, "step": 0, **arguments})


def test_a_column_of_zeros_is_the_first_axis():
    """At step 1205178 the only normal of column 0 is exactly 0, and its direction would be NaN."""
    A, scale = sample_unit_directions(1, 16, step=1205178, impl="torch")
    assert A[0, 0].item() == scale[0].item() == 1
    assert A.abs().eq(1).all()
