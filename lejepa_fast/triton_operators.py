"""Registered operators around the Triton kernels, and whether they can run.

    x, A --[triton_table]--> partial sums --[sum over splits, all-reduce]--> --[triton_statistic]--> loss
                                                                     grad --[triton_gradient]--> dx

`triton_statistic` carries the gradient: it returns the coefficients of dT/dp beside the value and passes them
to `triton_gradient`. So nothing of the size of the sums is differentiated, and x enters `triton_table`
detached. Without several ranks, `triton_statistic` sums the splits itself.

Where nobody traces, one `autograd.Function` does the same: registered operators cost the host 40 us each.
"""

import functools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import refuse_double_backward
from .kernels.configs import Config, get_config, target_of
from .kernels.runtime import interpreting
from .kernels.table import Plan, coefficient_shape, count_splits, make_plan
from .reference import Knots

_Function = TypeVar("_Function", bound=Callable[..., Any])
MIN_TRITON = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("ieee", "tf32x3", "tf32")


def _constant_when_compiled(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would import all of torch._dynamo with this module."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_compiled
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take a tensor: "argument: expected ..., got ...", or None if they can."""
    if dtype not in DTYPES:
        return f"x: expected float32, bfloat16 or float16 for impl='triton', got {dtype}; use impl='torch'"
    version = triton_version()
    if version is None:
        return "impl: 'triton' needs the package triton, which is not installed; use impl='torch'"
    if version < MIN_TRITON:
        needed, got = (".".join(map(str, v)) for v in (MIN_TRITON, version))
        return f"impl: 'triton' needs triton {needed} or newer, got {got}; use impl='torch'"
    if device.type == "cuda":
        try:
            target_of(device)
        except ValueError as error:
            return str(error)
        return None
    if device.type == "cpu" and interpreting():
        return None
    return (
        f"x: expected on a GPU for impl='triton' (or TRITON_INTERPRET=1 in the environment), got {device}; "
        "use impl='torch'"
    )


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    try:
        import triton
    except ImportError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


def default_precision(device: torch.device) -> str:
    """The default for float32 products: as accurate as float32, on tensor cores if the compiler can."""
    return "ieee" if device.type == "cpu" or torch.version.hip else "tf32x3"


@_constant_when_compiled
def why_not_precision(device: torch.device, precision: str | None) -> str | None:
    """Why the device's compiler lacks a precision, or None if it has it; AMD's has little but "ieee"."""
    if device.type != "cuda" or not torch.version.hip or precision in (None, "ieee"):
        return None
    name = torch.cuda.get_device_properties(device).gcnArchName
    able = ("ieee", "tf32") if name.startswith("gfx942") else ("ieee",)
    if precision in able:
        return None
    expected = " or ".join(map(repr, able))
    return f"precision: expected {expected} or None on ROCm's {name}, got {precision!r}; None takes 'ieee'"


def _plan(x: Tensor, A: Tensor, t: Tensor, spacing: float | None, precision: str) -> tuple[Plan, Config]:
    # x and A of different dtypes are multiplied as float32.
    config = get_config(x.device, x.element_size() if x.dtype == A.dtype else 4)
    stretch = config.stretch if precision == "tf32x3" else 1.0
    return make_plan(t.shape[0], spacing, stretch), config


def tracing(*tensors: Tensor) -> bool:
    """Whether operators must be called by name: somebody traces, or the tensors are fake."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


@functools.cache
def kernels() -> SimpleNamespace:
    """The modules that launch kernels. Importing Triton takes longer than importing this library."""
    from .kernels import backward, epilogue, forward, philox

    return SimpleNamespace(backward=backward, epilogue=epilogue, forward=forward, philox=philox)


def _table(
    x: Tensor, A: Tensor, scale: Tensor | None, t: Tensor, spacing: float | None, precision: str
) -> Tensor:
    """x (V, N, K), A (K, M), scale (M,), t (J,) -> sums (splits, V, rows, M), see `kernels/forward.py`."""
    plan, config = _plan(x, A, t, spacing, precision)
    return kernels().forward.table_sums(x, A, scale, t, plan, config, precision)


def _statistic(
    x: Tensor,
    A: Tensor,
    scale: Tensor | None,
    table: Tensor,
    count: Tensor | None,
    local_count: int,
    t: Tensor,
    phi: Tensor,
    weights: Tensor,
    spacing: float | None,
    unbiased: bool,
    scale_by_n: bool,
    factor: float | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Statistic (V, M), or its sum times `factor`, and coefficients, see `kernels/epilogue.py`.

    x is not read; it is an argument because the gradient goes to it. `count` is the number of samples of all
    ranks, on the device; None without several ranks, where `local_count` is the number.
    """
    return kernels().epilogue.statistic(
        table,
        local_count if count is None else count,
        scale,
        t,
        phi,
        weights,
        make_plan(t.shape[0], spacing),
        unbiased=unbiased,
        scale_by_n=scale_by_n,
        factor=factor,
    )


def _gradient(
    grad: Tensor,
    factor: float,
    coef: Tensor,
    x: Tensor,
    A: Tensor,
    scale: Tensor | None,
    t: Tensor,
    spacing: float | None,
    precision: str,
) -> Tensor:
    """Gradient in x, shape and dtype of x, contiguous, see `kernels/backward.py`."""
    plan, config = _plan(x, A, t, spacing, precision)
    return kernels().backward.gradient(grad, factor, coef, x, A, scale, t, plan, config, precision)


triton_table = torch.library.custom_op("lejepa_fast::triton_table", _table, mutates_args=())
triton_statistic = torch.library.custom_op("lejepa_fast::triton_statistic", _statistic, mutates_args=())
triton_gradient = torch.library.custom_op("lejepa_fast::triton_gradient", _gradient, mutates_args=())


@triton_table.register_fake
def _(x, A, scale, t, spacing, precision):
    plan, config = _plan(x, A, t, spacing, precision)
    views, N, M = x.shape[0], x.shape[1], A.shape[1]
    splits, _ = count_splits(views, N, M, plan.chunks, config.split)
    return x.new_empty(splits, views, plan.rows, M, dtype=torch.float32)


@triton_statistic.register_fake
def _(
    x, A, scale, table, count, local_count, t, phi, weights, spacing, unbiased, scale_by_n, factor, precision
):
    _, views, _, M = table.shape
    value = table.new_empty((views, M) if factor is None else ())
    return value, table.new_empty(coefficient_shape(views, M, make_plan(t.shape[0], spacing)))


@triton_gradient.register_fake
def _(grad, factor, coef, x, A, scale, t, spacing, precision):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, scale, _, _, _, t, _, _, ctx.spacing, _, _, factor, ctx.precision = inputs
    ctx.factor = 1.0 if factor is None else factor
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, A, scale, t)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    dx = None
    if grad is not None:
        coef, x, A, scale, t = ctx.saved_tensors
        # The operator refuses a second derivative.
        run = torch.ops.lejepa_fast.triton_gradient if torch.is_grad_enabled() or tracing(x) else _gradient
        dx = run(grad, ctx.factor, coef, x, A, scale, t, ctx.spacing, ctx.precision)
    return (dx, *[None] * 13)


triton_statistic.register_autograd(_backward, setup_context=_setup_context)
triton_gradient.register_autograd(refuse_double_backward)


class _Eager(torch.autograd.Function):
    """`triton_statistic` with its gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _statistic(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def sigreg_value(
    x: Tensor,
    A: Tensor,
    scale: Tensor | None,
    knots: Knots,
    *,
    unbiased: bool,
    scale_by_n: bool,
    factor: float | None,
    precision: str,
    reduce: Callable[[Tensor], tuple[Tensor, Any]] | None,
) -> Tensor:
    """The statistic of every view and direction (V, M), or its sum times `factor`, by the kernels.

    Args:
        x: embeddings (V, N, K); the gradient goes to them alone.
        A, scale, knots, unbiased, scale_by_n, precision: as for `lejepa_fast.sigreg`.
        factor: None for all values.
        reduce: adds the sums (1, V, rows, M) and the count over ranks; None without several ranks.
    """
    t, phi, weights, spacing = knots
    ops = torch.ops.lejepa_fast  # by name, which a compiler traces
    named = tracing(x, A)
    table = (ops.triton_table if named else _table)(x.detach(), A, scale, t, spacing, precision)
    count = None
    if reduce is not None:
        # In float64, as exact as without ranks.
        table, count = reduce(table.sum(0, keepdim=True, dtype=torch.float64).float())
    options = (spacing, unbiased, scale_by_n, factor, precision)
    run = ops.triton_statistic if named else _Eager.apply
    return run(x, A, scale, table, count, x.shape[1], t, phi, weights, *options)[0]
