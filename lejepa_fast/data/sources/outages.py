"""What data lie on may be away for a moment: a mount, a network, a folder. That is no fault of an image.

Reading is then tried again for a few seconds, and after that it is an error that ends the run.
"""

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from lejepa_fast.errors import RunError

log = logging.getLogger("lejepa_fast.data")

T = TypeVar("T")

RETRY_DELAYS = (0.1, 0.4, 1.0, 3.0)
"""Seconds to wait before each further attempt."""

# A file can be to blame for these alone, and for the first ones only while its folder is there.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)
_OF_THE_FILE = (*_MISSING, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)

# Waiting does not help here, but something else does: error number to the way out.
_WAYS_OUT = {
    errno.EMFILE: "this process has too many files open: raise the limit, 'ulimit -n'",
    errno.ENFILE: "the machine has too many files open: close other programs, or raise fs.file-max",
    errno.ENOMEM: "memory is short: fewer workers, or a higher limit ('ulimit -v', or the container's)",
    errno.ENXIO: "put the file back in its place",
}


class SharedFileError(OSError):
    """A file that holds many images cannot be read: never the fault of one of them."""


def patiently(work: Callable[[], T], what: str) -> T:
    """`work()`, which reads `what`; tried again after each of `RETRY_DELAYS` while the data are away.

    Raises:
        OSError: a file itself is to blame, or what it holds.
        RunError: the data are still away, or the process or the machine lacks something.
    """
    delays, waited = iter(RETRY_DELAYS), 0.0
    while True:
        try:
            return work()
        except OSError as error:
            if _is_of_the_file(error):
                raise
            reason = f"cannot read {what}: {error.strerror or error}"
            way_out = _WAYS_OUT.get(error.errno or 0)
            delay = None if way_out else next(delays, None)
            if delay is None:
                reason += f", still after {waited:.1f} s" if waited else ""
                way_out = way_out or "check the disk or network that it lies on, its folder and their rights"
                raise RunError(f"{reason}; {way_out} (the data may be good)") from error
        if not waited:
            log.warning("%s; trying again for %.1f s", reason, sum(RETRY_DELAYS))
        waited += delay
        time.sleep(delay)


def _is_of_the_file(error: OSError) -> bool:
    """Whether a file itself is to blame, and not what it lies on.

    A missing file is, when its folder is there and holds other files: an empty folder may be the place of a
    mount that is away. A file that may not be read is, when its folder may.
    """
    away = isinstance(error, SharedFileError | ConnectionError | TimeoutError)
    if away or error.errno not in (None, *_OF_THE_FILE):  # decoders give no number
        return False
    if error.errno not in _MISSING or not isinstance(error.filename, str | bytes):
        return True
    parent, name = os.path.split(os.path.realpath(os.fsdecode(error.filename)))
    try:
        # In the open folder: what comes back in between does not count as missing.
        folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.stat(name, dir_fd=folder)
            return error.errno in (errno.EACCES, errno.EPERM)
        except FileNotFoundError:
            with os.scandir(folder) as entries:
                return next(entries, None) is not None
        finally:
            os.close(folder)
    except OSError:
        return False
