"""One trainer to a run folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from lejepa_fast.errors import UsageError

log = logging.getLogger("lejepa_fast.train")

NAME = "trainer.lock"


class RunLock:
    """Held by the process that trains in a folder, until it is released or the process ends, however it ends.

    On network file systems it holds between machines where the server has locks; where it has none, a warning
    says so and the run goes on.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / NAME
        self._file: int | None = None

    def take(self) -> None:
        """UsageError, naming who trains there, if another process holds it. The folder must exist."""
        if self._file is not None:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            raise UsageError(
                f"out: another trainer{f' ({owner})' if owner else ''} is running in {self._path.parent}; "
                "choose another --out, or wait for it"
            ) from error
        except OSError as error:
            os.close(file)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            log.warning("%s: no locks on this file system; start no second trainer there", self._path.parent)
            return
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            # A forked loader worker that still lives has the file open too: closing it here frees nothing.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None
