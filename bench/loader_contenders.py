"""The loaders that `loader_bench.py` compares, each as a function that makes one epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from loader_files import Folder
from plain_torchvision import PlainDataset
from torch.utils.data import DataLoader, Dataset

from lejepa_fast.data import MultiCropRecipe, multicrop_loader
from lejepa_fast.data.backends.reading import Encoded, Reader
from lejepa_fast.data.sources import EncodedSource, FolderSource
from lejepa_fast.data.sources.shards import ShardSource

PLAIN, PLAIN_TENSORS = "torchvision v2", "torchvision v2, tensors"
OURS, DALI = "backend torchvision", "backend dali"
BYTES, PILLOW, DECODED = "bytes only", "decode only, Pillow", "decode only, DALI"


class Setting(NamedTuple):
    """What all contenders share. device: where the batches end."""

    folder: Folder
    recipe: MultiCropRecipe
    batch_size: int
    workers: int
    device: torch.device

    def source(self, copies: int = 1) -> EncodedSource:
        """The files, or those in the shards there, `copies` times over."""
        path = self.folder.path
        shards = sorted(path.glob("*.tar"))
        source: EncodedSource = ShardSource(shards) if shards else FolderSource(path)
        return source if copies == 1 else source.subset(np.tile(np.arange(len(source)), copies))

    @property
    def views(self) -> str:
        """The recipe's views in words."""
        large, small = self.recipe.global_crops, self.recipe.local_crops
        return f"{large} x {self.recipe.global_size} + {small} x {self.recipe.local_size}"

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


Pass = Callable[[], int]
"""Makes one epoch and returns its number of images."""


def plain(setting: Setting, *, tensors: bool) -> Pass:
    loader = DataLoader(
        PlainDataset(setting.source(), setting.recipe, tensors=tensors),
        batch_size=setting.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=setting.workers,
        persistent_workers=True,
        pin_memory=setting.on_gpu,
        worker_init_fn=_one_thread,
    )

    def run() -> int:
        count = 0
        for views, targets in loader:
            moved = [view.to(setting.device, non_blocking=True) for view in views]
            count += len(targets)
            del moved
        return count

    return run


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def ours(setting: Setting, backend: str, *, copies: int = 1, **options: Any) -> Pass:
    """options: further ones of `multicrop_loader`."""
    loader = multicrop_loader(
        setting.source(copies),
        setting.recipe,
        batch_size=setting.batch_size,
        num_workers=setting.workers,
        backend=backend,
        device=setting.device if setting.on_gpu else None,
        **options,
    )

    def run() -> int:
        count = 0
        for views, _ in loader:
            count += len(views[0])
        return count

    return run


def bytes_only(setting: Setting) -> Pass:
    source = setting.source()
    pool = ThreadPoolExecutor(setting.workers)

    def run() -> int:
        for _ in pool.map(source.encoded, range(len(source))):
            pass
        return len(source)

    return run


class _Decoded(Dataset):
    """Decodes images and keeps nothing of them."""

    def __init__(self, source: EncodedSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> int:
        return self.source[index][0].width


def pillow_only(setting: Setting) -> Pass:
    loader = DataLoader(
        _Decoded(setting.source()),
        batch_size=setting.batch_size,
        num_workers=setting.workers,
        persistent_workers=True,
    )
    return lambda: sum(len(batch) for batch in loader)


def dali_only(setting: Setting, *, copies: int = 1, hw_decoder_load: float = 0.65) -> Pass:
    """DALI's decoder, fed as the backend feeds it, two batches in flight."""
    from lejepa_fast.data.backends.dali_graph import decode_pipeline

    source = setting.source(copies)
    reader = Reader(source, 1, setting.workers)
    pipe = decode_pipeline(
        batch_size=setting.batch_size,
        num_threads=setting.workers,
        device_id=(setting.device.index or 0) if setting.on_gpu else None,
        prefetch_queue_depth=1,
        device="gpu" if setting.on_gpu else "cpu",
        hw_decoder_load=hw_decoder_load,
    )
    pipe.build()
    size = setting.batch_size
    parts = [range(i, i + size) for i in range(0, len(source) - size + 1, size)]

    def run() -> int:
        reads = deque(reader.read(part) for part in parts[:2])
        running = 0
        for number in range(len(parts)):
            rows = [row for row in reads.popleft().result() if isinstance(row, Encoded)]
            if number + 2 < len(parts):
                reads.append(reader.read(parts[number + 2]))
            pipe.feed_input("encoded", [np.frombuffer(row.data, dtype=np.uint8) for row in rows])
            pipe.schedule_run()
            running += 1
            if running == 2:
                pipe.share_outputs()
                pipe.release_outputs()
                running -= 1
        if running:
            pipe.share_outputs()
            pipe.release_outputs()
        return len(parts) * size

    return run


def contenders(setting: Setting) -> dict[str, Callable[[], Pass]]:
    """Name to maker. On a GPU the fast ones go through more images, so that a pass is long enough."""
    copies = 16 if setting.on_gpu else 1
    return {
        PLAIN: lambda: plain(setting, tensors=False),
        DALI: lambda: ours(setting, "dali", copies=copies),
        OURS: lambda: ours(setting, "torchvision"),
        DECODED: lambda: dali_only(setting, copies=copies),
        PLAIN_TENSORS: lambda: plain(setting, tensors=True),
        PILLOW: lambda: pillow_only(setting),
        BYTES: lambda: bytes_only(setting),
    }
