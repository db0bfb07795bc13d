"""Which backend makes the batches, and why."""

import functools
import importlib
import logging

import torch

from lejepa_fast.data.backends.base import Backend, Loading
from lejepa_fast.data.backends.torchvision_backend import TorchvisionBackend
from lejepa_fast.data.views import EvalViews, TrainViews
from lejepa_fast.errors import UsageError, first_line
from lejepa_fast.triton_operators import why_not

log = logging.getLogger("lejepa_fast.data")

BACKENDS = ("auto", "dali", "cpu", "torchvision")


def choose_backend(name: str, device: torch.device | None, channels: int = 3) -> tuple[str, str]:
    """(name, reason) of the backend of a loader whose batches go to `device` (None: the CPU).

    "auto" is "dali" on a GPU where DALI is installed, else "cpu" where Numba is, else "torchvision". Images
    of other `channels` than 3 need "cpu". Raises `UsageError` for a name that is unknown or a backend that
    cannot run here.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    if channels != 3:
        if name not in ("auto", "cpu"):
            raise UsageError(
                f"backend {name!r}: it makes views of 3 channels, not {channels}; use backend='cpu'"
            )
        if fault := numba_fault():
            raise UsageError(f"backend 'cpu': {fault}; no other makes views of {channels} channels")
        return "cpu", f"no other makes views of {channels} channels"
    on_gpu = device is not None and device.type == "cuda"
    if name == "auto":
        reasons = []
        if on_gpu:
            if (fault := dali_fault(True)) is None:
                return "dali", "DALI and a GPU are there"
            reasons.append(fault)
        fault = numba_fault()
        reasons.append(fault or "Numba is there")
        return "torchvision" if fault else "cpu", "; ".join(reasons)
    fault = dali_fault(on_gpu) if name == "dali" else numba_fault() if name == "cpu" else None
    if fault:
        raise UsageError(f"backend {name!r}: {fault}, or use backend='torchvision'")
    return name, "as asked for"


def dali_fault(on_gpu: bool) -> str | None:
    """Why DALI cannot be used, with the package to install; None if it can."""
    package = wanted_package(torch.version.cuda)
    try:
        dali = importlib.import_module("nvidia.dali")
        importlib.import_module("nvidia.dali.fn")
    except Exception as error:  # a library that cannot be loaded: ImportError, OSError, RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name in ("nvidia", "nvidia.dali"):
            return f"DALI is not installed: pip install {package}"
        return f"DALI cannot be loaded ({first_line(error)}): pip install {package}"
    if not on_gpu:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    # "13.4.92", or "13492" without the dots.
    built = int("".join(c for c in str(getattr(dali, "__cuda_version__", "")) if c.isdigit())[:2] or 0)
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # 12080 for 12.8
    if built > driver // 1000:
        supported = f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"DALI is built for CUDA {built}, the driver supports CUDA {supported}: "
            f"pip install {wanted_package(supported)} in its place"
        )
    fault = why_not(torch.device("cuda"), torch.float32)
    return fault and f"the GPU cannot run the Triton kernels for colors ({fault})"


def wanted_package(cuda: str | None) -> str:
    """The build of DALI for a CUDA version such as "12.8"; None (no CUDA) takes the newest."""
    major = int(cuda.split(".")[0]) if cuda else 13
    return f"nvidia-dali-cuda{min(max(major, 12), 13)}0"


@functools.cache
def numba_fault() -> str | None:
    """Why the compiled CPU kernels cannot be used; None if they can. A broken Numba is logged once."""
    try:
        importlib.import_module("lejepa_fast.data.backends.cpu_kernels")
    except Exception as error:  # another NumPy than Numba wants, a cache that cannot be written, ...
        if isinstance(error, ModuleNotFoundError) and error.name == "numba":
            return "Numba is not installed: pip install numba"
        log.warning("the compiled CPU kernels cannot be used: Numba says %r", first_line(error))
        return f"Numba is broken ({first_line(error)}): pip install --upgrade numba, or set NUMBA_CACHE_DIR"
    return None


def make_backend(name: str, views: TrainViews | EvalViews, loading: Loading) -> tuple[Backend, str]:
    """The backend and the reason for the choice. A further backend goes in here."""
    chosen, reason = choose_backend(name, loading.device, views.source.channels)
    if chosen == "dali":
        from lejepa_fast.data.backends.dali_backend import DaliBackend

        return DaliBackend(views, loading), reason
    if chosen == "cpu":
        from lejepa_fast.data.backends.cpu_backend import CpuBackend

        return CpuBackend(views, loading), reason
    return TorchvisionBackend(views, loading), reason
