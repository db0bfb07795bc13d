"""What only a GPU can show about the kernels: size, memory, launches, graphs. About two minutes, and as much
again where compute-sanitizer is installed.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import timing
import torch
from accuracy import Result, assert_within_rule, evaluate, value_error
from torch import Tensor

from lejepa_fast import Knots, SIGReg, reference, sample_unit_directions, sigreg, standard_normal_knots
from lejepa_fast.kernels.configs import get_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda")
KNOTS = standard_normal_knots()
REFERENCE = (8, 2048, 512), 1024  # shape of x and number of directions
OURS = ("_directions_kernel", "_sigreg_", "_sum_kernel")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30


def inputs(
    shape: tuple[int, ...], M: int, dtype: torch.dtype, *, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, and directions with their scale as the module draws them."""
    x = scale * torch.randn(shape, device="cuda", dtype=dtype)
    A, unit = sample_unit_directions(shape[-1], M, step=3, device="cuda", dtype=dtype)
    return x, A, unit if dtype.itemsize == 2 else None


def truth_of_rows(
    x: Tensor, A: Tensor, knots: Knots, rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """By the reference's formulas in chunks: T (M,) of one view x (N, K), and d sum(T) / dx of some rows.

    The rows enter through the difference of their sums from themselves, so only they are differentiated.
    """
    t, phi, weights = (a.to("cuda", dtype) for a in knots[:3])
    values, grad = [], 0.0
    for a in A.split(64, dim=1):
        with torch.no_grad():
            parts = x.split(1 << 14)
            sums = sum(reference.ecf_sums(part[None].to(dtype), a.to(dtype), t) for part in parts)
        z = x[rows].detach().to(dtype).requires_grad_()
        local = reference.ecf_sums(z[None], a.to(dtype), t)
        value = reference.statistic_from_sums(sums + local - local.detach(), x.shape[0], phi, weights)
        grad = grad + torch.autograd.grad(value.sum(), z)[0]
        values.append(value.detach().flatten())
    return torch.cat(values), grad


def evaluate_scaled(x: Tensor, A: Tensor, unit: Tensor | None) -> Result:
    """Mean statistic, and the gradient of the sum over views and directions.

    The loss is differentiated times the power of two next to their number, as loss scaling does: the mean's
    gradient would lie among the subnormal numbers of float16.
    """
    x, count = x.detach().clone().requires_grad_(), x.shape[0] * A.shape[1]
    value = sigreg(x, A, *KNOTS[:3], spacing=KNOTS.spacing, scale=unit, impl="triton")
    power = 1 << (count.bit_length() - 1)
    (value * power).backward()
    assert x.grad is not None
    return Result(value.detach(), x.grad.float() * (count / power))


@pytest.mark.parametrize(
    ("shape", "M", "dtype", "scale", "shift", "gib"),
    [
        # float32 by its default precision: three tf32 products where the compiler has them
        (*REFERENCE, torch.float32, 1.0, 0.0, 4),
        (*REFERENCE, torch.float32, 100.0, 0.0, 4),
        (*REFERENCE, torch.bfloat16, 1.0, 0.0, 4),
        (*REFERENCE, torch.float16, 1.0, 0.0, 4),
        # T of normal embeddings is a difference of nearly equal numbers: no whole tiles, and long sums
        ((2, 2001, 512), 1024, torch.float32, 1.0, 0.0, 4),
        ((1, 16384, 512), 1024, torch.float32, 1.0, 0.0, 4),
        ((2, 2001, 512), 1024, torch.bfloat16, 1.0, 0.0, 4),
        ((1, 16384, 512), 1024, torch.bfloat16, 1.0, 0.0, 4),
        ((10, 4096, 1536), 4096, torch.bfloat16, 1.0, 0.0, 16),  # the giant size
        # far from the null; `gpu_check.py` knows it by its id
        pytest.param(
            (1, (1 << 22) + 77, 513), 32, torch.bfloat16, 1.0, 0.1, 36, id="more_than_32_bits_count"
        ),
    ],
)
def test_accuracy_at_size(shape, M, dtype, scale, shift, gib):
    """The rule for the last view: its statistic, and the gradient of its last rows. Two runs are equal."""
    if free_gib() < gib:
        pytest.skip(f"needs {gib} GiB")
    x, A, unit = inputs(shape, M, dtype, scale=scale)
    x += shift
    rows = slice(shape[1] - 1000, shape[1])
    got, again = (evaluate_scaled(x, A, unit) for _ in range(2))
    assert torch.equal(got.value, again.value)
    assert torch.equal(got.grad, again.grad)
    with torch.no_grad():
        each = sigreg(x, A, *KNOTS[:3], spacing=KNOTS.spacing, scale=unit, impl="triton", reduction=None)
    torch.testing.assert_close(each.double().mean().float(), got.value, rtol=1e-5, atol=0)
    results = []
    for precision in (torch.float32, torch.float64):
        columns = A.to(precision) if unit is None else A.to(precision) * unit.to(precision)
        results.append(truth_of_rows(x[-1], columns, KNOTS, rows, precision))
    (plain_value, plain_grad), (exact_value, exact_grad) = results
    assert_within_rule(each[-1], plain_value, exact_value, "value", relative=value_error(x))
    ulp = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert_within_rule(got.grad[-1, rows], plain_grad, exact_grad, "gradient", ulp=ulp)


def test_extra_memory_is_a_fortieth_of_the_eager_reference():
    def extra(impl, x, A, unit):
        return timing.peak_extra_bytes(lambda: evaluate(x, A, KNOTS, impl=impl, scale=unit), GPU)

    assert extra("triton", *inputs((10, 4096, 1536), 4096, torch.bfloat16)) < 2e9
    if free_gib() < 24:
        pytest.skip("the eager reference needs 24 GiB")
    usual = inputs(*REFERENCE, torch.bfloat16)
    assert extra("triton", *usual) <= extra("reference", *usual) / 40


def test_nothing_waits_for_the_gpu():
    reg = SIGReg(num_slices=256, impl="auto").cuda()
    x = torch.randn(4, 256, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert reg.chosen_impl == "triton"
    reg(x).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        reg(x).backward()
        with pytest.raises(RuntimeError, match="synchroniz"):
            reg.step.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("size", [REFERENCE, ((4, 256, 16), 256)])
def test_at_most_six_launches(size):
    """Directions, forward and backward; PyTorch adds the addition for the step, and the ones."""
    shape, M = size
    reg = SIGReg(num_slices=M, impl="triton").cuda()
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # the first compiles
        launched = timing.launches(lambda: torch.autograd.grad(reg(x), x))
    ours = sum(count for name, count in launched.items() if name.startswith(OURS))
    others = sum(count for name, count in launched.items() if not name.startswith((*OURS, "Mem")))
    fused = get_config(x.device, 2).fuses(shape[-1], M)
    assert ours == 5 + (not fused), launched  # directions, sums, statistic, its sum, dx or dT/dp and dx
    assert others <= 2, launched


# dx in registers, and through chunks
@pytest.mark.parametrize(("dtype", "K"), [(torch.bfloat16, 48), (torch.float32, 200)])
def test_cuda_graph_replays_steps(dtype, K):
    """Forward, backward and the counter in one graph: each replay is the next step of an eager module."""
    captured, eager = (SIGReg(num_slices=100, impl="triton").cuda() for _ in range(2))

    def step(x):
        loss = captured(x)
        return loss, torch.autograd.grad(loss, x)[0]

    replay = timing.graphed(step, GPU)
    replay(torch.randn(2, 300, K, device="cuda", dtype=dtype))  # captures
    captured.step.zero_()
    values = []
    for _ in range(4):
        x = torch.randn(2, 300, K, device="cuda", dtype=dtype, requires_grad=True)
        loss, grad = replay(x)
        expected = eager(x)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, torch.autograd.grad(expected, x)[0])
        values.append(loss.item())
    assert captured.step.item() == eager.step.item() == 4
    assert len(set(values)) == 4


def test_compiled_modules_agree_with_eager_in_cuda_graphs():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    eager, module = (SIGReg(num_slices=100, impl="triton").cuda() for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    x = torch.randn(2, 300, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x)
        (h,) = torch.autograd.grad(got, x)
        expected = eager(x)
        (g,) = torch.autograd.grad(expected, x)
        assert torch.equal(got, expected)
        assert torch.equal(h, g)
    assert module.step.item() == 5
    assert counters["inductor"]["cudagraph_skips"] == 0, "the step's mutation kept it out of CUDA graphs"


SMALL_RUN = """
import torch
from lejepa_fast import SIGReg
from lejepa_fast.data import draws
from lejepa_fast.kernels.color_jitter import change_colors
for dtype, K in ((torch.float32, 40), (torch.bfloat16, 100)):
    x = torch.randn(2, 77, K, device="cuda", dtype=dtype, requires_grad=True)
    SIGReg(num_slices=70, impl="triton").cuda()(x).backward()
rows = torch.zeros(2, draws.SOLARIZE + 1 - draws.CODES, device="cuda")
pictures = torch.zeros(2, 33, 33, 3, dtype=torch.uint8, device="cuda")
change_colors(pictures, rows, kernel_size=7, threshold=100, blurred=False)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, tmp_path):
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", SMALL_RUN]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation of its own
    # In tmp_path `python -c` finds the package that the tests find, not a folder of its name.
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
