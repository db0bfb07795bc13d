"""The kernels with the rounding of real matrix units, which `bench/matrix_units.py` models.

Triton's interpreter multiplies in rounded float32; here its products are those of the model, with the tiles
that are shipped for the target. On a GPU `test_kernels_gpu.py` asks the units themselves.
"""

from __future__ import annotations

import matrix_units
import numpy as np
import pytest
import rounding_bench
import torch
from accuracy import Result, assert_within_rule, plain_float32, truth
from kernel_helpers import DEVICE

from lejepa_fast import sample_unit_directions, standard_normal_knots
from lejepa_fast.kernels import backward, finish, forward
from lejepa_fast.kernels.configs import Config, Tile, shipped_config
from lejepa_fast.kernels.layout import make_plan
from lejepa_fast.kernels.rounding import Lost, plan_chain

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="models of the units, for Triton's interpreter")
KNOTS = standard_normal_knots()
PLAN = make_plan(17, 3 / 16)


@pytest.fixture
def use_units(monkeypatch):
    """Products by the model of a target from now on."""
    from triton.runtime import interpreter

    def use(target: str, precision: str) -> None:
        def create_dot(self, a, b, acc, *_):
            assert a.data.dtype == b.data.dtype == acc.data.dtype == np.float32
            operands = (part.data.astype(np.float64) for part in (a, b, acc))
            sums = matrix_units.multiply(target, *operands, precision)
            return interpreter.TensorHandle(sums.astype(np.float32), acc.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)

    return use


def inputs(
    N: int, K: int, M: int, dtype: torch.dtype, embeddings: str = "normal"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    A, scale = sample_unit_directions(K, M, step=1, dtype=dtype)
    x = rounding_bench.EMBEDDINGS[embeddings](torch.randn(N, K).numpy())
    return torch.from_numpy(x)[None].to(dtype), A, scale


def statistic(x, A, scale, config: Config) -> torch.Tensor:
    table = forward.table_sums(x, A, scale, KNOTS.t.float(), PLAN, config, "tf32x3")
    return finished(table, x.shape[1], scale)[0]


def finished(table, count: int, scale) -> tuple[torch.Tensor, torch.Tensor]:
    knots = (a.float() for a in KNOTS[:3])
    options = {"unbiased": False, "scale_by_n": True, "factor": None}
    return finish.finish(table, count, scale, *knots, PLAN, **options)


@pytest.mark.parametrize(
    ("target", "dtype", "N", "K", "embeddings"),
    [
        ("sm_90", torch.bfloat16, 1024, 512, "normal"),
        ("sm_90", torch.bfloat16, 512, 512, "sparse"),
        ("sm_90", torch.bfloat16, 512, 512, "leading"),
        ("sm_90", torch.float16, 1024, 512, "normal"),
        ("sm_90", torch.float32, 512, 256, "normal"),
        ("sm_80", torch.float16, 512, 512, "normal"),
        ("gfx942", torch.bfloat16, 512, 512, "normal"),
    ],
)
def test_the_statistic_keeps_the_accuracy_rule(use_units, target, dtype, N, K, embeddings):
    x, A, scale = inputs(N, K, 64, dtype, embeddings)
    options = {"scale": scale, "reduction": None, "impl": "reference"}
    exact, plain = truth(x, A, KNOTS, **options), plain_float32(x, A, KNOTS, **options)
    config = shipped_config(target, dtype.itemsize)
    use_units(target, "half" if dtype.itemsize == 2 else "tf32x3")
    got = statistic(x, A, scale, config)
    assert_within_rule(got, plain.value, exact.value, "value")
    # Neither without what the units lose, nor for more dimensions in a chain, where they are NVIDIA's.
    if target == "sm_90" and dtype == torch.bfloat16 and embeddings == "normal":
        tile = config.tile("forward", K)  # bf16: `for_sums` leaves it as it is
        (choice,) = (c for c in config.forward if c.tile == tile)
        one_chain = (choice._replace(tile=tile._replace(chain=0)),)
        for worse in (config._replace(lost=Lost()), config._replace(forward=one_chain, lost=Lost())):
            with pytest.raises(AssertionError, match=r"^value: error"):
                assert_within_rule(statistic(x, A, scale, worse), plain.value, exact.value, "value")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_the_gradient_keeps_the_accuracy_rule(use_units, dtype, size):
    """float32 by one kernel and half precision by two: gradient and product."""
    K, M = (64, 64) if dtype == torch.float32 else (272, 64)
    x, A, scale = inputs(64, K, M, dtype)
    x = size * x
    options = {"scale": scale, "reduction": None, "impl": "reference"}
    exact, plain = truth(x, A, KNOTS, **options), plain_float32(x, A, KNOTS, **options)
    config = shipped_config("sm_90", dtype.itemsize)
    assert config.fuses(K, M) == (dtype == torch.float32)
    use_units("sm_90", "half" if dtype.itemsize == 2 else "tf32x3")
    t = KNOTS.t.float()
    value, coef = finished(forward.table_sums(x, A, scale, t, PLAN, config, "tf32x3"), 64, scale)
    one = torch.ones(())
    grad = backward.gradient(one, 1.0, coef, x, A, scale, t, PLAN, config, "tf32x3")
    got = Result(value, grad)
    ulp = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert_within_rule(got.value, plain.value, exact.value, "value")
    assert_within_rule(got.grad, plain.grad, exact.grad, "gradient", ulp=ulp)


@pytest.mark.parametrize("kind", rounding_bench.KINDS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_recorded_shares_are_a_little_less_than_those_of_the_units(target, kind):
    config = shipped_config(target, rounding_bench.KINDS[kind].itemsize)
    K = 32 if kind == "tf32x3" else 64
    case = rounding_bench.problem(K, kind, samples=512)
    share = rounding_bench.lost_share(case, rounding_bench.project(target, case, kind, K)) / K
    assert getattr(config.lost, kind) == pytest.approx(0.8 * share, rel=0.1)


def test_units_cut_towards_zero():
    one, tiny = np.ones((1, 16)), np.zeros((16, 1))
    tiny[0] = 2.0**-24 * 1.5  # nearer to the next float32 than to 1
    for acc in (1.0, -1.0):
        for target in matrix_units.TENSOR_CORES:
            total = matrix_units.multiply(target, one, np.sign(acc) * tiny, np.full((1, 1), acc), "half")
            assert total == acc
        rounded = matrix_units.multiply("gfx942", one, np.sign(acc) * tiny, np.full((1, 1), acc), "half")
        assert rounded == acc * (1 + 2.0**-23)


@pytest.mark.parametrize(
    ("K", "kind", "held", "chain"),
    [
        (128, "bf16", True, (0, True, 128e-9)),  # one chain
        (512, "bf16", True, (2, True, 128e-9)),
        (512, "tf32x3", True, (0, True, 3 * 64e-9)),  # of which the compiler makes chains of a tile
        (512, "ieee", True, (0, True, 0.0)),
        (500, "fp16", True, (2, False, 2 * 128e-9)),
        (512, "bf16", False, (2, True, 128e-9)),
        (192, "bf16", False, (1, True, 64e-9)),  # whole tiles, but no whole chains
        (200, "bf16", False, (2, False, 128e-9)),
        (10, "bf16", False, (0, False, 10e-9)),
    ],
)
def test_chains(K, kind, held, chain):
    tile = Tile(64, 32, 64, 4, 1, chain=128)
    found = plan_chain(Lost(1e-9, 2e-9, 3e-9), tile, K, kind, held=held)
    assert (found.tiles, found.even) == chain[:2]
    assert found.lost == pytest.approx(chain[2])
