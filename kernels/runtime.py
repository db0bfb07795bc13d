"""What all launches share: options, the current device, memory for outputs."""

import contextlib
import os
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_MOST_LAUNCHES = 4096
_launches: dict[Hashable, tuple[Callable[..., None], list[Any], list[tuple[int, str]]]] = {}
"""By problem: the compiled kernel, its arguments, and the positions and names of the tensors among them."""

_HERE = contextlib.nullcontext()
# Products and sums may become one instruction. Unset, newer versions of Triton warn.
OPTIONS = {"enable_fp_fusion": True}


def interpreting() -> bool:
    """True when Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def kernel_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current: Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _HERE


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor for output. Launchers get all memory here, so that tests can guard it."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def launch(
    kernel: Any,
    problem: Hashable,
    tensors: Mapping[str, Tensor],
    describe: Callable[[], tuple[int, dict[str, Any]]],
) -> None:
    """Launch a kernel. Triton looks at every argument, which takes longer than the launch; so it does that
    once for each problem, and the compiled kernel is kept.

    Args:
        kernel: a `triton.jit` function.
        problem: everything that the grid and the arguments depend on but the memory of `tensors`: sizes,
            strides, dtypes, the device, numbers.
        tensors: by the names of their arguments.
        describe: returns the number of programs, and the other arguments by name with Triton's options.
    """
    # Code for pointers that are multiples of 16 differs.
    key = (id(kernel), problem, *[tensor.data_ptr() % 16 for tensor in tensors.values()])
    if known := _launches.get(key):
        run, arguments, places = known
        arguments = arguments.copy()
        for place, name in places:
            arguments[place] = tensors[name]
        run(*arguments)
        return
    programs, others = describe()
    grid = (programs, 1, 1)
    compiled = kernel[grid](**tensors, **others)
    if compiled is None:  # by the interpreter
        return
    if len(_launches) >= _MOST_LAUNCHES:  # sizes that change at every step
        _launches.clear()
    names = kernel.arg_names
    places = [(place, name) for place, name in enumerate(names) if name in tensors]
    _launches[key] = compiled[grid], [others.get(name) for name in names], places
