"""Values against the types and bounds that a dataclass declares. pydantic checks, the messages are ours."""

import dataclasses
import difflib
import itertools
import json
import re
import reprlib
import typing
from collections.abc import Sequence
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

    def unfit(value: Any) -> str:
        if strict:  # text fits no number, and the message shows it
            return repr(value)
        raise UsageError(f"{where}expected values that fit JSON, got {reprlib.repr(value)}")

    try:
        text = json.dumps(values, default=unfit)
        return pydantic.TypeAdapter(kind).validate_json(text, strict=strict or None)
    except pydantic.ValidationError as error:
        raise UsageError(where + _first_error(kind, error)) from error


def check_bounds(options: Any) -> None:
    """Raise UsageError for a value of a dataclass that does not fit the type and bounds of its field."""
    import pydantic  # after --help

    kind = type(options)
    validated(kind, pydantic.TypeAdapter(kind).dump_python(options, mode="json", warnings=False))


def _first_error(kind: type, error: "pydantic.ValidationError") -> str:
    """Return `section.field: expected ..., got ...` for the first field that pydantic refuses."""
    kinds = typing.get_type_hints(kind)

    def key(location: Sequence[int | str]) -> str:  # without the members of a union
        depth = 1 + dataclasses.is_dataclass(kinds.get(str(location[0]))) if location else 0
        indices = itertools.takewhile(lambda part: isinstance(part, int), location[depth:])
        return ".".join(map(str, location[:depth])) + "".join(f"[{index}]" for index in indices)

    found = [(key(each["loc"]), each) for each in error.errors(include_url=False)]
    name, first = found[0]
    if first["type"] == "unexpected_keyword_argument":
        *section, last = map(str, first["loc"])
        known = [field.name for field in dataclasses.fields(kinds[section[0]] if section else kind)]
        near = difflib.get_close_matches(last, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{''.join(f'{part}: ' for part in section)}unknown key {last!r}; {hint}"
    if first["type"] == "missing":
        if isinstance(first["loc"][-1], int):
            return f"{key(first['loc'][:-1])}: expected more values, got {reprlib.repr(first['input'])}"
        return f"{name}: expected a value, got none"
    expected = " or ".join(dict.fromkeys(each["msg"] for other, each in found if other == name))
    for theirs, ours in (
        ("Input should be ", ""),
        ("greater than or equal to", "at least"),
        ("less than or equal to", "at most"),
        ("greater than", "above"),
        ("less than", "below"),
    ):
        expected = expected.replace(theirs, ours)
    if first["input"] != first["input"]:  # NaN lies within no bounds
        expected = "a number"
    expected = re.sub(r"^(Tuple|Dictionary) should have | after validation, not \d+$", "", expected)
    return f"{name + ': ' if name else ''}expected {expected}, got {reprlib.repr(first['input'])}"
