"""The backends on which the promises of the loader are tested, and data sets whose labels tell the images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_files import saved
from PIL import Image

from lejepa_fast.data import MultiCropRecipe
from lejepa_fast.data.backends.choose_backend import choose_backend
from lejepa_fast.data.sources import FolderSource, ImageSource
from lejepa_fast.errors import UsageError

BACKENDS = ("torchvision", "cpu", "dali", "gpu")
CROPS_ONLY = MultiCropRecipe(
    global_size=24, local_crops=0, jitter_prob=0, grayscale_prob=0, blur_prob=0, solarize_prob=0
)


def fault_of(name: str) -> str | None:
    """Why this backend cannot run here; None if it can. "gpu" is DALI on a GPU."""
    device = torch.device("cuda") if name == "gpu" else None
    try:
        choose_backend("dali" if name == "gpu" else name, device)
    except UsageError as error:
        return str(error)
    return None


def without_gpu() -> list[str]:
    """The backends that run here on the CPU alone."""
    return [name for name in BACKENDS if name != "gpu" and fault_of(name) is None]


def skip_without(name: str) -> None:
    """Skip the test, with the reason, where this backend cannot run."""
    if fault := fault_of(name):
        pytest.skip(fault)


def on(name: str) -> dict[str, Any]:
    """Arguments for `multicrop_loader` and `eval_loader`."""
    return {"backend": "dali", "device": "cuda"} if name == "gpu" else {"backend": name}


class NumberedSource(ImageSource):
    """Image i is noise that depends on i, and its label is i."""

    def __init__(self, count: int, *, labeled: bool = True, size: tuple[int, int] = (40, 32)) -> None:
        super().__init__(name="numbered", classes=None, targets=range(count) if labeled else None)
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def describe(self, index: int) -> str:
        return f"image-{index}.png"

    def open_image(self, index: int) -> Image.Image:
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (self.size[1], self.size[0], 3), dtype=np.uint8))


class NumberedFolder(FolderSource):
    """The label of a file is its number, so that batches tell which files they hold."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._targets = np.arange(len(self))

    def name_of(self, index: int) -> str:
        return Path(self.describe(index)).name


class AwayFolder(NumberedFolder):
    """Once `armed`, it is moved away when image 5 is read; with `back` it is back after a wait."""

    armed = back = False

    def encoded(self, index: int) -> bytes:
        other, marker = self.root.with_name("away"), self.root.with_name("gone")
        if self.armed and index == 5:
            if not marker.exists():
                marker.touch()
                self.root.rename(other)
            elif self.back and other.exists():
                other.rename(self.root)
        return super().encoded(index)


def numbered_folder(root: Path, count: int, **replaced: bytes) -> NumberedFolder:
    """`count` PNG files of 48 x 32 px, 000.png and so on; keywords n0, n7, ... replace single ones."""
    root.mkdir(parents=True)
    for number in range(count):
        (root / f"{number:03d}.png").write_bytes(replaced.get(f"n{number}") or saved(picture(number), "PNG"))
    return NumberedFolder(root)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in KiB."""
    # Not from `getrusage`: its figure starts from that of the process that started this one.
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def picture(number: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Smooth random colors."""
    small = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


def broken_png() -> bytes:
    """A PNG file whose header and end are fine, but not what lies between."""
    data = bytearray(saved(picture(), "PNG"))
    start = data.index(b"IDAT") + 10
    data[start : start + 8] = b"\xff" * 8
    return bytes(data)
