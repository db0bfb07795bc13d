"""Files that are written whole or not at all, the rows of metrics.jsonl, and the lock on the run folder."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.regular_files import open_regular

log = logging.getLogger("lejepa_fast.train")

UNFINISHED = ".unfinished"
"""Suffix of files and folders that are being written; the next run removes those of a killed process."""


@contextlib.contextmanager
def disk_errors_named(path: Path, way_out: str) -> Iterator[None]:
    """Turn an OSError into a RunError that names the path, the reason and what the user can do."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; {way_out}") from error


def write_atomically(path: Path, content: bytes, *, way_out: str) -> None:
    """Write a temporary file beside `path`, sync it to the disk and rename it to `path`.

    RunError, which ends with `way_out`, if the file system refuses; an earlier file at `path` then stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    with disk_errors_named(path, way_out):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(temporary, content)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, values: Mapping[str, Any], *, way_out: str) -> None:
    """Write values as indented JSON, as `write_atomically` does."""
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode(), way_out=way_out)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files and folders that a killed process left in `folder`."""
    for path in folder.glob(f".*{UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; [] if it does not exist. Other lines than rows with a kind and a step
    are skipped with a warning (power cut, edited by hand). RunError if the file cannot be read."""
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}; move it elsewhere") from error
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # bytes that are not UTF-8 are a ValueError
            row = None
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and type(row.get("step")) is int:
            rows.append(row)
    if skipped := len(lines) - len(rows):
        log.warning("%s: skipped %d line(s) that are no rows", path, skipped)
    return rows


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
            RunError: the file system refuses it.
        """
        if self._file is not None:
            return
        with disk_errors_named(self._path, "choose another --out"):
            self._file = self._locked()
        # A forked process may outlive the trainer, and would hold the lock.
        os.register_at_fork(after_in_child=self._leave)

    def _locked(self) -> int | None:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                log.warning("%s: no locks on this file system; start no second trainer there", self._path)
                return None
            if not isinstance(error, BlockingIOError):
                raise
            raise UsageError(
                f"out: another trainer{f' ({owner})' if owner else ''} is running in "
                f"{self._path.parent}; choose another --out, or wait for it"
            ) from error
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return file

    def _leave(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._file is not None:
            # Closing alone would not release it if a process that was not forked by Python shares the file.
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._leave()
