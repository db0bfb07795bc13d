"""What memory the Triton kernels touch and how much they ask for (see `kernel_helpers.py`)."""

from __future__ import annotations

import pytest
import torch
from accuracy import evaluate
from kernel_helpers import DEVICE, TWO_KERNELS, arbitrary_knots, directions, normal

from lejepa_fast import Knots, sample_unit_directions, sigreg, standard_normal_knots
from lejepa_fast.kernels import backward, epilogue, forward, philox
from lejepa_fast.kernels.configs import get_config
from lejepa_fast.kernels.table import COEF_BLOCK, count_splits

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ALLOCATORS = (forward, backward, epilogue, philox)


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
    A, scale = philox.draw_directions(torch.tensor(3, device=DEVICE), K, M, 0, dtype)
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


PLANTED = [
    ("load out of bounds", {"SHIFT_IN": 1}),
    ("load out of bounds", {"SHIFT_IN": 96}),  # in the other argument
    ("store out of bounds", {"SHIFT_OUT": 1}),
    ("race, two programs store", {"STEP_OUT": 31}),
    ("race, a program loads what another stores", {"IN_PLACE": True}),
    ("one store writes an address twice", {"DOUBLE": True}),
]


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at the interpreter's loads and stores")
@pytest.mark.parametrize(("fault", "options"), [(None, {}), *PLANTED])
def test_the_sanitizer_finds_planted_faults(fault, options):
    """Faults that leave every guard and every value as they should be."""
    import triton
    import triton.language as tl
    from interpreter_sanitizer import sanitize

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

    both = torch.zeros(161)
    source, out = both[:64], both[96:160]
    with sanitize() as kernels:
        if fault is None:
            copy[(2,)](source, out)
        else:
            with pytest.raises(Exception, match=f"copy: {fault}"):
                copy[(2,)](source, out, **options)
    assert kernels == ["copy"]


@pytest.mark.parametrize(
    ("chunk_rows", "dtype"),  # a part of a view, one view, two views
    [(1, torch.float32), (40, torch.float32), (100, torch.float32), (1, torch.float16), (100, torch.float16)],
)
def test_gradient_in_chunks(monkeypatch, chunk_rows, dtype):
    """Float16 has a power of two for each view, which differ here."""
    K, M = TWO_KERNELS, 9
    sizes = torch.tensor([1.0, 0.1, 10.0]).view(3, 1, 1)
    x, knots = (sizes * torch.randn(3, 40, K)).to(DEVICE, dtype), standard_normal_knots()
    A, scale = sample_unit_directions(K, M, step=1, device=DEVICE, dtype=dtype)
    options = {"impl": "triton", "reduction": "sum", "scale": scale if dtype == torch.float16 else None}
    whole = evaluate(x, A, knots, **options).grad
    monkeypatch.setattr(backward, "_CHUNK_BYTES", chunk_rows * M * dtype.itemsize)
    monkeypatch.setattr(backward, "_CHUNK_STEP", 16)
    rtol = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(evaluate(x, A, knots, **options).grad, whole, rtol=rtol, atol=1e-6)


def test_memory_does_not_grow_with_the_samples(monkeypatch):
    """Beyond dx: tables of 35 rows for each split, and buffers that know nothing of the samples."""
    K, M, step = TWO_KERNELS, 20, 16
    knots, A = standard_normal_knots(), directions(K, M)
    monkeypatch.setattr(backward, "_CHUNK_BYTES", step * M * 4)
    monkeypatch.setattr(backward, "_CHUNK_STEP", step)
    beyond = {}
    for N in (100, 400):
        guards = Guards(monkeypatch)
        x = normal(1, N, K)
        evaluate(x, A, knots, impl="triton")
        splits, _ = count_splits(1, N, M, 1, get_config(x.device, 4).split)
        beyond[N] = sum(guards.sizes) - 4 * (N * K + splits * 35 * M)
    coefficients, dp, sums = 36 * COEF_BLOCK, step * M, 2
    assert beyond == dict.fromkeys(beyond, 4 * (coefficients + dp + sums))
