"""torchvision's image-classification data sets, by name, from files that are already on disk."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lejepa_fast.data.sources.base import ImageSource, Split
from lejepa_fast.data.sources.folder import FileSource
from lejepa_fast.data.sources.outages import SharedFileError
from lejepa_fast.errors import UsageError

# Sets that are not image classification, or that unpack archives on opening (ImageNet), are left out.
_BY_FLAG = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS")  # train=True or False
_UNSPLIT = ("EuroSAT", "SUN397", "Caltech101", "Caltech256")
_VAL_SPLITS = {  # what the held-out split is called
    **dict.fromkeys(("STL10", "SVHN", "Food101", "GTSRB", "StanfordCars", "OxfordIIITPet"), "test"),
    **dict.fromkeys(("Flowers102", "DTD", "FGVCAircraft", "Imagenette", "PCAM", "RenderedSST2"), "val"),
    "CLEVRClassification": "val",
    "Country211": "valid",
}
NAMES = sorted([*_BY_FLAG, *_UNSPLIT, *_VAL_SPLITS])

# Sets that keep decoded images in arrays; all others consist of image files.
_ARRAYS = frozenset({*_BY_FLAG, "STL10", "SVHN", "PCAM"})


class ArraySource(ImageSource):
    """A torchvision data set that makes its images from arrays."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._count = dataset, len(dataset)
        super().__init__(name=name, classes=_classes(dataset), targets=_labels(dataset))

    def __len__(self) -> int:
        return self._count

    def describe(self, index: int) -> str:
        return f"number {index} of torchvision's {self.name}"

    def open_image(self, index: int) -> Image.Image:
        try:
            return self._dataset[index][0]
        except OSError as error:  # PCAM reads its one file for each image
            raise SharedFileError(error.errno or errno.EIO, str(error)) from error


def _file_source(dataset: Any, name: str) -> FileSource:
    """A torchvision data set of image files, which are read here and not by torchvision.

    So the limits, formats and conversions of all image files hold. torchvision lets Pillow try any format on
    files of any size, and for EPS Pillow runs Ghostscript.
    """
    files, labels = _files(dataset), _labels(dataset)
    order = sorted(range(len(files)), key=lambda item: os.fsencode(files[item]))  # SUN397 has the disk's
    names = (os.path.abspath(files[item]) for item in order)
    return FileSource(Path("/"), names, name=name, classes=_classes(dataset), targets=labels[order])


def split_options(name: str, split: Split) -> dict[str, Any] | None:
    """Arguments of torchvision's class that select the split; None for a set that has no splits."""
    if name in _UNSPLIT:
        return None
    if name in _BY_FLAG:
        return {"train": split == "train"}
    train = "trainval" if name == "OxfordIIITPet" else "train"
    return {"split": train if split == "train" else _VAL_SPLITS[name]}


def open_torchvision_set(path: str, split: Split) -> tuple[ImageSource, bool]:
    """Open "torchvision:NAME:/dir": the source, and whether it is only this split. Nothing is downloaded.

    Sets without splits come whole. Raises `UsageError` for a malformed path, or what torchvision cannot open.
    """
    _, name, root = [*path.split(":", 2), "", ""][:3]
    if not name or not root:
        raise UsageError(f"expected torchvision:NAME:/dir, such as torchvision:CIFAR10:/data, got {path!r}")
    if name not in NAMES:
        raise UsageError(f"torchvision data set {name!r} is not known here; known: {', '.join(NAMES)}")
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise UsageError(f"no such folder: {root}; give the folder that holds the files of {name}")
    options = split_options(name, split)
    from torchvision import datasets  # takes seconds

    try:
        dataset = getattr(datasets, name)(root, **(options or {}))
    except Exception as error:  # each data set raises its own: RuntimeError, FileNotFoundError, ImportError
        reason = (str(error) or repr(error)).splitlines()[0].split(". You can use download=True")[0]
        raise UsageError(
            f"torchvision's {name} cannot be opened in {root}: {reason}; nothing is downloaded: if files "
            f"are missing, fetch them once with torchvision.datasets.{name}({root!r}, ..., download=True)"
        ) from error
    source = ArraySource(dataset, name) if name in _ARRAYS else _file_source(dataset, name)
    if len(source) == 0:
        raise UsageError(f"torchvision's {name} in {root} holds no images for the split {split!r}")
    return source, options is not None


def _attribute(dataset: Any, *names: str) -> Any:
    """The first of these attributes that holds something for every item."""
    for found in (getattr(dataset, name, None) for name in names):
        if found is not None and len(found) == len(dataset):
            return found
    raise UsageError(
        f"this version of torchvision keeps the files or labels of {type(dataset).__name__} where they are "
        "not looked for; give the path of the folder that holds its images instead"
    )


def _files(dataset: Any) -> list[str]:
    """Path of every item, from whichever attribute this data set keeps them in."""
    name = type(dataset).__name__
    if name in ("Caltech101", "Caltech256"):
        folder = os.path.join(dataset.root, f"{name[-3:]}_ObjectCategories")
        files = "image_{1:04d}.jpg" if name == "Caltech101" else "{0:03d}_{1:04d}.jpg"
        return [
            os.path.join(folder, dataset.categories[label], files.format(label + 1, number))
            for label, number in zip(dataset.y, dataset.index, strict=True)
        ]
    items = _attribute(dataset, "_samples", "samples", "_images", "_image_files")
    return [os.fspath(item[0] if isinstance(item, tuple) else item) for item in items]


def _classes(dataset: Any) -> Sequence[str] | None:
    classes = getattr(dataset, "classes", None)
    return classes if classes and all(isinstance(name, str) for name in classes) else None


def _labels(dataset: Any) -> np.ndarray:
    """Class index of every item, from whichever attribute this data set keeps them in."""
    if type(dataset).__name__ == "PCAM":  # which keeps them in its file
        labels = [dataset[index][1] for index in range(len(dataset))]
    else:
        labels = _attribute(dataset, "targets", "labels", "_labels", "y", "_samples")
    if len(labels) and isinstance(labels[0], tuple):
        labels = [label for _, label in labels]
    return np.asarray(labels, dtype=np.int64)
