"""torchvision's image-classification data sets, by name, from files that are already on disk."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision import datasets

from lejepa_fast.data.sources.base import EncodedSource, ImageSource, Split
from lejepa_fast.data.sources.decoding import read_file
from lejepa_fast.errors import UsageError


def _splits(val: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"split": "train"}, {"split": val}


_TRAIN_FLAG = ({"train": True}, {"train": False})

# Arguments that select the two splits; None when a data set has no splits of its own. Sets that are
# not image classification, or that would unpack archives on opening (ImageNet), are left out.
_SETS: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    "CIFAR10": _TRAIN_FLAG,
    "CIFAR100": _TRAIN_FLAG,
    "MNIST": _TRAIN_FLAG,
    "FashionMNIST": _TRAIN_FLAG,
    "KMNIST": _TRAIN_FLAG,
    "USPS": _TRAIN_FLAG,
    "STL10": _splits("test"),
    "SVHN": _splits("test"),
    "Food101": _splits("test"),
    "GTSRB": _splits("test"),
    "StanfordCars": _splits("test"),
    "Flowers102": _splits("val"),
    "DTD": _splits("val"),
    "FGVCAircraft": _splits("val"),
    "Imagenette": _splits("val"),
    "PCAM": _splits("val"),
    "RenderedSST2": _splits("val"),
    "CLEVRClassification": _splits("val"),
    "Country211": _splits("valid"),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "EuroSAT": None,
    "SUN397": None,
    "Caltech101": None,
    "Caltech256": None,
}

# Sets that keep their images decoded, in arrays; all others are image files.
_ARRAYS = frozenset(
    {"CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS", "STL10", "SVHN", "PCAM"}
)


class Unsplit(NamedTuple):
    """A data set that has no held-out part of its own."""

    source: ImageSource


class ArraySource(ImageSource):
    """A torchvision data set whose items are (image, class index), the images from arrays."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset = dataset
        super().__init__(name=name, kind="torchvision", classes=_classes(dataset), targets=_labels(dataset))

    def __len__(self) -> int:
        return len(self._dataset)

    def describe(self, index: int) -> str:
        return f"number {index} of torchvision's {self.name}"

    def open_image(self, index: int) -> Image.Image:
        return self._dataset[index][0]


class FileSource(EncodedSource):
    """A torchvision data set of image files, which are read here and not by torchvision.

    So they have the limits, formats and conversions of all image files: torchvision lets Pillow try any
    format on files of any size, and for EPS Pillow runs Ghostscript.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        files = _files(dataset)
        order = np.argsort(files, kind="stable")  # SUN397 lists them as the disk does
        self._files = files[order]
        labels = _labels(dataset)[order]
        super().__init__(name=name, kind="torchvision", classes=_classes(dataset), targets=labels)

    def __len__(self) -> int:
        return len(self._files)

    def describe(self, index: int) -> str:
        return os.fsdecode(self._files[index])

    def encoded(self, index: int) -> bytes:
        return read_file(self.describe(index))


def open_torchvision_set(path: str, split: Split) -> ImageSource | Unsplit:
    """Open "torchvision:NAME:/dir"; the files must be there already, nothing is downloaded."""
    parts = path.split(":", 2)
    if len(parts) != 3 or not parts[1] or not parts[2]:
        raise UsageError(f"expected torchvision:NAME:/dir, such as torchvision:CIFAR10:/data; got {path!r}")
    _, name, root = parts
    if name not in _SETS:
        by_lower = {known.lower(): known for known in _SETS}
        close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
        hint = f"did you mean {by_lower[close[0]]}?" if close else f"known: {', '.join(sorted(_SETS))}"
        raise UsageError(f"torchvision data set {name!r} is not known here; {hint}")
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise UsageError(f"no such folder: {root}; give the folder that holds the files of {name}")
    splits = _SETS[name]
    options = {} if splits is None else splits[0 if split == "train" else 1]
    try:
        dataset = getattr(datasets, name)(root, **options)
    except Exception as error:  # RuntimeError, FileNotFoundError, ImportError, ...: each data set has its own
        # Some turn the ImportError of a package that they read their files with into another error.
        missing = next((e for e in (error, error.__context__) if isinstance(e, ModuleNotFoundError)), None)
        if missing is not None and missing.name:
            package = missing.name.partition(".")[0]
            raise UsageError(
                f"torchvision's {name} needs a package that is not installed: pip install {package}"
            ) from error
        reason = (str(error) or repr(error)).splitlines()[0].split(". You can use download=True")[0]
        raise UsageError(
            f"torchvision's {name} cannot be opened in {root}: {reason}; nothing is downloaded "
            f"here: fetch it once with torchvision.datasets.{name}({root!r}, ..., download=True)"
        ) from error
    source = ArraySource(dataset, name) if name in _ARRAYS else FileSource(dataset, name)
    if len(source) == 0:
        raise UsageError(f"torchvision's {name} in {root} holds no images for the split {split!r}")
    return Unsplit(source) if splits is None else source


def _files(dataset: Any) -> np.ndarray:
    """Path of every item (bytes), from whichever attribute this data set keeps them in."""
    found = None
    for attribute in ("_image_files", "_images", "samples", "_samples"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            found = [os.fspath(item[0] if isinstance(item, tuple) else item) for item in values]
    name = type(dataset).__name__
    if name in ("Caltech101", "Caltech256"):
        folder = os.path.join(dataset.root, f"{name[-3:]}_ObjectCategories")
        files = "image_{1:04d}.jpg" if name == "Caltech101" else "{0:03d}_{1:04d}.jpg"
        found = [
            os.path.join(folder, dataset.categories[label], files.format(label + 1, number))
            for label, number in zip(dataset.y, dataset.index, strict=True)
        ]
    if found is None:
        raise _unknown_layout(dataset)
    # Not a list of strings: forked workers would copy its pages by counting references.
    return np.array([os.fsencode(path) for path in found], dtype=np.bytes_)


def _classes(dataset: Any) -> Sequence[str] | None:
    classes = getattr(dataset, "classes", None)
    named = isinstance(classes, Sequence) and all(isinstance(item, str) for item in classes)
    return classes if named else None


def _labels(dataset: Any) -> np.ndarray:
    """Class index of every item, from whichever attribute this data set keeps them in."""
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return np.asarray(values, dtype=np.int64)
    samples = getattr(dataset, "_samples", None)
    if samples is not None and len(samples) == len(dataset):
        return np.asarray([label for _, label in samples], dtype=np.int64)
    if type(dataset).__name__ not in _ARRAYS:
        raise _unknown_layout(dataset)  # its items would be opened by torchvision
    return np.asarray([dataset[index][1] for index in range(len(dataset))], dtype=np.int64)


def _unknown_layout(dataset: Any) -> UsageError:
    return UsageError(
        f"this version of torchvision keeps the files or labels of {type(dataset).__name__} where they are "
        "not looked for; give the path of the folder that holds its images instead"
    )
