"""Which backend makes the batches, and why."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
from typing import NamedTuple

import torch

from lejepa_fast.data.backends.base import Backend
from lejepa_fast.data.backends.torchvision_backend import TorchvisionBackend
from lejepa_fast.data.views import EvalPlan, TrainPlan
from lejepa_fast.errors import UsageError

log = logging.getLogger("lejepa_fast.data")

BACKENDS = ("auto", "dali", "torchvision")
DALI_VIEWS = ("auto", "numba", "operators")


class Choice(NamedTuple):
    """A backend's name and the reason for it."""

    name: str
    reason: str


def choose_backend(name: str, device: torch.device | None) -> Choice:
    """Resolve "auto" for a loader whose batches go to `device` (None: CPU).

    Raises `UsageError` for an unknown name, and for "dali" where DALI cannot run.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    if name == "torchvision":
        return Choice(name, "as asked for")
    on_gpu = device is not None and device.type == "cuda"
    fault = dali_fault(on_gpu)
    if name == "dali":
        if fault:
            raise UsageError(f"backend 'dali': {fault}, or use backend='torchvision'")
        return Choice(name, "as asked for")
    if fault:
        return Choice("torchvision", fault)
    if on_gpu:
        return Choice("dali", "DALI and a GPU are there")
    if missing := numba_fault():
        return Choice("torchvision", f"on the CPU, DALI is the faster one only with numba, and {missing}")
    return Choice("dali", "DALI and numba are there")


def dali_fault(on_gpu: bool) -> str | None:
    """Why DALI cannot be used, with the package to install; None if it can."""
    package = wanted_package(torch.version.cuda)
    if not _is_installed():
        return f"DALI is not installed: pip install {package}"
    try:
        dali = importlib.import_module("nvidia.dali")
        importlib.import_module("nvidia.dali.fn")
    except Exception as error:  # a library that cannot be loaded: ImportError, OSError, RuntimeError
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"DALI cannot be loaded ({first}): pip install {package}"
    if not on_gpu:
        return None
    built = _major(str(getattr(dali, "__cuda_version__", "")))
    available, driver = torch.cuda.is_available(), _driver_version()
    if available and not (built and driver):
        _say_unchecked()
    return cuda_fault(built, available, driver)


def cuda_fault(built: int, available: bool, driver: int) -> str | None:
    """Why a DALI built for CUDA `built` (13) cannot use the GPU.

    driver: the newest CUDA that it supports (12080 for 12.8). 0 for what is not known.
    """
    if not available:
        return "there is no CUDA device"
    if driver and built > driver // 1000:
        supported = f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"DALI is built for CUDA {built}, the driver supports CUDA {supported}: "
            f"pip install {wanted_package(supported)} in its place"
        )
    return None


def _major(version: str) -> int:
    """13 of "13.4.92", "13492" (as DALI has it, without the dots) and "13000"; 0 of what is no version."""
    digits = "".join(c for c in version if c.isdigit())
    return int(digits[:2] or 0)


@functools.cache
def _say_unchecked() -> None:
    log.warning(
        "cannot tell whether this build of DALI suits the CUDA driver, as one of their versions is not to be "
        "had; if DALI fails on the GPU, use backend='torchvision'"
    )


@functools.cache
def numba_fault() -> str | None:
    """Why the compiled CPU kernels cannot be used; None if they can. One that is broken is logged, once."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    try:
        importlib.import_module("lejepa_fast.data.backends.cpu_kernels")
    except Exception as error:  # another NumPy than numba wants, a cache that cannot be written, ...
        first = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("the compiled CPU kernels cannot be used: numba says %r", first)
        return f"numba is broken ({first}): pip install --upgrade numba, or set NUMBA_CACHE_DIR"
    return None


def wanted_package(cuda: str | None) -> str:
    """The build of DALI for a CUDA version such as "12.8"; None (no CUDA) takes the newest."""
    major = int(cuda.split(".")[0]) if cuda else 13
    return f"nvidia-dali-cuda{min(max(major, 12), 13)}0"


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # no package `nvidia` at all
        return False


def _driver_version() -> int:
    """CUDA version that the driver supports, 12080 for 12.8; 0 when it is not to be had."""
    version = ctypes.c_int(0)
    try:
        fault = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if fault else version.value


def check_loading(*, prefetch: int, hw_decoder_load: float, dali_views: str) -> None:
    """Raise `UsageError` for settings of the loading that cannot work."""
    if prefetch < 1:
        raise UsageError(f"prefetch must be at least 1 batch; got {prefetch}")
    if not 0.0 <= hw_decoder_load <= 1.0:
        raise UsageError(f"hw_decoder_load must lie in [0, 1]; got {hw_decoder_load}")
    if dali_views not in DALI_VIEWS:
        raise UsageError(f"dali_views must be one of {', '.join(map(repr, DALI_VIEWS))}; got {dali_views!r}")


def make_backend(
    name: str,
    plan: TrainPlan | EvalPlan,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device | None,
    start_method: str | None,
    prefetch: int,
    hw_decoder_load: float,
    dali_views: str,
) -> tuple[Backend, str]:
    """The backend and the reason for the choice. The place where a further backend goes in."""
    if num_workers < 0:
        raise UsageError(f"num_workers must be 0 or more; got {num_workers}")
    check_loading(prefetch=prefetch, hw_decoder_load=hw_decoder_load, dali_views=dali_views)
    if start_method not in (None, "fork", "spawn", "forkserver"):
        raise UsageError(f"start_method must be 'fork', 'spawn', 'forkserver' or None; got {start_method!r}")
    choice = choose_backend(name, device)
    if choice.name == "dali":
        from lejepa_fast.data.backends.dali_backend import DaliBackend

        made = DaliBackend(
            plan,
            batch_size=batch_size,
            threads=num_workers,
            device=device,
            prefetch=prefetch,
            hw_decoder_load=hw_decoder_load,
            views=dali_views,
        )
        return made, f"{choice.reason}; views by {made.views}"
    pin_memory = device is not None and device.type == "cuda"
    return (
        TorchvisionBackend(
            plan,
            num_workers=num_workers,
            pin_memory=pin_memory,
            start_method=start_method,
            prefetch=prefetch,
        ),
        choice.reason,
    )
