"""The saved state of a loader: what each of its fields must be, whoever wrote them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

from lejepa_fast.errors import UsageError


def _whole(value: object, least: int = 0) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _listing(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(fits, value))


def _part(value: Any) -> bool:
    """Whether it is a `sampler.Part`, as JSON keeps it."""
    if not _listing(value, _whole) or len(value) != 4:
        return False
    ranks, size, first, last = map(int, value)
    return min(ranks, size) >= 1 and first <= last


_COUNT = "a whole number, 0 or more"
_NUMBER = "a whole number, 1 or more"
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epoch": (_COUNT, _whole),
    "batch": (_COUNT, _whole),
    "world_size": (_NUMBER, lambda value: _whole(value, 1)),
    "global_batch": (_NUMBER, lambda value: _whole(value, 1)),
    "since": (_COUNT, _whole),
    "earlier": (
        "a list of parts [ranks, batch size, first batch, batch after the last]",
        lambda value: _listing(value, _part),
    ),
    "bad": ("a list of numbers of images", lambda value: _listing(value, _whole)),
    "reasons": ("a list of texts", lambda value: _listing(value, lambda reason: isinstance(reason, str))),
}
_NEEDED = ("epoch", "batch")  # older states lack some of the others


def check_fields(state: Mapping[str, Any]) -> None:
    """Raise `UsageError` naming the first field of a loader's state that cannot be one."""
    if not isinstance(state, Mapping):
        raise UsageError(f"a loader state must be what state_dict() has returned; got {type(state).__name__}")
    for name, (expected, fits) in _FIELDS.items():
        if (name in state or name in _NEEDED) and not fits(state.get(name)):
            raise wrong_field(state, name, expected)


def wrong_field(state: Mapping[str, Any], name: str, expected: str) -> UsageError:
    """The error for a field that is not what it must be."""
    got = reprlib.repr(state[name]) if name in state else "none"
    return UsageError(
        f"loader state: {name!r} must be {expected}; got {got}; use the state of a checkpoint as it was saved"
    )
