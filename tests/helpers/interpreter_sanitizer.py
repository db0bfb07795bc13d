"""Out-of-bounds and race check of Triton kernels in Triton's interpreter.

Every load and store of every program is looked at: its addresses must lie inside the tensor whose pointer
they were computed from, and no address may be stored to by two programs, or stored to by one and loaded by
another. Programs of a launch run at the same time in any order on a GPU, so either is a race. Atomics are
not looked at.

A pointer knows its tensor by its upper 16 bits, which no address of a process uses: they hold the number of
the kernel's argument, addition keeps them, and they are taken off before memory is touched.
triton-viz has a sanitizer too, but 3.0 fails at these kernels and does not look for races.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

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
        self.starts, self.stops = [0], [0]  # no argument has number 0
        self.accesses: dict[str, list[tuple[np.ndarray, int]]] = {"load": [], "store": []}

    def add_argument(self, tensor: torch.Tensor, pointer: Any) -> None:
        """Mark the pointer that the kernel gets for a tensor."""
        pointer.handle.data = pointer.handle.data | np.uint64(len(self.starts) << _TAG_SHIFT)
        start, stop = _span(tensor)
        self.starts.append(start)
        self.stops.append(stop)

    def record(self, kind: str, pointers: Any, mask: Any, program: tuple[int, ...]) -> Any:
        """Looks at an access; returns the pointers without their marks."""
        plain = pointers.data & np.uint64((1 << _TAG_SHIFT) - 1)
        used = np.broadcast_to(mask.data, np.atleast_1d(plain).shape)
        addresses = np.atleast_1d(plain)[used].astype(np.int64)
        argument = np.atleast_1d(pointers.data >> np.uint64(_TAG_SHIFT))[used].astype(np.int64)
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        known = argument < len(self.starts)
        argument = np.where(known, argument, 0)
        starts, stops = np.array(self.starts)[argument], np.array(self.stops)[argument]
        if ((addresses < starts) | (addresses + itemsize > stops)).any():
            raise FindingError(f"{self.kernel}: {kind} out of bounds in program {program}")
        if kind == "store" and len(np.unique(addresses)) < len(addresses):
            raise FindingError(f"{self.kernel}: one store writes an address twice in program {program}")
        x, y, z = program
        self.accesses[kind].append((addresses, (x << 40) | (y << 20) | z))
        return TensorHandle(plain, pointers.dtype)

    def check_races(self) -> None:
        stored, writers = self._flat("store")
        order = np.argsort(stored, kind="stable")
        stored, writers = stored[order], writers[order]
        if ((stored[1:] == stored[:-1]) & (writers[1:] != writers[:-1])).any():
            raise FindingError(f"{self.kernel}: race, two programs store to one address")
        loaded, readers = self._flat("load")
        if not (len(stored) and len(loaded)):
            return
        position = np.searchsorted(stored, loaded).clip(max=len(stored) - 1)
        if ((stored[position] == loaded) & (writers[position] != readers)).any():
            raise FindingError(f"{self.kernel}: race, a program loads what another stores")

    def _flat(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        parts = self.accesses[kind]
        addresses = np.concatenate([part for part, _ in parts] or [np.empty(0, np.int64)])
        programs = [np.full(len(part), program, np.int64) for part, program in parts]
        return addresses, np.concatenate(programs or [np.empty(0, np.int64)])


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last address of a tensor's elements, the last exclusive."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


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

    GridExecutor.__call__, interpreter._implicit_cvt = checked_call, marked
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    try:
        yield kernels
    finally:
        GridExecutor.__call__, interpreter._implicit_cvt = call, convert
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
