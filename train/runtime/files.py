"""Writing files so that a reader finds the whole file or none, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lejepa_fast.errors import RunError

# Marks our unfinished files: a process that was killed while writing leaves one, and the next run of the
# same folder removes it.
UNFINISHED = ".unfinished"


class _RememberingFile:
    """A file that keeps the first OSError of `write`: PyTorch's writer may report another error instead."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._raw.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._raw.flush()


def write_atomically(path: Path, fill: Callable[[IO[bytes]], object], *, way_out: str) -> None:
    """Let `fill` write into a temporary file beside `path`, sync it to the disk and rename it to `path`.

    Raises RunError, naming the path, the reason and `way_out`, where the file system refuses; then no
    partial file is left and an earlier file at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    remembering: _RememberingFile | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as raw:
            remembering = _RememberingFile(raw)
            fill(remembering)  # type: ignore[arg-type]
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = (remembering.error if remembering else None) or error
        if isinstance(cause, OSError):
            raise RunError(f"cannot write {path}: {cause.strerror or cause}; {way_out}") from error
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half written in `folder`."""
    for path in folder.glob(f".*{UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make `path` and its parents; RunError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {path}: {error.strerror}; choose another --out") from error


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
