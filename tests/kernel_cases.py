"""Tests of the Triton kernels. `test_kernels.py` runs them: on the GPU if there is one, else interpreted.

The interpreter decides at import which kernels it interprets, so this file is run in a process of its own
with TRITON_INTERPRET=1. Sizes are small and odd: an interpreted tile has 16 x 16 x 16 elements.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_within_rule, check_accuracy, evaluate, plain_float32, truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lejepa_fast import (
    Knots,
    SIGReg,
    sample_directions,
    sample_unit_directions,
    sigreg,
    standard_normal_knots,
)
from lejepa_fast.kernels import backward, finish, forward
from lejepa_fast.kernels import directions as kernel_directions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALLOCATORS = (forward, backward, finish, kernel_directions)


@pytest.fixture(autouse=True)
def _seed_and_poison():
    """Fresh memory holds NaN: an output that no program wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def directions(K: int, M: int) -> torch.Tensor:
    return sample_directions(K, M, step=1, device=DEVICE)


def arbitrary_knots(J: int) -> Knots:
    t = torch.rand(J, dtype=torch.float64).cumsum(0)
    return Knots(t, torch.exp(-t.square() / 2), torch.rand(J, dtype=torch.float64), None)


# --- Accuracy against float64 ---------------------------------------------------------------------

SHAPES = [
    ((2, 32, 16), 32),  # whole tiles only
    ((1, 16), 8),  # one sample
    ((3, 37, 5), 7),  # nothing a multiple of a tile, K below the least tile
    ((33, 1), 1),  # one dimension, one direction
    ((2, 130, 20), 17),  # several splits, one direction more than a tile, K not a multiple of the tile
    ((40, 33), 20),  # K above the limit of the fused backward, not a multiple of the tile
    ((2, 1, 17, 48), 33),  # two leading dimensions, K of three whole tiles
    ((3, 2100), 5),  # K > 2048
]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("shape", "M"), SHAPES)
def test_accuracy_over_shapes(shape, M, unbiased):
    if unbiased and shape[-2] < 2:
        pytest.skip("the unbiased statistic needs two samples")
    x, A = normal(*shape), directions(shape[-1], M)
    check_accuracy(x, A, standard_normal_knots(), impl="triton", unbiased=unbiased)


# Around each change of the table: baby steps only, one giant step, two, several chunks, the last not full.
@pytest.mark.parametrize("J", [1, 2, 3, 4, 5, 11, 12, 17, 18, 19, 25, 33, 65])
def test_accuracy_over_numbers_of_knots(J):
    knots = standard_normal_knots(3.0, J)
    check_accuracy(normal(50, 8), directions(8, 12), knots, impl="triton", reduction=None)


@pytest.mark.parametrize("J", [1, 7, 8, 9, 17])  # around the eight knots of a chunk
@pytest.mark.parametrize("K", [8, 40])
def test_accuracy_of_arbitrary_knots(J, K):
    check_accuracy(normal(2, 20, K), directions(K, 9), arbitrary_knots(J), impl="triton")


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("J", [17, 65])
def test_accuracy_over_sizes_of_projections(scale, J):
    x, A = scale * normal(60, 16), directions(16, 12)
    check_accuracy(x, A, standard_normal_knots(3.0, J), impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [16, 40])
@pytest.mark.parametrize("exact_directions", [False, True])
def test_accuracy_of_half_precision_inputs(dtype, K, exact_directions):
    """float32 directions multiply as float32; half-precision ones with their scale on the tensor cores."""
    x, knots = normal(2, 50, K, dtype=dtype), standard_normal_knots()
    if not exact_directions:
        check_accuracy(x, directions(K, 20), knots, impl="triton")
        return
    A, scale = sample_unit_directions(K, 20, step=1, device=DEVICE, dtype=dtype)
    for reduction in ("mean", None):
        check_accuracy(x, A, knots, impl="triton", scale=scale, reduction=reduction)


@pytest.mark.parametrize("K", [6, 40])
def test_gradient_per_direction(K):
    """reduction=None with an arbitrary gradient for every view and direction, of very different sizes."""
    x, A, knots = normal(2, 20, K), directions(K, 9), standard_normal_knots()
    upstream = torch.logspace(-6, 6, 18).view(2, 9).to(DEVICE)
    grads = {}
    runs = [("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]
    for impl, dtype in runs:
        v = x.detach().clone().to(dtype).requires_grad_()
        value = sigreg(v, A.to(dtype), *knots[:3], spacing=knots.spacing, reduction=None, impl=impl)
        value.backward(upstream.to(dtype))
        grads[impl, dtype] = v.grad
    exact = grads["reference", torch.float64]
    got, reference = grads["triton", torch.float32], grads["reference", torch.float32]
    assert_within_rule(got, reference, exact, "gradient")


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


def test_strided_inputs():
    A, knots, base = directions(6, 10), standard_normal_knots(), normal(4, 20, 12)
    transposed = directions(10, 6).t()
    for x in (base[1:3, ::2, 3:9], base[..., :6].transpose(0, 1), base[:1, :, :6].expand(3, 20, 6)):
        assert not x.is_contiguous()
        for a in (A, transposed):
            strided, plain = (evaluate(v, a, knots, impl="triton") for v in (x, x.contiguous()))
            torch.testing.assert_close(strided.value, plain.value, rtol=1e-6, atol=0)
            torch.testing.assert_close(strided.grad, plain.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("J", [1, 2, 17, 25])
def test_non_finite_input_gives_nan(bad, J):
    x = normal(2, 30, 4)
    x[1, 7, 2] = bad
    each = SIGReg(num_slices=6, n_points=J, impl="triton", reduction=None).to(DEVICE)(x)
    assert each[1].isnan().all()
    assert each[0].isfinite().all(), "the other view is not touched"


def test_projections_without_a_phase_stay_bounded():
    """Beyond 2**22 half turns float32 has no phase: |C|, |S| <= 1 must still hold."""
    knots = standard_normal_knots()
    value = sigreg(1e12 * normal(20, 4), directions(4, 6), *knots[:3], spacing=knots.spacing, impl="triton")
    bound = 20 * (knots.weights * (1 + knots.phi).square() + knots.weights).sum()
    assert 0 <= value <= bound


def test_the_accuracy_rule_can_fail():
    x, A, knots = normal(40, 8), directions(8, 12), standard_normal_knots()
    exact, reference = truth(x, A, knots), plain_float32(x, A, knots)
    wrong = evaluate(x * (1 + 1e-5), A, knots, impl="triton")
    for part in ("value", "grad"):
        with pytest.raises(AssertionError):
            assert_within_rule(getattr(wrong, part), getattr(reference, part), getattr(exact, part), part)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_generated_cases(data):
    """Any sizes, knots, dtypes and options against float64 truth."""
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    views, N = draw(st.integers(1, 3), "views"), draw(st.integers(2, 40), "N")
    K, M = draw(st.integers(1, 50), "K"), draw(st.integers(1, 40), "M")
    J = draw(st.integers(2, 20), "J")
    knots = draw(st.sampled_from([standard_normal_knots(3.0, J), arbitrary_knots(J)]), "knots")
    options = {
        "unbiased": draw(st.booleans(), "unbiased"),
        "scale_by_n": draw(st.booleans(), "scale_by_n"),
        "reduction": draw(st.sampled_from(["mean", "sum", None]), "reduction"),
    }
    x = normal(views, N, K, dtype=dtype) * draw(st.sampled_from([0.1, 1, 10]), "size")
    if draw(st.booleans(), "transposed"):
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if draw(st.booleans(), "native"):
        A, options["scale"] = sample_unit_directions(K, M, step=2, device=DEVICE, dtype=dtype)
    else:
        A = directions(K, M)
    check_accuracy(x, A, knots, impl="triton", **options)


# --- Memory: bounds, chunks, amount ---------------------------------------------------------------


class Guards:
    """Allocator that surrounds every output by numbers of its own, and counts bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.buffers: list[torch.Tensor] = []
        self.sizes: list[int] = []
        for module in ALLOCATORS:
            monkeypatch.setattr(module, "empty", self.empty)

    def empty(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count, margin = torch.Size(shape).numel(), 4096
        buffer = torch.full((count + 2 * margin,), 7.0, dtype=dtype, device=like.device)
        inside = buffer[margin : margin + count]
        inside.fill_(float("nan"))
        self.buffers.append(buffer)
        self.sizes.append(count * dtype.itemsize)
        return inside.view(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[:4096] == 7).all(), "written before the start"
            assert (buffer[-4096:] == 7).all(), "written past the end"


def surrounded(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers inside a buffer of NaN: a read out of bounds spoils the result."""
    buffer = torch.full((tensor.numel() + 8192,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    inside = buffer[4096:-4096].view(tensor.shape)
    return inside.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("J", [3, 17, 25, None])
@pytest.mark.parametrize(("N", "K", "M"), [(37, 5, 7), (17, 40, 33)])
def test_nothing_outside_the_buffers_is_touched(monkeypatch, N, K, M, J, dtype):
    guards = Guards(monkeypatch)
    knots = arbitrary_knots(9) if J is None else standard_normal_knots(3.0, J)
    knots = Knots(*(surrounded(a.float().to(DEVICE)) for a in knots[:3]), knots.spacing)
    A, scale = kernel_directions.sample_directions(torch.tensor(3, device=DEVICE), K, M, 0, dtype)
    x = surrounded(normal(2, N, K, dtype=dtype)).requires_grad_()
    value = sigreg(
        x, surrounded(A), *knots[:3], spacing=knots.spacing, scale=surrounded(scale), impl="triton"
    )
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
    assert len(guards.buffers) >= 7
    guards.check()


@pytest.mark.parametrize(
    "fault", ["write past the end", "write before the start", "read past the end", "hole"]
)
def test_the_guards_find_planted_faults(monkeypatch, fault):
    import triton
    import triton.language as tl

    @triton.jit
    def copy(in_ptr, out_ptr, count, SHIFT_IN: tl.constexpr, SHIFT_OUT: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out_ptr + i + SHIFT_OUT, tl.load(in_ptr + i + SHIFT_IN, mask=i < count), mask=i < count)

    guards = Guards(monkeypatch)
    source = surrounded(normal(60))
    out = forward.empty(source, (60,), torch.float32)
    shift_in = {"read past the end": 1}.get(fault, 0)
    shift_out = {"write past the end": 1, "write before the start": -1}.get(fault, 0)
    copy[(1,)](source, out, 59 if fault == "hole" else 60, SHIFT_IN=shift_in, SHIFT_OUT=shift_out, BLOCK=64)
    if "write" in fault:
        with pytest.raises(AssertionError, match="written"):
            guards.check()
    else:
        guards.check()
        assert out.isnan().any()


@pytest.mark.parametrize("chunk_rows", [1, 40, 100])  # a part of a view, one view, two views
def test_gradient_in_chunks(monkeypatch, chunk_rows):
    x, A, knots = normal(3, 40, 40), directions(40, 9), standard_normal_knots()
    whole = evaluate(x, A, knots, impl="triton").grad
    monkeypatch.setattr(backward, "_CHUNK_BYTES", chunk_rows * 9 * 4)
    monkeypatch.setattr(backward, "_CHUNK_STEP", 16)
    torch.testing.assert_close(evaluate(x, A, knots, impl="triton").grad, whole, rtol=1e-5, atol=1e-8)


def test_memory_does_not_grow_with_the_samples(monkeypatch):
    """Beyond dx: O(J M splits) floats, and a bounded buffer where dx does not fit into registers."""
    knots, A = standard_normal_knots(), directions(40, 20)
    monkeypatch.setattr(backward, "_CHUNK_BYTES", 16 * 20 * 4)
    monkeypatch.setattr(backward, "_CHUNK_STEP", 16)
    extra = {}
    for N in (100, 400):
        guards = Guards(monkeypatch)
        evaluate(normal(1, N, 40), A, knots, impl="triton")
        extra[N] = sum(guards.sizes) - N * 40 * 4
    splits = 6
    assert extra[100] <= (splits + 1) * 35 * 20 * 4 + 16 * 20 * 4 + 64
    assert extra[400] <= extra[100] + 35 * 20 * 4  # a split more at most


# --- Directions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "M"), [(1, 1), (3, 5), (130, 33)])
def test_directions_are_those_of_the_torch_implementation(K, M, dtype):
    for step, seed in ((0, 0), (5 + (1 << 33), -7), (2, (1 << 40) + 1)):
        got, scale = kernel_directions.sample_directions(torch.tensor(step, device=DEVICE), K, M, seed, dtype)
        expected, expected_scale = sample_unit_directions(K, M, step=step, seed=seed, dtype=dtype)
        # Half precision: a float32 rounding can tip an entry to the next number.
        ulp = 2e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=ulp, atol=2e-7)
        assert (got.cpu() != expected).float().mean() < (1 if dtype == torch.float32 else 0.01)
        norms = (got.cpu().double() * scale.cpu().double()).norm(dim=0)
        torch.testing.assert_close(norms, torch.ones(M).double(), rtol=0, atol=3e-7)
        torch.testing.assert_close(scale.cpu(), expected_scale, rtol=1e-4, atol=0)


# --- As operators and as a module -----------------------------------------------------------------


@pytest.mark.parametrize("K", [6, 40])
def test_two_runs_agree_bit_for_bit(K):
    x, A, knots = normal(2, 100, K), directions(K, 20), standard_normal_knots()
    first, second = (evaluate(x, A, knots, impl="triton") for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.grad, second.grad)


def test_operators_contract():
    x, A, scale = normal(2, 20, 4).requires_grad_(), directions(4, 6), torch.ones(6, device=DEVICE)
    t, phi, weights = (a.float().to(DEVICE) for a in standard_normal_knots()[:3])
    ops = torch.ops.lejepa_fast
    torch.library.opcheck(ops.triton_table, (x.detach(), A, scale, t, 0.1875, "ieee"))
    table = ops.triton_table(x.detach(), A, None, t, 0.1875, "ieee")
    for factor in (None, 0.5):
        arguments = (x, A, None, table, None, 20, t, phi, weights, 0.1875, False, True, factor, "ieee")
        torch.library.opcheck(ops.triton_statistic, arguments)
        _, coef = ops.triton_statistic(*arguments)
    grad = torch.ones((), device=DEVICE)
    torch.library.opcheck(ops.triton_gradient, (grad, 0.5, coef, x.detach(), A, None, t, 0.1875, "ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_agrees_with_the_other_implementations(dtype):
    x = normal(2, 30, 6, dtype=dtype)
    modules = {impl: SIGReg(num_slices=9, impl=impl).to(DEVICE) for impl in ("triton", "torch", "reference")}
    losses = {impl: module(x) for impl, module in modules.items()}
    assert modules["triton"].chosen_impl == "triton"
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["reference"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["mean", None])
def test_compiles_to_one_graph(reduction):
    x = normal(2, 20, 4).requires_grad_()
    eager, module = (SIGReg(num_slices=8, impl="triton", reduction=reduction).to(DEVICE) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True)
    for _ in range(2):
        expected, got = eager(x), compiled(x)
        assert torch.equal(got, expected)
        (g,), (h,) = (torch.autograd.grad(v.sum(), x) for v in (expected, got))
        assert torch.equal(h, g)
    assert module.step.item() == 2


def test_autocast_and_checkpointing_change_nothing():
    from torch.utils.checkpoint import checkpoint

    x, weight = normal(20, 4), torch.eye(4, device=DEVICE, requires_grad=True)
    plain, other = (SIGReg(num_slices=8, impl="triton").to(DEVICE) for _ in range(2))
    expected = plain(x @ weight)
    (grad,) = torch.autograd.grad(expected, weight)
    got = checkpoint(lambda w: other(x @ w), weight, use_reentrant=False)
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got, weight)[0], grad)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(plain(x, step=0), expected.detach())


def test_double_backward_is_refused_clearly():
    x = normal(10, 3).requires_grad_()
    loss = SIGReg(num_slices=4, impl="triton").to(DEVICE)(x)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'"):
        grad.sum().backward()


def _distributed_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.load(f"{folder}/x.pt").split([13, 4], dim=1)[rank].requires_grad_()
    loss = SIGReg(num_slices=9, impl="triton").eval()(x)
    loss.backward()
    torch.save((loss.detach(), x.grad), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo ranks share the interpreter's CPU")
def test_two_ranks_are_one_on_the_whole_batch(tmp_path):
    """Unequal ranks; a rank's gradient is that of the sum of the ranks' losses, which DDP averages."""
    x = (normal(2, 17, 5) + torch.linspace(-1, 1, 17).view(1, 17, 1)).requires_grad_()
    torch.save(x.detach(), tmp_path / "x.pt")
    torch.multiprocessing.spawn(_distributed_rank, args=(str(tmp_path),), nprocs=2)
    loss = SIGReg(num_slices=9, impl="triton").eval()(x)
    loss.backward()
    values, grads = zip(*(torch.load(tmp_path / f"rank{r}.pt") for r in range(2)), strict=True)
    for value in values:
        torch.testing.assert_close(value, loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat(grads, 1) / 2, x.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": torch.randn(9, 3, device=DEVICE).double()},
            TypeError,
            "^x: expected float32, bfloat16 or float16.*float64",
        ),
        ({"precision": "fp32"}, ValueError, "^precision: expected one of .* got 'fp32'"),
        ({"scale": torch.ones(5)}, ValueError, r"^scale: expected float32 of shape \(4,\), got .*\(5,\)"),
        ({"scale": torch.ones(4, device="meta")}, ValueError, "^scale: expected on the device of x"),
        ({"scale": torch.ones(4).requires_grad_()}, ValueError, "^scale: .*impl='reference'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    knots = standard_normal_knots()
    arguments = {"x": torch.randn(9, 3), "A": sample_directions(3, 4, step=0), "t": knots.t}
    arguments |= {"phi": knots.phi, "weights": knots.weights} | changes
    for name in {"x", "A"} - set(changes):
        arguments[name] = arguments[name].to(DEVICE)
    with pytest.raises(error, match=message):
        sigreg(**arguments, impl="triton")
