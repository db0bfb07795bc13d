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
    ADD_TO: tl.constexpr = None,
):
    i = tl.arange(0, 32)
    value = tl.load(in_ptr + tl.program_id(0) * 32 + i + SHIFT_IN)
    if IN_PLACE:
        value = tl.load(out_ptr + (1 - tl.program_id(0)) * 32 + i)
    if DOUBLE:
        i = i // 2 * 2
    tl.store(out_ptr + tl.program_id(0) * STEP_OUT + i + SHIFT_OUT, value)
    if ADD_TO is not None:
        tl.atomic_add(out_ptr + ADD_TO, 1.0)


@no_gpu
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        (None, {}),
        ("load out of bounds", {"SHIFT_IN": 1}),
        ("load out of bounds", {"SHIFT_IN": 96}),  # in the other argument
        ("store out of bounds", {"SHIFT_OUT": 1}),
        ("race", {"STEP_OUT": 31}),  # two programs store
        ("race", {"IN_PLACE": True}),  # one loads what another stores
        ("one store writes an address twice", {"DOUBLE": True}),
        ("atomic out of bounds", {"ADD_TO": 64}),
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
    ("V", "N", "K", "M", "dtype", "rows"),
    [
        (1, 20, 8, 5, torch.float32, None),
        (2, 20, 32, 32, torch.bfloat16, 1),  # fused, several tiles of K
        (2, 40, 32, 17, torch.bfloat16, 40),  # of a size that is not
        (2, 40, TWO_KERNELS, 17, torch.bfloat16, None),
        (2, 20, TWO_KERNELS, 17, torch.bfloat16, 1),
        (3, 20, TWO_KERNELS, 9, torch.float32, 1),  # chunks of a part of a view,
        (3, 20, TWO_KERNELS, 9, torch.float32, 20),  # of one view,
        (3, 20, TWO_KERNELS, 9, torch.float32, 50),  # of two views
        (3, 20, TWO_KERNELS, 9, torch.float16, 1),
        (3, 20, TWO_KERNELS, 9, torch.float16, 50),
    ],
)
def test_memory_and_gradient_of_chunks(monkeypatch, V, N, K, M, dtype, rows):
    """Tables, coefficients, sums of blocks, dx, and dT/dp of a chunk where the backward is not one kernel.

    A chunk is 32 MiB, or 128 samples where those need more, but never more than the batch. Float16 has a
    power of two for each view, which differ here.
    """
    sizes = torch.logspace(-1, 1, V).view(V, 1, 1)
    x = (sizes * torch.randn(V, N, K)).to(DEVICE, dtype)
    A, scale = sample_unit_directions(K, M, step=1, device=DEVICE, dtype=dtype)
    options = {"impl": "triton", "reduction": "sum", "scale": scale}
    whole = evaluate(x, A, KNOTS, **options).grad
    if rows is not None:
        monkeypatch.setattr(backward, "CHUNK_STEP", 16)
        monkeypatch.setattr(backward, "CHUNK_BYTES", rows * M * dtype.itemsize)
    asked = []

    def empty(like, shape, dtype):
        asked.append(torch.Size(shape).numel() * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device=like.device)

    for module in (forward, epilogue, backward):
        monkeypatch.setattr(module, "empty", empty)
    got = evaluate(x, A, KNOTS, **options).grad
    rtol = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, whole, rtol=rtol, atol=1e-6)
    config = get_config(x.device, dtype.itemsize)
    splits, _ = count_splits(V, N, M, 1, config.split)
    blocks = V * -(-M // 32)
    expected = 4 * (splits * 35 * M * V + 36 * 32 * blocks + blocks + 1) + x.numel() * dtype.itemsize
    if not config.fuses(K, M):
        step, rows = (128, V * N) if rows is None else (16, rows)
        expected += min(V, max(1, rows // N)) * min(N, max(step, rows // step * step)) * M * dtype.itemsize
    assert sum(asked) == expected


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
