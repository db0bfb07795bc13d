"""Which implementation of SIGReg runs, and what each one refuses."""

import functools
import importlib
import logging
import os
from typing import Any, Literal

import torch
from torch import Tensor

from . import triton_operators
from .reference import transforming

Implementation = Literal["auto", "torch", "triton", "reference"]
Chosen = Literal["torch", "triton", "reference"]
Precision = Literal["ieee", "tf32x3", "tf32"]

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
logger = logging.getLogger("lejepa_fast")
logged_choices: set[tuple[str, str]] = set()
"""(device type, reason) of the choices of "auto" that have been logged."""


def resolve_implementation(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Chosen:
    """The implementation that `impl` means for tensors of a device and dtype.

    "auto" takes the Triton kernels on a GPU (CUDA or ROCm) that can run them on this dtype, else the
    streaming implementation. Each choice is logged once with its reason, as a warning where a GPU has to do
    without the kernels.

    Raises:
        ValueError, TypeError: an implementation that cannot run here; the message names one that can.
    """
    if impl == "triton":
        problem = triton_operators.why_not(device, dtype)
        if problem is not None:
            raise (TypeError if dtype not in triton_operators.DTYPES else ValueError)(problem)
        return "triton"
    if impl in ("torch", "reference"):
        return impl  # type: ignore[return-value]
    chosen: Chosen = "torch"
    why = "the kernels are for GPUs"
    if device.type == "cuda":  # also ROCm
        problem = triton_operators.why_not(device, dtype)
        if problem is None:
            chosen, why = "triton", "kernels for this GPU"
        else:
            why = problem.removesuffix("; use impl='torch'")
    if not torch.compiler.is_compiling() and (device.type, why) not in logged_choices:
        logged_choices.add((device.type, why))
        level = logging.WARNING if device.type == "cuda" and chosen != "triton" else logging.INFO
        logger.log(level, "SIGReg impl='auto' takes %r on %s: %s", chosen, device.type, why)
    return chosen


def choose(impl: str, x: Tensor, precision: str | None, *, several_ranks: bool) -> Chosen:
    """The implementation for embeddings x, after checking what it cannot do.

    Raises:
        ValueError, TypeError: as `resolve_implementation`, or the device lacks `precision`.
        RuntimeError: inside a `torch.func` transform or forward-mode differentiation, except for "reference"
            without a process group. Registered operators take no part in transforms: some raise from deep
            inside, and forward mode would silently drop the tangent.
    """
    chosen = resolve_implementation(impl, x.device, x.dtype)
    if transforming() and chosen != "reference":
        raise RuntimeError(
            "sigreg: torch.func transforms (grad, vmap, jvp, ...) and forward-mode differentiation are "
            f"supported by impl='reference' only, got impl={chosen!r}; choose 'reference', or take the "
            "gradient by backward() or torch.autograd.grad"
        )
    if transforming() and several_ranks:
        raise RuntimeError(
            "sync: expected False inside torch.func transforms and forward-mode differentiation, which do "
            "not reach other ranks, got True on several ranks"
        )
    problem = triton_operators.why_not_precision(x.device, precision) if chosen == "triton" else None
    if problem is not None:
        raise ValueError(problem)
    return chosen


def refuse_gradients(chosen: str, other: str, **arguments: Tensor | None) -> None:
    """Raise ValueError if an argument needs a gradient that `chosen` lacks and `other` has."""
    for name, tensor in arguments.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor without gradient for impl={chosen!r}, got requires_grad=True; "
                f"detach it or choose impl={other!r}"
            )


@functools.cache
def compiled_tiles() -> Any:
    """The module `cpu_tiles`; None without Numba, or where it is not to compile (NUMBA_DISABLE_JIT).

    Warns where Numba does not work.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return None
    try:
        return importlib.import_module(".cpu_tiles", __package__)
    except Exception as failure:  # compilers raise anything
        if not isinstance(failure, ModuleNotFoundError) or failure.name not in ("numba", "numpy"):
            logger.warning("SIGReg on the CPU does without Numba, which is slower: %r", failure)
        return None
