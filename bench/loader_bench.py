"""Images per second of the multi-crop loader: torchvision v2 against DALI, ceilings, memory, damaged files.

    python bench/loader_bench.py [--out DIR] [--budget-minutes X] [--data PATH] [--only PART ...]

All loaders read the same JPEG files of 500 x 375 px, make the default recipe (2 x 224 + 6 x 98 px) in
float32, normalised, with the same number of workers or threads, and take turns pass by pass. With a GPU and
DALI, DALI decodes and augments there, and every loader's batches end on the GPU. Rows go to DIR/loader.jsonl.
`--data`: images to make the files from, of any kind that `open_source` reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchlib import RESULTS, append_rows, machine, print_table
from loader_contenders import (
    DALI,
    DECODED,
    OURS,
    PLAIN,
    PLAIN_TENSORS,
    Pass,
    Setting,
    contenders,
    dali_only,
    ours,
)
from loader_files import BAD_KINDS, ODD_KINDS, QUALITY, Folder, damage, make_folder
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, multicrop_loader
from lejepa_fast.data.backends.base import RawBatch
from lejepa_fast.data.backends.choose_backend import dali_fault
from lejepa_fast.data.backends.torchvision_backend import TrainBatches
from lejepa_fast.data.commands.pack import pack_folder
from lejepa_fast.data.sampler import BatchKey
from lejepa_fast.data.sources import FolderSource
from lejepa_fast.data.views import TrainPlan

CPU_TARGET, GPU_TARGET, GPU_SHARE = 2.2, 8.0, 0.6
MEMORY_EPOCHS, MEMORY_COPIES, MEMORY_LIMIT = 5, 2, 1.05
# A batch of 32 is 60 MB, a tenth of what is resident: one more or less in flight would decide. So small ones.
MEMORY_BATCH = 8
MEMORY_SHARD_BYTES = 4 << 20  # several shards
DAMAGE_BATCH, DAMAGE_LIMIT = 40, 1.10
LARGE_SIZE = 8000, 6000
PARTS = ("speed", "damage", "memory", "views", "graph", "large", "hw_decoder_load")
HW_LOADS = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)


# --- Speed ----------------------------------------------------------------------------------------


def timed(run: Pass, setting: Setting) -> float:
    """Images per second of one pass."""
    if setting.on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    count = run()
    if setting.on_gpu:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def measure_speed(setting: Setting, repeats: int, deadline: float) -> list[dict[str, Any]]:
    """Interleaved passes; after the first round, no round is begun that would end past the deadline."""
    running: dict[str, Pass] = {}
    for name, make in contenders(setting).items():
        try:
            run = make()
            timed(run, setting)  # workers, pipelines and compiled code start
            running[name] = run
        except Exception as error:
            print(f"{name}: not available here: {str(error).splitlines()[0]}")
    found: dict[str, list[float]] = {name: [] for name in running}
    longest = 0.0
    for repeat in range(repeats):
        begun = time.monotonic()
        if repeat and begun + longest > deadline:
            print(f"stopped after {repeat} of {repeats} rounds: the budget is spent")
            break
        for name, run in running.items():
            found[name].append(timed(run, setting))
        longest = max(longest, time.monotonic() - begun)
    running.clear()
    gc.collect()  # ends their workers: forks to come would inherit them
    rows = [_speed_row(name, values) for name, values in found.items()]
    base = max((row["images_per_s"] for row in rows if row["contender"].startswith(PLAIN)), default=0.0)
    table = [
        [
            row["contender"],
            f"{row['images_per_s']:.0f}",
            f"{row['images_per_s'] / base:.2f}x" if base else "-",
        ]
        for row in rows
    ]
    print_table(["loader", "images/s", "against torchvision v2"], table)
    return rows


def _speed_row(name: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    figures = {"images_per_s": statistics.median(values), "passes": [round(value, 1) for value in values]}
    return {"kind": "speed", "contender": name, **figures, **more}


def measure_views(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """On a CPU: DALI's operators against the compiled code that makes the views in their place."""
    if setting.on_gpu or dali_fault(False) or find_spec("numba") is None:
        return []
    runs = {views: ours(setting, "dali", dali_views=views) for views in ("numba", "operators")}
    found: dict[str, list[float]] = {views: [] for views in runs}
    for repeat in range(-1, repeats):  # the first round starts pipelines and compiled code
        for views, run in runs.items():
            found[views] += [timed(run, setting)][repeat < 0 :]
    rows = [{**_speed_row(f"{DALI}, {views}", values), "kind": "views"} for views, values in found.items()]
    for row in rows:
        print(f"{row['contender']}: {row['images_per_s']:.0f} images/s")
    return rows


def measure_graph(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """What DALI's operators that make the views take on one image of 16 x 16 px: there is nothing to do."""
    if dali_fault(setting.on_gpu):
        return []
    from lejepa_fast.data.backends.dali_graph import view_pipeline

    sizes = setting.recipe.view_sizes()
    pipe = view_pipeline(
        batch_size=1,
        num_threads=1,
        prefetch_queue_depth=1,
        device_id=0 if setting.on_gpu else None,
        device="gpu" if setting.on_gpu else "cpu",
        hw_decoder_load=0.0,
        sizes=sizes,
    )
    pipe.build()
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, "JPEG")
    windows = np.zeros((1, len(sizes), 2, 2), np.float32)
    windows[:, :, 1] = 16  # from (0, 0) to (16, 16)
    seconds = []
    for _ in range(10 * repeats):
        start = time.perf_counter()
        pipe.feed_input("encoded", [np.frombuffer(file.getvalue(), np.uint8)])
        pipe.feed_input("windows", windows)
        pipe.schedule_run()
        pipe.share_outputs()
        pipe.release_outputs()
        seconds.append(time.perf_counter() - start)
    row: dict[str, Any] = {"kind": "graph", "contender": DALI, "operators": len(pipe._ops)}
    row["run_ms"] = 1e3 * statistics.median(seconds)
    print(f"{row['operators']} operators, {row['run_ms']:.2f} ms for an image of 16 x 16 px")
    return [row]


def measure_large(setting: Setting, size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Seconds for one image of `size` px, whole and as the loader reads it, and for one of the files.

    From its file to its views, in this process and without workers; by torchvision and Pillow. The large
    image is a mosaic of such a file, so it has as many bytes for a pixel.
    """
    file = sorted(setting.folder.path.iterdir())[0]
    with tempfile.TemporaryDirectory() as place, Image.open(file) as image:
        canvas = Image.new("RGB", size)
        for y in range(0, size[1], image.height):
            for x in range(0, size[0], image.width):
                canvas.paste(image, (x, y))
        canvas.save(Path(place) / "large.jpg", quality=QUALITY)
        large, usual = FolderSource(place), FolderSource(setting.folder.path)
        plan = TrainPlan(large, setting.recipe, seed=0)
        plans = {"whole": _WholePlan(large, setting.recipe, seed=0), "reduced": plan}
        plans["usual"] = TrainPlan(usual, setting.recipe, seed=0)
        seconds: dict[str, list[float]] = {name: [] for name in plans}
        for repeat in range(-1, repeats):
            for name, used in plans.items():
                start = time.perf_counter()
                made = TrainBatches(used)[BatchKey(0, (0,))]
                assert isinstance(made, RawBatch)
                assert not made.faults
                seconds[name] += [time.perf_counter() - start][repeat < 0 :]
    row: dict[str, Any] = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    row |= {"kind": "large", "contender": OURS, "width": size[0], "height": size[1], "repeats": repeats}
    row["factor"] = plan.reduction(*size)
    print(f"one image of {size[0]} x {size[1]} px: {row['whole_s']:.2f} s, {row['reduced_s']:.2f} s reduced")
    return [row]


class _WholePlan(TrainPlan):
    """Reads every image as it is, however large."""

    def reduction(self, width: int, height: int) -> int:
        return 1


def sweep_hardware_decoder(setting: Setting, deadline: float) -> list[dict[str, Any]]:
    """Share of JPEGs for the GPU's hardware decoder: what it does to DALI, whole and decoding only."""
    rows = []
    for load in HW_LOADS:
        if time.monotonic() > deadline:
            print("the sweep of hw_decoder_load ends early: the budget is spent")
            break
        for name, run in (
            (DALI, ours(setting, "dali", copies=16, hw_decoder_load=load)),
            (DECODED, dali_only(setting, copies=16, hw_decoder_load=load)),
        ):
            timed(run, setting)
            row = _speed_row(name, [timed(run, setting) for _ in range(2)], hw_decoder_load=load)
            rows.append({**row, "kind": "hw_decoder_load"})
            print(f"hw_decoder_load {load}: {name} {row['images_per_s']:.0f} images/s")
    return rows


# --- Memory ---------------------------------------------------------------------------------------


def resident_mib() -> float:
    """Memory of this process and its children in MiB; what they share counts once. Linux only.

    Pages of files, libraries above all, are those of the process that has most of them: their
    proportional share would depend on whichever other programs have the same files open.
    """
    own, files = 0, 0
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    for pid in [os.getpid(), *map(int, children.stdout.split())]:
        try:
            shares = Path(f"/proc/{pid}/smaps_rollup").read_text()
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # ps itself, gone by now
            continue
        own += _kib(shares, "Pss_Anon") + _kib(shares, "Pss_Shmem")
        files = max(files, _kib(status, "RssFile"))
    return (own + files) / 1024


def _kib(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:")), 0)


def memory_by_epoch(setting: Setting, backend: str) -> list[float]:
    """Resident memory after each epoch; long ones, for the allocator to have settled in the first."""
    run = ours(setting, backend, copies=MEMORY_COPIES)
    found = []
    for _ in range(MEMORY_EPOCHS):
        run()
        found.append(round(resident_mib(), 1))
    return found


def measure_memory(setting: Setting, deadline: float) -> list[dict[str, Any]]:
    """Of both backends, from the files and from shards of them."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        shards = Path(place) / "shards"
        pack_folder(setting.folder.path, shards, shard_bytes=MEMORY_SHARD_BYTES)
        for files, kind in ((setting.folder.path, ""), (shards, ", shards")):
            for name, backend in ((DALI, "dali"), (OURS, "torchvision")):
                if time.monotonic() > deadline:
                    print(f"memory of {name}{kind} is not measured: the budget is spent")
                else:
                    rows += _memory_row(setting, files, name + kind, backend)
    return rows


def _memory_row(setting: Setting, files: Path, name: str, backend: str) -> list[dict[str, Any]]:
    """In a process of its own, so that nothing else is in it; no row where the backend cannot run."""
    batch_size = min(MEMORY_BATCH, setting.batch_size)
    arguments = ["--files", str(files), "--batch-size", str(batch_size), "--workers", str(setting.workers)]
    arguments += ["--device", str(setting.device), "--memory-of", backend]
    arguments += ["--rehearse"] if setting.recipe != MultiCropRecipe() else []
    child = subprocess.run(
        [sys.executable, str(Path(__file__)), *arguments], capture_output=True, text=True, check=False
    )
    if child.returncode:
        print(f"memory of {name}: not available here: {child.stderr.strip().splitlines()[-1:]}")
        return []
    epochs = json.loads(child.stdout.splitlines()[-1])
    print(f"memory of {name}: {', '.join(f'{m:.0f}' for m in epochs)} MiB after epochs 1 to {len(epochs)}")
    row = {"kind": "memory", "contender": name, "epoch_mib": epochs, "memory_batch_size": batch_size}
    return [{**row, "growth": max(epochs[1:]) / min(epochs[1:])}]


# --- Damaged files --------------------------------------------------------------------------------


def measure_damage(setting: Setting, count: int, repeats: int, deadline: float) -> list[dict[str, Any]]:
    """Seconds of an epoch over `count` good files, and over those with 15 bad and 5 odd ones among them."""
    with tempfile.TemporaryDirectory() as place:
        clean, mixed = Path(place) / "clean", Path(place) / "mixed"
        files = sorted(setting.folder.path.iterdir())
        for path in (clean, mixed):
            path.mkdir()
            for number in range(count):
                (path / f"{number:05d}.jpg").hardlink_to(files[number % len(files)])
        damage(mixed)
        rows = []
        for name, backend in ((DALI, "dali"), (OURS, "torchvision")):
            seconds: dict[str, list[float]] = {"clean": [], "mixed": []}
            quarantined = 0
            _epoch_seconds(setting, clean, backend)  # compiled code is loaded, files are in memory
            for _ in range(repeats):
                if seconds["mixed"] and time.monotonic() > deadline:
                    break
                for kind, path in (("clean", clean), ("mixed", mixed)):
                    took, quarantined = _epoch_seconds(setting, path, backend)
                    seconds[kind].append(took)
            medians = {f"{kind}_s": statistics.median(values) for kind, values in seconds.items()}
            ratio = medians["mixed_s"] / medians["clean_s"]
            files_of = {"good": count, "odd": len(ODD_KINDS), "damaged": sum(BAD_KINDS.values())}
            measured = {"ratio": ratio, "bad": quarantined, "damage_batch_size": DAMAGE_BATCH, **files_of}
            rows.append({"kind": "damage", "contender": name, **medians, **measured})
            print(f"damaged files, {name}: {ratio:.3f} of the clean time, {quarantined} files quarantined")
        return rows


def _epoch_seconds(setting: Setting, path: Path, backend: str) -> tuple[float, int]:
    """Of a loader that knows of no bad files yet, start included; and how many it has quarantined then."""
    loader = multicrop_loader(
        FolderSource(path),
        dataclasses.replace(setting.recipe, min_image_size=1),
        batch_size=DAMAGE_BATCH,  # a divisor of 1000: as many images with and without the 20 others
        num_workers=setting.workers,
        backend=backend,
        device=setting.device if setting.on_gpu else None,
        max_bad_fraction=0.5,
    )
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start, len(loader.quarantined)


# --- Targets --------------------------------------------------------------------------------------


def targets(rows: Sequence[dict[str, Any]], on_gpu: bool) -> list[dict[str, Any]]:
    """What was to be reached, what was measured, and whether that is enough."""
    speed = {row["contender"]: row["images_per_s"] for row in rows if row["kind"] == "speed"}
    found: list[tuple[str, float, float, bool]] = []
    plain_speed = max((speed[name] for name in (PLAIN, PLAIN_TENSORS) if name in speed), default=None)
    if plain_speed and DALI in speed:
        wanted, ratio = GPU_TARGET if on_gpu else CPU_TARGET, speed[DALI] / plain_speed
        found.append(("DALI against torchvision v2, at least", wanted, ratio, ratio >= wanted))
    if on_gpu and DALI in speed and DECODED in speed:
        share = speed[DALI] / speed[DECODED]
        found.append(("DALI, share of decode-only DALI, at least", GPU_SHARE, share, share >= GPU_SHARE))
    for row in rows:
        name = row["contender"]
        if row["kind"] == "memory":
            growth = row["growth"]
            label = f"{name}: memory, epochs 2 to 5, largest / smallest, at most"
            found.append((label, MEMORY_LIMIT, growth, growth <= MEMORY_LIMIT))
        elif row["kind"] == "damage":
            label = f"{name}: time with damaged files / without, at most"
            found.append((label, DAMAGE_LIMIT, row["ratio"], row["ratio"] <= DAMAGE_LIMIT))
    return [
        {"kind": "target", "target": label, "wanted": wanted, "figure": round(figure, 3), "met": bool(met)}
        for label, wanted, figure, met in found
    ]


# --- Command line ---------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for loader.jsonl")
    parser.add_argument("--budget-minutes", type=float, default=8.0, help="begin nothing new after this long")
    parser.add_argument("--data", help="images to make the files from (default: the embedded ones)")
    parser.add_argument("--images", type=int, help="files (default: 384, with a GPU 1024)")
    parser.add_argument("--batch-size", type=int, help="default: 32, with a GPU 128")
    parser.add_argument(
        "--workers", type=int, default=min(16, os.cpu_count() or 1), help="workers or threads"
    )
    parser.add_argument("--repeats", type=int, default=5, help="passes of each loader")
    parser.add_argument("--device", help="where batches end (default: a GPU that DALI can use, else cpu)")
    parser.add_argument("--rehearse", action="store_true", help="everything in small; the rows say so")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these parts alone")
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    begun = time.monotonic()
    deadline = begun + 60 * options.budget_minutes
    gpu = options.device.startswith("cuda") if options.device else dali_fault(True) is None
    count = options.images or (16 if options.rehearse else 1024 if gpu else 384)
    batch_size = options.batch_size or (4 if options.rehearse else 128 if gpu else 32)
    recipe = (
        MultiCropRecipe(global_size=32, local_size=16, local_crops=1)
        if options.rehearse
        else MultiCropRecipe()
    )
    device = torch.device(options.device or ("cuda" if gpu else "cpu"))
    if options.memory_of:
        setting = Setting(Folder(options.files, "", 0.0), recipe, batch_size, options.workers, device)
        print(json.dumps(memory_by_epoch(setting, options.memory_of)))
        return
    logging.getLogger("lejepa_fast.data").setLevel(logging.ERROR)  # quarantined files are counted below
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(Path(place) / "files", count, options.data)
        setting = Setting(folder, recipe, batch_size, options.workers, device)
        print(f"{count} files, {folder.description}, {folder.mean_kib:.0f} KiB each; batches of {batch_size}")
        about = {
            "benchmark": "loader",
            "files": folder.description,
            "file_kib": round(folder.mean_kib, 1),
            "images": count,
            "batch_size": batch_size,
            "workers": options.workers,
            "views": setting.views,
            "gpu": gpu,
            **({"rehearsal": True} if options.rehearse else {}),
            **machine(),
        }
        repeats, good = (1, 80) if options.rehearse else (options.repeats, 1000)
        large = (400, 300) if options.rehearse else LARGE_SIZE
        rows: list[dict[str, Any]] = []

        def keep(measured: list[dict[str, Any]]) -> None:
            rows.extend(measured)
            append_rows(options.out / "loader.jsonl", [{**row, **about} for row in measured])

        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "speed": lambda: measure_speed(setting, repeats, deadline),
            "damage": lambda: measure_damage(setting, good, repeats, deadline),
            "memory": lambda: measure_memory(setting, deadline),
            "views": lambda: measure_views(setting, repeats),
            "graph": lambda: measure_graph(setting, repeats),
            "large": lambda: measure_large(setting, large, repeats),
            "hw_decoder_load": lambda: sweep_hardware_decoder(setting, deadline) if gpu else [],
        }
        for part in options.only:
            if part in ("views", "graph", "large") and time.monotonic() > deadline:
                print(f"{part}: not measured, the budget is spent")
            else:
                keep(parts[part]())
    met = [] if options.rehearse or set(options.only) != set(PARTS) else targets(rows, gpu)
    keep(met)
    lines = [
        [row["target"], f"{row['wanted']:g}", f"{row['figure']:g}", "met" if row["met"] else "MISSED"]
        for row in met
    ]
    if lines:
        print_table(["target", "wanted", "figure", ""], lines)
    print(f"rows: {options.out / 'loader.jsonl'}; {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
