"""What memory the Triton kernels touch and how much they ask for (see `kernel_helpers.py`)."""

import mmap

import pytest
import torch
import triton
import triton.language as tl
from accuracy import evaluate
from kernel_helpers import DEVICE, TWO_KERNELS

from lejepa_fast import sample_unit_directions, standard_normal_knots
from lejepa_fast.kernels import backward, epilogue, forward
from lejepa_fast.kernels.configs import get_config
from lejepa_fast.kernels.table import count_splits

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KNOTS = standard_normal_knots()
no_gpu = pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter, or address space of the CPU")


@triton.jit
def copy(
    in_ptr,
    out_ptr,
    SHIFT_IN: tl.constexpr = 0,
    SHIFT_OUT: tl.constexpr = 0,
    STEP_OUT: tl.constexpr = 32,
    IN_PLACE: tl.constexpr = False,
    DOUBLE: tl.constexpr = False,
):
    i = tl.arange(0, 32)
    value = tl.load(in_ptr + tl.program_id(0) * 32 + i + SHIFT_IN)
    if IN_PLACE:
        value = tl.load(out_ptr + (1 - tl.program_id(0)) * 32 + i)
    if DOUBLE:
        i = i // 2 * 2
    tl.store(out_ptr + tl.program_id(0) * STEP_OUT + i + SHIFT_OUT, value)


@no_gpu
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (None, {}),
        ("load out of bounds", {"SHIFT_IN": 1}),
        ("load out of bounds", {"SHIFT_IN": 96}),  # in the other argument
        ("store out of bounds", {"SHIFT_OUT": 1}),
        ("race, two programs store", {"STEP_OUT": 31}),
        ("race, a program loads what another stores", {"IN_PLACE": True}),
        ("one store writes an address twice", {"DOUBLE": True}),
    ],
)
def test_the_sanitizer_finds_planted_faults(fault, options):
    from interpreter_sanitizer import sanitize

    both = torch.zeros(161)
    with sanitize() as kernels:
        if fault is None:
            copy[(2,)](both[:64], both[96:160])
        else:
            with pytest.raises(Exception, match=f"copy: {fault}"):
                copy[(2,)](both[:64], both[96:160], **options)
    assert kernels == ["copy"]


@pytest.mark.parametrize(
    ("chunk_rows", "dtype"),  # a part of a view, one view, two views
    [(1, torch.float32), (20, torch.float32), (50, torch.float32), (1, torch.float16), (50, torch.float16)],
)
def test_gradient_in_chunks(monkeypatch, chunk_rows, dtype):
    """Float16 has a power of two for each view, which differ here."""
    K, M = TWO_KERNELS, 9
    sizes = torch.tensor([1.0, 0.1, 10.0]).view(3, 1, 1)
    x = (sizes * torch.randn(3, 20, K)).to(DEVICE, dtype)
    A, scale = sample_unit_directions(K, M, step=1, device=DEVICE, dtype=dtype)
    options = {"impl": "triton", "reduction": "sum", "scale": scale if dtype == torch.float16 else None}
    whole = evaluate(x, A, KNOTS, **options).grad
    monkeypatch.setattr(backward, "CHUNK_BYTES", chunk_rows * M * dtype.itemsize)
    monkeypatch.setattr(backward, "CHUNK_STEP", 16)
    rtol = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(evaluate(x, A, KNOTS, **options).grad, whole, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    ("V", "N", "K", "M", "dtype", "chunk"),
    [
        (1, 20, 8, 5, torch.float32, None),
        (2, 20, 32, 32, torch.bfloat16, (16, 1)),  # fused, several tiles of K
        (2, 40, 32, 17, torch.bfloat16, (16, 40)),  # of a size that is not
        (3, 40, TWO_KERNELS, 17, torch.bfloat16, None),
        (3, 40, TWO_KERNELS, 17, torch.bfloat16, (16, 1)),
    ],
)
def test_memory_is_what_the_documentation_says(monkeypatch, V, N, K, M, dtype, chunk):
    """Tables, coefficients, sums of blocks, dx, and dT/dp of a chunk where the backward is not one kernel.

    A chunk is 32 MiB, or 128 samples where those need more, but never more than the batch.
    """
    step, rows = chunk or (128, 1 << 30)
    if chunk is not None:
        monkeypatch.setattr(backward, "CHUNK_STEP", step)
        monkeypatch.setattr(backward, "CHUNK_BYTES", rows * M * dtype.itemsize)
    sizes = []

    def empty(like, shape, dtype):
        sizes.append(torch.Size(shape).numel() * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device=like.device)

    for module in (forward, epilogue, backward):
        monkeypatch.setattr(module, "empty", empty)
    x = torch.randn(V, N, K).to(DEVICE, dtype)
    A, scale = sample_unit_directions(K, M, step=1, device=DEVICE, dtype=dtype)
    evaluate(x, A, KNOTS, impl="triton", scale=scale)
    config = get_config(x.device, dtype.itemsize)
    splits, _ = count_splits(V, N, M, 1, config.split)
    blocks = V * -(-M // 32)
    expected = 4 * (splits * 35 * M * V + 36 * 32 * blocks + blocks + 1) + x.numel() * dtype.itemsize
    if not config.fuses(K, M):
        expected += min(V * N, max(step, rows // step * step)) * M * dtype.itemsize
    assert sum(sizes) == expected


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same numbers with huge strides: address space only, pages without numbers are never touched."""
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    memory = mmap.mmap(-1, extent * values.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(memory, dtype=values.dtype)
    return flat.as_strided(values.shape, strides).copy_(values)


FAR = (1 << 31) + 64
V, N, M = 2, 9, 5


# Fused, and in two kernels; forward with resident directions, and without.
@no_gpu
@pytest.mark.parametrize("K", [16, 35])
@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("x", lambda K: (FAR, K, 1)),  # a view far from the first
        ("x", lambda K: (K, FAR // (N - 1), 1)),  # samples far apart
        ("x", lambda K: (N, 1, FAR // (K - 1))),  # transposed: dimensions far apart
        ("A", lambda K: (FAR // (K - 1), 1)),
        ("A", lambda K: (1, FAR // (M - 1))),
    ],
)
def test_offsets_past_two_to_the_31(K, name, strides):
    """Straight from the operators, for nothing copies x or A on the way."""
    x = torch.randn(V, N, K, dtype=torch.bfloat16)
    A, scale = sample_unit_directions(K, M, step=1, dtype=torch.bfloat16)
    t, phi, weights = (a.float() for a in KNOTS[:3])
    operators = torch.ops.lejepa_fast

    def forward_backward(x, A):
        table = operators.triton_table(x, A, scale, t, KNOTS.spacing, "ieee")
        options = (t, phi, weights, KNOTS.spacing, False, True, 1.0, "ieee")
        value, coef = operators.triton_statistic(x, A, scale, table, None, N, *options)
        one = torch.ones(())
        return value, operators.triton_gradient(one, 1.0, coef, x, A, scale, t, KNOTS.spacing, "ieee")

    far = spread({"x": x, "A": A}[name], strides(K))
    assert (torch.tensor(far.shape) - 1) @ torch.tensor(far.stride()) >= 1 << 31
    got = forward_backward(*((far, A) if name == "x" else (x, far)))
    assert all(map(torch.equal, got, forward_backward(x, A)))
