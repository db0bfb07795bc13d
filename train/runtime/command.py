"""Shared by the commands: options from dataclasses, log lines, error lines and exit codes."""

import contextlib
import difflib
import functools
import io
import itertools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

from lejepa_fast.data.validation import check_bounds
from lejepa_fast.errors import RunError, UsageError, printable
from lejepa_fast.train.runtime.signals import Interrupted

C = TypeVar("C")


def parse_options(
    cls: Callable[..., C],
    argv: Sequence[str] | None,
    *,
    description: str | None = None,
    default: C | None = None,
) -> C:
    """Parse a command line into the dataclass `cls`; `--help` prints the options and exits with code 0.

    Args:
        cls: the dataclass; its docstring is the description unless one is given.
        argv: the arguments; None: those of this process.
        description: begins the text of `--help`.
        default: supplies the options that are not given; None: the defaults of `cls`.

    Raises:
        UsageError: an unknown option, a bad value, or one beyond the bounds of its field, in one line.
    """
    argv = checked_arguments(argv)
    given: dict[str, Any] = {} if default is None else {"default": default}
    parse = functools.partial(tyro.cli, cls, description=description, return_unknown_args=True, **given)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options, unknown = parse(args=argv)
    except SystemExit as end:
        if not end.code:
            raise
        # A box, drawn or in ASCII: title, perhaps a rule, message, rule.
        lines = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue()).splitlines()[1:]
        texts = itertools.groupby(lines, lambda line: bool(line.strip(" -─│╭╮╰╯")))
        message = next(" ".join(line.strip(" │") for line in text) for found, text in texts if found)
        raise UsageError(f"{message.rstrip('.')}; see --help") from None
    if not unknown:
        check_bounds(options)
        return options
    option = unknown[0].partition("=")[0]
    if not option.startswith("-"):
        raise UsageError(f"unexpected argument {option!r}; see --help")
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
        parse(args=["--help"])
    names = re.findall(r"(?<=--)[\w.-]+", printed.getvalue())
    near = difflib.get_close_matches(option.lstrip("-"), names, n=1)
    hint = f"did you mean --{near[0]}?" if near else "see --help for all options"
    raise UsageError(f"unknown option {option}; {hint}")


def checked_arguments(argv: Sequence[str] | None) -> Sequence[str]:
    """Return the arguments, None: those of this process; UsageError for one that is empty or not UTF-8."""
    argv = sys.argv[1:] if argv is None else argv
    for option, value in itertools.pairwise(["argument", *argv]):
        if not value or (value.startswith("--") and value.endswith("=")):
            empty = value.rstrip("=") or option
            raise UsageError(f"{empty}: expected a value, got nothing; is a variable of the shell unset?")
        if re.search(r"[\ud800-\udfff]", value):  # how Python holds other bytes
            raise UsageError(f"{option}: expected text in UTF-8, got {value!r}; give it another name")
    return argv


def run_with_options(cls: Callable[..., C], work: Callable[[C], object], argv: Sequence[str] | None) -> int:
    """Run `work` on the options of a command line; log to stderr and return the exit code."""
    log_to_stderr()
    let_threads_sleep()
    return run_command(lambda: work(parse_options(cls, argv)))


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


def let_threads_sleep() -> None:
    """Let idle OpenMP threads of this process sleep, unless OMP_WAIT_POLICY is set; before PyTorch is loaded.

    By default they spin at barriers and take the CPU from loader threads. Some microseconds of it pay: small
    networks reach a barrier so often that falling asleep costs more.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class _BarSafeHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)  # it may name files


def log_to_stderr(*, main_process: bool = True, who: str = "") -> None:
    """Send the library's log to stderr: all of it from rank 0, warnings only from other ranks."""
    logger = logging.getLogger("lejepa_fast")
    if not logger.handlers:
        handler = _BarSafeHandler()
        handler.setFormatter(logging.Formatter("%(message)s" if main_process else f"%(message)s{who}"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    logger.propagate = False


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows of a table as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)
