"""The SIGReg implementations that are compared, the sizes at which they are, and what is right.

Every variant draws its own directions inside the call, as in a training step. Each result is held to float64
on the directions that the variant used.

In float32 everything is float32 (PyTorch's default: no TF32). In bf16 the authors' formula runs as their
users run it, under autocast: the projection is a bf16 matmul; phases, cosines and sines are float32.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import timing
import torch
from benchlib import installed_version
from torch import Tensor

from lejepa_fast import SIGReg, sample_unit_directions, sigreg, standard_normal_knots

T_MAX = 3.0
PHASES = ("forward", "backward", "forward_backward", "wall")
# Largest error relative to float64, of value and of gradient. bf16: two operands of 8 bits, and a result
# rounded to 8 bits.
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Size(NamedTuple):
    """Views, samples per view, dimensions, directions, knots."""

    V: int
    N: int
    K: int
    M: int
    J: int


class Case(NamedTuple):
    """One table of the benchmark: variants at one size in one dtype."""

    name: str
    size: Size
    dtype: torch.dtype
    variants: Sequence[str]

    @property
    def key(self) -> str:
        return f"{self.name}-{self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2


class Loss:
    """A variant that is ready to be called.

    Args:
        call: from embeddings (V, N, K) to the loss and the directions (K, M) that it used, or a function
            that computes them.
    """

    def __init__(self, call: Callable[[Tensor], tuple[Tensor, Any]]):
        self.call = call
        self.used: Any = None
        self.seed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        value, self.used = self.call(x)
        return value

    def step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient; the gradient is not copied into x.grad."""
        value = self.forward(x)
        if self.seed is None:
            self.seed = torch.ones_like(value)
        return value.detach(), torch.autograd.grad(value, x, self.seed)[0]

    def directions(self) -> Tensor:
        """The directions (K, M) of the last call in float64."""
        return (self.used() if callable(self.used) else self.used).double()


def authors_formula(case: Case, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The statistic as the authors' code writes it: cos and sin of all N x M x J phases."""
    t, phi, weights = (a.float().to(device) for a in standard_normal_knots(T_MAX, case.size.J)[:3])

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        A = _draw(case, device)
        phase = (x @ A).unsqueeze(-1) * t  # float32: the knots are
        error = (phase.cos().mean(-3) - phi).square() + phase.sin().mean(-3).square()
        return ((error @ weights) * x.shape[-2]).mean(), A

    return loss


def _draw(case: Case, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    A = torch.randn(case.size.K, case.size.M, device=device, generator=generator)
    return (A / A.norm(p=2, dim=0)).to(case.dtype)


def compiled(mode: str | None, case: Case, device: torch.device) -> Loss:
    function = torch.compile(authors_formula(case, device), dynamic=False, mode=mode)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # the results of the last call may be overwritten
        return function(x)

    return Loss(call)


def ours(impl: str, case: Case, device: torch.device) -> Loss:
    size = case.size
    module = SIGReg(size.M, t_max=T_MAX, n_points=size.J, impl=impl).to(device)  # type: ignore[arg-type]

    def last() -> Tensor:
        step = module.step - 1
        A, scale = sample_unit_directions(size.K, size.M, step=step, device=device, dtype=case.dtype)
        # In half precision the rounded columns times their scale are the unit directions.
        return A.double() * scale.double() if case.half else A

    return Loss(lambda x: (module(x), last))


def lightly_peer(case: Case, device: torch.device) -> Loss:
    from lightly.loss.lejepa_loss import SIGReg as Peer

    module = Peer(knots=case.size.J, t_max=T_MAX, num_vectors=case.size.M).to(device)
    draw, used = module._generate_unit_vectors, list[Tensor]()

    def directions(device: torch.device, dtype: torch.dtype, num_features: int) -> Tensor:
        used[:] = [draw(device, dtype, num_features)]
        return used[0]

    module._generate_unit_vectors = directions
    return Loss(lambda x: (module(x), used[0]))


def stable_pretraining_peer(case: Case, device: torch.device) -> Loss:
    # transformers, which it imports, looks for the kernels package of the Hugging Face hub. In an editable
    # installation it would find the folder of this checkout under that name.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    from stable_pretraining.methods.lejepa import SlicedEppsPulley

    module = SlicedEppsPulley(case.size.M, t_max=T_MAX, n_points=case.size.J).to(device)
    return _seeded_peer(case, device, module, pooled=True)


def authors_package(case: Case, device: torch.device) -> Loss:
    from lejepa.multivariate import SlicingUnivariateTest
    from lejepa.univariate import EppsPulley

    test = EppsPulley(t_max=T_MAX, n_points=case.size.J)
    return _seeded_peer(case, device, SlicingUnivariateTest(test, num_slices=case.size.M).to(device))


def _seeded_peer(case: Case, device: torch.device, module: Any, *, pooled: bool = False) -> Loss:
    """A module that draws from a generator seeded by its `global_step`; `pooled`: takes (N, K) only."""

    def last() -> Tensor:
        step = int(module.global_step) - 1
        return _draw(case, device, torch.Generator(device=device).manual_seed(step))

    def call(x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        with torch.autocast(device.type, dtype=case.dtype if case.half else None, enabled=case.half):
            return module(x.flatten(0, 1) if pooled else x), last

    return Loss(call)


BASELINE = "authors' formulation"
COMPILED = "torch.compile of it"
REDUCED = "torch.compile of it, reduce-overhead"
EAGER_REFERENCE = "our reference"
STREAMING = "our impl='torch'"
TRITON = "our impl='triton'"
GRAPH = "our impl='triton', CUDA graph"  # TRITON under `timing.graphed`
LIGHTLY, STABLE, AUTHORS = "lightly", "stable-pretraining", "lejepa, the authors' package"
VARIANTS: dict[str, Callable[[Case, torch.device], Loss]] = {
    BASELINE: lambda case, device: Loss(authors_formula(case, device)),
    COMPILED: partial(compiled, None),
    REDUCED: partial(compiled, "reduce-overhead"),
    EAGER_REFERENCE: partial(ours, "reference"),
    STREAMING: partial(ours, "torch"),
    TRITON: partial(ours, "triton"),
    GRAPH: partial(ours, "triton"),
    LIGHTLY: lightly_peer,
    STABLE: stable_pretraining_peer,
    AUTHORS: authors_package,
}
PACKAGES = {LIGHTLY: "lightly", STABLE: "stable-pretraining", AUTHORS: "lejepa"}
"""Peers, and the packages that they come from."""
PEERS = tuple(name for name, package in PACKAGES.items() if installed_version(package))
"""Peers that are installed here."""

_BF16, _FP32 = torch.bfloat16, torch.float32
REFERENCE = Size(8, 2048, 512, 1024, 17)
GIANT = Size(10, 4096, 1536, 4096, 17)
MINIMAL = Size(4, 256, 16, 256, 17)
CPU_SIZE = Size(1, 2048, 512, 1024, 17)
_EVERYONE = (BASELINE, COMPILED, REDUCED, STREAMING, TRITON, GRAPH)
GPU_CASES = (
    Case("reference", REFERENCE, _BF16, _EVERYONE),
    Case("giant", GIANT, _BF16, (BASELINE, STREAMING, TRITON)),
    Case("minimal", MINIMAL, _FP32, _EVERYONE),
    Case("minimal", MINIMAL, _BF16, _EVERYONE),
    Case("reference", REFERENCE, _FP32, _EVERYONE),
)
_ON_CPU = (BASELINE, COMPILED, EAGER_REFERENCE, STREAMING)
CPU_CASE = Case("cpu", CPU_SIZE, _FP32, _ON_CPU)
SWEEPS = {  # on a GPU or not
    False: {"N": [256, 512, 1024, 2048, 4096], "M": [128, 256, 512, 1024]},
    True: {"N": [512, 1024, 2048, 4096, 8192], "M": [256, 512, 1024, 2048, 4096]},
}

TABLE_6 = tuple(Size(1, N, 512, 512, 16) for N in (512, 2048, 8192, 32768))
"""Sizes of Table 6 of the LeJEPA paper; it does not name K."""
# Phases N x M x J; the formulas take minutes for more, and the eager one a dozen tensors of them.
MOST_PHASES_ON_CPU = 1 << 27


def large_cases(gpu: bool) -> list[Case]:
    """N = 32,768, M = 8,192 and the sizes of the paper's Table 6; on a CPU without formulas of minutes.

    On a CPU also the usual size, where ours takes turns with the products of the floor alone: after a formula
    that fills a gigabyte, whatever comes next finds its caches empty.
    """
    base, ours = sweep_base(gpu), TRITON if gpu else STREAMING
    everyone = (BASELINE, COMPILED, ours)
    sizes = [base.size._replace(N=32768), base.size._replace(M=8192), *([] if gpu else [base.size])]
    alone = everyone if gpu else (ours,)
    large = [base._replace(name="large", size=size, variants=alone) for size in sizes]
    for size in TABLE_6:
        small = size.V * size.N * size.M * size.J <= MOST_PHASES_ON_CPU
        large.append(Case("table 6", size, _FP32, everyone if gpu or small else (ours,)))
    return large


def largest_cases(gpu: bool) -> list[Case]:
    """Where the search for the largest N, and for the largest N = M, begins."""
    names = (TRITON if gpu else STREAMING, BASELINE, *(p for p in PEERS if p == LIGHTLY), COMPILED)
    starts = {"largest N": Size(1, 512, 512, 1024, 17), "largest N = M": Size(1, 512, 512, 512, 17)}
    return [Case(name, size, _FP32, names) for name, size in starts.items()]


def share_cases(gpu: bool) -> list[Case]:
    """SIGReg as in training steps of these models with so many images, at the trainer's defaults."""
    models = {"vit_small_patch16_224": 256, "vit_large": 64} if gpu else {"vit_small_patch16_224": 4}
    names = (TRITON if gpu else STREAMING, BASELINE)
    return [Case(model, Size(10, images, 512, 1024, 17), _FP32, names) for model, images in models.items()]


def sweep_base(gpu: bool) -> Case:
    """The case whose N and M are varied."""
    if not gpu:
        return CPU_CASE._replace(name="sweep")
    # Every size of a sweep compiles anew, some ten seconds each: without torch.compile.
    return GPU_CASES[0]._replace(name="sweep", variants=(BASELINE, STREAMING, TRITON))


def sweep_cases(gpu: bool) -> list[Case]:
    """`sweep_base` with each size of `SWEEPS` once."""
    base = sweep_base(gpu)
    sizes = [base.size._replace(**{axis: v}) for axis, values in SWEEPS[gpu].items() for v in values]
    return [base._replace(size=size) for size in dict.fromkeys(sizes)]


def peer_cases(gpu: bool) -> list[Case]:
    """Ours against what people install: lightly per view, stable-pretraining with all views pooled."""
    mine, cases = TRITON if gpu else STREAMING, []
    for size in (Size(8, 128, 64, 1024, 17), Size(4, 256, 512, 256, 17), *[REFERENCE] * gpu):
        cases.append(Case("peers", size, _FP32, (mine, *(p for p in PEERS if p != STABLE))))
        if STABLE in PEERS:
            pooled = size._replace(V=1, N=size.V * size.N)
            cases.append(Case("peers, views pooled", pooled, _FP32, (mine, STABLE)))
    return cases


CASES_OF: dict[str, Callable[[bool], list[Case]]] = {
    "peers": peer_cases,
    "large": large_cases,
    "largest": largest_cases,
    "share": share_cases,
    "sweep": sweep_cases,
}
"""What an option of the benchmark measures, on a GPU or not."""


def make_inputs(case: Case, count: int, device: torch.device) -> list[Tensor]:
    """`count` standard normal embeddings (V, N, K) that require a gradient."""
    generator = torch.Generator(device=device).manual_seed(0)
    drawn = (torch.randn(*case.size[:3], generator=generator, device=device) for _ in range(count))
    return [x.to(case.dtype).requires_grad_() for x in drawn]


def exact(x: Tensor, A: Tensor, J: int) -> tuple[Tensor, Tensor]:
    """Value and gradient by the reference in float64, a few directions at a time."""
    knots = standard_normal_knots(T_MAX, J)
    x = x.detach().double().requires_grad_()
    value = torch.zeros((), dtype=torch.float64, device=x.device)
    phases = 1 << (25 if x.is_cuda else 22)  # of a chunk: 256 or 32 MiB a tensor
    for chunk in A.double().split(max(1, phases // (x.shape[0] * x.shape[1] * J)), dim=1):
        part = sigreg(x, chunk, *knots[:3], reduction="sum", impl="reference", sync=False)
        part = part / (x.shape[0] * A.shape[1])
        part.backward()
        value += part.detach()
    assert x.grad is not None
    return value, x.grad


def build_and_compare(
    case: Case, name: str, x: Tensor, device: torch.device
) -> tuple[Loss, Callable[[Tensor], Any], float]:
    """A variant, its training step, and on `x` the larger of the relative errors of value and gradient."""
    loss = VARIANTS[name](case, device)
    step: Callable[[Tensor], Any] = loss.step
    if name == GRAPH:
        step = timing.graphed(step, device)
        step(x.flip(1))  # what is checked is a replay with another input than the captured one
    got = step(x)
    pairs = zip(got, exact(x, loss.directions(), case.size.J), strict=True)
    errors = torch.stack([(mine.double() - right).norm() / right.norm() for mine, right in pairs])
    return loss, step, errors.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
