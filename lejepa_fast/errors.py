"""Errors of the command-line programs, each printed as one line with an exit code, and missing extras.

The library itself raises `ValueError` and `TypeError`; both classes here derive from the built-in
errors, so a caller who imports the library never needs to know them.
"""

import importlib.util
import sys
from pathlib import Path


def printable(text: str) -> str:
    """`text` for a one-line message. Line breaks, and bytes of file names that are not UTF-8, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(ValueError):
    """What the user asked for cannot be done: wrong path, option or input. Exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may name files


class RunError(RuntimeError):
    """The run failed on the way: disk full, unreadable data, non-finite loss. Exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def first_line(error: BaseException | None) -> str:
    """First line of another library's error message, or the name of its class if there is no message."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def require_extra(extra: str, *modules: str) -> None:
    """Check that the modules of an optional extra are installed, without importing them.

    Args:
        extra: name of the extra in pyproject.toml.
        modules: import names of what is needed.

    Raises:
        ModuleNotFoundError: a module is missing; the message names it and the extra to install. In our own
            commands: SystemExit with code 2 after printing that line.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if not missing:
        return
    message = f"{', '.join(missing)}: not installed; run: pip install 'lejepa_fast[{extra}]'"
    program, package = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent
    scripts = (package, (package / "train").resolve())
    if program.name.startswith("lejepa-") or any(folder in program.parents for folder in scripts):
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)
    raise ModuleNotFoundError(message, name=missing[0])
