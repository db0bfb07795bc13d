"""Images per second of the multi-crop loader against torchvision v2, its ceilings and its memory.

    python bench/loader_bench.py [--out DIR] [--budget-minutes X]
    python bench/loader_bench.py --peers     # against stable-pretraining's transforms, one worker each

All loaders read the same JPEG files of 500 x 375 px, make the default recipe (2 x 224 + 6 x 98 px) in
float32, normalized, with the same number of workers or threads, and take turns pass by pass. With a GPU and
DALI, DALI decodes and augments there, and every loader's batches end on the GPU. Rows go to DIR/loader.jsonl.
"""

import contextlib
import gc
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import targets
import timing
import torch
from benchlib import Row, Rows, command_line, first_line, installed_version, print_rows
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source

PLAIN, PLAIN_TENSORS = "torchvision v2", "torchvision v2, tensors"
OURS, FALLBACK, STABLE = "lejepa_fast", "lejepa_fast, torchvision backend", "stable-pretraining"
BYTES, PILLOW, DECODED = "bytes only", "decode only, Pillow", "decode only, DALI"
MEMORY_EPOCHS, MEMORY_COPIES = 5, 2
# A batch of 32 is 60 MB, a tenth of what is resident: one more or less in flight would decide. So small ones.
MEMORY_BATCH = 8
WIDTH, HEIGHT = 500, 375  # the size of a typical ImageNet file
QUALITY = 95
View = TypeVar("View")


def make_folder(path: Path, count: int) -> None:
    """Write `count` JPEG files of 500 x 375 px: mosaics of the embedded images in their own size.

    An enlarged small picture would be far smoother than a photograph, and quick to decode.
    """
    source = open_source("trashnet96", "train")
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    step = min(source[0][0].size)
    for number in range(count):
        canvas = Image.new("RGB", (WIDTH, HEIGHT))
        for y in range(0, HEIGHT, step):
            for x in range(0, WIDTH, step):
                canvas.paste(source[int(random.integers(len(source)))][0], (x, y))
        canvas.save(path / f"{number:05d}.jpg", quality=QUALITY)


# --- The loaders ----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What all loaders share."""

    folder: Path
    recipe: MultiCropRecipe
    batch_size: int
    workers: int
    device: torch.device
    """Where the batches end."""
    copies: int = 1
    """How often the fast ones go through the files in a pass, so that it is long enough."""

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


Pass = Callable[[], int]
"""Makes one epoch and returns its number of images."""


class Files(torch.utils.data.Dataset):
    """What `make` makes of each file, and the label 0."""

    def __init__(self, files: list[Path], make: Callable[[Image.Image], Any]):
        self.files, self.make = files, make

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self.files[index]) as image:
            return self.make(image.convert("RGB")), 0


def stock(setting: Setting, dataset: torch.utils.data.Dataset, images: Callable[[Any], int]) -> Pass:
    """A stock `DataLoader` over `dataset`; `images` counts those of a batch."""
    loader = DataLoader(
        dataset,
        batch_size=setting.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=setting.workers,
        persistent_workers=True,
        pin_memory=setting.on_gpu,
    )  # PyTorch gives each worker one thread
    return lambda: sum(images(batch) for batch in loader)


def _views(recipe: MultiCropRecipe, view: Callable[[int, tuple[float, float]], View]) -> list[View]:
    """The transforms of all views, globals first; `view` makes one from size and scale."""
    views = [view(recipe.global_size, recipe.global_scale)] * recipe.global_crops
    return views + [view(recipe.local_size, recipe.local_scale)] * recipe.local_crops


def multicrop_transform(
    recipe: MultiCropRecipe, *, tensors: bool, normalized: bool = True
) -> Callable[[Image.Image], list[Tensor]]:
    """All views of a Pillow image in torchvision's own random transforms, globals first.

    `tensors`: work on uint8 tensors from the start and not on Pillow images, which v2 takes alike.
    `normalized`: views are float32 (3, size, size), normalized, or else uint8.
    """
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    blur = v2.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma)
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(recipe.mean), list(recipe.std))]

    def view(size: int, scale: tuple[float, float]) -> v2.Compose:
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(size, scale, recipe.aspect_ratio, antialias=True),
            v2.RandomHorizontalFlip(recipe.flip_prob),
            v2.RandomApply([jitter], recipe.jitter_prob),
            v2.RandomGrayscale(recipe.grayscale_prob),
            v2.RandomApply([blur], recipe.blur_prob),
            v2.RandomSolarize(recipe.solarize_threshold, recipe.solarize_prob),
        ]
        steps.insert(0 if tensors else len(steps), v2.ToImage())
        return v2.Compose(steps + to_float * normalized)

    views = _views(recipe, view)
    return lambda image: [make(image) for make in views]


def plain(setting: Setting, *, tensors: bool) -> Pass:
    """The recipe as users of torchvision write it: `tensors` as in `multicrop_transform`."""

    def images(batch: Any) -> int:
        for view in batch[0]:
            view.to(setting.device, non_blocking=True)
        return len(batch[1])

    return stock(setting, Files(setting.files, multicrop_transform(setting.recipe, tensors=tensors)), images)


def stable_pretraining(setting: Setting) -> Pass:
    """The recipe in stable-pretraining's own transforms, behind its data set."""
    # See `sigreg_variants.stable_pretraining_peer`.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    from stable_pretraining.data import transforms
    from stable_pretraining.data.datasets import FromTorchDataset

    recipe = setting.recipe
    jitter = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)

    def view(size: int, scale: tuple[float, float]) -> Any:
        return transforms.Compose(
            transforms.RandomResizedCrop(size, scale, recipe.aspect_ratio, antialias=True),
            transforms.RandomHorizontalFlip(recipe.flip_prob),
            transforms.ColorJitter(*jitter, p=recipe.jitter_prob),
            transforms.RandomGrayscale(recipe.grayscale_prob),
            transforms.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma, p=recipe.blur_prob),
            transforms.RandomSolarize(recipe.solarize_threshold, recipe.solarize_prob),
            transforms.ToImage(mean=list(recipe.mean), std=list(recipe.std)),
        )

    made = transforms.MultiViewTransform(_views(recipe, view))
    dataset = FromTorchDataset(Files(setting.files, lambda image: image), ["image", "label"], made)
    return stock(setting, dataset, lambda batch: len(batch["views"][0]["label"]))


def ours(setting: Setting, backend: str) -> Pass:
    source = open_source(str(setting.folder), "train")
    loader = multicrop_loader(
        source.subset(list(range(len(source))) * setting.copies),
        setting.recipe,
        batch_size=setting.batch_size,
        num_workers=setting.workers,
        backend=backend,
        device=setting.device if setting.on_gpu else None,
    )
    return lambda: sum(len(views[0]) for views, _ in loader)


def bytes_only(setting: Setting) -> Pass:
    pool, files = ThreadPoolExecutor(setting.workers), setting.files
    return lambda: sum(1 for _ in pool.map(Path.read_bytes, files))


def pillow_only(setting: Setting) -> Pass:
    return stock(setting, Files(setting.files, lambda image: image.width), lambda batch: len(batch[1]))


def dali_only(setting: Setting) -> Pass:
    """DALI's reader and decoder alone."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(
        batch_size=setting.batch_size,
        num_threads=setting.workers,
        device_id=(setting.device.index or 0) if setting.on_gpu else None,
    )
    def decode() -> Any:
        encoded, _ = fn.readers.file(files=list(map(str, setting.files)))
        return fn.decoders.image(encoded, device="mixed" if setting.on_gpu else "cpu")

    pipe = decode()
    pipe.build()
    batches = len(setting.files) * setting.copies // setting.batch_size

    def run() -> int:
        for _ in range(batches):
            pipe.run()
        return batches * setting.batch_size

    return run


def contenders(setting: Setting, peers: bool = False) -> dict[str, Callable[[], Pass]]:
    """Name to maker. On a GPU the fast ones go through more images; `peers`: other packages for LeJEPA."""
    fast = setting._replace(copies=16) if setting.on_gpu and not peers else setting
    mine = {OURS: partial(ours, fast, "auto"), FALLBACK: partial(ours, setting, "torchvision")}
    if peers:
        return {STABLE: partial(stable_pretraining, setting), **mine}
    return {
        PLAIN: partial(plain, setting, tensors=False),
        **mine,
        DECODED: partial(dali_only, fast),
        PLAIN_TENSORS: partial(plain, setting, tensors=True),
        PILLOW: partial(pillow_only, setting),
        BYTES: partial(bytes_only, setting),
    }


# --- Speed and memory -----------------------------------------------------------------------------


def measure_speed(
    kind: str, makers: Mapping[str, Callable[[], Pass]], setting: Setting, repeats: int, deadline: float
) -> list[Row]:
    """Loaders take turns pass by pass, `repeats` times or until the time is up, once at least."""
    calls: dict[str, timing.Call] = {}
    speeds: dict[str, list[float]] = {}
    counts: dict[str, int] = {}

    def whole(run: Pass) -> int:
        count = run()
        if setting.on_gpu:
            torch.cuda.synchronize()
        return count

    for name, make in makers.items():
        try:
            call = partial(whole, make())
            counts[name] = call()  # workers, pipelines and compiled code start
            calls[name], speeds[name] = call, []
        except Exception as failure:
            print(f"{name}: not available here: {first_line(failure)}", flush=True)
    for number in range(repeats):
        if number and time.monotonic() > deadline:
            break
        for name, (seconds,) in timing.interleave(calls, 1, timing.once).items():
            speeds[name].append(counts[name] / seconds)
    calls.clear()
    gc.collect()  # ends their workers: forks to come would inherit them
    rows: list[Row] = []
    for name, each in speeds.items():
        row: Row = {"kind": kind, "contender": name, "images_per_s": statistics.median(each)}
        row["passes"] = [round(speed, 1) for speed in each]
        rows.append(row | ({"version": installed_version(STABLE)} if name == STABLE else {}))
    print_rows(rows, {"loader": "{contender}", "images/s": "{images_per_s:.0f}"})
    return rows


def resident_mib() -> float:
    """Memory of this process and its children in MiB, without files; what they share counts once."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    kibibytes: list[str] = []
    for pid in ("self", *children.split()):
        with contextlib.suppress(OSError):  # it has ended
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kibibytes += re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+)", rollup, re.MULTILINE)
    return sum(map(int, kibibytes)) / 1024


def memory_by_epoch(setting: Setting, backend: str) -> list[float]:
    """Resident memory after each epoch; long ones, for the allocator to have settled in the first."""
    run = ours(setting._replace(copies=MEMORY_COPIES), backend)
    return [round(resident_mib(), 1) for _ in range(MEMORY_EPOCHS) if run()]


def measure_memory(setting: Setting, deadline: float) -> list[Row]:
    """Measure the memory of both backends, each in a process of its own."""
    rows: list[Row] = []
    small = setting._replace(batch_size=min(MEMORY_BATCH, setting.batch_size))
    for name, backend in ((OURS, "auto"), (FALLBACK, "torchvision")):
        if time.monotonic() > deadline:
            print(f"memory of {name} is not measured: the budget is spent")
            continue
        epochs = timing.in_fresh_process(memory_by_epoch, small, backend)
        print(f"memory of {name}: {epochs} MiB after each epoch", flush=True)
        row = {"kind": "memory", "contender": name, "epoch_mib": epochs}
        growth = max(epochs[1:]) / min(epochs[1:])
        rows.append({**row, "memory_batch_size": small.batch_size, "growth": growth})
    return rows


# --- Command line ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__, rehearse="everything in small; the rows say so")
    parser.add_argument("--budget-minutes", type=float, default=8.0, help="begin nothing new after this long")
    cores = min(16, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, help="workers or threads")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each loader")
    parser.add_argument("--device", help="where batches end (default: a GPU that DALI can use, else cpu)")
    parser.add_argument("--peers", action="store_true", help="measure against stable-pretraining alone")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.budget_minutes
    has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    device = torch.device(options.device or ("cuda" if has_dali and torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    recipe, repeats = MultiCropRecipe(), options.repeats
    count, batch_size = (1024, 128) if gpu else (384, 32)
    if options.rehearse:
        recipe = MultiCropRecipe(global_size=32, local_size=16, local_crops=1)
        repeats, count, batch_size = 1, 16, 4
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), count)
        setting = Setting(Path(folder), recipe, batch_size, 1 if options.peers else options.workers, device)
        writer = Rows(options.out / "loader.jsonl", "loader", device, rehearsal=options.rehearse)
        writer.about |= {"images": count, "batch_size": batch_size, "workers": setting.workers, "gpu": gpu}
        views = (recipe.global_crops, recipe.global_size, recipe.local_crops, recipe.local_size)
        writer.about["views"] = "{} x {} + {} x {}".format(*views)
        kind = "peers" if options.peers else "speed"
        makers = contenders(setting, options.peers)
        rows = writer.write(*measure_speed(kind, makers, setting, repeats, deadline))
        if not options.peers:
            rows += writer.write(*measure_memory(setting, deadline))
    case = "loader, peers" if options.peers else "loader on a GPU" if gpu else "loader on a CPU"
    judged = targets.judge(rows, case)
    writer.write(*({"kind": "target", **row} for row in judged))
    targets.print_judged(judged)
    print(f"rows: {writer.path}")


if __name__ == "__main__":
    main()
