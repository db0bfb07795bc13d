"""Checks of arguments. Errors read `name: expected ..., got ...`."""

import numbers
from typing import Any

from torch import Tensor


def check_integer(name: str, value: Any, *, at_least: int | None = None) -> None:
    """Raise TypeError unless `value` is an integer (not bool), ValueError if it is below `at_least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_choice(name: str, value: Any, *choices: str | None) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a floating tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")


def check_embeddings(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a floating tensor (..., N, K), not empty but for N."""
    check_tensor(name, value)
    if value.dim() < 2:
        raise ValueError(f"{name}: expected shape (..., N, K), got {tuple(value.shape)}")
    if value.shape[-1] < 1 or value.shape[:-2].numel() < 1:
        raise ValueError(
            f"{name}: expected non-empty view and feature dimensions, got shape {tuple(value.shape)}"
        )


def refuse_double_backward(ctx: Any, grad: Tensor) -> None:
    """The gradient of the operators' gradients: raises RuntimeError."""
    raise RuntimeError(
        "sigreg: double backward is supported by impl='reference' only; choose it to differentiate twice"
    )
