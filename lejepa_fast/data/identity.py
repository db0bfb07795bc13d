"""A digest of the names of a data set's images, to tell data sets apart without reading them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from lejepa_fast.data.sources.base import ImageSource

_NAMED_IMAGES = 10_000  # at most, of each source: enough to tell data sets apart


def names_digest(sources: Mapping[str, ImageSource]) -> str:
    """SHA-256 of the names of the images of some sources, in hexadecimal digits.

    The prefix that all names share is left out, so a folder that was moved stays the same.
    """
    names = {key: _names(source) for key, source in sources.items()}
    every = [name for group in names.values() for name in group]
    first, last = min(every, default=""), max(every, default="")
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    digest = hashlib.sha256()
    for key, group in names.items():
        digest.update(f"{key}\0".encode())
        for name in group:
            digest.update(name[shared:].encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _names(source: ImageSource) -> list[str]:
    stride = -(-len(source) // _NAMED_IMAGES) or 1
    return [source.describe(index) for index in range(0, len(source), stride)]
