"""Measured error of SIGReg's implementations against float64: python bench/accuracy_bench.py

Relative errors, in the Euclidean norm, of the statistic of every direction and of the gradient of their sum,
over the number of knots J and the size of the projections |p|. The rounding of half-precision inputs is taken
as given. Rows go to bench/results/sigreg_accuracy.jsonl. Each is held to the accuracy rule (`allowed_error`)
by plain float32 on the same inputs, whose errors it carries. The exit code is 1 if one is beyond the rule.
Plain float32 and tf32 are there to be compared only.

`--tensor-cores` instead adds the products of bf16 inputs as an sm_90 tensor core does, in one sum over all of
K, and writes the error of the statistic to bench/results/tensor_core_model.jsonl.

On a GPU the kernels are compiled. Without one they run in Triton's interpreter, at a size of one tile, where
float32 is multiplied as such whatever the precision.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import timing
import torch
from benchlib import Row, Rows, command_line
from numpy.typing import NDArray
from torch import Tensor

from lejepa_fast import Knots, sample_directions, sample_unit_directions, sigreg, standard_normal_knots
from lejepa_fast.kernels.runtime import interpreting

RELATIVE_ERROR = 1e-6
# Of the value of half-precision inputs: tensor cores add products without rounding. The rounding of these
# inputs changes a value by about 3e-4.
HALF_PRECISION_ERROR = 5e-5
KNOTS = (17, 3, 5, 9, 33, 65)  # the default first: what comes later may be stopped
SCALES = (1.0, 10.0, 100.0, 1e3, 1e4)
PARTS = ("value_errors", "gradient_errors", "plain_value_errors", "plain_gradient_errors")
SIZES = {"cpu": {"N": 16, "K": 16, "M": 16}, "cuda": {"N": 2048, "K": 512, "M": 256}}


def allowed_error(
    plain: float, size: float = 1.0, *, ulp: float = 0.0, relative: float = RELATIVE_ERROR
) -> float:
    """The accuracy rule: the largest allowed distance from the float64 result, in the Euclidean norm.

    Args:
        plain: error of the reference in plain float32 on the same problem, which counts twice.
        size: norm of the exact result; 1 for relative errors.
        ulp: relative rounding to a coarser output dtype: half its eps for the gradient of a bf16 input.
        relative: RELATIVE_ERROR, or HALF_PRECISION_ERROR for the value of half-precision inputs.
    """
    return 2 * plain + (relative + ulp) * size


class Variant(NamedTuple):
    """One line of the table: what computes, on which inputs, for which J; whether the rule holds for it."""

    name: str
    dtype: torch.dtype
    impl: str
    precision: str | None = None
    knots: Sequence[int] = KNOTS
    judged: bool = True


def variants(device: str) -> Iterator[Variant]:
    """On a GPU each variant and J is compiled: the default precision at every J, most others at 17."""
    yield Variant("plain float32", torch.float32, "reference", judged=False)
    yield Variant("impl='torch'", torch.float32, "torch")
    if device == "cpu" or torch.version.hip:
        yield Variant("impl='triton'", torch.float32, "triton", "ieee")
    else:
        yield Variant("impl='triton'", torch.float32, "triton", "tf32x3")
        yield Variant("impl='triton', ieee", torch.float32, "triton", "ieee", knots=(17,))
        yield Variant("impl='triton', tf32", torch.float32, "triton", "tf32", knots=(17,), judged=False)
    yield Variant("impl='triton', bf16", torch.bfloat16, "triton", knots=(17, 65))
    yield Variant("impl='triton', fp16", torch.float16, "triton", knots=(17,))


def evaluate(x: Tensor, A: Tensor, knots: Knots, **options: Any) -> tuple[Tensor, Tensor]:
    """Statistic of every direction, and the gradient of their sum.

    The sum takes the path of training, where dT/dp is rounded in half precision; `reduction=None` does not.
    """
    with torch.no_grad():
        value = sigreg(x, A, *knots[:3], spacing=knots.spacing, reduction=None, **options)
    x = x.detach().clone().requires_grad_()
    total = sigreg(x, A, *knots[:3], spacing=knots.spacing, reduction="sum", **options)
    (grad,) = torch.autograd.grad(total, x)
    return value, grad


def problem(
    variant: Variant, J: int, scale: float, device: str, N: int, K: int, M: int
) -> tuple[Tensor, Tensor, Tensor | None, Knots]:
    """Inputs: embeddings, directions, their scale in half precision, and knots."""
    generator = torch.Generator().manual_seed(J)
    x = (scale * torch.randn(N, K, generator=generator)).to(device, variant.dtype)
    knots, unit = standard_normal_knots(3.0, J), None
    if variant.dtype == torch.float32:
        # The same on every device: normals of one generator, not of its kernel.
        A = sample_directions(K, M, step=0).to(device)
    else:
        A, unit = sample_unit_directions(K, M, step=0, device=device, dtype=variant.dtype, impl="torch")
    return x, A, unit, knots


def errors(variant: Variant, J: int, scale: float, device: str) -> list[float]:
    """Relative errors against float64: value, gradient, and those of plain float32 on the same inputs."""
    x, A, unit, knots = problem(variant, J, scale, device, **SIZES[device])
    exact = evaluate(x.double(), A.double(), knots, impl="reference", scale=unit)
    plain = evaluate(x.float(), A.float(), knots, impl="reference", scale=unit)
    got = evaluate(x, A, knots, impl=variant.impl, precision=variant.precision, scale=unit)
    pairs = zip((*got, *plain), (*exact, *exact), strict=True)
    return [((g.double() - e).norm() / e.norm()).item() for g, e in pairs]


def measured(variant: Variant, J: int, device: str) -> Row:
    row: Row = {"variant": variant.name, "dtype": str(variant.dtype).removeprefix("torch.")}
    row |= {"precision": variant.precision, "judged": variant.judged, "J": J, "size": SIZES[device]}
    row |= {"scales": list(SCALES), "kernels": "compiled" if device == "cuda" else "interpreted"}
    found = [errors(variant, J, scale, device) for scale in SCALES]
    row |= zip(PARTS, zip(*found, strict=True), strict=True)
    return row | {"share_of_allowed": share_of_allowed(row) if variant.judged else None}


def share_of_allowed(row: Row) -> float:
    """The largest error of a row as a share of what the rule allows; infinite if an error is NaN."""
    dtype, value = getattr(torch, row["dtype"]), RELATIVE_ERROR
    ulp = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2  # the gradient has the inputs' dtype
    if ulp and row["kernels"] == "compiled":
        value = HALF_PRECISION_ERROR
    shares = [
        error / allowed_error(plain, **options)
        for part, options in (("value", {"relative": value}), ("gradient", {"ulp": ulp}))
        for error, plain in zip(row[f"{part}_errors"], row[f"plain_{part}_errors"], strict=True)
    ]
    return max(share if share == share else float("inf") for share in shares)


def cases(device: str, knots: Sequence[int] = KNOTS) -> list[tuple[Variant, int]]:
    """What a run measures, in its order: a row for each."""
    return [(variant, J) for J in knots for variant in variants(device) if J in variant.knots]


def measure(device: str, knots: Sequence[int]) -> Iterator[Row]:
    """Row by row, on a GPU from several processes: each compiles its own kernels, and nothing is timed."""
    jobs = zip(*((variant, J, device) for variant, J in cases(device, knots)), strict=True)
    if device == "cpu":
        yield from map(measured, *jobs)
    else:
        with timing.fresh_processes(min(8, os.cpu_count() or 1)) as pool:
            yield from pool.map(measured, *jobs)


def tensor_core_product(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a (N, K) times b (K, M), bf16 values of normal range, bit for bit as an sm_90 tensor core adds.

    It takes 16 products and the sum so far, cuts each off 25 bits below the largest exponent, adds them, and
    cuts the sum to float32: the model of Xie et al. (arXiv 2511.10909), who compared it with the hardware.
    """

    def exponent(values: NDArray[np.float64]) -> NDArray[Any]:
        return np.where(values == 0, -126, np.frexp(values)[1] - 1)

    total = np.zeros((a.shape[0], b.shape[1]))
    for k in range(0, a.shape[1], 16):
        left, right = a[:, k : k + 16, None], b[None, k : k + 16]
        largest = np.maximum((exponent(left) + exponent(right)).max(1), exponent(total))
        unit = np.ldexp(1.0, largest - 25)
        exact = (np.trunc(left * right / unit[:, None]).sum(1) + np.trunc(total / unit)) * unit
        nearest = exact.astype(np.float32)
        inner = np.nextafter(nearest, np.float32(0))
        total = np.where(abs(nearest.astype(float)) > abs(exact), inner, nearest).astype(float)
    return total


def tensor_core_row(N: int = 1024, K: int = 512, M: int = 64) -> Row:
    """Error of the statistic, in float64 but for the projections, as a share of what the rule allows.

    Args:
        N, K, M: samples, dimensions, directions.
    """
    x = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    A, unit = sample_unit_directions(K, M, step=0, dtype=torch.bfloat16, impl="torch")
    knots = standard_normal_knots()

    def statistic(p: Tensor) -> Tensor:
        return evaluate(p, torch.eye(M, dtype=p.dtype), knots, impl="reference", scale=unit.to(p.dtype))[0]

    errors = []
    for scale in (1.0, 16.0, 256.0):  # powers of two, which bf16 multiplies without rounding
        exact = statistic(scale * x @ A.double())
        product = torch.from_numpy(tensor_core_product(scale * x.numpy(), A.double().numpy()))
        errors.append(((statistic(product) - exact).norm() / exact.norm()).item())
    row: Row = {"model": "sm_90", "dtype": "bfloat16", "N": N, "K": K, "M": M, "J": 17}
    row |= {"scales": [1.0, 16.0, 256.0], "value_errors": errors}
    return row | {"allowed": HALF_PRECISION_ERROR, "share_of_allowed": max(errors) / HALF_PRECISION_ERROR}


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--knots", type=int, nargs="+", choices=KNOTS, default=KNOTS, help="default: all")
    parser.add_argument("--tensor-cores", action="store_true", help="only the model of the tensor cores")
    options = parser.parse_args()
    if options.tensor_cores:
        (row,) = Rows(options.out / "tensor_core_model.jsonl", "tensor_core_model").write(tensor_core_row())
        print(f"relative error of the statistic by the model: {row['value_errors']}")
        return int(row["share_of_allowed"] > 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not interpreting():  # Triton decides when it is imported
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    writer = Rows(options.out / "sigreg_accuracy.jsonl", "sigreg_accuracy")
    scales = ", ".join(f"{scale:g}" for scale in SCALES)
    print(f"relative error of the statistic / of the gradient, for projections of {scales}", flush=True)
    code = 0
    for row in measure(device, options.knots):
        writer.write(row)
        pairs = zip(row["value_errors"], row["gradient_errors"], strict=True)
        cells = [f"{value:.0e} / {gradient:.0e}" for value, gradient in pairs]
        what = f"{row['variant']}, J {row['J']}"
        print(f"{what}: {', '.join(cells)}", flush=True)
        if row["judged"] and row["share_of_allowed"] > 1:
            print(f"error: {what}: {row['share_of_allowed']:.2g} times the error allowed", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
