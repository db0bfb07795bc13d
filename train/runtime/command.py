"""Shared by the commands: options from dataclasses, log lines, error lines and exit codes."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.runtime.signals import Interrupted

C = TypeVar("C")

_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = " -─│╭╮╰╯┌┐└┘├┤━┃"
_UNKNOWN = "Unrecognized options: "


def parse_options(
    cls: Callable[..., C], argv: Sequence[str], *, description: str, default: C | None = None
) -> C:
    """Parse a command line into the dataclass `cls`; `--help` prints the options and exits with code 0.

    Raises:
        UsageError: an unknown option or a bad value, in one line.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=list(argv), description=description, **given)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_message_of(printed.getvalue())) from None


def _message_of(box: str) -> str:
    """The message in tyro's box of text, in one line: its first paragraph and the option it suggests."""
    paragraphs: list[list[str]] = [[]]
    for line in _COLORS.sub("", box).splitlines()[1:]:
        if line.strip(_FRAME):
            paragraphs[-1].append(line.strip(" │┃"))
        elif paragraphs[-1]:
            paragraphs.append([])  # a rule ends a paragraph
    message = " ".join(paragraphs[0]) or "these options cannot be parsed"
    if not message.startswith(_UNKNOWN):
        return message.rstrip(".") + "; see --help"
    option = message.removeprefix(_UNKNOWN).split(",")[0].partition("=")[0]
    if not option.startswith("-"):
        return f"unexpected argument {option!r}; see --help"
    suggested = re.findall(r"(?<=[ ,])--[\w.-]+", " " + " ".join(paragraphs[1][:2])) if paragraphs[1:] else []
    if "Perhaps you meant:" not in paragraphs[1][:1] or not suggested:
        return f"unknown option {option}; see --help for all options"
    negated = [name for name in suggested if option.startswith("--no-") and "no-" in name]
    return f"unknown option {option}; did you mean {(negated or suggested)[0]}?"


def run_command(
    work: Callable[[], object], *, who: str = "", quiet: Callable[[BaseException], bool] = lambda error: False
) -> int:
    """Run `work` and return the exit code. Expected failures print one line to stderr, not a traceback.

    Args:
        work: raises UsageError (exit code 2), RunError (1), Interrupted (0 after SIGTERM, else 128 + signal)
            or KeyboardInterrupt (130). Other exceptions are defects and are not caught.
        who: names this process in the line, if there are several.
        quiet: whether another process prints the error, so that this one need not.
    """
    try:
        work()
        return 0
    except (UsageError, RunError) as error:
        if not quiet(error):
            print(f"error{who}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Interrupted as interruption:
        if not quiet(interruption):
            print(interruption, file=sys.stderr)
        return 0 if interruption.signum == signal.SIGTERM else 128 + interruption.signum
    except KeyboardInterrupt:
        print("interrupted; saved checkpoints are untouched", file=sys.stderr)
        return 128 + signal.SIGINT


class _BarSafeHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_stderr(*, main_process: bool = True, who: str = "") -> None:
    """Send the library's log to stderr: all of it from rank 0, warnings only from other ranks."""
    logger = logging.getLogger("lejepa_fast")
    if not logger.handlers:
        handler = _BarSafeHandler()
        handler.setFormatter(logging.Formatter("%(message)s" if main_process else f"%(message)s{who}"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    logger.propagate = False
