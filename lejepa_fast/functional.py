"""SIGReg as a function of embeddings and directions.

    x, A --[ecf_sums]--> local sums --[all-reduce]--> global sums --[statistic]--> T --[reduction]--> loss

Only the first stage is large, so only it has several implementations (`dispatch.py`). The rest works on
2 * J * M numbers per view in plain PyTorch, or in one more kernel.
"""

import contextlib
import math
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from . import reference, triton_operators
from .checks import check_choice, check_flag, check_number, check_tensor
from .collectives import all_reduce_sums, check_batch, sum_gradient_over_ranks
from .directions import sample_unit_directions
from .dispatch import IMPLEMENTATIONS, Chosen, Implementation, Precision, choose, logger, refuse_gradients
from .reference import Knots, full_precision, statistic_from_sums
from .streaming import ecf_sums

Reduction = Literal["mean", "sum"] | None


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
    t[j] * <x[v, n], A[:, m]> over the samples n of all ranks. Mathematics: `lejepa_fast.reference`. With the
    knots of N(0, 1) and fresh directions, as the module `SIGReg` has them:

        A = sample_directions(x.shape[-1], 1024, step=step, device=x.device)
        t, phi, weights, spacing = standard_normal_knots()
        loss = sigreg(x, A, t, phi, weights, spacing=spacing)

    Args:
        x: embeddings, shape (..., N, K), any floating dtype. Each leading index (view) gets its own
            statistic. bf16 and fp16 are upcast: statistics are float32, or float64 for float64 inputs, with
            and without autocast.
        A: directions, shape (K, M), usually unit columns (`sample_directions`).
        t: knots, shape (J,), non-negative.
        phi: target characteristic function (real, even) at the knots, shape (J,) or (J, M). Gradients in phi
            and weights come from impl="torch" and "reference"; "triton" refuses them, also under "auto".
        weights: quadrature weights times window, doubled for the half line, shape (J,) or (J, M).
        unbiased: replace C^2 + S^2 by its unbiased estimate, see `statistic_from_sums`. Needs N >= 2.
        reduction: "mean" or "sum" over leading dimensions and directions, or None.
        scale_by_n: multiply by the number of samples of the whole batch, as the paper does.
        process_group: ranks that share the batch; None is the default group.
        sync: True takes the statistic of the batch of all ranks of the group. Without an initialized
            process group, or with False, the statistic is local.
        impl: "triton" (fused kernels for GPUs), "torch" (streaming, any device), "reference"
            (materializes N x M x J; allows double backward, forward mode, `torch.func` and directions
            that require grad), or "auto": "triton" on a GPU that can run it, else "torch". "auto" compares
            the two once for each kind of problem, and warns and takes "torch" where they differ, but not
            under `torch.compile` or while a CUDA graph is captured.
        spacing: the distance of the knots when t[j] = j * spacing (faster), None for arbitrary knots, "auto"
            to detect it. Only knots on the CPU can be read without a synchronization; "auto" takes knots on
            another device as arbitrary.
        scale: multiplies the columns of A, shape (M,), float32. It makes half-precision directions exact unit
            vectors: `sample_unit_directions`. With impl="triton", A in the half-precision dtype of x is
            multiplied on the tensor cores of that dtype; other pairs are multiplied as float32.
        precision: of float32 products with impl="triton": "ieee", "tf32x3" (three products of tf32 parts,
            about as accurate) or "tf32" (an error of 2^-11 in each factor). None: "tf32x3", or "ieee" on
            ROCm, whose compiler lacks tf32x3 (and has "tf32" on gfx942 alone). The other implementations
            follow PyTorch's own settings.

    Returns:
        Scalar for "mean" and "sum", shape (..., M) for None; float64 for float64 x, else float32. A rank
        without samples adds nothing and gets the value of the others. NaN if no rank has any sample: raising
        would need a synchronization to read the count.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.
        RuntimeError: on double backward, and inside `torch.func` transforms and forward-mode differentiation,
            except for impl="reference" without a process group.

    Source: LeJEPA, arXiv 2511.08544, Algorithm 1 and section 4.
    """
    for name, flag in (("unbiased", unbiased), ("scale_by_n", scale_by_n), ("sync", sync)):
        check_flag(name, flag)
    group = check_batch("x", x, process_group, sync, unbiased=unbiased)
    check_choice("impl", impl, *IMPLEMENTATIONS)
    check_choice("precision", precision, *triton_operators.PRECISIONS, None)
    check_choice("reduction", reduction, "mean", "sum", None)
    _check_tensors(x, A, t, phi, weights, scale)
    chosen = choose(impl, x, precision, several_ranks=group is not None)
    if chosen != "reference":
        refuse_gradients(chosen, "reference", A=A, t=t, scale=scale)
    if chosen == "triton":
        refuse_gradients(chosen, "torch", phi=phi, weights=weights)
    knots = Knots(t, phi, weights, resolve_spacing(spacing, t))
    options = Options(unbiased, reduction, scale_by_n, precision)
    if impl == "auto" and chosen == "triton":
        chosen = after_trial(x, A.shape[1], knots, options, group, directions=(A, scale))
    return sigreg_unchecked(x, A, scale, knots, options, group, chosen)


class Options(NamedTuple):
    """Arguments of `sigreg` of these names, checked."""

    unbiased: bool
    reduction: Reduction
    scale_by_n: bool
    precision: Precision | None


def sigreg_unchecked(
    x: Tensor,
    A: Tensor,
    scale: Tensor | None,
    knots: Knots,
    options: Options,
    group: dist.ProcessGroup | None,
    chosen: Chosen,
) -> Tensor:
    """`sigreg` for arguments that have been checked, with the group, implementation and spacing resolved."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    M, count, reduction = A.shape[1], x.shape[-2], options.reduction
    with full_precision(x.device):
        t, phi, weights = (a.to(x.device, compute_dtype) for a in knots[:3])
        # numel: -1 is ambiguous for N = 0
        views = x if x.dim() == 3 else x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
        if chosen == "triton":
            views, A = views.resolve_neg(), A.resolve_neg()  # kernels read the memory
            if A.dtype not in (torch.float32, x.dtype):
                A = A.float()
            value = triton_operators.sigreg_value(
                views,
                A,
                None if scale is None else scale.float().contiguous(),
                Knots(t.contiguous(), phi, weights, knots.spacing),
                unbiased=options.unbiased,
                scale_by_n=options.scale_by_n,
                factor={"mean": 1 / (views.shape[0] * M), "sum": 1.0, None: None}[reduction],
                precision=options.precision or triton_operators.default_precision(x.device),
                reduce=None if group is None else lambda sums: all_reduce_sums(sums, count, group),
            )
            if reduction is None:
                value = value.reshape(*x.shape[:-2], M)
            return sum_gradient_over_ranks(value, group)
        A = A.to(compute_dtype)
        if scale is not None:
            A = A * scale.to(compute_dtype)
        if chosen == "reference":
            sums = reference.ecf_sums(views.to(compute_dtype), A, t)
        else:
            sums = ecf_sums(views, A, t, knots.spacing)
        sums, total = all_reduce_sums(sums, count, group)
        statistic = statistic_from_sums(
            sums, total, phi, weights, unbiased=options.unbiased, scale_by_n=options.scale_by_n
        )
        value = statistic.reshape(*x.shape[:-2], M)
        if reduction is not None:
            value = value.mean() if reduction == "mean" else value.sum()
        return sum_gradient_over_ranks(value, group)


_trials: dict[Hashable, bool] = {}
_failed: set[tuple[torch.dtype, bool]] = set()
"""Dtypes whose kernels failed a trial, of this process alone (False) and of all ranks (True)."""
_TRIAL_SAMPLES = 192
_TRIAL_ERROR = 1e-3
_TRIAL_ERROR_OF_ROUNDED = 3e-2  # half precision and tf32


def after_trial(
    x: Tensor,
    num_slices: int,
    knots: Knots,
    options: Options,
    group: dist.ProcessGroup | None,
    *,
    directions: tuple[Tensor, Tensor | None] | None = None,
) -> Chosen:
    """What "auto" takes where the kernels can run: "torch" if they fail or differ from it, else "triton".

    Tried once for each kind of problem: value and gradient of a few random samples, against float64. If one
    rank's kernels fail, all ranks of the group do without them: with a group, nothing that may differ between
    ranks decides whether something is tried. A CUDA error is raised: the process can do nothing more on the
    GPU. Too little memory is raised, too, and tried again. Nothing is tried while torch.compile traces or a
    CUDA graph is captured; then earlier failures with the dtype count.

    Args:
        x: embeddings of the call; their device, dtype and dimensions count.
        num_slices: number of directions.
        knots, options, group: of the call.
        directions: A and scale of the call; None: the kernels that draw them are tried, too.
    """
    untried: Chosen = "torch" if (x.dtype, group is not None) in _failed else "triton"
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return untried
    fixed = knots[:3] if directions is None else (*knots[:3], directions[0])
    # Samples of one rank may have another layout: N = 1 is contiguous in any.
    transposed = group is None and x.stride(-1) != 1
    kind: tuple[Hashable, ...] = (x.device, x.dtype, x.shape[-1], transposed, num_slices)
    kind += tuple((a.dtype, a.shape, a.stride()) for a in fixed)
    kind += (*options, knots.spacing, group and group.group_name, directions and directions[1] is None)
    if kind not in _trials:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return untried
        problem = no_memory = None
        # Modes that look at operators may be active on one rank alone, such as a counter of operations.
        with _disable_current_modes():
            try:
                problem = _trial(x, transposed, num_slices, knots, options, directions)
            except torch.OutOfMemoryError as failure:
                no_memory = failure
            except Exception as failure:  # compilers raise anything
                if isinstance(failure, torch.AcceleratorError) or "CUDA error" in str(failure):
                    raise
                problem = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
            outcome = torch.tensor(2.0 if no_memory else float(problem is not None), device=x.device)
            if group is not None:
                dist.all_reduce(outcome, dist.ReduceOp.MAX, group=group)
            worst = outcome.item()
        if no_memory:
            raise no_memory
        if worst == 2:
            return "triton"  # until the rank that ran out of memory has tried
        _trials[kind] = worst == 0
        if not _trials[kind]:
            if group is None or group.size() == dist.get_world_size():
                _failed.add((x.dtype, group is not None))
            logger.warning(
                "SIGReg: the Triton kernels failed a trial on %s with %s embeddings of %d dimensions and %d "
                "directions (%s); taking impl='torch' instead, which is slower. Please report it.",
                x.device, x.dtype, x.shape[-1], num_slices, problem or "on another rank",
            )  # fmt: skip
    return "triton" if _trials[kind] else "torch"


def _trial(
    x: Tensor,
    transposed: bool,
    num_slices: int,
    knots: Knots,
    options: Options,
    directions: tuple[Tensor, Tensor | None] | None,
) -> str | None:
    """What the kernels do wrong; None if nothing. With `transposed` samples, else as in `after_trial`."""
    dim, device, half = x.shape[-1], x.device, x.dtype.itemsize <= 2

    def tried(chosen: Chosen, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Value and gradient times `factor` of samples like x, far from N(0, 1), where the unbiased statistic
        is about 0. By the kernels, or in float64 by the streaming implementation."""
        z = 2 * torch.randn(
            _TRIAL_SAMPLES, dim, device=device, generator=torch.Generator(device).manual_seed(0)
        )
        z = z.to(x.dtype).T.contiguous().T if transposed else z.to(x.dtype)
        if directions is None:
            A, scale = sample_unit_directions(
                dim, num_slices, step=0, device=device, dtype=x.dtype, impl=chosen
            )
            tensors = z, A, scale if half else None, *knots[:3]
        else:
            tensors = z, *directions, *knots[:3]
        given: list[Any] = [None if a is None else a.detach().clone() for a in tensors]  # clones keep strides
        if chosen == "torch":
            given = [None if a is None else a.double() for a in given]
        z, A, scale, t, phi, weights = given
        z.requires_grad_()
        own = Knots(t, phi, weights, knots.spacing)
        value = sigreg_unchecked(z, A, scale, own, options, None, chosen)
        (gradient,) = torch.autograd.grad(factor * value.sum(), z)
        return value.detach().double(), gradient.double()

    # The first call may come in inference mode, whose tensors autograd does not take, and inside activation
    # checkpointing, whose hooks would take those that are saved here for its own.
    kept: Any = contextlib.nullcontext()
    if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), kept:
        right_value, right_gradient = tried("torch")
        # The largest element of the gradient becomes 1: float16 would round a small one to 0.
        largest = right_gradient.abs().max().item()
        factor = 1 / largest if largest > 0 else 1.0
        value, gradient = tried("triton", factor)
    allowed = _TRIAL_ERROR_OF_ROUNDED if half or options.precision == "tf32" else _TRIAL_ERROR
    pairs = (("value", value, right_value), ("gradient", gradient, factor * right_gradient))
    for part, found, right in pairs:
        error, size = (found - right).norm().item(), right.norm().item()
        if not error <= allowed * size:
            return f"the {part} is off by {error / size if size else math.inf:.1e} of its size"
    return None


def resolve_spacing(spacing: float | str | None, t: Tensor) -> float | None:
    """The distance of knots j * spacing: as given, or detected for "auto"; None for arbitrary knots.

    Raises:
        ValueError, TypeError: `spacing` is not a positive number, or does not fit the knots.
    """
    if spacing is None:
        return None
    readable = host_can_read(t)
    if spacing == "auto":
        found = t[-1].item() / (t.shape[0] - 1) if readable and t.shape[0] > 1 else 0.0
        return found if found > 0 and _fits(t, found) else None
    check_number("spacing", spacing)
    spacing = float(spacing)
    if not 0 < spacing < float("inf") or (readable and not _fits(t, spacing)):
        raise ValueError(f"spacing: expected the distance of the knots t, t[j] = j * spacing, got {spacing}")
    return spacing


def _fits(t: Tensor, spacing: float) -> bool:
    """Whether t[j] = j * spacing; knots rounded to float32 fit within one unit in the last place."""
    knots = t.detach().double()
    exact = torch.arange(t.shape[0], dtype=torch.float64, device=t.device) * spacing
    tolerance = torch.finfo(torch.float32).eps * knots[-1].abs()
    return bool(((knots - exact).abs() <= tolerance).all())


def host_can_read(t: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a trace."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(t, FakeTensor)


def _check_tensors(
    x: Tensor, A: Tensor, t: Tensor, phi: Tensor, weights: Tensor, scale: Tensor | None
) -> None:
    for name, tensor in (("A", A), ("t", t), ("phi", phi), ("weights", weights)):
        check_tensor(name, tensor)
    if A.dim() != 2 or A.shape[0] != x.shape[-1] or A.shape[1] < 1:
        raise ValueError(f"A: expected shape ({x.shape[-1]}, M) with M >= 1, got {tuple(A.shape)}")
    if t.dim() != 1 or t.shape[0] < 1:
        raise ValueError(f"t: expected shape (J,) with J >= 1, got {tuple(t.shape)}")
    for name, tensor in (("phi", phi), ("weights", weights)):
        if tensor.shape not in (t.shape, (t.shape[0], A.shape[1])):
            expected = f"({t.shape[0]},) or ({t.shape[0]}, {A.shape[1]})"
            raise ValueError(f"{name}: expected shape {expected} to match t and A, got {tuple(tensor.shape)}")
    if scale is not None:
        check_tensor("scale", scale)
        if scale.shape != A.shape[1:] or scale.dtype not in (torch.float32, torch.float64):
            got = f"{scale.dtype} of shape {tuple(scale.shape)}"
            raise ValueError(f"scale: expected float32 or float64 of shape ({A.shape[1]},), got {got}")
    for name, other in (("A", A), ("scale", scale)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected on the device of x, {x.device}, got {other.device}")
