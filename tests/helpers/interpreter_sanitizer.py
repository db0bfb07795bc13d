"""Out-of-bounds and race check of Triton kernels in Triton's interpreter.

Every load, store and atomic operation of every program is looked at: its addresses must lie inside the tensor
whose pointer they were computed from, and no address that a program stores to may be stored to or loaded by
another. Programs of a launch run at the same time in any order on a GPU, so that is a race. Atomics race with
nothing.

A pointer knows its tensor by its upper 16 bits, which no address of a process uses: they hold the number of
the kernel's argument, addition keeps them, and they are taken off before memory is touched.
triton-viz has a sanitizer too, but 3.0 fails at these kernels and does not look for races.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_TAG_SHIFT = 48


class FindingError(AssertionError):
    """An access that a kernel must not make."""


class _Launch:
    """Accesses of one launch: addresses and the program that made each."""

    def __init__(self, kernel: str):
        self.kernel = kernel
        self.spans = [(0, 0)]  # first and last address of each argument; none has number 0
        self.accesses: dict[str, list[np.ndarray]] = {"load": [], "store": [], "atomic": []}

    def add_argument(self, tensor: torch.Tensor, pointer: Any) -> None:
        """Mark the pointer that the kernel gets for a tensor."""
        pointer.handle.data = pointer.handle.data | np.uint64(len(self.spans) << _TAG_SHIFT)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        count = last + 1 if tensor.numel() else 0
        self.spans.append((tensor.data_ptr(), tensor.data_ptr() + count * tensor.element_size()))

    def record(self, kind: str, pointers: Any, mask: Any, program: tuple[int, ...]) -> Any:
        """Looks at an access; returns the pointers without their marks."""
        plain = pointers.data & np.uint64((1 << _TAG_SHIFT) - 1)
        used = np.broadcast_to(mask.data, np.shape(plain))
        addresses = np.asarray(plain)[used].astype(np.int64)
        argument = np.asarray(pointers.data >> np.uint64(_TAG_SHIFT))[used].astype(np.int64)
        starts, stops = np.array(self.spans).T[:, np.where(argument < len(self.spans), argument, 0)]
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        if ((addresses < starts) | (addresses + itemsize > stops)).any():
            raise FindingError(f"{self.kernel}: {kind} out of bounds in program {program}")
        if kind == "store" and len(np.unique(addresses)) < len(addresses):
            raise FindingError(f"{self.kernel}: one store writes an address twice in program {program}")
        x, y, z = program
        self.accesses[kind].append(np.stack([addresses, np.full_like(addresses, x << 40 | y << 20 | z)]))
        return TensorHandle(plain, pointers.dtype)

    def check_races(self) -> None:
        nothing = np.empty((2, 0), np.int64)
        stores, loads = (np.hstack([nothing, *self.accesses[kind]]) for kind in ("store", "load"))
        addresses, programs = np.hstack([stores, loads[:, np.isin(loads[0], stores[0])]])
        order = np.lexsort((programs, addresses))
        addresses, programs = addresses[order], programs[order]
        if ((addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1])).any():
            raise FindingError(f"{self.kernel}: race, a program stores where another stores or loads")


@contextlib.contextmanager
def sanitize() -> Iterator[list[str]]:
    """Checks every launch inside; gives the list of the kernels launched.

    Raises:
        FindingError: a race, when the launch ends. Accesses out of bounds stop the launch before they are
            made, and arrive inside the error that the interpreter turns everything into.
    """
    kernels: list[str] = []
    launches: list[_Launch] = []
    call, convert = GridExecutor.__call__, interpreter._implicit_cvt
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> None:
        kernels.append(self.fn.__name__)
        launches.append(_Launch(self.fn.__name__))
        try:
            call(self, *args, **kwargs)
            launches[-1].check_races()
        finally:
            launches.pop()

    def marked(argument: Any) -> Any:
        converted = convert(argument)
        if isinstance(argument, torch.Tensor):
            launches[-1].add_argument(argument, converted)
        return converted

    def checked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        return load(self, launches[-1].record("load", pointers, mask, self.grid_idx), mask, *args)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, launches[-1].record("store", pointers, mask, self.grid_idx), value, mask, *args)

    def checked_atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        pointers = launches[-1].record("atomic", pointers, mask, self.grid_idx)
        return atomic(self, op, pointers, value, mask, *args)

    with (
        mock.patch.object(GridExecutor, "__call__", checked_call),
        mock.patch.object(interpreter, "_implicit_cvt", marked),
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", checked_atomic),
    ):
        yield kernels
