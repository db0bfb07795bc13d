"""Files that are written whole or not at all, and the rows of metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lejepa_fast.errors import RunError

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


def write_atomically(path: Path, fill: Callable[[IO[bytes]], object], *, way_out: str) -> None:
    """Let `fill` write a temporary file beside `path`, sync it to the disk and rename it to `path`.

    RunError, which ends with the advice `way_out`, if the file system refuses; then no partial file is left
    and an earlier file at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    with disk_errors_named(path, way_out):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files and folders that a killed process left in `folder`."""
    for path in folder.glob(f".*{UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make `path` and its parents; RunError if that fails."""
    with disk_errors_named(path, "choose another --out"):
        path.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder to the disk, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; [] if it does not exist. Incomplete lines are skipped (power cut)."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            log.warning("%s: skipped a line that is not JSON", path)
    return rows
