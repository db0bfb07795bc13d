"""Folders of image files, and what names of folders and files mean."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lejepa_fast.data.sources.base import EncodedSource, Names
from lejepa_fast.data.sources.decoding import IMAGE_SUFFIXES, read_file
from lejepa_fast.errors import UsageError

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "eval", "dev", "test", "testing")  # the first one there is used


class FileSource(EncodedSource):
    """Image files below a folder, given by their paths relative to it. `about`: as of `ImageSource`."""

    def __init__(self, root: Path, names: Iterable[str], **about: Any) -> None:
        super().__init__(**{"origin": f"folder {root}", **about})
        self.root, self._names = root, Names(names)

    def __len__(self) -> int:
        return len(self._names)

    def relative_path(self, index: int) -> str:
        """Path of the image file below the root."""
        return self._names[index]

    def describe(self, index: int) -> str:
        return str(self.root / self._names[index])

    def encoded(self, index: int) -> bytes:
        return read_file(self.describe(index))


class FolderSource(FileSource):
    """Image files below a folder: one sub-folder per class, or a flat folder without labels.

    Classes are the sub-folders that hold an image at any depth, in sorted order. Files are taken in sorted
    order. Hidden files and `__MACOSX` folders are ignored; `left_out` counts other files and empty classes.

    Args:
        root: the folder.
        classes: names and order of the classes, such as those of the training split. None: as found.
        empty: class folders of the training split without images, for messages.

    Raises:
        UsageError: there are no images, images beside folders of images, a class that `classes` lacks,
            class folders that are split, or a folder that cannot be listed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        empty: Collection[str] = (),
    ) -> None:
        root = Path(root)
        folders, files = list_folder(root)
        flat = [name for name in files if is_image(name)]
        others = [name for name in files if flat and not is_image(name)]
        by_class: dict[str, list[str]] = {}
        for name in folders:
            images, rest = walk_files(root / name)
            if images:
                by_class[name] = images
                others += [os.path.join(name, file) for file in rest]
        if flat and by_class:
            raise UsageError(
                f"{root} holds both images ({flat[0]}) and folders of images ({next(iter(by_class))}/); "
                "move the images into class folders, or all of them into one flat folder"
            )
        if not flat and not by_class:
            raise UsageError(
                f"no images in {root}; expected class folders of images, image files, or .tar shards "
                f"({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        _refuse_split_classes(root, by_class)
        names = list(by_class if classes is None else classes)
        if unknown := sorted(set(by_class) - set(names)):
            fault = "whose folder in the training split holds no images"
            if unknown[0] not in empty:
                fault = "which the training split does not have"
            raise UsageError(
                f"{root} has the class {unknown[0]!r}, {fault}; give both splits the same class folders"
            )
        counts = [len(images) for images in by_class.values()]
        super().__init__(
            root,
            flat or (os.path.join(name, file) for name in by_class for file in by_class[name]),
            name=root.name or str(root),
            classes=None if flat else names,
            targets=None if flat else np.repeat([names.index(name) for name in by_class], counts),
        )
        self.empty = [] if flat else [name for name in folders if name not in by_class]
        self.left_out = _left_out(others, self.empty)


def _left_out(others: Sequence[str], empty: Sequence[str]) -> str:
    """What is said of files that are no images, and of folders without images."""
    parts = []
    if others:
        suffixes = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in others)
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(5))
        parts.append(f"{len(others):,} other files ({counts}), such as {others[0]}")
    if empty:
        parts.append(f"folders without images: {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}")
    return "; ".join(parts)


def _refuse_split_classes(root: Path, by_class: Mapping[str, Sequence[str]]) -> None:
    """Raise `UsageError` for splits inside the folders, as in cats/train/, cats/val/: they would be mixed."""
    inside = {name: {image.partition(os.sep)[0] for image in images} for name, images in by_class.items()}
    everywhere = all(part.lower() in TRAIN_NAMES + VAL_NAMES for parts in inside.values() for part in parts)
    for name, parts in inside.items():
        train, val = (sorted(p for p in parts if p.lower() in known) for known in (TRAIN_NAMES, VAL_NAMES))
        if everywhere or (train and val):
            found = ", ".join(f"{part}/" for part in train + val)
            raise UsageError(
                f"{root / name} holds {found} as a data set does, beside other folders of images; give one "
                f"of these folders, or move the images to {root / 'train' / name} and {root / 'val' / name}"
            )


# --- names --------------------------------------------------------------------------------------


def is_image(name: str) -> bool:
    """Whether a file is read as an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_shard(name: str) -> bool:
    """Whether a file is taken for a WebDataset shard."""
    return name.lower().endswith(SHARD_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Names that begin with a dot, and the folder that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def split_word(name: str) -> str | None:
    """The one word in a name that means a split, as in "imagenet1k-val-00.tar", "valB"; None without."""
    parts = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    words = {word for word in map(str.lower, parts) if word in TRAIN_NAMES + VAL_NAMES}
    return words.pop() if len(words) == 1 else None


# --- folders ------------------------------------------------------------------------------------


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """(sub-folders, files) of a folder, sorted, without hidden ones. Raises `UsageError` when it cannot."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not is_hidden(entry.name)]
            folders = sorted(entry.name for entry in visible if entry.is_dir())
            # A pipe in the place of a shard must not silently go missing either.
            files = sorted(e.name for e in visible if not e.is_dir() and os.path.exists(e.path))
    except OSError as error:
        _refuse_folder(error)
    return folders, files


def walk_files(folder: Path) -> tuple[list[str], list[str]]:
    """(images, other files) below `folder`, as sorted paths relative to it, without hidden ones."""
    paths = [
        os.path.relpath(os.path.join(current, name), folder)
        for current, names in _walk(folder)
        for name in names
    ]
    images = sorted(filter(is_image, paths))
    return images, sorted(path for path in paths if not is_image(path))


def holds_images(folder: Path) -> bool:
    """Whether there is an image or a shard at any depth below `folder`."""
    return any(is_image(name) or is_shard(name) for _, names in _walk(folder) for name in names)


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder from here down with its files, without hidden ones. Links are followed, not in circles."""
    seen: set[tuple[int, int]] = set()
    for current, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield current, [name for name in files if not is_hidden(name)]


def _refuse_folder(error: OSError) -> NoReturn:
    """A folder that cannot be listed must not silently go missing from the data set."""
    raise UsageError(
        f"cannot list the folder {error.filename}: {error.strerror}; check the path and rights"
    ) from error
