"""Where and with what the kernels can run."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

# Of every launch. Products and sums may become one instruction; unset, newer versions of Triton warn.
OPTIONS = {"enable_fp_fusion": True}


def interpreting() -> bool:
    """True when Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def kernel_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for a kernel's output: all memory that the kernels ask for comes from here."""
    return torch.empty(shape, dtype=dtype, device=like.device)
