"""Speed, MFU and memory of the trainer:

    python bench/train_bench.py [--out DIR] [--budget-minutes X] [--rehearse]

On a GPU: ViT-L/14, giant, gigantic and S/16 with 2 x 224 + 8 x 98 px, bf16, compiled, on synthetic views:
images/s, MFU, peak memory, SIGReg's share of the step; FSDP2 and DDP on one GPU against no wrapper, what a
checkpoint costs, the plan's memory against the allocator's, and S/16 on JPEG files through the loader. On a
CPU the same on tiny sizes, to see that it works: those rows say nothing about GPUs, and memory there is that
of the whole process.

Cases run in the order of their importance, each in a process of its own. One that does not fit into memory is
a row with `error`, and is tried again with half the images. On a GPU, and in a rehearsal (the GPU's cases in
small on the CPU, in one process, measuring nothing), a row of kind `target` follows for each target of
`train_targets.py`: goal, figure, and whether it is met.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import train_case
import train_targets
from benchlib import RESULTS, append_rows, machine, print_table
from gpu_targets import judge, table_of
from train_case import Case

CASE = Path(__file__).with_name("train_case.py")

_LARGE = Case("vit_large", 128)
GPU_CASES = (
    dataclasses.replace(_LARGE, checkpoint=True),
    dataclasses.replace(_LARGE, strategy="ddp"),
    dataclasses.replace(_LARGE, strategy="fsdp"),
    Case("vit_gigantic", 64, strategy="fsdp", activation_checkpointing="full", steps=40),
    Case("vit_giant", 64),
    Case("vit_small_patch16_224", 512),
    Case("vit_gigantic", 32, activation_checkpointing="selective"),
    Case("vit_large", 64, strategy="fsdp", compile="off", steps=5, plan=True),
    Case("vit_small_patch16_224", 512, loader=True, steps=40, warm_up=10),
)

_TINY = Case("test_vit", 16, global_size=32, local_size=16, local_crops=2, steps=10, warm_up=3)
CPU_CASES = (
    dataclasses.replace(_TINY, checkpoint=True),
    dataclasses.replace(_TINY, strategy="ddp"),
    dataclasses.replace(_TINY, strategy="fsdp"),
    dataclasses.replace(_TINY, activation_checkpointing="full"),
    dataclasses.replace(_TINY, loader=True),
)

SMALLEST_BATCH = 8
# What makes a case another kind of case, and its rehearsal another rehearsal.
_KINDS = ("strategy", "activation_checkpointing", "checkpoint", "plan", "loader")


def run_case(case: Case, timeout: float) -> dict[str, Any]:
    """The row of a case from its own process; one with `error` if it fails."""
    command = [sys.executable, str(CASE), json.dumps(dataclasses.asdict(case))]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {timeout:.0f} s"}
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def measure(
    cases: Sequence[Case], out: Path, budget_minutes: float, *, rehearse: bool = False
) -> list[dict[str, Any]]:
    """Run the cases while there is time, writing each row at once; returns the rows."""
    ends = time.monotonic() + 60 * budget_minutes
    device = "GPU" if torch.cuda.is_available() else "CPU, tiny sizes: no figure for GPUs"
    rows = []
    waiting = list(cases)
    while waiting:
        case = waiting.pop(0)
        left = ends - time.monotonic()
        if left < 30:
            print(f"out of time: {1 + len(waiting)} case(s) left out")
            break
        figures = train_case.measure(case) if rehearse else run_case(case, left)
        marks = {"rehearsal": True} if rehearse else {}
        row = {"benchmark": "train", "kind": device, **marks, **dataclasses.asdict(case), **figures}
        row |= machine()
        append_rows(out / "train.jsonl", [row])
        rows.append(row)
        print(_line(row), flush=True)
        if case.model == "vit_gigantic" and "losses" in row:
            print("  losses: " + " ".join(f"{loss:.3f}" for loss in row["losses"]))
        if figures.get("error") == "out of memory" and case.images >= 2 * SMALLEST_BATCH:
            waiting.insert(0, dataclasses.replace(case, images=case.images // 2))
    return rows


def _line(row: dict[str, Any]) -> str:
    what = f"{_name(row)}: "
    if "error" in row:
        return what + row["error"]
    parts = [f"{row['images_per_second']:,.1f} images/s", f"{row['peak_memory_gib']:.1f} GiB"]
    if row.get("mfu"):
        parts.append(f"MFU {row['mfu']:.1%}")
    if "sigreg_share" in row:
        parts.append(f"SIGReg {row['sigreg_share']:.2%} of the step")
    if "checkpoint_stall_steps" in row:
        parts.append(f"a checkpoint costs {row['checkpoint_stall_steps']:.2f} steps")
    if "planned_memory_gib" in row:
        parts.append(f"planned {row['planned_memory_gib']:.1f} GiB")
    if row["loader"]:
        parts.append(f"data wait {row['data_wait']:.1%}")
    return what + ", ".join(parts)


def _name(row: dict[str, Any]) -> str:
    options = [row["strategy"]] if row["strategy"] != "none" else []
    if row["activation_checkpointing"] != "none":
        options.append(f"{row['activation_checkpointing']} checkpointing")
    options += ["uncompiled"] if row["compile"] == "off" else []
    options += ["real loader"] if row["loader"] else []
    return f"{row['model']} x {row['images']}" + (f" ({', '.join(options)})" if options else "")


def shrunk(case: Case) -> Case:
    """The same kind of case in a second on a CPU."""
    return dataclasses.replace(_TINY, **{name: getattr(case, name) for name in _KINDS}, steps=3, warm_up=1)


def tell_targets(rows: Sequence[dict[str, Any]], out: Path, *, rehearse: bool) -> None:
    """Write a row for each target, and print them as a table."""
    judged = judge(rows, train_targets.TARGETS)
    marks = {"rehearsal": True} if rehearse else {}
    append_rows(
        out / "train.jsonl",
        [{"benchmark": "train", "kind": "target", **marks, **row, **machine()} for row in judged],
    )
    print()
    print_table(["target (H200)", "goal", "figure", "met or not"], table_of(judged))
    for row in judged:
        print(f"{row['target']}: {row['reason'] or row['note']}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for train.jsonl")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="start no case after this long")
    parser.add_argument("--models", nargs="+", help="only these of the models")
    parser.add_argument("--rehearse", action="store_true", help="the GPU's cases in small, on the CPU")
    options = parser.parse_args(arguments)
    if not options.budget_minutes > 0:
        parser.error(f"--budget-minutes: expected a number above 0, got {options.budget_minutes}")
    gpu = torch.cuda.is_available()
    cases = GPU_CASES if gpu or options.rehearse else CPU_CASES
    known = sorted({case.model for case in cases})
    if options.models and not set(options.models) <= set(known):
        parser.error(f"--models: expected some of {', '.join(known)}, got {', '.join(options.models)}")
    chosen = [case for case in cases if not options.models or case.model in options.models]
    if options.rehearse:
        chosen = list(dict.fromkeys(map(shrunk, chosen)))
    small = "" if gpu and not options.rehearse else ": tiny sizes, no figure for GPUs"
    print(f"trainer on {machine()['device']}{small}")
    rows = measure(chosen, options.out, options.budget_minutes, rehearse=options.rehearse)
    if gpu or options.rehearse:
        tell_targets(rows, options.out, rehearse=options.rehearse)
    print(f"rows: {options.out / 'train.jsonl'}")


if __name__ == "__main__":
    main()
