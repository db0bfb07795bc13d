"""Folders of image files."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lejepa_fast.data.sources.base import EncodedSource, Names
from lejepa_fast.data.sources.decoding import IMAGE_SUFFIXES, printable, read_file
from lejepa_fast.errors import UsageError


class FileSource(EncodedSource):
    """Image files below a folder, given by their paths relative to it. `about`: as of `ImageSource`."""

    def __init__(self, root: Path, names: Iterable[str], **about: Any) -> None:
        super().__init__(**about)
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
    order. Other files, hidden ones and `__MACOSX` folders are ignored.

    Args:
        root: the folder.
        classes: names and order of the classes, such as those of the training split. None: as found.

    Raises:
        UsageError: there are no images, images beside folders of images, a class that `classes` lacks, or a
            folder that cannot be listed.
    """

    def __init__(self, root: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> None:
        root = Path(root)
        folders, files = list_folder(root)
        flat = [name for name in files if _is_image(name)]
        by_class = {name: images for name in folders if (images := walk_images(root / name))}
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
        names = list(by_class if classes is None else classes)
        if unknown := sorted(set(by_class) - set(names)):
            raise UsageError(
                f"{root} has the class {unknown[0]!r}, which the training split does not have; "
                "give both splits the same class folders"
            )
        counts = [len(images) for images in by_class.values()]
        super().__init__(
            root,
            flat or (os.path.join(name, file) for name in by_class for file in by_class[name]),
            name=root.name or str(root),
            classes=None if flat else names,
            targets=None if flat else np.repeat([names.index(name) for name in by_class], counts),
        )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """(sub-folders, files) of a folder, sorted, without hidden ones. Raises `UsageError` when it cannot."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not _is_hidden(entry.name)]
            folders = sorted(entry.name for entry in visible if entry.is_dir())
            # A pipe in the place of a shard must not silently go missing either.
            files = sorted(e.name for e in visible if not e.is_dir() and os.path.exists(e.path))
    except OSError as error:
        _refuse_folder(error)
    return folders, files


def walk_images(folder: Path) -> list[str]:
    """Paths of all images below `folder`, relative to it, sorted. Links are followed, but not in circles."""
    found = []
    seen: set[tuple[int, int]] = set()
    for current, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        images = [name for name in files if _is_image(name) and not _is_hidden(name)]
        found += [os.path.relpath(os.path.join(current, name), folder) for name in images]
    return sorted(found)


def _is_hidden(name: str) -> bool:
    """Names that begin with a dot, and the folder that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def _refuse_folder(error: OSError) -> NoReturn:
    """A folder that cannot be listed must not silently go missing from the data set."""
    name = printable(str(error.filename))
    raise UsageError(f"cannot list the folder {name}: {error.strerror}; check the path and rights") from error
