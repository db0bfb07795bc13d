"""Values against the types and bounds that a dataclass declares. pydantic checks, the messages are ours."""

import dataclasses
import difflib
import json
import reprlib
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from lejepa_fast.errors import UsageError

if TYPE_CHECKING:
    import pydantic

T = TypeVar("T")


def validated(kind: type[T], values: Any, where: str = "", *, strict: bool = False) -> T:
    """Make a dataclass of values that fit JSON.

    Args:
        kind: the dataclass; its sections are dataclasses themselves.
        values: a dictionary by field.
        where: begins the message.
        strict: convert nothing, not even "3" to 3.

    Raises:
        UsageError: names the first field that is wrong, what was expected and what came.
    """
    import pydantic

    try:
        text = json.dumps(values, default=repr)
        return pydantic.TypeAdapter(kind).validate_json(text, strict=strict or None)
    except pydantic.ValidationError as error:
        raise UsageError(where + _first_error(kind, error)) from error


def _first_error(kind: type, error: "pydantic.ValidationError") -> str:
    """Return `section.field: expected ..., got ...` for the first field that pydantic refuses."""
    kinds = typing.get_type_hints(kind)

    def key(location: tuple[int | str, ...]) -> str:  # without union members and indices
        in_section = location and dataclasses.is_dataclass(kinds.get(str(location[0])))
        return ".".join(map(str, location[: 2 if in_section else 1]))

    found = [(key(each["loc"]), each) for each in error.errors(include_url=False)]
    name, first = found[0]
    if first["type"] == "unexpected_keyword_argument":
        section, _, last = name.rpartition(".")
        known = typing.get_type_hints(kinds[section]) if section else kinds
        near = difflib.get_close_matches(last, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{section + ': ' if section else ''}unknown key {last!r}; {hint}"
    if first["type"] == "missing" and name.count(".") + 1 == len(first["loc"]):
        return f"{name}: expected a value, got none"
    expected = " or ".join(dict.fromkeys(each["msg"] for other, each in found if other == name))
    for theirs, ours in (
        ("Input should be ", ""),
        ("Field required", "all of its values"),
        ("greater than or equal to", "at least"),
        ("less than or equal to", "at most"),
        ("greater than", "above"),
        ("less than", "below"),
    ):
        expected = expected.replace(theirs, ours)
    return f"{name + ': ' if name else ''}expected {expected}, got {reprlib.repr(first['input'])}"
