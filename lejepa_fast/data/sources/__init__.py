"""Where images come from: `open_source` turns a path into a sequence of (image, label) pairs.

`base` says what a source is, `folder`, `shards` and `torchvision_sets` are its kinds, and `decoding` reads
image files. To add a kind, subclass `EncodedSource` or `ImageSource` and give it a form of path here.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lejepa_fast.data.draws import HOLDOUT, permutation
from lejepa_fast.data.sources.base import EncodedSource, ImageSource, Split
from lejepa_fast.data.sources.decoding import UnreadableImageError, printable
from lejepa_fast.data.sources.folder import FolderSource, list_folder, walk_images
from lejepa_fast.data.sources.shards import SHARD_SUFFIXES, ShardSource
from lejepa_fast.data.sources.torchvision_sets import open_torchvision_set
from lejepa_fast.errors import UsageError

__all__ = ["EncodedSource", "FolderSource", "ImageSource", "ShardSource", "Split", "UnreadableImageError"]

EMBEDDED = {"trashnet96": Path(__file__).parents[1] / "trashnet96"}
_MAX_CLASSES_BYTES = 64 << 20
_VAL_NAMES = ("val", "valid", "validation", "test")


class HoldOutError(UsageError):
    """No class has an image to spare for validation. `source` holds all the images."""

    def __init__(self, source: ImageSource) -> None:
        super().__init__(f"{source.name} has too few images to hold some out for validation; add images")
        self.source = source


def open_source(path: str, split: Split, *, val_fraction: float = 0.1, seed: int = 0) -> ImageSource:
    """Open one split of a data set.

    Args:
        path: "trashnet96", which the package ships; a folder of class folders; a flat folder of images; a
            folder of WebDataset .tar shards, or one .tar; "torchvision:NAME:/dir" for a torchvision data set
            whose files are in /dir (nothing is ever downloaded). A folder with train/ and val/ (or valid/,
            validation/, test/) below it has its own splits.
        split: "train" or "val".
        val_fraction: share of each class, at least one image, that "val" gets where there are no splits.
        seed: chooses the images of that share.

    Raises:
        UsageError: the data cannot be opened; names the path, what is wrong with it and the way out.
    """
    if split not in ("train", "val"):
        raise UsageError(f"split must be 'train' or 'val'; got {split!r}")
    if not 0.0 < val_fraction < 1.0:
        raise UsageError(f"val_fraction must lie between 0 and 1; got {val_fraction}")
    path = os.fspath(path)
    if path.startswith("torchvision:"):
        source, is_split = open_torchvision_set(path, split)
        return source if is_split else _hold_out(source, split, val_fraction, seed)
    if path not in EMBEDDED and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise UsageError(
            f"cannot read {path!r}: only local folders, .tar files and torchvision:NAME:/dir are opened, "
            "never commands or URLs; copy the data to a disk first"
        )
    root = EMBEDDED.get(path) or Path(path).expanduser()
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
    folders = list_folder(root)[0] if root.is_dir() else []
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
    """Open a folder without splits, or one .tar.

    `classes` are binding: those of the training split. `shard_classes` name the numbers in shards: they are
    those of a classes.txt beside the splits, and the shards' own classes.txt comes after it.
    """
    if root.is_dir():
        shards = [root / name for name in list_folder(root)[1] if name.endswith(SHARD_SUFFIXES)]
        if not shards:
            return FolderSource(root, classes=classes)
    elif root.name.endswith(SHARD_SUFFIXES):
        shards = [root]
    else:
        raise UsageError(f"{root} is a file; give a folder of images, or a .tar shard")
    if images := walk_images(root) if root.is_dir() else []:
        raise UsageError(
            f"{root} holds both shards ({shards[0].name}) and images ({printable(images[0])}); "
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
            raise ValueError(f"it has {size >> 20:,} MiB")
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:  # bytes that are not UTF-8 are a `ValueError`
        raise UsageError(f"cannot read class names from {file}, one per line in UTF-8: {error}") from error
    if not names or len(set(names)) < len(names) or "" in names:
        raise UsageError(f"{file} must hold one distinct class name per line")
    return names
