"""Speed, MFU and memory of the trainer: python bench/train_bench.py [--out DIR] [--budget-minutes X]

On a GPU: ViT-L, giant, gigantic and S (patch 14) with 2 x 224 + 8 x 98 px, bf16, compiled, on synthetic
views: images/s, MFU, peak memory, SIGReg's share of the step; FSDP2 and DDP on one GPU against no wrapper,
what a checkpoint costs, the plan's memory against the allocator's, and a run with the real loader. On a CPU
the same on tiny sizes, to see that it works: those rows say nothing about GPUs, and memory there is that of
the whole process.

Cases run in the order of their importance, each in a process of its own. One that does not fit into memory is
a row with `error`, and is tried again with half the images.
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
from benchlib import RESULTS, append_rows, machine, print_table
from train_case import Case

CASE = Path(__file__).with_name("train_case.py")

_LARGE = Case("vit_large", 128)
GPU_CASES = (
    dataclasses.replace(_LARGE, checkpoint=True),
    dataclasses.replace(_LARGE, strategy="ddp"),
    dataclasses.replace(_LARGE, strategy="fsdp"),
    Case("vit_gigantic", 64, strategy="fsdp", activation_checkpointing="full", steps=40),
    Case("vit_giant", 64),
    Case("vit_gigantic", 32, activation_checkpointing="selective"),
    Case("vit_large", 64, strategy="fsdp", compile="off", steps=5, plan=True),
    Case("vit_large", 128, loader=True, steps=40, warm_up=10),
    Case("vit_small", 512),
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


def measure(cases: Sequence[Case], out: Path, budget_minutes: float) -> list[dict[str, Any]]:
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
        figures = run_case(case, left)
        row = {"benchmark": "train", "kind": device, **dataclasses.asdict(case), **figures, **machine()}
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


def targets(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The trainer's targets on an H200: what was asked, what came, and whether that meets it."""
    good = [row for row in rows if "error" not in row]

    def best(model: str, key: str) -> float | None:
        values = [row[key] for row in good if row["model"] == model and row.get(key) is not None]
        return max(values, default=None)

    stalls = [row["checkpoint_stall_steps"] for row in good if "checkpoint_stall_steps" in row]
    shares = [row["sigreg_share"] for row in good if "sigreg_share" in row]
    single = [r for r in good if r["model"] == "vit_gigantic" and r["activation_checkpointing"] != "none"]
    return [
        _at_least("ViT-L/14 MFU", best("vit_large", "mfu"), 0.45),
        _at_least("ViT-giant MFU", best("vit_giant", "mfu"), 0.50),
        _at_least("ViT-gigantic MFU (goal)", best("vit_gigantic", "mfu"), 0.55),
        ["ViT-gigantic trains on one GPU", "yes", "yes" if single else "-", _verdict(bool(single) or None)],
        _at_least("FSDP2 / DDP images/s, one GPU", _ratio(good), 0.99),
        _at_most("checkpoint stall, steps", max(stalls, default=None), 1.0, "{:.2f}"),
        _at_most("SIGReg's share of the step", max(shares, default=None), 0.01, "{:.2%}"),
    ]


def _ratio(rows: Sequence[dict[str, Any]]) -> float | None:
    """FSDP2 against DDP, of the same model and batch."""
    speed = {(r["model"], r["images"], r["strategy"]): r["images_per_second"] for r in rows if not r["plan"]}
    pairs = [
        speed[model, images, "fsdp"] / value
        for (model, images, strategy), value in speed.items()
        if strategy == "ddp" and (model, images, "fsdp") in speed
    ]
    return min(pairs, default=None)


def _at_least(what: str, value: float | None, target: float) -> list[str]:
    came = "-" if value is None else f"{value:.1%}"
    return [what, f">= {target:.0%}", came, _verdict(None if value is None else value >= target)]


def _at_most(what: str, value: float | None, target: float, style: str) -> list[str]:
    came = "-" if value is None else style.format(value)
    return [
        what,
        "<= " + style.format(target),
        came,
        _verdict(None if value is None else value <= target),
    ]


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "NOT met"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for train.jsonl")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="start no case after this long")
    parser.add_argument("--models", nargs="+", help="only these of the models")
    options = parser.parse_args()
    if not options.budget_minutes > 0:
        parser.error(f"--budget-minutes: expected a number above 0, got {options.budget_minutes}")
    gpu = torch.cuda.is_available()
    cases = GPU_CASES if gpu else CPU_CASES
    known = sorted({case.model for case in cases})
    if options.models and not set(options.models) <= set(known):
        parser.error(f"--models: expected some of {', '.join(known)}, got {', '.join(options.models)}")
    chosen = [case for case in cases if not options.models or case.model in options.models]
    print(f"trainer on {machine()['device']}" + ("" if gpu else ": tiny sizes, no figure for GPUs"))
    rows = measure(chosen, options.out, options.budget_minutes)
    if gpu:
        print()
        print_table(["target (H200)", "wanted", "came", ""], targets(rows))
    print(f"rows: {options.out / 'train.jsonl'}")


if __name__ == "__main__":
    main()
