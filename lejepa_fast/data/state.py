"""The saved state of a loader: checks each field, whoever wrote it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

from lejepa_fast.errors import UsageError


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _whole(value) and value >= 0


def _pairs(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and _count(pair[0]) and isinstance(pair[1], str)
        for pair in value
    )


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epoch": ("a whole number, 0 or more", _count),
    "images_seen": ("a whole number, 0 or more", _count),
    "seed": ("a whole number", _whole),
    "num_images": ("a whole number, 0 or more", _count),
    "names_sha256": ("a text", lambda value: isinstance(value, str)),
    "bad": ("a list of pairs [number of the image, reason]", _pairs),
}
_NEEDED = ("epoch", "images_seen")


def check_state(state: Mapping[str, Any]) -> None:
    """Check the type of each field of a loader's state; only the epoch and the position must be there.

    Raises:
        UsageError: Names the first field that is wrong, what was expected and what came.
    """
    if not isinstance(state, Mapping):
        raise UsageError(f"a loader state must be what state_dict() returned; got {type(state).__name__}")
    for name, (expected, fits) in _FIELDS.items():
        if (name in state or name in _NEEDED) and not fits(state.get(name)):
            raise wrong_field(state, name, expected)


def wrong_field(state: Mapping[str, Any], name: str, expected: str) -> UsageError:
    """The error for a field that is not what it must be."""
    got = reprlib.repr(state[name]) if name in state else "none"
    return UsageError(
        f"loader state: {name!r} must be {expected}; got {got}; use the state of a checkpoint as it was saved"
    )
