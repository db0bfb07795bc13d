"""Index files of shards: `python -m lejepa_fast.data.commands.index PATH`.

Opening shards walks through all their headers, which takes minutes where they are many. `name.tar.idx`
beside a shard keeps the result: what is where, with which label. It is used as long as size and modification
time of the shard are those that it was made for, and it is only data: JSON, whose numbers are checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tarfile import BLOCKSIZE

from tqdm import tqdm

from lejepa_fast.data.sources.decoding import IMAGE_SUFFIXES
from lejepa_fast.data.sources.members import Member
from lejepa_fast.errors import RunError, UsageError

_VERSION = 1
_LONGEST_LINE = 8 << 20  # characters: names in a tar are shorter, and a file without lines is not read whole


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name + ".idx")


def read_index(shard: Path) -> list[Member] | None:
    """The members of a shard from its index file; None when there is none, or none that fits the shard."""
    try:
        status = shard.stat()
        if not index_path(shard).is_file():
            return None
        with open(index_path(shard), encoding="utf-8") as file:
            if json.loads(file.readline(_LONGEST_LINE)) != _header(status):
                return None
            lines = iter(lambda: file.readline(_LONGEST_LINE), "")
            members = []
            for line in lines:
                members.append(Member(*json.loads(line)))
                if len(members) > status.st_size // BLOCKSIZE or not _is_sound(members[-1], status.st_size):
                    return None
        return members
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write_index(shard: Path, members: Sequence[Member]) -> None:
    """Write the index file of a shard, complete or not at all. Raises `RunError` when that fails."""
    target = index_path(shard)
    work = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        lines = [json.dumps(_header(shard.stat())), *(json.dumps(list(member)) for member in members)]
        work.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(work, target)
    except OSError as error:
        work.unlink(missing_ok=True)
        raise RunError(f"cannot write {target}: {error.strerror}; check space and rights") from error


def _header(status: os.stat_result) -> dict[str, int]:
    return {"version": _VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_sound(member: Member, size: int) -> bool:
    """Raises `ValueError` or `TypeError` for what is unsound in other ways."""
    numbers = [member.offset, member.size] + ([] if member.target is None else [member.target])
    return (
        isinstance(member.key, str)
        and bool(os.fsencode(member.key))  # JSON can hold what no file name can: lone surrogates
        and member.suffix in IMAGE_SUFFIXES
        and all(type(number) is int and number >= 0 for number in numbers)
        and member.offset + member.size <= size
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code (0, 2 for wrong usage, 1 for a failed run)."""
    from lejepa_fast.data.sources.shards import index_shard

    parser = argparse.ArgumentParser(
        prog="python -m lejepa_fast.data.commands.index",
        description="Write index files beside WebDataset shards.",
    )
    parser.add_argument("path", type=Path, help="a .tar shard, or a folder with shards at any depth")
    path = parser.parse_args(arguments).path
    try:
        shards = [path] if path.is_file() else sorted(path.rglob("*.tar"))
        if not shards:
            raise UsageError(f"no .tar shards in {path}; give a shard, or a folder with shards")
        images = 0
        for shard in tqdm(shards, desc="shards", disable=None):
            members = index_shard(shard)
            write_index(shard, members)
            images += len(members)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"{len(shards)} index files written for {images} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
