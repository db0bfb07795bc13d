"""Bad images: listed, counted and replaced by others.

In training a substitute takes the place of a bad image, so a batch keeps its size and every rank its number
of batches. Which one is a function of (seed, epoch, number of the bad image), see `views.TrainViews`. Ranks,
backends and resumed runs therefore agree without asking each other. In evaluation bad images are left out.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from lejepa_fast.data.sources.base import ImageSource
from lejepa_fast.data.sources.decoding import UnreadableImageError, printable
from lejepa_fast.data.views import Views
from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.regular_files import open_regular

log = logging.getLogger("lejepa_fast.data")

DEFAULT_MAX_BAD_FRACTION = 0.05

T = TypeVar("T")


class BadImages:
    """The images of a source that are known to be bad, with their reasons. Threads may share it.

    Args:
        source: where the images come from.
        file: list of bad images, one line each: name, number and reason, separated by tabs. Images in it that
            fit the source are not tried again. Every rank appends what it meets, and reads what the others
            have met when an epoch begins. What other options may mend is not written.
            None: bad images are only logged.
        max_bad_fraction: more than this share of the source's images stops the run.
        log_each: log each bad image as a warning.

    Raises:
        UsageError: `max_bad_fraction` is not in [0, 1], or `file` cannot be written.
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
            raise UsageError(f"max_bad_fraction: expected a number in [0, 1], got {max_bad_fraction}")
        self._source = source
        self._file = None if file is None else Path(file)
        self._max_bad_fraction, self._log_each = max_bad_fraction, log_each
        self._reasons: dict[int, str] = {}  # the latest one last
        self._passing: set[int] = set()  # those of them that other options may mend
        self._lock = threading.Lock()
        self._other_names: set[str] = set()  # of lines of the file that do not fit
        if self._file is not None:
            existing = next(path for path in (self._file, *self._file.absolute().parents) if path.exists())
            usable = existing.is_file() if existing == self._file else existing.is_dir()
            if not (usable and os.access(existing, os.R_OK | os.W_OK)):
                raise UsageError(f"bad_images: cannot write {file}; choose another file, or check its rights")
        self._read()
        self._listed = len(self._reasons)  # known before this start

    def __contains__(self, index: int) -> bool:
        return index in self._reasons

    def items(self, *, lasting: bool = False) -> list[tuple[int, str]]:
        """(number, reason) of each bad image, in ascending order. lasting: without what options may mend."""
        with self._lock:
            return sorted(x for x in self._reasons.items() if not (lasting and x[0] in self._passing))

    def add(self, index: int, reason: str, *, lasting: bool = True) -> None:
        """List image `index`. lasting: in the file, too.

        Raises `RunError` for too many bad images, or a file that cannot be written.
        """
        reason = printable(reason)
        with self._lock:
            if index not in self._reasons:
                if lasting:
                    self._append({index: reason})
                else:
                    self._passing.add(index)
                self._reasons[index] = reason
                name = printable(self._source.describe(index))
                level = logging.WARNING if self._log_each else logging.DEBUG
                log.log(level, "bad image %s: %s", name, reason)
            self._check()

    def learn(self, found: Iterable[tuple[int, str]], *, write: bool = True) -> None:
        """Take over the bad images of a saved state. write: list them in the file, as one rank has to."""
        with self._lock:
            new = {index: printable(reason) for index, reason in found if index not in self._reasons}
            if write:
                self._append(new)
            self._reasons.update(new)
            self._listed = len(self._reasons)

    def begin_epoch(self) -> None:
        """Read what other ranks have listed. Raises `RunError` when there are too many bad images."""
        with self._lock:
            try:
                self._read()
            except OSError as error:  # what the other ranks met is only found again
                log.warning("cannot read %s: %s; going on without it", self._file, error.strerror)
            self._check()

    def first_usable(self, views: Views, epoch: int, index: int, make: Callable[[int], T]) -> T | None:
        """`make(index)`, or where that image is bad `make` of its first usable substitute; None without one.

        `make` raises `UnreadableImageError` for a bad image. Raises `RunError` when all images are bad, or
        more than allowed.
        """
        tried: int | None = index
        while tried is not None:
            if tried not in self:
                try:
                    return make(tried)
                except UnreadableImageError as error:
                    self.add(tried, error.reason, lasting=error.lasting)
            tried = views.substitute(epoch, tried)
            if tried == index:
                raise RunError("no readable image is left in the data set; see the warnings above")
        return None

    def warn_of_other_numbers(self) -> None:
        """Warn when the file has images of this source under other numbers. Names of other images are fine:
        several sources, such as the splits of a data set, can have one file."""
        others = self._other_names - {printable(self._source.describe(index)) for index in self._reasons}
        if others and (
            count := sum(printable(self._source.describe(i)) in others for i in range(len(self._source)))
        ):
            log.warning(
                "%s: %d images have other numbers there than here, as where another share is held out, and "
                "are not left out; list them again with this share by `lejepa-data verify --val-fraction`",
                self._file,
                count,
            )

    def _check(self) -> None:
        count, total = len(self._reasons), len(self._source)
        # A single file never stops a run that allows for any.
        if not count or count <= max(self._max_bad_fraction * total, self._max_bad_fraction > 0):
            return
        index, reason = next(reversed(self._reasons.items()))
        listed = f" ({self._listed} of them listed before this start)" if self._listed else ""
        way_out = "and begin with an empty list" if self._listed else "(`lejepa-data verify` lists all)"
        way_out += ", or raise max_bad_fraction" if self._max_bad_fraction else ""  # 0: what needs all images
        raise RunError(
            f"{count} of {total} images are bad{listed}, more than the allowed "
            f"{100 * self._max_bad_fraction:g} % (max_bad_fraction); the last one: "
            f"{printable(self._source.describe(index))}: {reason}; repair or remove them {way_out}"
        )

    def _read(self) -> None:
        """Add the images of the file that fit the source. The rest of the file is ignored."""
        if self._file is None or not self._file.exists():
            return
        with open_regular(self._file) as file:
            # Of a process that was killed while it wrote, the last line may be incomplete.
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.decode("utf-8", errors="replace").splitlines():
            name, _, after = line.partition("\t")
            number, _, reason = after.partition("\t")
            index = int(number) if number.isdecimal() and len(number) < 19 else -1
            if 0 <= index < len(self._source) and printable(self._source.describe(index)) == name:
                self._reasons.setdefault(index, reason)
            else:
                self._other_names.add(name)

    def _append(self, found: Mapping[int, str]) -> None:
        if self._file is None or not found:
            return
        names = {index: printable(self._source.describe(index)) for index in found}
        lines = "".join(f"{names[index]}\t{index}\t{reason}\n" for index, reason in found.items())
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # One unbuffered write in append mode keeps the lines of several ranks apart.
            with open_regular(self._file, "ab+", buffering=0) as file:
                torn = file.seek(0, os.SEEK_END) > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
                data = b"\n" * torn + lines.encode()
                while data:  # a disk that fills up takes a part, and the rest is an error
                    data = data[file.write(data) :]
        except OSError as error:
            raise RunError(f"cannot write {self._file}: {error.strerror}; free some space") from error
