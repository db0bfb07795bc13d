"""A lock on the run folder, so that only one trainer writes to it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from lejepa_fast.errors import UsageError

log = logging.getLogger("lejepa_fast.train")


class RunLock:
    """A `flock` on RUN/trainer.lock. The kernel releases it when the process ends, however it ends.

    On a network file system it holds between machines if the server supports locks; if not, a warning is
    logged and the run continues without a lock.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / "trainer.lock"
        self._file: int | None = None

    def take(self) -> None:
        """Take the lock, unless it is held already. The folder must exist.

        Raises:
            UsageError: another process holds it; the message names the process and its machine.
        """
        if self._file is not None:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            if isinstance(error, BlockingIOError):
                raise UsageError(
                    f"out: another trainer{f' ({owner})' if owner else ''} is running in "
                    f"{self._path.parent}; choose another --out, or wait for it"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            log.warning("%s: this file system has no locks; do not start a second trainer there", self._path)
            return
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file = file

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._file is not None:
            # Closing alone would not release it: forked loader workers share the open file.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None
