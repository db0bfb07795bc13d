"""Errors that the command-line programs turn into one line and an exit code.

The library itself raises `ValueError` and `TypeError`; both classes here derive from the built-in
errors, so a caller who imports the library never needs to know them.
"""

from __future__ import annotations


class UsageError(ValueError):
    """What the user asked for cannot be done: wrong path, option or input. Exit code 2."""


class RunError(RuntimeError):
    """The run failed on the way: disk full, unreadable data, non-finite loss. Exit code 1."""


def first_line(error: BaseException | None) -> str:
    """What an error of another library says, short enough for one of ours; its kind where it says nothing."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
