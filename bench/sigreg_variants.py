"""The SIGReg implementations that are compared, the sizes at which they are, and what is right.

Accounting. With "drawn" directions every variant draws its own inside the call, as a training step does;
with "given" ones none does. A variant keeps the directions that it multiplied with, so that each result is
held to float64 on its own directions.

Dtypes. In float32 everything is float32 (PyTorch's default: no TF32). In bf16 the authors' formulation runs
as its users run it, under autocast: the projection is a bf16 matmul, phases, cosines and sines are float32.
`lightly` takes bf16 embeddings as they are, which comes to the same. Ours multiplies in the dtype of the
embeddings, with float32 statistics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from benchlib import Mark
from torch import Tensor

from lejepa_fast import SIGReg, sample_unit_directions, sigreg, standard_normal_knots
from lejepa_fast.dispatch import Implementation

T_MAX = 3.0
# Largest error relative to float64, of value and of gradient. bf16: two operands of 8 bits, and a result
# rounded to 8 bits.
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Size(NamedTuple):
    """Views, samples per view, dimensions, slices, knots."""

    V: int
    N: int
    K: int
    M: int
    J: int

    def __str__(self) -> str:
        return f"V {self.V}, N {self.N}, K {self.K}, M {self.M}, J {self.J}"


class Case(NamedTuple):
    """One table of the benchmark: a size, a dtype, where directions come from, who takes part."""

    name: str
    size: Size
    dtype: torch.dtype
    directions: Literal["drawn", "given"]
    variants: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.size}, {dtype_name(self.dtype)}, directions {self.directions}"

    @property
    def key(self) -> str:
        return f"{self.name}-{dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Directions(NamedTuple):
    """Given directions in the dtype of the embeddings, and the scale that makes them unit vectors."""

    A: Tensor
    scale: Tensor


class Loss:
    """A loss, and through `directions` the matrix (K, M) that its last call multiplied with, in float64."""

    def __init__(self, call: Callable[[Tensor], Any], directions: Callable[[], Tensor] | None = None):
        self._call = call
        self._directions = directions
        self._used: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._directions is not None:
            return self._call(x)
        value, self._used = self._call(x)
        return value

    def directions(self) -> Tensor:
        if self._directions is not None:
            return self._directions()
        assert self._used is not None
        return self._used.double()

    def forget(self) -> None:
        """Release the directions of the last call: they are no memory of the loss."""
        self._used = None


# `run(x, between)` makes one training step of the loss: returns value and gradient, and calls `between`
# where forward ends and backward begins.
Run = Callable[[Tensor, Mark], tuple[Tensor, Tensor]]
Build = Callable[[Case, "Directions | None", torch.device], Loss]


def step_of(loss: Loss, *, keep_directions: bool = False) -> Run:
    ones: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def run(x: Tensor, between: Mark) -> tuple[Tensor, Tensor]:
        # Not `backward()`: the gradient is not to be copied into x.grad. The gradient that it starts from
        # comes, as in a trainer, from outside.
        value = loss(x)
        between()
        key = value.device, value.dtype
        if key not in ones:
            ones[key] = torch.ones_like(value)
        (grad,) = torch.autograd.grad(value, x, ones[key])
        if not keep_directions:
            loss.forget()
        return value.detach(), grad

    return run


# --- The variants ---------------------------------------------------------------------------------


def authors_formulation(
    case: Case, given: Directions | None, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The statistic as the authors' code writes it: cos and sin of all N x M x J phases."""
    t, phi, weights = (a.float().to(device) for a in standard_normal_knots(T_MAX, case.size.J)[:3])

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        if given is None:
            A = torch.randn(case.size.K, case.size.M, device=device)
            A = (A / A.norm(p=2, dim=0)).to(x.dtype)
        else:
            A = given.A
        phase = (x @ A).unsqueeze(-1) * t  # float32: the knots are
        error = (phase.cos().mean(-3) - phi).square() + phase.sin().mean(-3).square()
        return ((error @ weights) * x.shape[-2]).mean(), A

    return loss


def authors(case: Case, given: Directions | None, device: torch.device) -> Loss:
    return Loss(authors_formulation(case, given, device))


def compiled(mode: str | None) -> Build:
    def build(case: Case, given: Directions | None, device: torch.device) -> Loss:
        function = torch.compile(authors_formulation(case, given, device), dynamic=False, mode=mode)
        if mode is None:
            return Loss(function)

        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            torch.compiler.cudagraph_mark_step_begin()  # the results of the last call may be overwritten
            return function(x)

        return Loss(call)

    return build


def ours(impl: Implementation) -> Build:
    def build(case: Case, given: Directions | None, device: torch.device) -> Loss:
        size = case.size
        if given is None:
            module = SIGReg(num_slices=size.M, t_max=T_MAX, n_points=size.J, impl=impl).to(device)

            def last() -> Tensor:
                A, scale = sample_unit_directions(
                    size.K, size.M, step=module.step - 1, device=device, dtype=case.dtype
                )
                return _unit(A, scale)

            return Loss(module, last)
        knots = standard_normal_knots(T_MAX, size.J)
        t, phi, weights = (a.float().to(device) for a in knots[:3])
        scale = given.scale if case.dtype.itemsize == 2 else None

        def call(x: Tensor) -> Tensor:
            return sigreg(
                x, given.A, t, phi, weights, impl=impl, spacing=knots.spacing, scale=scale, sync=False
            )

        return Loss(call, lambda: _unit(*given))

    return build


def _unit(A: Tensor, scale: Tensor) -> Tensor:
    """The directions that our implementations mean: the rounded columns times their scale."""
    return A.double() * scale.double() if A.dtype.itemsize == 2 else A.double()


def lightly_peer(case: Case, given: Directions | None, device: torch.device) -> Loss:
    from lightly.loss.lejepa_loss import SIGReg as Peer

    module = Peer(knots=case.size.J, t_max=T_MAX, num_vectors=case.size.M).to(device)
    draw = module._generate_unit_vectors
    used: list[Tensor] = []

    def directions(device: torch.device, dtype: torch.dtype, num_features: int) -> Tensor:
        used[:] = [draw(device, dtype, num_features) if given is None else given.A]
        return used[0]

    module._generate_unit_vectors = directions
    return Loss(lambda x: (module(x), used[0]))


def authors_package(case: Case, given: Directions | None, device: torch.device) -> Loss:
    from lejepa.multivariate import SlicingUnivariateTest
    from lejepa.univariate import EppsPulley

    if given is not None:
        raise RuntimeError("takes no directions")
    size = case.size
    module = SlicingUnivariateTest(EppsPulley(t_max=T_MAX, n_points=size.J), num_slices=size.M).to(device)

    def call(x: Tensor) -> Tensor:
        half = case.dtype != torch.float32
        with torch.autocast(device.type, dtype=case.dtype if half else None, enabled=half):
            return module(x)

    def last() -> Tensor:
        generator = torch.Generator(device=device).manual_seed(int(module.global_step) - 1)
        A = torch.randn(size.K, size.M, device=device, generator=generator)
        return (A / A.norm(p=2, dim=0)).to(case.dtype).double()

    return Loss(call, last)


BASELINE = "authors' formulation"
COMPILED = "torch.compile of it"
REDUCED = "torch.compile of it, reduce-overhead"
STREAMING = "our impl='torch'"
TRITON = "our impl='triton'"
GRAPH = "our impl='triton', CUDA graph"  # built from TRITON, see gpu_timing.graphed

VARIANTS: dict[str, Build] = {
    BASELINE: authors,
    COMPILED: compiled(None),
    REDUCED: compiled("reduce-overhead"),
    "our reference": ours("reference"),
    STREAMING: ours("torch"),
    TRITON: ours("triton"),
    GRAPH: ours("triton"),
}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # it, or what it imports, does not work here
        return False


PEERS: tuple[str, ...] = ()
for _name, _module, _build in (
    ("lightly", "lightly.loss.lejepa_loss", lightly_peer),
    ("lejepa, the authors' package", "lejepa.multivariate", authors_package),
):
    if _installed(_module):
        VARIANTS[_name] = _build
        PEERS += (_name,)
# They materialise the phases of all samples, directions and knots: as often as the largest estimate, in
# float32, forward and backward together.
MATERIALISING = (BASELINE, "our reference", *PEERS)
PHASE_COPIES = 7


def estimated_bytes(size: Size) -> int:
    """Peak memory of the variants that materialise the phases."""
    return PHASE_COPIES * 4 * size.V * size.N * size.M * size.J


# --- The sizes ------------------------------------------------------------------------------------

REFERENCE = Size(8, 2048, 512, 1024, 17)
GIANT = Size(10, 4096, 1536, 4096, 17)
MINIMAL = Size(4, 256, 16, 256, 17)
CPU_SIZE = Size(1, 2048, 512, 1024, 17)
EVERYONE = (BASELINE, COMPILED, REDUCED, STREAMING, TRITON, GRAPH, *PEERS)
_BF16, _FP32 = torch.bfloat16, torch.float32
# Those with given directions first: without torch.compile they are soon done, and leave rows in any case.
GPU_CASES = (
    Case("reference", REFERENCE, _BF16, "given", (BASELINE, STREAMING, TRITON)),
    Case("reference", REFERENCE, _BF16, "drawn", EVERYONE),
    Case("giant", GIANT, _BF16, "given", (TRITON,)),
    Case("giant", GIANT, _BF16, "drawn", (BASELINE, STREAMING, TRITON)),
    Case("minimal", MINIMAL, _FP32, "given", (BASELINE, TRITON)),
    Case("minimal", MINIMAL, _FP32, "drawn", EVERYONE),
    Case("minimal", MINIMAL, _BF16, "drawn", EVERYONE),
    Case("reference", REFERENCE, _FP32, "drawn", EVERYONE),
)
_ON_CPU = (BASELINE, COMPILED, "our reference", STREAMING, *PEERS)
CPU_CASE = Case("cpu", CPU_SIZE, _FP32, "given", _ON_CPU)
# Every size of a sweep compiles anew, some ten seconds each on a GPU: there without torch.compile.
SWEEP_VARIANTS = {"cpu": _ON_CPU, "cuda": (BASELINE, STREAMING, TRITON, *PEERS)}
SWEEPS = {
    "cpu": {"N": [256, 512, 1024, 2048, 4096], "M": [128, 256, 512, 1024, 2048]},
    "cuda": {"N": [512, 1024, 2048, 4096, 8192], "M": [256, 512, 1024, 2048, 4096]},
}


# --- Inputs and truth -----------------------------------------------------------------------------


def make_inputs(case: Case, count: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    size = case.size
    return [
        torch.randn(size.V, size.N, size.K, generator=generator, device=device).to(case.dtype)
        for _ in range(count)
    ]


def given_directions(case: Case, device: torch.device) -> Directions | None:
    if case.directions == "drawn":
        return None
    A, scale = sample_unit_directions(case.size.K, case.size.M, step=0, device=device, dtype=case.dtype)
    return Directions(A, scale)


def exact(x: Tensor, A: Tensor, J: int) -> tuple[Tensor, Tensor]:
    """Value and gradient by the reference in float64, a few directions at a time."""
    knots = standard_normal_knots(T_MAX, J)
    x = x.detach().double().requires_grad_()
    rows = x.shape[0] * x.shape[1]
    value = torch.zeros((), dtype=torch.float64, device=x.device)
    phases = 1 << (25 if x.is_cuda else 22)  # of a chunk: 256 or 32 MiB a tensor
    for chunk in A.double().split(max(1, phases // (rows * J)), dim=1):
        part = sigreg(x, chunk, *knots[:3], reduction="sum", impl="reference", sync=False)
        part = part / (x.shape[0] * A.shape[1])
        part.backward()
        value += part.detach()
    assert x.grad is not None
    return value, x.grad


class Truth:
    """`exact` for an input; the directions that it was asked for last need no second computation."""

    def __init__(self, x: Tensor, J: int):
        self._x, self._J = x, J
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __call__(self, A: Tensor) -> tuple[Tensor, Tensor]:
        if self._last is None or not torch.equal(A, self._last[0]):
            self._last = A, exact(self._x, A, self._J)
        return self._last[1]


def relative_error(got: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """Larger of the relative errors of value and gradient; infinite where something is not finite."""
    value, grad = (g.double() for g in got)
    worst = max((value / truth[0] - 1).abs().item(), ((grad - truth[1]).norm() / truth[1].norm()).item())
    return worst if worst == worst else float("inf")
