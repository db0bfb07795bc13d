"""SIGTERM and Ctrl-C: finish the step, save a checkpoint, exit. A killed torchrun: exit at once."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A signal ended the run and its state is saved. Not an `Exception`: error handlers must not catch it."""

    def __init__(self, message: str, signum: int):
        super().__init__(message, signum)
        self.signum = signum

    def __str__(self) -> str:
        return str(self.args[0])


def end_with_torchrun() -> None:
    """Let the kernel send SIGKILL to this process when its parent ends, if that is torchrun on Linux.

    A torchrun that is killed cannot end its trainers, which would go on and hold the GPUs and the run folder.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent, set_death_signal = os.getppid(), 1  # PR_SET_PDEATHSIG, see man 2 prctl
    ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


class SignalWatch:
    """Context in which SIGTERM and SIGINT set `signum` instead of ending the process.

    The training checks `requested` after every step. Inside `exit_at_once` a signal raises Interrupted. A
    second Ctrl-C raises KeyboardInterrupt anywhere. Outside the main thread, where Python has no signals,
    nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._exit_message: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked this process to stop."""
        return self.signum is not None

    @contextmanager
    def exit_at_once(self, message: str) -> Iterator[None]:
        """Raise Interrupted(message) on a signal, also on an earlier one. For code with nothing to save."""
        if self.signum is not None:
            raise Interrupted(message, self.signum)
        self._exit_message = message
        try:
            yield
        finally:
            self._exit_message = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._handle)

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if self._exit_message is not None:
            raise Interrupted(self._exit_message, signum)
