"""Memory that the C allocator holds although nothing is in it."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Return it to the system, where the C library can (glibc); a few milliseconds.

    Batches of a few MB each, made in one thread and freed in another, leave gaps that glibc keeps. They are
    used again, but not all: resident memory creeps up over epochs.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return
    trim(0)
