"""Kernels with every candidate tile, with large offsets, and how much memory they ask for."""

from __future__ import annotations

import mmap

import pytest
import torch
from kernel_helpers import DEVICE, TWO_KERNELS

from lejepa_fast import sample_directions, sample_unit_directions
from lejepa_fast.kernels import autotune, backward, epilogue, forward, timing
from lejepa_fast.kernels.configs import Tile, get_config
from lejepa_fast.kernels.table import make_plan

t = torch.arange(17, device=DEVICE) * 0.1875
PHI = torch.exp(-t.square() / 2)
PLAN = make_plan(17, 0.1875)


def forward_backward(x, A, scale=None, precision="ieee"):
    """Loss and gradient in x, straight from the kernels: nothing copies x or A on the way."""
    config = get_config(x.device, x.element_size() if x.dtype == A.dtype else 4)
    table = forward.table_sums(x, A, scale, t, PLAN, config, precision)
    options = {"unbiased": False, "scale_by_n": True, "factor": 1.0}
    value, coef = epilogue.finish(table, x.shape[1], scale, t, PHI, PHI, PLAN, **options)
    one = torch.ones((), device=x.device)
    return value, backward.gradient(one, 1.0, coef, x, A, scale, t, PLAN, config, precision)


@pytest.mark.parametrize(
    ("K", "dtype", "kernels"),
    [
        (13, torch.bfloat16, {"forward", "fused"}),
        (TWO_KERNELS, torch.float32, {"forward", "gradient", "product"}),
    ],
)
def test_every_candidate_gives_the_same_result(monkeypatch, K, dtype, kernels):
    monkeypatch.setenv("LEJEPA_AUTOTUNE", "1")
    x = torch.randn(1, 35, K).to(DEVICE, dtype)
    A, scale = sample_unit_directions(K, 9, step=1, device=DEVICE, dtype=dtype)
    able: dict[str, list[Tile]] = {}  # what can run here, by kernel
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    monkeypatch.setattr(autotune, "measure", lambda call, x: call() or 0.0)
    pick, first = 0, None
    while pick < max(map(len, able.values()), default=1):

        def picked(timed, pick=pick):
            tiles = [Tile(**row["tile"]) for row in timed if row["error"] is None]
            able[timed[0]["kernel"]] = tiles
            return tiles[min(pick, len(tiles) - 1)]

        monkeypatch.setattr(autotune, "_chosen", {})
        monkeypatch.setattr(autotune, "_fastest", picked)
        value, grad = forward_backward(x, A, scale)
        assert {key[0]: tile for key, tile in autotune._chosen.items()} == {
            kernel: tiles[min(pick, len(tiles) - 1)] for kernel, tiles in able.items()
        }
        first = first or (value, grad)
        torch.testing.assert_close(value, first[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(
            grad, first[1], rtol=tolerance, atol=tolerance * first[1].abs().max().item()
        )
        pick += 1
    assert set(able) == kernels
    assert pick >= 2


def test_candidates_for_a_benchmark():
    x, A = torch.randn(2, 20, 8, device=DEVICE), sample_directions(8, 9, step=0, device=DEVICE)
    calls = []
    rows = timing.time_candidates(x, A, timer=lambda call: calls.append(call()) or 0.5)
    assert len(rows) == len(calls)
    assert {row["kernel"] for row in rows} == {"forward", "fused"}
    assert all(row["seconds"] == 0.5 and row["error"] is None for row in rows)
    assert sum(row["shipped"] for row in rows) == 2
    rows = timing.time_candidates(x, A, fused=False, timer=lambda call: 0.5)
    assert {row["kernel"] for row in rows} == {"forward", "gradient", "product"}


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same numbers with huge strides: address space only, pages without numbers are never touched."""
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    memory = mmap.mmap(-1, extent * values.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(memory, dtype=values.dtype)
    return flat.as_strided(values.shape, strides).copy_(values)


FAR = (1 << 31) + 64


@pytest.mark.skipif(DEVICE != "cpu", reason="needs address space without memory behind it")
@pytest.mark.parametrize(
    "K", [16, 35]
)  # fused, and gradient with product; forward with and without residence
@pytest.mark.parametrize(
    "strides",
    [
        lambda V, N, K: (FAR, K, 1),  # a view far from the first
        lambda V, N, K: (K, FAR // (N - 1), 1),  # samples far apart
        lambda V, N, K: (N, 1, FAR // (K - 1)),  # transposed: dimensions far apart
    ],
    ids=["views", "samples", "dimensions"],
)
def test_offsets_past_two_to_the_31(K, strides):
    V, N, M = 2, 9, 5
    x = torch.randn(V, N, K, dtype=torch.bfloat16)
    A, scale = sample_unit_directions(K, M, step=1, dtype=torch.bfloat16)
    far = spread(x, strides(V, N, K))
    assert (torch.tensor(far.shape) - 1) @ torch.tensor(far.stride()) >= 1 << 31
    for got, expected in zip(forward_backward(far, A, scale), forward_backward(x, A, scale), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs address space without memory behind it")
@pytest.mark.parametrize("K", [16, 35])
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_of_directions_past_two_to_the_31(K, transposed):
    M = 5
    x = torch.randn(1, 9, K, dtype=torch.bfloat16)
    A, scale = sample_unit_directions(K, M, step=1, dtype=torch.bfloat16)
    far = spread(A, (1, FAR // (M - 1)) if transposed else (FAR // (K - 1), 1))
    for got, expected in zip(forward_backward(x, far, scale), forward_backward(x, A, scale), strict=True):
        assert torch.equal(got, expected)


def test_a_chunk_of_gradients_is_no_larger_than_the_batch():
    """128 samples at a time where fewer do not fit into 32 MiB, but never more than there are."""
    assert backward._chunk(8, 64, 4 << 20) == (1, 64)
    assert backward._chunk(8, 4096, 4 << 20) == (1, 128)
    assert backward._chunk(8, 64, 4 << 10) == (8, 64)


@pytest.mark.parametrize(
    ("V", "N", "K", "M", "dtype"),
    [
        (1, 20, 8, 5, torch.float32),
        (2, 100, 32, 64, torch.bfloat16),  # fused, several tiles of K
        (1, 70, 32, 17, torch.bfloat16),  # of a size that is not
        (1, 70, 40, 17, torch.bfloat16),
    ],
)
def test_memory_is_what_the_documentation_says(monkeypatch, V, N, K, M, dtype):
    """Beyond inputs and dx: tables and coefficients, sums of blocks, and dT/dp where the backward is not one
    kernel.
    """
    sizes = []

    def empty(like, shape, dtype):
        sizes.append(torch.Size(shape).numel() * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device=like.device)

    for module in (forward, epilogue, backward):
        monkeypatch.setattr(module, "empty", empty)
    x = torch.randn(V, N, K).to(DEVICE, dtype)
    A, scale = sample_unit_directions(K, M, step=1, device=DEVICE, dtype=dtype)
    config = get_config(x.device, x.element_size())
    forward_backward(x, A, scale)
    splits, _ = forward.count_splits(V, N, M, 1, config.split)
    blocks = V * -(-M // 32)
    expected = 4 * (splits * 35 * M * V + 36 * 32 * blocks + blocks + 1)
    expected += x.numel() * x.element_size()  # dx
    if not config.fuses(K, M):
        expected += min(V * N * M * x.element_size(), 32 << 20)
    assert sum(sizes) == expected


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
        return epilogue.finish(sums.to(DEVICE), count, None, t, PHI, PHI, PLAN, **options)[0].cpu()

    exact = statistic((table.double().sum(0, keepdim=True) / count).float(), 1.0)
    one_after_another = table[0]
    for part in table[1:]:
        one_after_another = one_after_another + part
    naive = (statistic(one_after_another[None], count) - exact).norm()
    assert (statistic(table, count) - exact).norm() <= 2e-7 * exact.norm()
    assert naive > 4e-7 * exact.norm(), "what it would be without compensation"
