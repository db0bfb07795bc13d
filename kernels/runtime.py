"""What all launches share: options, the current device, memory for outputs."""

import contextlib
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

# Products and sums may become one instruction. Unset, newer versions of Triton warn.
OPTIONS = {"enable_fp_fusion": True}


def interpreting() -> bool:
    """True when Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def kernel_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor for output. Launchers get all memory here, so that tests can guard it."""
    return torch.empty(shape, dtype=dtype, device=like.device)
