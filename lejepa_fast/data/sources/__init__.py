"""Where images come from: `open_source` turns a path into a sequence of (image, label) pairs.

`base` says what a source is, `folder`, `shards` and `torchvision_sets` are its kinds, and `decoding` reads
image files. To add a kind, subclass `EncodedSource` or `ImageSource` and give it a form of path here.
"""

from lejepa_fast.errors import require_extra

require_extra("train", "torchvision", "annotated_types", "numpy", "PIL", "pydantic", "tqdm")

import os
import re
from itertools import islice
from pathlib import Path

import numpy as np

from lejepa_fast.data.draws import HOLDOUT, permutation
from lejepa_fast.data.sources.base import EncodedSource, ImageSource, Split
from lejepa_fast.data.sources.decoding import UnreadableImageError
from lejepa_fast.data.sources.folder import (
    TRAIN_NAMES,
    VAL_NAMES,
    FolderSource,
    holds_images,
    is_shard,
    list_folder,
    split_word,
    walk_files,
)
from lejepa_fast.data.sources.shards import ShardSource
from lejepa_fast.data.sources.torchvision_sets import open_torchvision_set
from lejepa_fast.errors import UsageError

__all__ = ["EncodedSource", "FolderSource", "ImageSource", "ShardSource", "Split", "UnreadableImageError"]

EMBEDDED = {"trashnet96": Path(__file__).parents[1] / "trashnet96"}
_MAX_CLASSES_BYTES = 64 << 20

# What makes up a split: a folder, one .tar, or some of the shards of a folder.
Place = Path | list[Path]


def open_source(path: str, split: Split, *, val_fraction: float = 0.1, seed: int = 0) -> ImageSource:
    """Open one split of a data set.

    Args:
        path: "trashnet96", which the package ships; a folder of class folders; a flat folder of images; a
            folder of WebDataset .tar shards, or one .tar; "torchvision:NAME:/dir" for a torchvision data set
            whose files are in /dir (nothing is ever downloaded). `find_splits` says which have own splits.
        split: "train" or "val".
        val_fraction: share of each class, at least one image, that "val" gets where there are no splits; 0:
            "train" gets all images, and "val" none.
        seed: chooses the images of that share.

    Raises:
        UsageError: the data cannot be opened; names the path, what is wrong with it and the way out.
    """
    if split not in ("train", "val"):
        raise UsageError(f"split: expected 'train' or 'val', got {split!r}")
    if not 0.0 <= val_fraction < 1.0:
        raise UsageError(f"val_fraction: expected a number between 0 and 1, got {val_fraction}")
    path = os.fspath(path)
    if path.startswith("torchvision:"):
        source, is_split = open_torchvision_set(path, split)
        source.origin = path
        return source if is_split else hold_out(source, split, val_fraction, seed)
    if path not in EMBEDDED and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise UsageError(
            f"cannot read {path!r}: only local folders, .tar files and torchvision:NAME:/dir are opened, "
            "never commands or URLs; copy the data to a disk first"
        )
    root = EMBEDDED.get(path) or Path(path).expanduser()
    train_place, val_place = find_splits(root)
    source = train = open_place(train_place, root)
    one_class = train._targets is not None and len(np.unique(train._targets)) < 2
    if split == "val" and val_place is not None:
        source = open_place(val_place, root, train)
    if one_class:  # no labels: any classifier would be right about every image
        source._targets = source.classes = None
        source.origin += ", all of one class"
    if train_place != root:
        source.name = path if path in EMBEDDED else root.name or str(root)
    return source if val_place is not None else hold_out(source, split, val_fraction, seed)


def find_splits(root: Path, *, below: int = 3) -> tuple[Place, Place | None]:
    """Where the training images are, and the held-out ones; None: a part is to be held out.

    Splits are folders with images that are called as `TRAIN_NAMES` and `VAL_NAMES` in any case, or shards in
    one folder with such a word in their names.

    Args:
        root: a folder or a .tar.
        below: so many levels down, look for splits and shards in the only folder with images, too, as in
            images/train.

    Raises:
        UsageError: `root` does not exist, or names of splits in it make no training split.
    """
    if not root.exists():
        known = ", ".join(sorted(EMBEDDED))
        raise UsageError(
            f"no such data: {root} does not exist; give a folder of images or of .tar shards, "
            f"torchvision:NAME:/dir, or one of the embedded sets ({known})"
        )
    if not root.is_dir():
        return root, None
    folders, files = list_folder(root)
    exact = [n for n in folders if n.lower() in TRAIN_NAMES + VAL_NAMES and holds_images(root / n)]
    train = [name for name in exact if name.lower() in TRAIN_NAMES]
    # Without images a held-out folder is not passed over: opening it says so.
    val = [name for names in (exact, folders) for word in VAL_NAMES for name in names if name.lower() == word]
    if len(train) == 1 and val:
        return root / train[0], root / val[0]
    # Looking into all folders can take long. It is needed where one is named like a split.
    others = (name for name in folders if name not in exact and holds_images(root / name))
    named = exact + list(others if any(map(split_word, folders)) else islice(others, 2))
    if named == train and len(train) == 1:
        return root / train[0], None
    words = {split_word(name) for name in named}
    both = not words.isdisjoint(TRAIN_NAMES) and not words.isdisjoint(VAL_NAMES)
    # A class holds images; a folder of that name which holds classes is a split.
    nested = any(holds_images(root / name / inner) for name in exact for inner in list_folder(root / name)[0])
    if both or nested or (None not in words and (exact or len(words) > 1)):
        like = [name for name in named if split_word(name) or nested]
        found = ", ".join(f"{name}/" for name in like)
        raise UsageError(
            f"images in {root} are in folders named like splits ({found}), but not in train/ alone, or "
            f"beside val/ or test/; rename the folders, or give one of them ({root / like[0]}), of which a "
            "part is then held out"
        )
    shards = [root / name for name in files if is_shard(name)]
    if shards and not named:
        return _splits_of_shards(root, shards)
    if below and len(named) == 1 and not shards:
        only = root / named[0]
        inside = find_splits(only, below=below - 1)
        if inside[0] != only or any(map(is_shard, list_folder(only)[1])):
            return inside
    return root, None


def _splits_of_shards(root: Path, shards: list[Path]) -> tuple[Place, Place | None]:
    by_word: dict[str | None, list[Path]] = {}
    for shard in shards:
        by_word.setdefault(split_word(shard.name), []).append(shard)
    val = next((by_word[word] for word in VAL_NAMES if word in by_word), None)
    if val is None:
        return root, None
    train = [shard for word in TRAIN_NAMES for shard in by_word.get(word, ())]
    if not train or None in by_word:
        others = f"shards of no split ({by_word[None][0].name})" if None in by_word else "none for training"
        raise UsageError(
            f"{root} holds shards of a held-out split ({val[0].name}) and {others}; name all of them by "
            "their split, such as train-0000.tar and val-0000.tar, or move them to train/ and val/"
        )
    return train, val


def open_place(place: Place, root: Path, train: ImageSource | None = None) -> ImageSource:
    """Open a split, or a folder without splits.

    Args:
        place: what `find_splits(root)` found.
        root: the whole data set. A classes.txt beside its splits names the numbers in shards; that of the
            shards' own folder comes after it.
        train: the training split, whose classes are binding.

    Raises:
        UsageError: it cannot be opened.
    """
    classes = None if train is None else train.classes
    if isinstance(place, list):
        folder, shards = place[0].parent, place
    elif place.is_dir():
        folder, shards = place, [place / name for name in list_folder(place)[1] if is_shard(name)]
    elif is_shard(place.name):
        return ShardSource([place], classes=classes or _read_classes(place.parent))
    else:
        raise UsageError(f"{place} is a file; give a folder of images, or a .tar shard")
    if not shards:
        return FolderSource(folder, classes=classes, empty=getattr(train, "empty", ()))
    if images := walk_files(folder)[0]:
        raise UsageError(
            f"{folder} holds both shards ({shards[0].name}) and images ({images[0]}); "
            "move the shards or the images elsewhere"
        )
    beside = None if folder == root else _read_classes(folder.parent)
    return ShardSource(shards, classes=classes or beside or _read_classes(folder))


def hold_out(source: ImageSource, split: Split, val_fraction: float, seed: int = 0) -> ImageSource:
    """One part of a source that is split by class, the same on every machine, run and rank.

    The arguments are those of `open_source`. Raises `UsageError` when there are too few images.
    """
    if val_fraction == 0:
        return source if split == "train" else source.subset([])
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
        few = "too few images" if len(source) < 2 else "a single image in every class"
        raise UsageError(
            f"{source.name} has {few}, and none to hold out for validation; add images, or train on all of "
            "them with val_fraction 0 (--data.val-fraction 0; lejepa-data: --val-fraction 0)"
        )
    part = source.subset(np.flatnonzero(held_out if split == "val" else ~held_out))
    part.origin += ", held out" if split == "val" else ", all but those held out"
    part.left_out = part.left_out if split == "train" else ""  # said once
    return part


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
        raise UsageError(f"{file}: expected one distinct class name per line")
    return names
