"""What the tests of the Triton kernels share.

`kernel_*.py` run on a GPU if there is one. Without one `test_kernels.py` runs them in processes of their
own with TRITON_INTERPRET=1: the interpreter decides at import which kernels it interprets. Sizes are
small and odd: an interpreted tile has 16 x 16 x 16 elements.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch

from lejepa_fast import sample_directions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Dimensions whose backward is one kernel, and two, with an odd number of directions: on every GPU, in every
# dtype (`Config.fuses`).
ONE_KERNEL, TWO_KERNELS = 8, 40 if DEVICE == "cpu" else 136


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def directions(K: int, M: int) -> torch.Tensor:
    return sample_directions(K, M, step=1, device=DEVICE)


def sanitized() -> AbstractContextManager[Any]:
    """Finds accesses out of bounds and races in the interpreter; on a GPU compute-sanitizer does."""
    if DEVICE == "cuda":
        return contextlib.nullcontext()
    from interpreter_sanitizer import sanitize

    return sanitize()
