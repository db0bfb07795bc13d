"""Freed memory that the C allocator keeps."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Return freed memory to the system, where the C library can (glibc). Takes a few milliseconds.

    Batches of a few MB, made in one thread and freed in another, leave gaps in the heap. glibc does not reuse
    all of them, so resident memory would grow over the epochs.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return
    trim(0)
