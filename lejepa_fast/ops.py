"""The functional core: choice of implementation, registered operators, collectives.

    x, A --[ecf_sums]--> local sums --[all-reduce]--> global sums --[statistic]--> T --[reduction]--> loss

Only the first stage is large, so only it has several implementations. The rest works on 2 * J * M
numbers per view in plain PyTorch. `ecf_sums` keeps nothing but its inputs for the backward pass.

Data parallelism. Every rank computes the same loss from the global sums, and DDP and FSDP average the
parameter gradients over ranks. For the average to equal the gradient of one process on the
concatenated batch, a rank's embeddings must receive the gradient of the SUM of all ranks' losses.
The loss is the same function of the global sums on every rank, so it is enough to sum the gradient
that arrives at the loss (one number for a scalar loss): the large tensors cross ranks in the forward
pass only.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives as funcol

from . import reference, streaming, triton_ops
from .checks import check_count, check_embeddings, check_flag, check_number, check_tensor
from .reference import full_precision, statistic_from_sums

Implementation = Literal["auto", "torch", "triton", "reference"]
Chosen = Literal["torch", "triton", "reference"]
Reduction = Literal["mean", "sum"] | None
Precision = Literal["ieee", "tf32x3", "tf32"]

logger = logging.getLogger("lejepa_fast")
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
# A rank's count travels as two words in the buffer of the sums, so that both are exact in float32.
_COUNT_WORD = 1 << 16


def sigreg(
    x: Tensor,
    A: Tensor,
    t: Tensor,
    phi: Tensor,
    weights: Tensor,
    *,
    unbiased: bool = False,
    reduction: Reduction = "mean",
    scale_by_n: bool = True,
    process_group: dist.ProcessGroup | None = None,
    sync: bool = True,
    impl: Implementation = "auto",
    spacing: float | Literal["auto"] | None = "auto",
    scale: Tensor | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Sliced Epps-Pulley statistic of embeddings for any knots, target, weights and directions.

    T[v, m] = N * sum_j weights[j] * ((C - phi[j])^2 + S^2), with C and S the means of cos and sin of
    t[j] * <x[v, n], A[:, m]> over the samples n of all ranks. Mathematics: `lejepa_fast.reference`.

    Args:
        x: embeddings, shape (..., N, K), any floating dtype. Leading dimensions (views) get a statistic
            each. bf16 and fp16 are upcast: statistics are float32, or float64 for float64 inputs,
            with and without autocast.
        A: directions, shape (K, M), usually unit columns (`sample_directions`).
        t: knots, shape (J,), non-negative.
        phi: target characteristic function (real, even) at the knots, shape (J,) or (J, M). Gradients in it
            and in weights come from impl="torch" and "reference"; "triton" refuses them, under "auto", too.
        weights: quadrature weights times window, doubled for the half line, shape (J,) or (J, M).
        unbiased: replace C^2 + S^2 by its unbiased estimate, see `statistic_from_sums`. Needs N >= 2.
        reduction: "mean" or "sum" over leading dimensions and directions, or None.
        scale_by_n: multiply by the number of samples of the whole batch, as the paper does.
        process_group: ranks that share the batch; None is the default group.
        sync: True takes the statistic of the batch of all ranks of the group. Without an initialised
            process group, or with False, the statistic is local.
        impl: "triton" (fused kernels for GPUs), "torch" (streaming, any device), "reference"
            (materialises N x M x J; allows double backward, forward mode, `torch.func` and directions
            that require grad), or "auto": "triton" on a GPU that can run it, else "torch".
        spacing: the knots' distance when t[j] = j * spacing (faster), None for arbitrary knots, "auto"
            to look. Only knots on the CPU can be looked at without a synchronisation; "auto" takes
            knots on another device as arbitrary.
        scale: multiplies the columns of A, shape (M,), float32. It lets half-precision directions be
            exact unit vectors: `sample_unit_directions`. With impl="triton", A in the half-precision dtype
            of x meets it on the tensor cores of that dtype; other pairs are multiplied as float32.
        precision: of float32 products with impl="triton": "ieee", "tf32x3" (three products of tf32 parts,
            about as accurate) or "tf32" (an error of 2^-11 in each factor). None: "tf32x3", or "ieee"
            where the compiler lacks it (ROCm; "tf32" it has on gfx942 alone). The other implementations
            follow PyTorch's own settings.

    Returns:
        scalar for "mean" and "sum", shape (..., M) for None; float64 for float64 x, else float32.
        A rank without samples adds nothing and gets the value of the others. NaN if no rank has any:
        to raise instead, the count would have to be waited for.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.
        RuntimeError: on double backward, except for impl="reference" without a process group; inside
            `torch.func` transforms and forward-mode differentiation, except for impl="reference"
            without a process group.

    Source: LeJEPA, arXiv 2511.08544, Algorithm 1 and section 4.
    """
    _check_inputs(x, A, t, phi, weights, reduction, scale)
    check_precision(precision)
    for name, flag in (("unbiased", unbiased), ("scale_by_n", scale_by_n), ("sync", sync)):
        check_flag(name, flag)
    group = resolve_group(process_group, sync)
    if group is None:  # a rank of a group may hold few samples, or none
        check_count("x", x.shape[-2], unbiased=unbiased)
    chosen = resolve_implementation(impl, x.device, x.dtype)
    if check_transforms(chosen) and group is not None:
        raise RuntimeError(
            "sync: expected False inside torch.func transforms and forward-mode differentiation, got True on "
            "several ranks, which they do not reach"
        )
    if chosen != "reference":
        _refuse_gradients(chosen, "reference", A=A, t=t, scale=scale)
    if chosen == "triton":
        _refuse_gradients(chosen, "torch", phi=phi, weights=weights)
        problem = triton_ops.why_not_precision(x.device, precision)
        if problem is not None:
            raise ValueError(problem)
    spacing = check_spacing(spacing, t)

    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with full_precision(x.device):
        t, phi, weights = (a.to(x.device, compute_dtype) for a in (t, phi, weights))
        views = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])  # numel: -1 is ambiguous for N = 0
        if chosen == "triton":
            factor = {"mean": 1 / (views.shape[0] * A.shape[1]), "sum": 1.0, None: None}[reduction]
            value = _triton_statistic(
                views, A, scale, t, phi, weights, spacing, group, unbiased, scale_by_n, factor, precision
            )
            if reduction is None:
                value = value.reshape(*x.shape[:-2], A.shape[1])
            return sum_gradient_over_ranks(value, group)
        A = A.to(compute_dtype)
        if scale is not None:
            A = A * scale.to(compute_dtype)
        if chosen == "reference":
            sums = reference.ecf_sums(views.to(compute_dtype), A, t)
        else:
            sums = torch.ops.lejepa_fast.ecf_sums(views, A, t, spacing)
        sums, count = all_reduce_sums(sums, x.shape[-2], group)
        statistic = statistic_from_sums(
            sums, count, phi, weights, unbiased=unbiased, scale_by_n=scale_by_n
        ).reshape(*x.shape[:-2], A.shape[1])
        if reduction == "mean":
            statistic = statistic.mean()
        elif reduction == "sum":
            statistic = statistic.sum()
        return sum_gradient_over_ranks(statistic, group)


def _triton_statistic(
    x: Tensor,
    A: Tensor,
    scale: Tensor | None,
    t: Tensor,
    phi: Tensor,
    weights: Tensor,
    spacing: float | None,
    group: dist.ProcessGroup | None,
    unbiased: bool,
    scale_by_n: bool,
    factor: float | None,
    precision: str | None,
) -> Tensor:
    """T (V, M) of views x (V, N, K), or its sum times `factor`."""
    if A.dtype not in (torch.float32, x.dtype):
        A = A.float()
    # The kernels read neighbouring elements of both.
    t, scale = t.contiguous(), None if scale is None else scale.float().contiguous()
    precision = precision or triton_ops.default_precision(x.device)
    table = torch.ops.lejepa_fast.triton_table(x.detach(), A, scale, t, spacing, precision)
    count, N = None, x.shape[-2]
    if group is not None:
        sums = table.sum(0, keepdim=True, dtype=torch.float64).float()  # as exactly as without ranks
        table, count = all_reduce_sums(sums, N, group)
    value, _ = torch.ops.lejepa_fast.triton_finish(
        x, A, scale, table, count, N, t, phi, weights, spacing, unbiased, scale_by_n, factor, precision
    )
    return value


def resolve_implementation(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Chosen:
    """The implementation that `impl` means for tensors of a device and dtype.

    "auto" takes the Triton kernels on a GPU (CUDA or ROCm) that can run them on this dtype, else the
    streaming implementation. What it chose is logged once, with the reason, as a warning where a GPU
    has to do without the kernels.

    Raises:
        ValueError, TypeError: unknown name, or an implementation that cannot run here; says which can.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl == "triton":
        problem = triton_ops.why_not(device, dtype)
        if problem is not None:
            raise (TypeError if dtype not in triton_ops.DTYPES else ValueError)(problem)
        return "triton"
    if impl in ("torch", "reference"):
        return impl  # type: ignore[return-value]
    chosen: Chosen
    if device.type == "cuda":  # ROCm calls itself so, too
        problem = triton_ops.why_not(device, dtype)
        chosen, why = ("triton", "kernels for this GPU") if problem is None else ("torch", problem)
    else:
        chosen, why = "torch", "the kernels are for GPUs"
    if not torch.compiler.is_compiling() and (device.type, why) not in _logged_choices:
        _logged_choices.add((device.type, why))
        level = logging.WARNING if device.type == "cuda" and chosen != "triton" else logging.INFO
        why = why.removesuffix("; use impl='torch'")
        logger.log(level, "SIGReg impl='auto' takes %r on %s: %s", chosen, device.type, why)
    return chosen


_logged_choices: set[tuple[str, str]] = set()


def find_spacing(t: Tensor) -> float | None:
    """The distance of equidistant knots starting at 0, or None; never reads knots of another device."""
    if t.shape[0] < 2 or not _readable(t):
        return None
    spacing = t[-1].item() / (t.shape[0] - 1)
    return spacing if spacing > 0 and _fits(t, spacing) else None


def check_spacing(spacing: float | str | None, t: Tensor) -> float | None:
    """`spacing` as `sigreg` takes it, resolved: the distance of the knots, or None for arbitrary ones."""
    if spacing == "auto":
        return find_spacing(t)
    if spacing is None:
        return None
    check_number("spacing", spacing)
    spacing = float(spacing)  # type: ignore[arg-type]
    if not 0 < spacing < float("inf") or (_readable(t) and not _fits(t, spacing)):
        raise ValueError(f"spacing: expected the distance of the knots t, t[j] = j * spacing, got {spacing}")
    return spacing


def _fits(t: Tensor, spacing: float) -> bool:
    """Whether t[j] = j * spacing; knots rounded to float32 fit within one unit in the last place."""
    knots = t.detach().double()
    exact = torch.arange(t.shape[0], dtype=torch.float64) * spacing
    tolerance = torch.finfo(torch.float32).eps * knots[-1].abs()
    return bool(((knots - exact).abs() <= tolerance).all())


def _readable(t: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a trace."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(t, FakeTensor)


def _check_inputs(
    x: Tensor,
    A: Tensor,
    t: Tensor,
    phi: Tensor,
    weights: Tensor,
    reduction: str | None,
    scale: Tensor | None,
) -> None:
    check_embeddings("x", x)
    for name, tensor in (("A", A), ("t", t), ("phi", phi), ("weights", weights)):
        check_tensor(name, tensor)
    if scale is not None:
        check_tensor("scale", scale)
    if A.dim() != 2 or A.shape[0] != x.shape[-1] or A.shape[1] < 1:
        raise ValueError(f"A: expected shape ({x.shape[-1]}, M) with M >= 1, got {tuple(A.shape)}")
    if t.dim() != 1 or t.shape[0] < 1:
        raise ValueError(f"t: expected shape (J,) with J >= 1, got {tuple(t.shape)}")
    for name, tensor in (("phi", phi), ("weights", weights)):
        if tensor.shape not in (t.shape, (t.shape[0], A.shape[1])):
            expected = f"({t.shape[0]},) or ({t.shape[0]}, {A.shape[1]})"
            raise ValueError(f"{name}: expected shape {expected} to match t and A, got {tuple(tensor.shape)}")
    if A.device != x.device:
        raise ValueError(f"A: expected on the device of x, {x.device}, got {A.device}")
    if reduction not in ("mean", "sum", None):
        raise ValueError(f"reduction: expected 'mean', 'sum' or None, got {reduction!r}")
    if scale is not None and (
        scale.shape != A.shape[1:] or scale.dtype not in (torch.float32, torch.float64)
    ):
        got = f"{scale.dtype} of shape {tuple(scale.shape)}"
        raise ValueError(f"scale: expected float32 or float64 of shape ({A.shape[1]},), got {got}")
    if scale is not None and scale.device != x.device:
        raise ValueError(f"scale: expected on the device of x, {x.device}, got {scale.device}")


def check_precision(precision: str | None) -> None:
    """ValueError unless `precision` is one that `sigreg` takes on some device."""
    if precision not in (*triton_ops.PRECISIONS, None):
        expected = ", ".join(map(repr, triton_ops.PRECISIONS))
        raise ValueError(f"precision: expected one of {expected} or None, got {precision!r}")


def check_transforms(chosen: str) -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active.

    Raises:
        RuntimeError: for any implementation but the reference. Operators take no part in transforms:
            some raise from deep inside, and forward mode would drop the tangent without a word.
    """
    if torch._C._are_functorch_transforms_active():
        what = "torch.func transforms (grad, vmap, jvp, jacrev, ...) are"
    elif forward_ad._current_level >= 0:
        what = "forward-mode differentiation is"
    else:
        return False
    if chosen != "reference":
        raise RuntimeError(
            f"sigreg: {what} supported by impl='reference' only, got impl={chosen!r}; choose 'reference', "
            "or take the gradient by backward() or torch.autograd.grad"
        )
    return True


def _refuse_gradients(chosen: str, other: str, **arguments: Tensor | None) -> None:
    """What no gradient comes for is no silent zero; `other` is the implementation that has it."""
    for name, tensor in arguments.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor without gradient for impl={chosen!r}, got requires_grad=True; "
                f"detach it or choose impl={other!r}"
            )


# --- Registered operators -------------------------------------------------------------------------


@torch.library.custom_op(
    "lejepa_fast::ecf_sums",
    mutates_args=(),
    schema="(Tensor x, Tensor A, Tensor t, float? spacing) -> Tensor",
)
def _ecf_sums(x: Tensor, A: Tensor, t: Tensor, spacing: float | None) -> Tensor:
    """Streaming `ecf_sums`: x (V, N, K), A (K, M), t (J,) -> (V, 2, J, M) in the dtype of A."""
    with full_precision(x.device):
        return streaming.ecf_sums(x, A, t, spacing)


@_ecf_sums.register_fake
def _(x: Tensor, A: Tensor, t: Tensor, spacing: float | None) -> Tensor:
    return A.new_empty(x.shape[0], 2, t.shape[0], A.shape[1])


@torch.library.custom_op(
    "lejepa_fast::ecf_sums_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor A, Tensor t, float? spacing) -> Tensor",
)
def _ecf_sums_backward(grad: Tensor, x: Tensor, A: Tensor, t: Tensor, spacing: float | None) -> Tensor:
    """Gradient of `ecf_sums` with respect to x, shape and dtype of x."""
    with full_precision(x.device):  # users do call backward() under autocast
        return streaming.ecf_sums_backward(grad, x, A, t, spacing)


@_ecf_sums_backward.register_fake
def _(grad: Tensor, x: Tensor, A: Tensor, t: Tensor, spacing: float | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, A, t, ctx.spacing = inputs
    ctx.save_for_backward(x, A, t)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    x, A, t = ctx.saved_tensors
    return torch.ops.lejepa_fast.ecf_sums_backward(grad, x, A, t, ctx.spacing), None, None, None


def _refuse_double_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "sigreg: double backward is supported by impl='reference' only; choose it to differentiate twice"
    )


_ecf_sums.register_autograd(_backward, setup_context=_setup_context)
_ecf_sums_backward.register_autograd(_refuse_double_backward)


# --- Collectives ----------------------------------------------------------------------------------


def resolve_group(process_group: dist.ProcessGroup | None, sync: bool) -> dist.ProcessGroup | None:
    """The group to reduce over, read at every call: the module may be older than the process group.

    Returns None when there is nothing to reduce: sync off, no process group, or a single rank.
    """
    if not (sync and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("process_group: expected a group that this rank belongs to")
    return group if size > 1 else None


def all_reduce_sums(sums: Tensor, count: int, group: dist.ProcessGroup | None) -> tuple[Tensor, int | Tensor]:
    """Add sums and sample counts over ranks in one collective.

    Args:
        sums: this rank's sums, any shape, float32 or float64.
        count: this rank's number of samples; ranks may differ.
        group: from `resolve_group`.

    Returns:
        global sums and global count (an int without a group, else a 0-dim tensor of the sums' dtype).
        The gradient of the global sums passes unchanged to the local ones: use
        `sum_gradient_over_ranks` on what is computed from them.
    """
    if group is None:
        return sums, count
    high, low = count // _COUNT_WORD, count % _COUNT_WORD  # not divmod: compiled, a count may be symbolic
    packed = torch.cat([sums.flatten(), sums.new_full((1,), high), sums.new_full((1,), low)])
    packed = _AllReduceIdentityGradient.apply(packed, group)
    return packed[:-2].view(sums.shape), (packed[-2] * _COUNT_WORD + packed[-1]).detach()


def sum_gradient_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Identity whose gradient is summed over ranks (see the module docstring)."""
    return value if group is None else _IdentitySumGradient.apply(value, group)


class _AllReduceIdentityGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _IdentitySumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_reduce(grad, ctx.group), None


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(tensor.contiguous(), "sum", group))


def is_recomputing() -> bool:
    """True inside the backward pass, where activation checkpointing runs the forward a second time."""
    return torch._C._current_graph_task_id() != -1
