"""WebDataset tar shards with random access.

A shard is an uncompressed tar whose members come in pairs `key.jpg` + `key.cls`, the class index as text.
Opening reads headers and labels once, or an index file; images are then read by offset. No file stays open.
Nothing is extracted, unpickled or executed. Members of other suffixes, links, devices, absolute names and
`..` are refused by name.

`name.tar.idx` beside a shard is its index file: lines of JSON that say what is where, with which label. It
counts as long as the shard has the size and modification time that it was written for.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

import numpy as np

from lejepa_fast.data.sources.base import EncodedSource, Names
from lejepa_fast.data.sources.decoding import IMAGE_SUFFIXES, refuse_large
from lejepa_fast.data.sources.folder import is_hidden
from lejepa_fast.data.sources.outages import SharedFileError, patiently
from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.regular_files import open_regular

_IGNORED_SUFFIXES = frozenset({".txt", ".json"})  # captions that other packers add; never read
_MAX_LABEL_BYTES = 32
_MAX_HEADER_BYTES = 1 << 20
_MAX_INDEX_LINE = 8 << 20  # characters; names in a tar are shorter
_MAX_UNNAMED_CLASSES = 65_536
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstd
_INDEX_VERSION = 1


class Member(NamedTuple):
    """One image of a shard: its byte range in the tar, and its class index (None when unlabeled)."""

    key: str
    suffix: str
    offset: int
    size: int
    target: int | None


class ShardSource(EncodedSource):
    """All images of some .tar shards, in the order of the shards and of their members.

    Raises `UsageError` naming a shard that is missing, truncated, compressed, unsafe or half labeled.
    """

    def __init__(self, shards: Sequence[Path], *, classes: Sequence[str] | None = None) -> None:
        self._shards = [Path(shard) for shard in shards]
        per_shard = [known if (known := read_index(s)) is not None else index_shard(s) for s in self._shards]
        members = [member for shard in per_shard for member in shard]
        folder = self._shards[0].parent
        if not members:
            raise UsageError(
                f"no images in {self._shards[0] if len(self._shards) == 1 else folder}; "
                "expected tar members such as key.jpg and key.cls"
            )
        self._shard_of = np.repeat(np.arange(len(per_shard), dtype=np.int32), [len(m) for m in per_shard])
        self._offsets = np.array([member.offset for member in members], dtype=np.int64)
        self._sizes = np.array([member.size for member in members], dtype=np.int64)
        self._names = Names(member.key + member.suffix for member in members)
        targets = self._check_labels([member.target for member in members], classes)
        super().__init__(
            name=folder.name if len(self._shards) > 1 else self._shards[0].stem,
            origin=f"{count} shards in {folder}" if (count := len(shards)) > 1 else f"shard {shards[0]}",
            classes=None if targets is None else classes,
            targets=targets,
        )

    def __len__(self) -> int:
        return len(self._offsets)

    def describe(self, index: int) -> str:
        return f"{self._shards[self._shard_of[index]]}: {self._names[index]}"

    def encoded(self, index: int) -> bytes:
        size, offset = int(self._sizes[index]), int(self._offsets[index])
        shard = self._shards[self._shard_of[index]]
        refuse_large(self.describe(index), size)
        # Opened for each image: with thousands of shards, descriptors that stay open would run out.
        try:
            with open_regular(shard, buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise SharedFileError(error.errno, error.strerror, str(shard)) from error
        if len(data) != size:
            raise RunError(
                f"{self.describe(index)}: the file ends early ({len(data)} of {size} bytes); "
                "it has changed since it was opened: copy the shard again"
            )
        return data

    def _check_labels(self, labels: Sequence[int | None], classes: Sequence[str] | None) -> list[int] | None:
        """Class indices of all images, or None when none has one."""
        targets = [label for label in labels if label is not None]
        # Without names, a high number is most likely a slip, and probes allocate memory for each class.
        limit = _MAX_UNNAMED_CLASSES if classes is None else len(classes)
        for index, label in enumerate(labels) if targets else ():
            if label is None:
                fault = "no .cls label while other images do; label all of them or none"
            elif label < limit:
                continue
            elif classes is None:
                fault = f"class {label}; without a classes.txt indices are below {limit}: correct the label, "
                fault += "or name the classes"
            else:
                fault = f"class {label}, but classes.txt names {limit} classes (0 to {limit - 1})"
            raise UsageError(f"{self.describe(index)} has {fault}")
        return targets or None


# --- walking through a shard --------------------------------------------------------------------


def index_shard(path: Path) -> list[Member]:
    """Byte ranges and labels of the images of one shard, in the order of the tar.

    Raises `UsageError` for anything but plain image data, and `RunError` as `patiently`.
    """
    try:
        return patiently(partial(_index_shard, path), f"the shard {path}")
    except OSError as error:
        raise UsageError(
            f"cannot read the shard {path}: {error.strerror}; check that it is there, and its rights"
        ) from error


def _index_shard(path: Path) -> list[Member]:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with open_regular(path) as file:
            if file.read(6).startswith(_COMPRESSED):
                raise UsageError(f"{path} is compressed, so not randomly readable; decompress it once")
            for info in _walk(path, file):
                key, suffix = _check_member(path, info)
                if suffix in _IGNORED_SUFFIXES:
                    continue
                if key in (labels if suffix == ".cls" else images):
                    kind = "labels" if suffix == ".cls" else "images"
                    raise UsageError(f"{path}: two {kind} with the key {key!r}; keys must be distinct")
                if suffix == ".cls":
                    labels[key] = _read_label(path, info, file.fileno())
                else:
                    images[key] = (suffix, info.offset_data, info.size)
    except UsageError:
        raise
    # tarfile raises all but the first for numbers in headers, such as the length of a name.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        reason = str(error) or "a length in a header exceeds the memory"
        raise UsageError(
            f"{path} is not a complete tar file ({reason}); copy or pack the shard again"
        ) from error
    orphan = next((key for key in labels if key not in images), None)
    if orphan is not None:
        raise UsageError(f"{path}: {orphan}.cls has no image beside it; pack the shard again")
    return [Member(key, *place, labels.get(key)) for key, place in images.items()]


def _walk(path: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """All members but folders, in bounded memory and time whatever the headers say."""
    file.seek(0)
    headers = _Headers(file)
    with tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:") as tar:
        while (info := tar.next()) is not None:
            headers.used = 0
            # tarfile collects these of all members.
            tar.members = []  # type: ignore[attr-defined]
            tar.pax_headers = {}
            if info.size < 0:  # the next member would be an earlier one, for ever
                raise UsageError(f"{path}: {info.name!r} claims {info.size} bytes; pack the shard again")
            if not info.isdir():
                yield info
        # A tar ends in a block of zeros. Without one, the file was cut between two members.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
            raise UsageError(f"{path} is truncated (no end-of-archive block); copy or pack the shard again")


class _Headers:
    """An open tar file that lets tarfile read at most `_MAX_HEADER_BYTES` of headers for a member."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._read = file.read
        self.used = 0

    def read(self, size: int) -> bytes:
        self.used += size
        if size < 0 or self.used > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADER_BYTES >> 20} MiB")
        return self._read(size)


def _check_member(path: Path, info: tarfile.TarInfo) -> tuple[str, str]:
    """(key, lower-case suffix) of a member that is safe to use; the suffix is .txt where it is hidden."""
    name = PurePosixPath(info.name)
    # WebDataset's rule: the key ends at the first dot of the file name.
    stem, dot, suffix = name.name.partition(".")
    suffix = dot + suffix.lower()
    if not info.isreg() or info.issparse():
        fault = "is not a plain file (a link or device); pack plain files"
    elif name.is_absolute() or ".." in name.parts:
        fault = "points outside the archive; pack relative names"
    elif any(map(is_hidden, name.parts)):  # macOS adds ._NAME to every file
        return str(name), ".txt"
    elif suffix != ".cls" and suffix not in IMAGE_SUFFIXES | _IGNORED_SUFFIXES:
        dots = f" (its key ends at the first dot, so its suffix is {suffix!r})" if "." in suffix[1:] else ""
        fault = f"is neither an image nor a .cls label{dots}, and nothing else is read; pack the images "
        fault += "again with 'lejepa-data pack SOURCE OUT'"
    else:
        return str(name.parent / stem), suffix
    raise UsageError(f"{path}: member {info.name!r} {fault}")


def _read_label(path: Path, info: tarfile.TarInfo, file: int) -> int:
    data = os.pread(file, min(info.size, _MAX_LABEL_BYTES), info.offset_data)
    text = data.decode("ascii", errors="replace").strip()
    if info.size > _MAX_LABEL_BYTES or not text.isdecimal():
        raise UsageError(f"{path}: member {info.name!r}: expected a class index such as 3, got {text[:20]!r}")
    return int(text)


# --- index files --------------------------------------------------------------------------------


def read_index(shard: Path) -> list[Member] | None:
    """The members of a shard from its index file; None when there is none that fits the shard."""
    index = shard.with_name(shard.name + ".idx")
    try:
        size = shard.stat().st_size
        members: list[Member] = []
        with open_regular(index, "r", encoding="utf-8") as file:
            lines = iter(lambda: file.readline(_MAX_INDEX_LINE), "")
            if json.loads(next(lines, "")) != _index_header(shard):
                return None
            for line in lines:
                members.append(Member(*json.loads(line)))
                if len(members) > size // tarfile.BLOCKSIZE or not _is_sound(members[-1], size):
                    return None
        return members
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def write_index(shard: Path, members: Sequence[Member]) -> None:
    """Write the index file of a shard, complete or not at all. Raises `RunError` when that fails."""
    target = shard.with_name(shard.name + ".idx")
    work = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        rows = [_index_header(shard), *members]
        work.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        os.replace(work, target)
    except OSError as error:
        work.unlink(missing_ok=True)
        raise RunError(f"cannot write {target}: {error.strerror}; check space and rights") from error


def _index_header(shard: Path) -> dict[str, Any]:
    status = shard.stat()
    return {"version": _INDEX_VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_sound(member: Member, size: int) -> bool:
    """Whether an index may say so of a shard of `size` bytes. Unsound types may also raise `TypeError`."""
    numbers = [member.offset, member.size] + ([] if member.target is None else [member.target])
    return (
        isinstance(member.key, str)
        and bool(os.fsencode(member.key))  # fails for lone surrogates, which no file name has
        and member.suffix in IMAGE_SUFFIXES
        and all(type(number) is int and number >= 0 for number in numbers)
        and member.offset + member.size <= size
    )
