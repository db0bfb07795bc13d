"""Bad files on the way: written down, replaced by other images, and counted.

A batch keeps its size and every rank its number of batches. The place of a bad image is taken by one that
the epoch would have dropped at its end (the images are seldom a multiple of the batch). Only when those run
out, images from the beginning of the epoch are repeated. Which image comes in is a function of the
schedule and of the set of bad files, in the order of the places; so both backends agree, and so does a
resumed run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lejepa_fast.data.decode import printable
from lejepa_fast.data.sampler import EpochSchedule
from lejepa_fast.data.sources import ImageSource
from lejepa_fast.errors import RunError, UsageError

log = logging.getLogger("lejepa_fast.data")

DEFAULT_MAX_BAD_FRACTION = 0.05


class Quarantine:
    """The images of a source that are known to be bad.

    file: where they are written, one line each: name, number of the image, reason, with tabs between. Lines
    that are there already and fit the source count as known, so those images are not tried again; several
    ranks may share the file. None: they are only kept in memory and logged.
    max_bad_fraction: more than this share of the source's images stops the run with a `RunError`.
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
        self._read_bytes = 0
        self._read()

    def add(self, index: int, reason: str) -> None:
        """Write image `index` down. Raises `RunError` when there are too many now."""
        if index not in self.known:
            self._read()  # another rank may have met it, too
        if index not in self.known:
            self.known.add(index)
            name = printable(self._source.describe(index))
            log.log(logging.WARNING if self._log_each else logging.DEBUG, "quarantined %s: %s", name, reason)
            self._write(f"{name}\t{index}\t{printable(reason)}\n")
        self._check(index, reason)

    def learn(self, indices: Iterable[int]) -> None:
        """Take over what a saved state knows."""
        self.known.update(index for index in indices if 0 <= index < len(self._source))

    def _check(self, index: int, reason: str) -> None:
        count, total = len(self.known), len(self._source)
        # A single file never stops a run that allows for any.
        if count <= max(self._max_bad_fraction * total, self._max_bad_fraction > 0):
            return
        share = f"{100 * self._max_bad_fraction:g} %"
        raise RunError(
            f"{count} of {total} images are bad, more than the allowed {share} (max_bad_fraction); "
            f"the last one: {printable(self._source.describe(index))}: {reason}; list all with "
            "'python -m lejepa_fast.data.verify PATH', then repair or remove them"
        )

    def _read(self) -> None:
        """Take over the lines that have been added since the last look, by whichever rank."""
        if self._file is None or not self._file.exists():
            return
        try:
            with open(self._file, "rb") as file:
                file.seek(self._read_bytes)
                added = file.read()
        except OSError as error:
            raise UsageError(f"cannot read {self._file}: {error.strerror}; choose another file") from error
        self._read_bytes += len(added)
        for line in added.decode("utf-8", errors="replace").splitlines():
            name, _, rest = line.partition("\t")
            number = rest.partition("\t")[0]
            index = int(number) if number.isdecimal() else -1
            if 0 <= index < len(self._source) and printable(self._source.describe(index)) == name:
                self.known.add(index)

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode: lines of several ranks do not mix.
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(f"cannot write {self._file}: {error.strerror}; free some space") from error


class Substitutes:
    """Replaces the bad images of one rank in one epoch, from batch number `start` on.

    `position` is the number of candidates that are used up. A backend that has to make batches again sets
    it back to where it was before them.
    """

    def __init__(self, schedule: EpochSchedule, epoch: int, start: int, quarantine: Quarantine) -> None:
        self._quarantine, self.known = quarantine, quarantine.known
        own, spare = schedule.places(epoch)
        self._candidates = np.concatenate([spare, own])
        self.position = 0
        if quarantine.known:
            bad = np.fromiter(quarantine.known, dtype=np.int64)
            for _ in range(int(np.isin(own[: start * schedule.batch_size], bad).sum())):
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


class Omission:
    """In an evaluation nothing takes the place of a bad image: it is left out."""

    def __init__(self, quarantine: Quarantine) -> None:
        self._quarantine, self.known = quarantine, quarantine.known
        self.position = 0

    def replace(self, index: int, reason: str) -> int | None:
        self._quarantine.add(index, reason)
        return None
