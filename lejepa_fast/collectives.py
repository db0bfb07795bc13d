"""Sums over the ranks that share a batch.

Every rank computes the same loss from the global sums, and DDP and FSDP average the parameter gradients over
ranks. For that average to equal the gradient of one process on the concatenated batch, a rank's embeddings
must receive the gradient of the SUM of all ranks' losses. The loss is the same function of the global sums on
every rank, so it is enough to sum the gradient that arrives at the loss, one number for a scalar loss. Larger
tensors are reduced in the forward pass only.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_embeddings

# The count travels as two float32 numbers in the buffer of the sums, so that it stays exact.
_COUNT_WORD = 1 << 16


def resolve_group(process_group: dist.ProcessGroup | None, sync: bool) -> dist.ProcessGroup | None:
    """The group to reduce over; looked up at every call because a module may be older than its group.

    Returns:
        None when there is nothing to reduce: `sync` off, no process group, or a single rank.

    Raises:
        ValueError: this rank does not belong to `process_group`.
    """
    if not (sync and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("process_group: expected a group that this rank belongs to")
    return group if size > 1 else None


def check_batch(
    name: str,
    x: Any,
    process_group: dist.ProcessGroup | None,
    sync: bool,
    *,
    unbiased: bool,
    pool: bool = False,
) -> dist.ProcessGroup | None:
    """Check embeddings x (..., N, K): type, shape and number of samples N, with `pool` of all views together.

    Returns:
        The group to reduce over, see `resolve_group`. A rank of a group may hold few samples, or none.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.
    """
    check_embeddings(name, x)
    group = resolve_group(process_group, sync)
    count = x.shape[:-1].numel() if pool else x.shape[-2]
    if group is None and count < 1 + unbiased:
        least = "2 samples for the unbiased statistic" if unbiased else "1 sample"
        raise ValueError(f"{name}: expected at least {least}, got N = {count}")
    return group


def all_reduce_sums(sums: Tensor, count: int, group: dist.ProcessGroup | None) -> tuple[Tensor, int | Tensor]:
    """Add sums and sample counts over ranks in one collective.

    Args:
        sums: this rank's sums, any shape, float32 or float64.
        count: this rank's number of samples; ranks may differ.
        group: from `resolve_group`.

    Returns:
        Global sums and global count: an int without a group, else a 0-dim tensor of the sums' dtype. The
        gradient of the global sums passes unchanged to the local ones; use `sum_gradient_over_ranks` on what
        is computed from them.
    """
    if group is None:
        return sums, count
    high, low = count // _COUNT_WORD, count % _COUNT_WORD  # not divmod: a compiled count may be symbolic
    packed = torch.cat([sums.flatten(), sums.new_full((1,), high), sums.new_full((1,), low)])
    packed = _AllReduceIdentityGradient.apply(packed, group)
    return packed[:-2].view(sums.shape), (packed[-2] * _COUNT_WORD + packed[-1]).detach()


def sum_gradient_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Identity whose gradient is summed over ranks, see the module docstring."""
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
    # Not when lejepa_fast is imported: it is slow to import.
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(tensor.contiguous(), "sum", group))
