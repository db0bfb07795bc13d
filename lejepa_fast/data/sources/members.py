"""The images within a shard."""

from __future__ import annotations

from typing import NamedTuple


class Member(NamedTuple):
    """One image of a shard: byte range in the tar, and its class index (None when unlabelled)."""

    key: str
    suffix: str
    offset: int
    size: int
    target: int | None
