"""Opening files where anybody may have put something else: a pipe or a device."""

import errno
import os
import stat
from typing import IO, Any


def open_regular(path: str | os.PathLike[str], mode: str = "rb", **options: Any) -> IO[Any]:
    """`open`, but of a pipe, device or socket at once an `OSError` (ENXIO): reading it might never end."""
    return open(path, mode, opener=_open, **options)


def _open(path: str, flags: int) -> int:
    try:
        # Without blocking: opening a pipe would wait for its other end.
        file = os.open(path, flags | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket, or a pipe that nobody reads
            raise
    else:
        mode = os.fstat(file).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself refuses a folder
            return file
        os.close(file)
    raise OSError(errno.ENXIO, "a pipe or device, not a file", path)
