"""SIGReg as a function of embeddings and directions.

    x, A --[ecf_sums]--> local sums --[all-reduce]--> global sums --[statistic]--> T --[reduction]--> loss

Only the first stage is large, so only it has several implementations (`dispatch.py`). The rest works on
2 * J * M numbers per view in plain PyTorch, or in one more kernel.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import reference, triton_operators
from .checks import check_choice, check_flag, check_number, check_tensor
from .collectives import all_reduce_sums, check_batch, sum_gradient_over_ranks
from .dispatch import Chosen, Implementation, Precision, choose, refuse_gradients
from .reference import full_precision, statistic_from_sums
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
    t[j] * <x[v, n], A[:, m]> over the samples n of all ranks. Mathematics: `lejepa_fast.reference`.

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
            that require grad), or "auto": "triton" on a GPU that can run it, else "torch".
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
    _check_inputs(x, A, t, phi, weights, reduction, scale)
    chosen = choose(impl, x, precision, several_ranks=group is not None)
    if chosen != "reference":
        refuse_gradients(chosen, "reference", A=A, t=t, scale=scale)
    if chosen == "triton":
        refuse_gradients(chosen, "torch", phi=phi, weights=weights)
    return sigreg_unchecked(
        x,
        A,
        t,
        phi,
        weights,
        unbiased=unbiased,
        reduction=reduction,
        scale_by_n=scale_by_n,
        group=group,
        chosen=chosen,
        spacing=resolve_spacing(spacing, t),
        scale=scale,
        precision=precision,
    )


def sigreg_unchecked(
    x: Tensor,
    A: Tensor,
    t: Tensor,
    phi: Tensor,
    weights: Tensor,
    *,
    unbiased: bool,
    reduction: Reduction,
    scale_by_n: bool,
    group: dist.ProcessGroup | None,
    chosen: Chosen,
    spacing: float | None,
    scale: Tensor | None,
    precision: str | None,
) -> Tensor:
    """`sigreg` for arguments that have been checked, with the group, implementation and spacing resolved."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    M, count = A.shape[1], x.shape[-2]
    with full_precision(x.device):
        t, phi, weights = (a.to(x.device, compute_dtype) for a in (t, phi, weights))
        views = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])  # numel: -1 is ambiguous for N = 0
        if chosen == "triton":
            # Called by name through torch.ops, which a compiler traces.
            ops = torch.ops.lejepa_fast
            if A.dtype not in (torch.float32, x.dtype):
                A = A.float()
            t, scale = t.contiguous(), None if scale is None else scale.float().contiguous()
            precision = precision or triton_operators.default_precision(x.device)
            table = ops.triton_table(views.detach(), A, scale, t, spacing, precision)
            total = None
            if group is not None:
                sums = table.sum(0, keepdim=True, dtype=torch.float64).float()  # as exact as without ranks
                table, total = all_reduce_sums(sums, count, group)
            factor = {"mean": 1 / (views.shape[0] * M), "sum": 1.0, None: None}[reduction]
            value, _ = ops.triton_statistic(
                views, A, scale, table, total, count, t, phi, weights, spacing, unbiased, scale_by_n, factor,
                precision,
            )  # fmt: skip
            if reduction is None:
                value = value.reshape(*x.shape[:-2], M)
            return sum_gradient_over_ranks(value, group)
        A = A.to(compute_dtype)
        if scale is not None:
            A = A * scale.to(compute_dtype)
        if chosen == "reference":
            sums = reference.ecf_sums(views.to(compute_dtype), A, t)
        else:
            sums = ecf_sums(views, A, t, spacing)
        sums, total = all_reduce_sums(sums, count, group)
        statistic = statistic_from_sums(sums, total, phi, weights, unbiased=unbiased, scale_by_n=scale_by_n)
        value = statistic.reshape(*x.shape[:-2], M)
        if reduction is not None:
            value = value.mean() if reduction == "mean" else value.sum()
        return sum_gradient_over_ranks(value, group)


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
    exact = torch.arange(t.shape[0], dtype=torch.float64) * spacing
    tolerance = torch.finfo(torch.float32).eps * knots[-1].abs()
    return bool(((knots - exact).abs() <= tolerance).all())


def host_can_read(t: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a trace."""
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
    check_choice("reduction", reduction, "mean", "sum", None)
    if scale is not None:
        check_tensor("scale", scale)
        if scale.shape != A.shape[1:] or scale.dtype not in (torch.float32, torch.float64):
            got = f"{scale.dtype} of shape {tuple(scale.shape)}"
            raise ValueError(f"scale: expected float32 or float64 of shape ({A.shape[1]},), got {got}")
    for name, other in (("A", A), ("scale", scale)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected on the device of x, {x.device}, got {other.device}")
