"""Where images come from: `open_source` turns a path into a map-style source of (image, label) pairs.

A source is a plain sequence that holds no open files and pickles small, so that it can be handed to
forked and spawned workers alike. To add one, subclass `ImageSource` (or `EncodedSource`, when the
images are files of an image format somewhere) and give it a form of path in `open_source`.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from PIL import Image

from lejepa_fast.data.draws import HOLDOUT, permutation
from lejepa_fast.data.sources.decoding import (
    IMAGE_SUFFIXES,
    UnreadableImageError,
    open_encoded,
    printable,
    read_file,
    to_rgb,
    unreadable,
)
from lejepa_fast.data.sources.large import Reduction
from lejepa_fast.errors import RunError, UsageError

Split = Literal["train", "val"]

EMBEDDED = {"trashnet96": Path(__file__).parents[1] / "trashnet96"}
_SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PROBED_IMAGES = 64
_MAX_CLASSES_BYTES = 64 << 20
_VAL_NAMES = ("val", "valid", "validation", "test")


class HoldOutError(UsageError):
    """No class has an image to spare for validation. source: all the images."""

    def __init__(self, source: ImageSource) -> None:
        super().__init__(f"{source.name} has too few images to hold some out for validation; add images")
        self.source = source


class ImageSource(ABC):
    """A sequence of (RGB image, class index or -1).

    name: what to call the data set in logs. kind: "folder", "webdataset" or "torchvision".
    classes: class names by index, or None when unknown. targets: class index of every image, or None
    when the images carry no labels.
    """

    def __init__(
        self,
        *,
        name: str,
        kind: str,
        classes: Sequence[str] | None,
        targets: Sequence[int] | np.ndarray | None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.classes = None if classes is None else list(classes)
        # An array, not a list: forked workers would otherwise copy pages by counting references.
        self._targets = None if targets is None else np.asarray(targets, dtype=np.int64)

    @property
    def targets(self) -> list[int] | None:
        """Class index of every image; None when unlabelled."""
        return None if self._targets is None else self._targets.tolist()

    @property
    def labelled(self) -> bool:
        """Whether the images carry class indices."""
        return self._targets is not None

    def target(self, index: int) -> int:
        """Class index of one image, -1 when unlabelled; reads no pixels."""
        return -1 if self._targets is None else int(self._targets[index])

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def describe(self, index: int) -> str:
        """The image's file (or shard and member), for messages."""

    @abstractmethod
    def open_image(self, index: int) -> Image.Image:
        """The image as Pillow opens it: any mode, not yet decoded, not yet upright."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """(upright RGB image, class index or -1). Raises `RunError` naming an unreadable file."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)}")
        return self.load(index), self.target(index)

    def load(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """The upright RGB image; reduction: how very large ones are reduced. Raises as `[index]` does."""
        try:
            return to_rgb(self.open_image(index), reduction)
        except (RunError, UsageError, MemoryError):
            raise
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
            raise unreadable(self.describe(index), error) from error

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) in px from the file's header where that is possible, before EXIF rotation."""
        try:
            return self.open_image(index).size
        except (RunError, UsageError, MemoryError):
            raise
        except Exception as error:
            raise unreadable(self.describe(index), error) from error

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSource:
        """The same source with these images only, in this order."""
        return SubsetSource(self, indices)


class EncodedSource(ImageSource):
    """A source of image files, which can hand out the encoded bytes (for backends that decode themselves)."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of the image file, as stored."""

    def open_image(self, index: int) -> Image.Image:
        return open_encoded(self.encoded(index))

    def subset(self, indices: Sequence[int] | np.ndarray) -> EncodedSource:
        return EncodedSubset(self, indices)


class SubsetSource(ImageSource):
    """Some images of another source, in a given order."""

    def __init__(self, base: ImageSource, indices: Sequence[int] | np.ndarray) -> None:
        self.base = base
        self._indices = np.asarray(indices, dtype=np.int64)
        targets = None if base._targets is None else base._targets[self._indices]
        super().__init__(name=base.name, kind=base.kind, classes=base.classes, targets=targets)

    def __len__(self) -> int:
        return len(self._indices)

    def describe(self, index: int) -> str:
        return self.base.describe(int(self._indices[index]))

    def open_image(self, index: int) -> Image.Image:
        return self.base.open_image(int(self._indices[index]))


class EncodedSubset(SubsetSource, EncodedSource):
    """Some images of a source of image files."""

    base: EncodedSource

    def encoded(self, index: int) -> bytes:
        return self.base.encoded(int(self._indices[index]))


class FolderSource(EncodedSource):
    """Image files below a folder: one sub-folder per class, or a flat folder without labels.

    Classes are the sub-folders that hold at least one image at any depth, in sorted order, unless
    `classes` fixes them (as the training split does for the held-out one). Files are taken in sorted
    order; other files, those whose names begin with a dot, and `__MACOSX` folders are ignored.
    """

    def __init__(self, root: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> None:
        self.root = Path(root)
        flat = [name for name in _listing(self.root)[1] if _is_image(name)]
        by_class = {name: _walk_images(self.root / name) for name in _listing(self.root)[0]}
        by_class = {name: files for name, files in by_class.items() if files}
        if flat and by_class:
            raise UsageError(
                f"{self.root} holds both images ({flat[0]}) and folders of images ({next(iter(by_class))}/); "
                "move the images into class folders, or all of them into one flat folder"
            )
        if not flat and not by_class:
            raise UsageError(
                f"no images in {self.root}; expected class folders of images, image files, or .tar shards "
                f"({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        if flat:
            files, labels, names = flat, None, None
        else:
            names = list(by_class) if classes is None else list(classes)
            unknown = sorted(set(by_class) - set(names))
            if unknown:
                raise UsageError(
                    f"{self.root} has the class {unknown[0]!r}, which the training split does not have; "
                    "give both splits the same class folders"
                )
            files = [os.path.join(name, file) for name in by_class for file in by_class[name]]
            numbers = {name: number for number, name in enumerate(names)}
            labels = [numbers[name] for name in by_class for _ in by_class[name]]
        # One blob and offsets: a list of millions of strings would be copied into every forked worker.
        encoded = [os.fsencode(file) for file in files]
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        super().__init__(name=self.root.name or str(self.root), kind="folder", classes=names, targets=labels)

    def __len__(self) -> int:
        return len(self._ends)

    def relative_path(self, index: int) -> str:
        """Path of the image file below the root."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._blob[start : int(self._ends[index])])

    def describe(self, index: int) -> str:
        return str(self.root / self.relative_path(index))

    def encoded(self, index: int) -> bytes:
        return read_file(self.describe(index))


def open_source(path: str, split: Split, *, val_fraction: float = 0.1, seed: int = 0) -> ImageSource:
    """Open the "train" or "val" split of the data at `path`.

    path: "trashnet96" (shipped with the package); a folder of class folders; a flat folder of images;
    a folder of WebDataset .tar shards, or one .tar; or "torchvision:NAME:/dir" for a torchvision data set
    whose files are already in /dir (nothing is ever downloaded). A folder with train/ and val/ (or
    valid/, validation/, test/) below it has its own splits. Otherwise `val_fraction` of each class,
    at least one image, is held out for "val"; which ones depends on `seed` only.
    Raises `UsageError` naming the path, what is wrong with it and the way out.
    """
    if split not in ("train", "val"):
        raise UsageError(f"split must be 'train' or 'val'; got {split!r}")
    if not 0.0 < val_fraction < 1.0:
        raise UsageError(f"val_fraction must lie between 0 and 1; got {val_fraction}")
    path = os.fspath(path)
    if path.startswith("torchvision:"):
        from lejepa_fast.data.sources.torchvision_sets import open_torchvision_set

        whole = open_torchvision_set(path, split)
        if isinstance(whole, ImageSource):
            return whole
        return _hold_out(whole.source, split, val_fraction, seed)
    if path in EMBEDDED:
        root = EMBEDDED[path]
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise UsageError(
            f"cannot read {path!r}: only local folders, .tar files and torchvision:NAME:/dir are opened, "
            "never commands or URLs; copy the data to a disk first"
        )
    else:
        root = Path(path).expanduser()
    train_root, val_root = find_splits(root)
    train = _open_plain(train_root, shard_classes=_read_classes(root))
    if val_root is None:
        return _hold_out(train, split, val_fraction, seed)
    source = train if split == "train" else _open_plain(val_root, classes=train.classes)
    source.name = path if path in EMBEDDED else root.name or str(root)
    return source


def find_splits(root: Path) -> tuple[Path, Path | None]:
    """(folder of the training images, folder of the held-out ones or None)."""
    if not root.exists():
        known = ", ".join(sorted(EMBEDDED))
        raise UsageError(
            f"no such data: {root} does not exist; give a folder of images or of .tar shards, "
            f"torchvision:NAME:/dir, or one of the embedded sets ({known})"
        )
    if not root.is_dir():
        return root, None
    folders = _listing(root)[0]
    if "train" not in folders:
        return root, None
    for name in _VAL_NAMES:
        if name in folders:
            return root / "train", root / name
    # A lone train/ is a split without a held-out part; next to other folders it is a class.
    return (root / "train", None) if folders == ["train"] else (root, None)


def _open_plain(
    root: Path, *, classes: Sequence[str] | None = None, shard_classes: Sequence[str] | None = None
) -> ImageSource:
    """Open one folder (or one .tar) that has no splits below it.

    classes: names that are binding (those of the training split). shard_classes: names from a
    classes.txt next to the splits, which shards need because they hold numbers only.
    """
    from lejepa_fast.data.sources.shards import ShardSource

    if root.is_dir():
        shards = [root / name for name in _listing(root)[1] if name.endswith(_SHARD_SUFFIXES)]
    elif root.name.endswith(_SHARD_SUFFIXES):
        shards = [root]
    else:
        raise UsageError(f"{root} is a file; give a folder of images, or a .tar shard")
    if not shards:
        return FolderSource(root, classes=classes)
    other = _first_image(root) if root.is_dir() else None
    if other is not None:
        raise UsageError(
            f"{root} holds both shards ({shards[0].name}) and images ({printable(other)}); "
            "move the shards or the images elsewhere"
        )
    return ShardSource(shards, classes=classes or shard_classes or _read_classes(shards[0].parent))


def _hold_out(source: ImageSource, split: Split, val_fraction: float, seed: int) -> ImageSource:
    """Split by class: the same images are held out on every machine, run and rank."""
    targets = source._targets if source._targets is not None else np.zeros(len(source), dtype=np.int64)
    held_out = np.zeros(len(source), dtype=bool)
    labels, counts = np.unique(targets, return_counts=True)
    by_label = np.split(np.argsort(targets, kind="stable"), np.cumsum(counts)[:-1])
    for label, members in zip(labels.tolist(), by_label, strict=True):
        if len(members) < 2:
            continue  # the only image of its class stays in training
        count = min(len(members) - 1, max(1, round(len(members) * val_fraction)))
        held_out[members[permutation(seed, HOLDOUT, 0, label, len(members))[:count]]] = True
    if not held_out.any():
        raise HoldOutError(source)
    return source.subset(np.flatnonzero(held_out if split == "val" else ~held_out))


def _read_classes(root: Path) -> list[str] | None:
    """Class names from `classes.txt`, one per line, or None when there is no such file."""
    file = root / "classes.txt"
    if not file.is_file():
        return None
    try:
        if (size := file.stat().st_size) > _MAX_CLASSES_BYTES:
            raise UsageError(f"{file} has {size >> 20:,} MiB, too much for one class name per line")
        names = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text; save it in UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}; check its rights") from error
    if not names or len(set(names)) < len(names) or "" in names:
        raise UsageError(f"{file} must hold one distinct class name per line")
    return names


def _first_image(root: Path) -> str | None:
    """An image in `root` or below one of its folders, relative to it; None when there is none."""
    folders, files = _listing(root)
    below = (os.path.join(folder, image) for folder in folders for image in _walk_images(root / folder))
    return next((file for file in files if _is_image(file)), None) or next(below, None)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _is_hidden(name: str) -> bool:
    """Names that are no data's: those with a dot, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """(sub-folders, files) of a folder, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not _is_hidden(entry.name)]
            folders = sorted(entry.name for entry in visible if entry.is_dir())
            files = sorted(entry.name for entry in visible if entry.is_file())
    except OSError as error:
        _refuse_folder(error)
    return folders, files


def _refuse_folder(error: OSError) -> NoReturn:
    """A folder that cannot be listed must not go missing from the data set without a word."""
    name = printable(str(error.filename))
    raise UsageError(f"cannot list the folder {name}: {error.strerror}; check the path and rights") from error


def _walk_images(folder: Path) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted. Links are followed, cycles are not."""
    found = []
    seen: set[tuple[int, int]] = set()
    for current, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [
            os.path.relpath(os.path.join(current, name), folder)
            for name in files
            if _is_image(name) and not _is_hidden(name)
        ]
    return sorted(found)


def size_fault(width: int, height: int, smallest: int) -> str | None:
    """Why an image of this size cannot be used; None if it can."""
    if min(width, height) >= smallest:
        return None
    return f"{width} x {height} px, the crops need a short side of {smallest} px"


def check_image_size(width: int, height: int, smallest: int, where: str) -> None:
    """Raise `UsageError` when an image's short side is below `smallest` px (0 or 1: never)."""
    if size_fault(width, height, smallest):
        raise UsageError(
            f"image smaller than the crop: {printable(where)} is {width} x {height} px, the crops need "
            f"a short side of {smallest}; use a smaller --crops.global-size (now at most "
            f"{min(width, height)}), or allow enlarging with --crops.min-image-size 1"
        )


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices spread evenly over `count` images."""
    step = max(1, math.ceil(count / wanted))
    return list(range(0, count, step))


def check_sizes(
    source: ImageSource, smallest: int, max_bad_fraction: float, known: Collection[int] = ()
) -> None:
    """Find data that is too small, or broken, as a whole, by 64 images spread over it.

    Raises `UsageError` or `RunError` for the first bad one if there are more than a share of
    `max_bad_fraction` explains; a few are left to the quarantine. known: images that are not looked at.
    """
    probed = spread(len(source), _PROBED_IMAGES)
    first: Exception | None = None
    bad = 0
    for index in probed:
        if index in known:
            continue
        try:
            check_image_size(*source.image_size(index), smallest, source.describe(index))
        except (UsageError, UnreadableImageError) as error:
            bad += 1
            first = first or error
    allowed = max_bad_fraction * len(probed)
    if len(probed) < len(source):  # a sample: three standard deviations more
        allowed += 3 * math.sqrt(allowed * (1 - max_bad_fraction))
    if first is not None and bad > max(allowed, max_bad_fraction > 0):
        raise first
