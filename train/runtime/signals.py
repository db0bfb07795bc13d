"""SIGTERM and Ctrl-C: finish the step, save a checkpoint, leave."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(BaseException):
    """The run was told to end and its state is saved. `args[0]` is the message, `signum` the signal.

    No `Exception`, like KeyboardInterrupt: code that survives errors must not survive this.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class SignalWatch:
    """Context in which SIGTERM and SIGINT set `requested` instead of ending the process.

    The training loop looks at it at the end of every step. Within `leaving_at_once` a signal raises
    Interrupted on the spot. A second SIGINT ends the process at once, anywhere. Elsewhere than in the
    main thread all this does nothing: Python has signals there only.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._process = os.getpid()
        self._message: str | None = None  # of the Interrupted to raise on the spot
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @contextmanager
    def leaving_at_once(self, message: str) -> Iterator[None]:
        """Where all that matters is saved already: a signal, also an earlier one, raises Interrupted."""
        if self.signum is not None:
            raise Interrupted(message, self.signum)
        self._message = message
        try:
            yield
        finally:
            self._message = None

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked loader worker inherits this handler. Ctrl-C reaches it with the whole group, and the
            # trainer still needs its batch; SIGTERM is how it is ended.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = number
        if self._message is not None:
            raise Interrupted(self._message, number)
