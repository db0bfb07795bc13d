"""Bad files on the way: written down, replaced by other images, and counted.

A batch keeps its size and every rank its number of batches. The place of a bad image is taken by one that
the epoch would have dropped at its end (the images are seldom a multiple of the batch). Only when those run
out, images from the beginning of the epoch are repeated. Which image comes in is a function of the
schedule and of the set of bad files, in the order of the places; so a resumed run agrees, and so do both
backends as far as they find the same files bad. What was known beforehand, and when another rank's files
become known, makes no difference.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from lejepa_fast.data.sampler import EpochSchedule, Part
from lejepa_fast.data.sources.base import ImageSource
from lejepa_fast.data.sources.decoding import printable
from lejepa_fast.errors import RunError, UsageError

try:
    import fcntl
except ImportError:  # not Linux or macOS: two ranks may write the same line
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("lejepa_fast.data")

DEFAULT_MAX_BAD_FRACTION = 0.05

_REASON_UNKNOWN = "bad in an earlier part of the run"  # of a state that older versions have saved


class Quarantine:
    """The images of a source that are known to be bad.

    file: where they are written, one line each: name, number of the image, reason, with tabs between. Lines
    that are there already and fit the source count as known, so those images are not tried again; several
    ranks may share the file, and then each knows what all have met. What a resumed state knows is added, so
    that it lists every bad image of a run. One that cannot be written raises `UsageError` at once. None: they
    are only kept in memory and logged. max_bad_fraction: more than this share of the source's images stops
    the run with a `RunError`.
    """

    def __init__(
        self,
        source: ImageSource,
        file: str | os.PathLike[str] | None = None,
        *,
        max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
        log_each: bool = True,
    ) -> None:
        if not 0.0 <= max_bad_fraction <= 1.0:
            raise UsageError(f"max_bad_fraction must lie in [0, 1]; got {max_bad_fraction}")
        self._source = source
        self._file = None if file is None else Path(file)
        self._max_bad_fraction, self._log_each = max_bad_fraction, log_each
        self.known: set[int] = set()
        self._reasons: dict[int, str] = {}  # of all that are known, the latest one last
        self._unlisted: dict[int, str] = {}  # those of them that the file does not hold
        self._read_bytes = 0
        self._look_failed = False
        # A backend adds to it in a thread of its own while the trainer asks for the state.
        self._lock = threading.Lock()
        if self._file is not None:
            try:
                if os.path.lexists(self._file):
                    with _open(self._file) as opened:
                        self._take_over(opened)
                else:  # a run that other settings end before its first image leaves no folder
                    _check_writable(self._file.parent)
            except OSError as error:
                raise UsageError(
                    f"quarantine: cannot write {self._file}: {error.strerror}; choose another file, or check "
                    "its rights"
                ) from error
        self._earlier = len(self.known)  # how many were known before this part of the run

    def add(self, index: int, reason: str) -> None:
        """Write image `index` down. Raises `RunError` when there are too many now."""
        with self._lock:
            if index not in self.known and self._list({index: printable(reason)}):
                name = printable(self._source.describe(index))
                level = logging.WARNING if self._log_each else logging.DEBUG
                log.log(level, "quarantined %s: %s", name, printable(reason))
            self._check()

    def learn(self, indices: Sequence[int], reasons: Sequence[str] | None = None) -> None:
        """Take over what a saved state knows, also into the file. reasons: of each; None: not known."""
        reasons = [_REASON_UNKNOWN] * len(indices) if reasons is None else reasons
        with self._lock:
            found = zip(indices, reasons, strict=True)
            if new := {index: printable(reason) for index, reason in found if index not in self.known}:
                self._list(new)
            self._earlier = len(self.known)

    def reasons(self, indices: Iterable[int]) -> list[str]:
        """Why each of these images, which are known, is bad."""
        return [self._reasons[index] for index in indices]

    def refresh(self) -> None:
        """Take over what other ranks have met since; costs a look at the size of the file."""
        with self._lock:
            self._look()

    def check(self) -> None:
        """`refresh`; raises `RunError` when there are too many now."""
        with self._lock:
            self._look()
            self._check()

    def _check(self) -> None:
        count, total = len(self.known), len(self._source)
        # A single file never stops a run that allows for any.
        if not count or count <= max(self._max_bad_fraction * total, self._max_bad_fraction > 0):
            return
        index = next(reversed(self._reasons))
        earlier = ""
        way_out = (
            "list all with 'python -m lejepa_fast.data.commands.verify PATH', then repair or remove them"
        )
        if self._earlier:
            earlier = (
                f" ({self._earlier} of them known from an earlier part of the run or the quarantine file)"
            )
            way_out = (
                "raise max_bad_fraction to go on without them, or repair them and start a new run, "
                "with an empty quarantine file"
            )
        raise RunError(
            f"{count} of {total} images are bad{earlier}, more than the allowed "
            f"{100 * self._max_bad_fraction:g} % (max_bad_fraction); the last one: "
            f"{printable(self._source.describe(index))}: {self._reasons[index]}; {way_out}"
        )

    def _look(self) -> None:
        """Take over the lines that have been added to the file since the last look, by whichever rank."""
        if self._file is None:
            return
        try:
            if self._file.stat().st_size != self._read_bytes:
                with open(self._file, "rb") as file:
                    self._take_over(file.fileno())
        except FileNotFoundError:
            return
        except OSError as error:  # file servers have their moments: it is tried again at the next step
            if not self._look_failed:
                log.warning("cannot read %s: %s; trying again at every step", self._file, error.strerror)
            self._look_failed = True
        else:
            self._look_failed = False

    def _take_over(self, file: int) -> bool:
        """Read what is new in the open file; whether it ends in the middle of a line."""
        size = os.fstat(file).st_size
        if size < self._read_bytes:
            self._read_bytes = 0  # somebody has shortened it, or made it anew
            self._unlisted = dict(self._reasons)
        added = os.pread(file, size - self._read_bytes, self._read_bytes)
        whole, newline, rest = added.rpartition(b"\n")
        self._read_bytes += len(whole + newline)  # of a line that is being written, the end comes later
        for line in whole.decode("utf-8", errors="replace").splitlines():
            name, _, after = line.partition("\t")
            number, _, reason = after.partition("\t")
            index = int(number) if number.isdecimal() and len(number) < 19 else -1
            if 0 <= index < len(self._source) and printable(self._source.describe(index)) == name:
                self._unlisted.pop(index, None)
                self._know({index: reason})
        return bool(rest)

    def _know(self, found: Mapping[int, str]) -> None:
        # In this order: whoever sees a number among the known ones may ask for its reason.
        self._reasons.update({index: found[index] for index in found if index not in self.known})
        self.known.update(found)

    def _list(self, found: dict[int, str]) -> bool:
        """Write images down, with whatever else the file lacks; whether one of them is new to all ranks."""
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with _locked(self._file) as file:
                    torn = self._take_over(file)
                    found = {index: reason for index, reason in found.items() if index not in self.known}
                    lines = "".join(
                        f"{printable(self._source.describe(index))}\t{index}\t{reason}\n"
                        for index, reason in (self._unlisted | found).items()
                    )
                    # In append mode, which keeps the lines of several ranks on one machine apart even where
                    # no lock holds. (Not those of several machines, on NFS.) Of a process that was killed
                    # while it wrote, or of a disk that was full, half a line may stand there.
                    data = b"\n" * torn + lines.encode()
                    while lines and data:  # a disk that becomes full takes a part, and the rest is an error
                        data = data[os.write(file, data) :]
                    self._take_over(file)
            except OSError as error:
                raise RunError(f"cannot write {self._file}: {error.strerror}; free some space") from error
        self._unlisted = {}
        self._know(found)
        return bool(found)


def _check_writable(folder: Path) -> None:
    """Raise `OSError` unless a file could be made in the folder, which need not be there yet."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _open(path: Path) -> Iterator[int]:
    """The file, made if need be, open for reading and appending."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield file
    finally:
        os.close(file)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The open file with a lock that other ranks respect, where the file system has locks."""
    with _open(path) as file:
        if fcntl is None:
            yield file
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _warn_of_no_lock(path, error.strerror)
            yield file
            return
        try:
            yield file
        finally:
            # A loader worker that was forked meanwhile has the file open too: closing it here frees nothing.
            fcntl.flock(file, fcntl.LOCK_UN)


@cache
def _warn_of_no_lock(path: Path, reason: str) -> None:
    """Once in a process."""
    log.warning(
        "no lock on %s (%s): ranks on several machines may spoil each other's lines there; "
        "give each machine its own file",
        path,
        reason,
    )


class Substitutes:
    """Replaces the bad images of one rank in one epoch, from batch number `start` on.

    since: the batch since which the epoch runs on these ranks. earlier: the parts of it before, each on
    another number of ranks; what all of them have used up follows from the bad images of those parts, which
    must be known. `position` is the number of candidates that are used up. A backend that has to make
    batches again sets it back to where it was before them.
    """

    def __init__(
        self,
        schedule: EpochSchedule,
        epoch: int,
        start: int,
        quarantine: Quarantine,
        *,
        since: int = 0,
        earlier: Sequence[Part] = (),
    ) -> None:
        self._quarantine, self.known = quarantine, quarantine.known
        order = schedule.order(epoch)
        bad = np.array(sorted(quarantine.known), dtype=np.int64)
        used = np.empty(0, dtype=np.int64)
        for part in earlier:
            taken = [_used(part, order, rank, bad, used) for rank in range(part.world_size)]
            used = np.concatenate([used, *taken])
        own, spare = schedule.part().places(order, schedule.rank)
        self._candidates = _unused_first(np.concatenate([spare, own]), used)
        self.position = 0
        for _ in range(_count_bad(own[since * schedule.batch_size : start * schedule.batch_size], bad)):
            self._next()

    def replace(self, index: int, reason: str) -> int | None:
        """Quarantine image `index`; the number of the image that takes its place."""
        self._quarantine.add(index, reason)
        return self._next()

    def _next(self) -> int:
        for _ in range(len(self._candidates)):
            candidate = int(self._candidates[self.position % len(self._candidates)])
            self.position += 1
            if candidate not in self._quarantine.known:
                return candidate
        raise RunError("no readable image is left in the data set; see the warnings above")


def _used(part: Part, order: np.ndarray, rank: int, bad: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The images that one rank has put in the places of bad ones in a part of an epoch."""
    own, spare = part.places(order, rank)
    count = _count_bad(own[part.first * part.batch_size : part.last * part.batch_size], bad)
    if not count:
        return own[:0]
    candidates = _unused_first(np.concatenate([spare, own]), before)
    return candidates[~np.isin(candidates, bad)][:count]


def _unused_first(candidates: np.ndarray, used: np.ndarray) -> np.ndarray:
    if not len(used):
        return candidates
    again = np.isin(candidates, used)
    return np.concatenate([candidates[~again], candidates[again]])


def _count_bad(images: np.ndarray, bad: np.ndarray) -> int:
    return int(np.isin(images, bad).sum()) if len(bad) else 0


class Omission:
    """In an evaluation nothing takes the place of a bad image: it is left out."""

    def __init__(self, quarantine: Quarantine) -> None:
        self._quarantine, self.known = quarantine, quarantine.known
        self.position = 0

    def replace(self, index: int, reason: str) -> int | None:
        self._quarantine.add(index, reason)
        return None
