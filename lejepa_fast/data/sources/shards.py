"""WebDataset tar shards with random access.

A shard is an uncompressed tar whose members come in pairs `key.jpg` + `key.cls` (the class index as
text). Opening reads the headers and labels once; images are then read by offset. No file stays open, so
workers and threads cannot disturb each other. Nothing is extracted,
unpickled or executed: members are looked up by suffix in an allow-list and everything else is
refused by name, as are links, devices, absolute names and `..`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import numpy as np

from lejepa_fast.data.commands.index import read_index
from lejepa_fast.data.sources.base import EncodedSource
from lejepa_fast.data.sources.decoding import IMAGE_SUFFIXES, printable, refuse_large, shortage
from lejepa_fast.data.sources.members import Member
from lejepa_fast.errors import RunError, UsageError

# Captions and metadata that other packers add. They are inert text and never read.
_IGNORED_SUFFIXES = frozenset({".txt", ".json"})
_MAX_LABEL_BYTES = 32
_MAX_HEADER_BYTES = 1 << 20
_MAX_UNNAMED_CLASSES = 65_536
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}


class ShardSource(EncodedSource):
    """All images of some shards, in the order of the shards and of their members.

    Raises `UsageError` naming the shard (and member) that is missing, truncated, compressed, unsafe or
    half labelled.
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
        targets = _check_labels(self._shards, per_shard, classes)
        self._shard_of = np.repeat(np.arange(len(per_shard), dtype=np.int32), [len(m) for m in per_shard])
        self._offsets = np.array([member.offset for member in members], dtype=np.int64)
        self._sizes = np.array([member.size for member in members], dtype=np.int64)
        # As file names: they need not be UTF-8.
        names = [os.fsencode(member.key + member.suffix) for member in members]
        self._names = b"".join(names)
        self._name_ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        super().__init__(
            name=folder.name if len(self._shards) > 1 else self._shards[0].stem,
            kind="webdataset",
            classes=None if targets is None else classes,
            targets=targets,
        )

    def __len__(self) -> int:
        return len(self._offsets)

    def describe(self, index: int) -> str:
        start = int(self._name_ends[index - 1]) if index else 0
        name = os.fsdecode(self._names[start : int(self._name_ends[index])])
        return f"{self._shards[self._shard_of[index]]}: {name}"

    def encoded(self, index: int) -> bytes:
        size, offset = int(self._sizes[index]), int(self._offsets[index])
        shard = int(self._shard_of[index])
        refuse_large(self.describe(index), size)
        # Opened for each image: with thousands of shards, descriptors that stay open would run out.
        try:
            descriptor = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(_cannot("open", self._shards[shard], error)) from error
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise RunError(
                f"{self.describe(index)}: the file ends early ({len(data)} of {size} bytes); "
                "it has changed since it was opened: copy the shard again"
            )
        return data


def index_shard(path: Path) -> list[Member]:
    """Byte ranges and labels of the images of one shard, in the order of the tar.

    Raises `UsageError` naming the shard and member for anything that is not plain image data.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for a writer
            raise UsageError(f"{path} is not a file; give a .tar file")
        with open(path, "rb") as file:
            _refuse_compressed(path, file.read(6))
            for info in _walk(path, file):
                key, suffix = _check_member(path, info)
                if suffix == ".cls":
                    labels[key] = _read_label(path, info, file.fileno())
                elif suffix in IMAGE_SUFFIXES:
                    if key in images:
                        raise UsageError(f"{path}: two images with the key {key!r}; keys must be distinct")
                    images[key] = (suffix, info.offset_data, info.size)
    except UsageError:
        raise
    # All but the first: numbers in its headers, such as the length of a name.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        reason = printable(str(error)) or "a length in a header exceeds the memory"
        raise UsageError(
            f"{path} is not a complete tar file ({reason}); copy or pack the shard again"
        ) from error
    except OSError as error:
        raise (RunError if shortage(error) else UsageError)(_cannot("read", path, error)) from error
    orphan = next((key for key in labels if key not in images), None)
    if orphan is not None:
        raise UsageError(f"{path}: {printable(orphan)}.cls has no image beside it; pack the shard again")
    return [Member(key, *place, labels.get(key)) for key, place in images.items()]


def _cannot(what: str, shard: Path, error: OSError) -> str:
    way_out = shortage(error) or "check that it is there, and its rights"
    return f"cannot {what} the shard {shard}: {error.strerror}; {way_out}"


def _walk(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members but for folders, in bounded memory and time whatever their headers say."""
    file.seek(0)
    headers = _Headers(file)
    with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:") as tar:
        while (info := tar.next()) is not None:
            headers.used = 0
            # What tarfile gathers of all members.
            tar.members = []  # type: ignore[attr-defined]
            tar.pax_headers = {}
            if info.size < 0:  # the next member would be an earlier one, for ever
                raise UsageError(
                    f"{path}: member {info.name!r} claims {info.size} bytes; pack the shard again"
                )
            if not info.isdir():
                yield info
        _check_complete(path, file.fileno(), tar.offset)


class _Headers:
    """An open tar for `tarfile`, which reads headers only, of not more than `_MAX_HEADER_BYTES` for a member.

    A header may claim to be a name of any length, and tarfile would read it whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.used = 0

    def read(self, size: int) -> bytes:
        self.used += size
        if size < 0 or self.used > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADER_BYTES >> 20} MiB")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()


def _refuse_compressed(path: Path, head: bytes) -> None:
    for magic, tool in _COMPRESSED.items():
        if head.startswith(magic):
            raise UsageError(f"{path} is compressed, so not randomly readable; unpack it once with {tool}")


def _check_member(path: Path, info: tarfile.TarInfo) -> tuple[str, str]:
    """(key, lower-case suffix) of a member that is safe to use."""
    name = PurePosixPath(info.name)
    if not info.isreg() or info.issparse():
        raise UsageError(
            f"{path}: member {info.name!r} is not a plain file (a link or device); pack plain files"
        )
    if name.is_absolute() or ".." in name.parts:
        raise UsageError(f"{path}: member {info.name!r} points outside the archive; pack relative names")
    # WebDataset's rule: the key ends at the first dot of the file name.
    stem, dot, suffix = name.name.partition(".")
    suffix = dot + suffix.lower()
    if suffix != ".cls" and suffix not in IMAGE_SUFFIXES and suffix not in _IGNORED_SUFFIXES:
        raise UsageError(
            f"{path}: member {info.name!r} is neither an image nor a .cls label, and nothing else is read; "
            "pack the images again with 'python -m lejepa_fast.data.commands.pack SOURCE OUT'"
        )
    return str(name.parent / stem), suffix


def _read_label(path: Path, info: tarfile.TarInfo, file: int) -> int:
    data = os.pread(file, min(info.size, _MAX_LABEL_BYTES), info.offset_data)
    text = data.decode("ascii", errors="replace").strip()
    if info.size > _MAX_LABEL_BYTES or not text.isdecimal():
        raise UsageError(f"{path}: member {info.name!r} must hold a class index such as 3; got {text[:20]!r}")
    return int(text)


def _check_complete(path: Path, file: int, end: int) -> None:
    """A tar ends in a block of zeros; without one, the file was cut between two members."""
    if os.pread(file, tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
        raise UsageError(f"{path} is truncated (no end-of-archive block); copy or pack the shard again")


def _check_labels(
    shards: Sequence[Path], per_shard: Sequence[Sequence[Member]], classes: Sequence[str] | None
) -> list[int] | None:
    """Class indices of all images, or None when none has one; half-labelled data is an error."""
    targets: list[int] = []
    unlabelled: str | None = None
    for shard, members in zip(shards, per_shard, strict=True):
        for member in members:
            where = printable(f"{shard}: {member.key}{member.suffix}")
            if member.target is None:
                unlabelled = unlabelled or where
            elif classes is not None and member.target >= len(classes):
                raise UsageError(
                    f"{where} has class {member.target}, but classes.txt names {len(classes)} classes "
                    f"(0 to {len(classes) - 1})"
                )
            elif classes is None and member.target >= _MAX_UNNAMED_CLASSES:
                # A slip: probes and votes allocate memory per class up to the largest index.
                raise UsageError(
                    f"{where} has class {member.target}; without a classes.txt indices are below "
                    f"{_MAX_UNNAMED_CLASSES}: correct the label, or name the classes"
                )
            else:
                targets.append(member.target)
    if unlabelled is not None and targets:
        raise UsageError(f"{unlabelled} has no .cls label while other images do; label all of them or none")
    return targets or None
