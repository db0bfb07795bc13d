"""A stand-in for a GPU driver: kernels compiled for sm_90 are launched into nothing, on tensors of the CPU.

The host does all that it does with a GPU: it checks arguments, looks up the compiled kernel and calls the
launcher. Outputs stay uninitialized.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from lejepa_fast import triton_operators
from lejepa_fast.kernels import backward, configs, runtime

OnLaunch = Callable[[str, tuple[int, int, int], tuple[Any, ...]], None]
"""Gets the name, the grid and all arguments of a kernel."""


class StandIn:
    """Takes the place of Triton's active driver."""

    def __init__(self, on_launch: OnLaunch | None) -> None:
        self.on_launch = on_launch
        properties = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (1, name, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls to launch a compiled kernel. Triton keeps it for as long as the process lives."""

        def launch(*given: Any) -> None:
            if on_launch := triton.runtime.driver.active.on_launch:
                on_launch(given[4], given[:3], given[9:])

        return launch


@contextlib.contextmanager
def standing_in(on_launch: OnLaunch | None = None) -> Iterator[None]:
    """Run the Triton kernels' host side on tensors of the CPU, as for an sm_90 GPU."""

    def shipped(device: Any, itemsize: int) -> configs.Config:
        return configs.shipped_config("sm_90", itemsize)

    def able(device: Any, dtype: Any) -> None:
        return None

    def precision(device: Any) -> str:
        return "tf32x3"

    with (
        mock.patch.object(triton.runtime.driver, "_active", StandIn(on_launch)),
        mock.patch.object(triton_operators, "why_not", able),
        mock.patch.object(triton_operators, "default_precision", precision),
        mock.patch.object(triton_operators, "get_config", shipped),
        mock.patch.object(backward, "get_config", shipped),
        mock.patch.object(runtime, "_launches", {}),
    ):
        yield
