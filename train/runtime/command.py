"""What the commands share: options from dataclasses with one-line errors, log lines, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import logging
import re
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train.runtime.signals import Interrupted

C = TypeVar("C")

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = " -─│╭╮╰╯┌┐└┘├┤━┃"


def parse_options(
    cls: Callable[..., C], argv: Sequence[str], *, description: str, default: C | None = None
) -> C:
    """Fill the dataclass `cls` from a command line; UsageError, of one line, for what does not fit.

    `--help` prints the options and exits with code 0.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options, unknown = tyro.cli(
                cls, args=list(argv), description=description, return_unknown_args=True, **given
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_message_of(printed.getvalue())) from None
    if unknown:
        raise UsageError(_unknown_option(unknown[0], option_names(cls)))
    return options


def option_names(cls: Any) -> list[str]:
    """All options of a dataclass and of the dataclasses in it, aliases first."""
    aliases: list[str] = []
    names: list[str] = []

    def collect(kind: Any, prefix: str) -> None:
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            hint, *notes = typing.get_args(hints[field.name]) or (hints[field.name],)
            name = prefix + field.name.replace("_", "-")
            if dataclasses.is_dataclass(hints[field.name]):
                collect(hints[field.name], f"{name}.")
                continue
            names.append(f"--{name}")
            if hints[field.name] is bool or hint is bool:
                names.append("--" + prefix + "no-" + field.name.replace("_", "-"))
            for note in notes:
                aliases.extend(getattr(note, "aliases", None) or ())

    collect(cls, "")
    return aliases + names


def _unknown_option(given: str, known: Sequence[str]) -> str:
    if not given.startswith("-"):
        return f"unexpected argument {given!r}; see --help"
    asked = given.partition("=")[0].replace("_", "-")
    last = asked.lstrip("-").rpartition(".")[2]
    same = [name for name in known if name.lstrip("-").rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(asked, known, n=1, cutoff=0.7)
    if not near:  # without its section: --momentumm for --optim.momentum
        by_last = {name.lstrip("-").rpartition(".")[2]: name for name in reversed(known)}
        near = [by_last[match] for match in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.7)]
    hint = f"did you mean {near[0]}?" if near else "see --help for all options"
    return f"unknown option {given.partition('=')[0]}; {hint}"


def _message_of(box: str) -> str:
    """The message in tyro's box: what stands between its title and the next rule, on one line."""
    lines = [_COLOURS.sub("", line) for line in box.splitlines()]
    message: list[str] = []
    for line in lines[1:]:
        if line.strip(_FRAME):
            message.append(line.strip(" │┃"))
        elif message:
            break  # the rule after the message
    text = " ".join(message) or " ".join(" ".join(lines).split()) or "these options do not fit"
    return text.rstrip(".") + "; see --help"


def run_command(
    work: Callable[[], object], *, who: str = "", quiet: Callable[[Exception], bool] = lambda error: False
) -> int:
    """Run `work` and return the exit code. The ends that are no defects print one line to stderr.

    `who` names this process in the line, where there are several; errors that are `quiet` are printed by
    another one.
    """
    try:
        work()
        return 0
    except (UsageError, RunError) as error:
        if not quiet(error):
            print(f"error{who}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Interrupted as interruption:
        print(f"{interruption}", file=sys.stderr)
        return 0 if interruption.signum == signal.SIGTERM else 128 + interruption.signum
    except KeyboardInterrupt:
        print("interrupted; what was saved is untouched", file=sys.stderr)
        return 128 + signal.SIGINT


class _BarSafeHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_stderr(*, main_process: bool = True, who: str = "") -> None:
    """Send the library's log there: all of it from rank 0, warnings from the others."""
    logger = logging.getLogger("lejepa_fast")
    if not logger.handlers:
        handler = _BarSafeHandler()
        handler.setFormatter(logging.Formatter("%(message)s" if main_process else f"%(message)s{who}"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    logger.propagate = False
