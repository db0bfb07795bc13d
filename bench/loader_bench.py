"""Images per second of the multi-crop loader against torchvision v2, its ceilings and its memory.

    python bench/loader_bench.py [--out DIR] [--budget-minutes X]
    python bench/loader_bench.py --peers     # against stable-pretraining's transforms, one worker each

All loaders read the same JPEG files of 500 x 375 px, make the default recipe (2 x 224 + 6 x 98 px) in
float32, normalised, with the same number of workers or threads, and take turns pass by pass. With a GPU and
DALI, DALI decodes and augments there, and every loader's batches end on the GPU. Rows go to DIR/loader.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import loader_contenders
import timing
import torch
from benchlib import Row, Rows, command_line, first_line, installed_version, print_table
from loader_contenders import DECODED, FALLBACK, OURS, PLAIN, PLAIN_TENSORS, STABLE, Pass, Setting
from loader_files import make_folder

from lejepa_fast.data import MultiCropRecipe

CPU_TARGET, GPU_TARGET, GPU_SHARE, PEER_TARGET = 5.0, 8.0, 0.6, 10.0
MEMORY_EPOCHS, MEMORY_COPIES, MEMORY_LIMIT = 5, 2, 1.05
# A batch of 32 is 60 MB, a tenth of what is resident: one more or less in flight would decide. So small ones.
MEMORY_BATCH = 8
BACKENDS = {OURS: "auto", FALLBACK: "torchvision"}


# --- Speed ----------------------------------------------------------------------------------------


def measure_speed(
    kind: str, makers: Mapping[str, Callable[[], Pass]], setting: Setting, repeats: int, deadline: float
) -> list[Row]:
    """Loaders take turns pass by pass, `repeats` times or, from the second on, as often as time allows."""
    calls: dict[str, timing.Call] = {}
    counts: dict[str, int] = {}

    def whole(run: Pass) -> int:
        count = run()
        if setting.on_gpu:
            torch.cuda.synchronize()
        return count

    for name, make in makers.items():
        try:
            call = functools.partial(whole, make())
            counts[name] = call()  # workers, pipelines and compiled code start
            calls[name] = call
        except Exception as failure:
            print(f"{name}: not available here: {first_line(failure)}", flush=True)
    begun = time.monotonic()
    found = [timing.interleave(calls, 1, timing.once)]
    allowed = (deadline - time.monotonic()) / (time.monotonic() - begun)
    found.append(timing.interleave(calls, max(0, min(repeats - 1, int(allowed))), timing.once))
    calls.clear()
    gc.collect()  # ends their workers: forks to come would inherit them
    rows: list[Row] = []
    for name, count in counts.items():
        speeds = [count / seconds for each in found for seconds in each[name]]  # type: ignore[union-attr]
        row: Row = {"kind": kind, "contender": name, "images_per_s": statistics.median(speeds)}
        row["passes"] = [round(speed, 1) for speed in speeds]
        rows.append(row | ({"version": installed_version(STABLE)} if name == STABLE else {}))
    print_table(["loader", "images/s"], [[row["contender"], f"{row['images_per_s']:.0f}"] for row in rows])
    return rows


# --- Memory ---------------------------------------------------------------------------------------


def resident_mib() -> float:
    """Memory of this process and its children in MiB, without files; what they share counts once."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    kibibytes = 0
    for pid in [os.getpid(), *map(int, children.stdout.split())]:
        try:
            shares = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # ps itself, gone by now
            continue
        kibibytes += sum(map(int, re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+)", shares, re.MULTILINE)))
    return kibibytes / 1024


def memory_by_epoch(setting: Setting, backend: str) -> list[float]:
    """Resident memory after each epoch; long ones, for the allocator to have settled in the first."""
    run = loader_contenders.ours(setting._replace(copies=MEMORY_COPIES), backend)
    found = []
    for _ in range(MEMORY_EPOCHS):
        run()
        found.append(round(resident_mib(), 1))
    return found


def measure_memory(setting: Setting, deadline: float) -> list[Row]:
    """Of both backends, each in a process of its own."""
    rows: list[Row] = []
    small = setting._replace(batch_size=min(MEMORY_BATCH, setting.batch_size))
    for name, backend in BACKENDS.items():
        if time.monotonic() > deadline:
            print(f"memory of {name} is not measured: the budget is spent")
            continue
        epochs = timing.in_fresh_process(memory_by_epoch, small, backend)
        print(f"memory of {name}: {epochs} MiB after each epoch", flush=True)
        row = {"kind": "memory", "contender": name, "epoch_mib": epochs}
        growth = max(epochs[1:]) / min(epochs[1:])
        rows.append({**row, "memory_batch_size": small.batch_size, "growth": growth})
    return rows


# --- Targets --------------------------------------------------------------------------------------


def targets(rows: list[Row], on_gpu: bool) -> list[Row]:
    """What was to be reached, what was measured, and whether that is enough."""
    speed = {(row["kind"], row["contender"]): row["images_per_s"] for row in rows if "images_per_s" in row}
    wanted = [("against torchvision v2", GPU_TARGET if on_gpu else CPU_TARGET, "speed", PLAIN)]
    wanted.append(("against torchvision v2, tensors", wanted[0][1], "speed", PLAIN_TENSORS))
    wanted.append(("against stable-pretraining", PEER_TARGET, "peers", STABLE))
    if on_gpu:
        wanted.append(("share of decode-only DALI", GPU_SHARE, "speed", DECODED))
    found = [
        {"target": f"{name}, at least", "wanted": least, "figure": figure, "met": figure >= least}
        for name, least, kind, other in wanted
        if (kind, OURS) in speed and (kind, other) in speed
        for figure in [speed[kind, OURS] / speed[kind, other]]
    ]
    for row in (row for row in rows if row["kind"] == "memory"):
        name, met = f"{row['contender']}: memory, largest / smallest epoch", row["growth"] <= MEMORY_LIMIT
        found.append(
            {"target": f"{name}, at most", "wanted": MEMORY_LIMIT, "figure": row["growth"], "met": met}
        )
    return [{"kind": "target", **row} for row in found]


# --- Command line ---------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, rehearse="everything in small; the rows say so")
    parser.add_argument("--budget-minutes", type=float, default=8.0, help="begin nothing new after this long")
    parser.add_argument("--images", type=int, help="files (default: 384, with a GPU 1024)")
    parser.add_argument("--batch-size", type=int, help="default: 32, with a GPU 128")
    cores = min(16, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, help="workers or threads")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each loader")
    parser.add_argument("--device", help="where batches end (default: a GPU that DALI can use, else cpu)")
    parser.add_argument("--peers", action="store_true", help="measure against stable-pretraining alone")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    deadline = time.monotonic() + 60 * options.budget_minutes
    has_dali = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    device = torch.device(options.device or ("cuda" if has_dali and torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    count = options.images or (16 if options.rehearse else 1024 if gpu else 384)
    batch_size = options.batch_size or (4 if options.rehearse else 128 if gpu else 32)
    small = MultiCropRecipe(global_size=32, local_size=16, local_crops=1)
    recipe = small if options.rehearse else MultiCropRecipe()
    repeats = 1 if options.rehearse else options.repeats
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        make_folder(folder, count)
        setting = Setting(folder, recipe, batch_size, 1 if options.peers else options.workers, device)
        writer = Rows(options.out / "loader.jsonl", "loader", device, rehearsal=options.rehearse)
        writer.about |= {"images": count, "batch_size": batch_size, "workers": setting.workers, "gpu": gpu}
        views = (recipe.global_crops, recipe.global_size, recipe.local_crops, recipe.local_size)
        writer.about["views"] = "{} x {} + {} x {}".format(*views)
        if options.peers:
            found = measure_speed("peers", loader_contenders.peers(setting), setting, repeats, deadline)
            rows = writer.write(*found)
        else:
            found = measure_speed("speed", loader_contenders.contenders(setting), setting, repeats, deadline)
            rows = writer.write(*found)
            rows += writer.write(*measure_memory(setting, deadline))
        judged = [] if options.rehearse else writer.write(*targets(rows, gpu))
    cells = [[r["target"], f"{r['wanted']:g}", f"{r['figure']:.3g}", str(r["met"])] for r in judged]
    print_table(["target", "wanted", "figure", "met"], cells)
    print(f"rows: {options.out / 'loader.jsonl'}")


if __name__ == "__main__":
    main()
