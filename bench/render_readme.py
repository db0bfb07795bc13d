"""Write the measured tables of README.md and docs/: python bench/render_readme.py [--check]

Tables stand between `<!-- NAME -->` and `<!-- /NAME -->`; what is between is replaced. With --check
nothing is written, and the exit code is 1 when a document is not what the rows say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from accuracy_bench import cells as error_cells
from benchlib import RESULTS, read_rows
from sigreg_variants import BASELINE, COMPILED, CPU_SIZE, TRITON

README = Path(__file__).resolve().parents[1] / "README.md"
Row = dict[str, Any]


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last measurement: one date and command."""
    return [row for row in rows if (row["date"], row["command"]) == (rows[-1]["date"], rows[-1]["command"])]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, alignment, *rows])


def origin(row: Row) -> str:
    return f"{where(row)}: `{row['command']}`"


def where(row: Row) -> str:
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {row['date'][:10]}"


def sigreg_table() -> str:
    """The sizes of a GPU where there are such rows, else the reference CPU size; each as last measured."""
    rows = [row for row in read_rows(RESULTS / "sigreg.jsonl") if not row.get("rehearsal")]
    on_gpu = [row for row in rows if "wall" in row]
    return gpu_table(on_gpu) if on_gpu else cpu_table(rows)


def cpu_table(rows: Sequence[Row]) -> str:
    size = CPU_SIZE._asdict()
    rows = latest([r for r in rows if all(r[k] == v for k, v in size.items()) and r["dtype"] == "float32"])
    base = next(row for row in rows if row["variant"] == BASELINE)
    if not base["correct"]:
        raise SystemExit(f"error: the newest rows of {BASELINE!r} are not correct; measure again")
    table = []
    for row in rows:
        if not row["correct"]:
            continue
        time, memory = row["forward_backward"]["median_ms"], row["peak_extra_mib"]
        speed = base["forward_backward"]["median_ms"] / time
        name = f"**{row['variant']}**" if row["variant"].startswith("our impl") else row["variant"]
        table.append([name, f"{time:.0f} ms", f"{speed:.1f}x", f"{memory:.0f} MiB"])
    header = [
        "SIGReg, forward + backward, 2048 x 512, 1024 slices, 17 knots, float32",
        "time",
        "speed",
        "peak memory",
    ]
    return markdown(header, table) + f"\n\n{origin(base)}"


# Case, dtype, what is compared: the wall clock where launches are what takes the time.
GPU_LINES = [
    ("reference", "bfloat16", "forward_backward"),
    ("reference", "float32", "forward_backward"),
    ("giant", "bfloat16", "forward_backward"),
    ("minimal", "float32", "wall"),
]


def gpu_table(everything: Sequence[Row]) -> str:
    """A line for each size: the authors' formulation, torch.compile of it, ours; directions included."""
    table, newest = [], {}
    for case, dtype, phase in GPU_LINES:
        wanted = {"case": case, "dtype": dtype, "directions": "drawn"}
        rows = [row for row in everything if all(row[k] == v for k, v in wanted.items())]
        rows = latest(rows) if rows else []
        found = {(row["variant"], row.get("group")): row for row in rows}
        others = [next((r for r in rows if r["variant"] == name), None) for name in (BASELINE, COMPILED)]
        # Ours beside each of them: only those figures took turns. The table shows the first.
        beside = [row and found.get((TRITON, row.get("group"))) for row in others]
        ours = next(filter(_ran, [*beside, *(row for row in rows if row["variant"] == TRITON)]), None)
        if ours is None:
            continue
        newest[ours["date"]] = ours
        size = "{V} x {N} x {K}, {M} slices, {J} knots".format(**ours)
        kind = f"{'bf16' if dtype == 'bfloat16' else dtype}{', wall clock' if phase == 'wall' else ''}"
        times = [_time(row, phase) for row in others]
        speeds = [_speed(row, mine, phase) for row, mine in zip(others, beside, strict=True)]
        peaks = [f"{row['peak_extra_mib']:.0f} MiB" if _ran(row) else "-" for row in (others[0], ours)]
        table.append([f"{size}, {kind}", *times, f"**{_time(ours, phase)}**", *speeds, *peaks])
    if not table:
        raise SystemExit(f"error: no row of {TRITON!r} on a GPU is correct; measure again")
    header = ["SIGReg, forward + backward", "authors' formulation", "torch.compile of it", TRITON]
    header += ["speed", "against compiled", "memory, authors'", "memory, ours"]
    row = newest[max(newest)]
    machine = f"{row['device']}, driver {row['driver']}, torch {row['torch']}, triton {row['triton']}"
    return markdown(header, table) + f"\n\n{machine}, {row['date'][:10]}: `python bench/sigreg_bench.py`"


def _speed(row: Row | None, ours: Row | None, phase: str) -> str:
    return f"{row[phase]['median_ms'] / ours[phase]['median_ms']:.1f}x" if _ran(row) and _ran(ours) else "-"


def _ran(row: Row | None) -> TypeGuard[Row]:
    return row is not None and row["correct"]


def _time(row: Row | None, phase: str) -> str:
    if row is None:
        return "-"
    return f"{row[phase]['median_ms']:.3g} ms" if row["correct"] else row["problem"].partition(":")[0]


def pretrain_table() -> str:
    """The newest run of every seed, of the configuration that was run last."""
    everything = read_rows(RESULTS / "pretrain.jsonl")
    rows = {row["seed"]: row for row in everything if recipe(row) == recipe(everything[-1])}
    table = []
    for seed, row in sorted(rows.items()):
        cells = [
            f"{row[f'{probe}_{which}']:.1f} %"
            for probe in ("knn", "linear")
            for which in ("untrained", "trained")
        ]
        gains = [row[f"{probe}_trained"] - row[f"{probe}_untrained"] for probe in ("knn", "linear")]
        table.append([str(seed), *cells[:2], f"+{gains[0]:.1f}", *cells[2:], f"+{gains[1]:.1f}"])
    header = ["seed", "kNN untrained", "kNN trained", "", "linear untrained", "linear trained", ""]
    row = next(iter(rows.values()))
    return markdown(header, table) + f'\n\n{where(row)}: `make pretrain RUN=runs/seed-S ARGS="--seed S"`'


def recipe(row: Row) -> Row:
    """The configuration of a run without what may differ between the runs of a table."""
    return {key: value for key, value in row["config"].items() if key not in ("seed", "out", "resume")}


def accuracy_table() -> str:
    """Errors over J and |p|: the newest rows of compiled kernels, or of interpreted ones."""
    rows = read_rows(RESULTS / "sigreg_accuracy.jsonl")
    rows = latest([row for row in rows if row["kernels"] == "compiled"] or rows)
    header = ["", "J", *(f"\\|p\\| ~ {scale:g}" for scale in rows[0]["scales"])]
    table = [[row["variant"], str(row["J"]), *error_cells(row)] for row in rows]
    size = ", ".join(f"{name} = {value}" for name, value in rows[0]["size"].items())
    return markdown(header, table) + f"\n\n{size}, kernels {rows[0]['kernels']}. {origin(rows[0])}"


def loader_rows(kind: str, *, gpu: bool = False) -> list[Row]:
    """Rows of one kind of the newest run of loader_bench.py that measured it."""
    rows = [row for row in read_rows(RESULTS / "loader.jsonl") if not row.get("rehearsal")]
    rows = [row for row in rows if row["gpu"] == gpu and row["kind"] == kind]
    return latest(rows) if rows else []


def loader_origin(row: Row) -> str:
    files = f"{row['files']}, {row['file_kib']:.0f} KiB each; {row['views']}, batches of {row['batch_size']}"
    return f"{files}, {row['workers']} workers or threads. {origin(row)}"


def loader_speed_table() -> str:
    """All contenders, fastest loader first, then the ceilings; on a CPU and, where measured, on a GPU."""
    parts = []
    for gpu in (False, True):
        rows = loader_rows("speed", gpu=gpu) if gpu is False or _has_gpu_rows() else []
        if not rows:
            continue
        base = max(row["images_per_s"] for row in rows if row["contender"].startswith("torchvision v2"))
        table = []
        for row in sorted(rows, key=lambda row: row["images_per_s"]):
            speed = row["images_per_s"]
            table.append([row["contender"], f"{speed:,.0f}", f"{speed / base:.1f}x"])
        header = ["loader", "images/s", "against torchvision v2"]
        parts.append(markdown(header, table) + f"\n\n{loader_origin(rows[0])}")
    return "\n\n".join(parts)


def _has_gpu_rows() -> bool:
    return any(row["gpu"] for row in read_rows(RESULTS / "loader.jsonl") if not row.get("rehearsal"))


def loader_large() -> str:
    (row,) = loader_rows("large")
    whole, reduced, usual = (row[f"{kind}_s"] for kind in ("whole", "reduced", "usual"))
    return (
        f"From the file to all views, with `torchvision` in one thread: {whole:.2f} s for a JPEG of "
        f"{row['width']} x {row['height']} px as it is, {reduced:.2f} s at 1/{row['factor']} of its size, "
        f"{usual:.3f} s for one of a usual size ({row['files'].partition(',')[0]}). {origin(row)}"
    )


def newest_run(rows: Sequence[Row]) -> list[Row]:
    """Rows of one commit and command: those whose rows are written one after another."""
    return [
        row for row in rows if (row["commit"], row["command"]) == (rows[-1]["commit"], rows[-1]["command"])
    ]


def train_table() -> str:
    """The trainer's cases, of the GPU where there are such rows and of the CPU."""
    everything = read_rows(RESULTS / "train.jsonl")
    rows = [row for row in everything if not row.get("rehearsal") and row["kind"] != "target"]
    parts = []
    for on_gpu in (True, False):
        here = [row for row in rows if (row["driver"] is not None) == on_gpu]
        if here:
            parts.append(_train_rows(newest_run(here)))
    return "\n\n".join(parts)


def _train_rows(rows: Sequence[Row]) -> str:
    table, notes = [], []
    for row in rows:
        name = _train_case(row)
        if "error" in row:
            table.append([name, "-", row["error"], "-", "-"])
            continue
        step = f"{row['step_ms']:.0f}" if "step_ms" in row else "-"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        table.append([name, step, f"{row['images_per_second']:,.0f}", mfu, f"{row['peak_memory_gib']:.1f}"])
        if "checkpoint_stall_steps" in row:
            copied, done = 1e3 * row["save_seconds"], row["checkpoint_seconds"]
            steps = 12 + row["checkpoint_stall_steps"]
            notes.append(
                f"- {name}: {copied:.0f} ms to copy a checkpoint; 12 steps with a save took as long "
                f"as {steps:.1f} without; it was complete after {done:.1f} s"
            )
        if row["loader"]:
            notes.append(f"- {name}: data wait {row['data_wait']:.0%}")
    header = ["case", "ms a step", "images/s", "MFU", "GiB"]
    return "\n\n".join([markdown(header, table), "\n".join(notes), origin(rows[0])])


def _train_case(row: Row) -> str:
    how = {"none": "no wrapper", "ddp": "DDP, one rank", "fsdp": "FSDP2, one rank"}[row["strategy"]]
    words = [f"{row['model']} x {row['images']}", how]
    if row["activation_checkpointing"] != "none":
        words.append(f"activation checkpointing {row['activation_checkpointing']}")
    if row["loader"]:
        words.append("with the loader")
    return ", ".join(words)


def plan_time() -> str:
    row = [row for row in read_rows(RESULTS / "plan.jsonl") if row["kind"] == "time"][-1]
    return f"`{row['planned']}` takes {row['seconds']:.0f} s ({where(row)}; row of kind `time`)."


TABLES: dict[str, Callable[[], str]] = {"sigreg": sigreg_table, "pretrain": pretrain_table}
DOCS = README.parent / "docs"
DOCUMENTS = {
    README: TABLES,
    DOCS / "training.md": {"measured": train_table},
    DOCS / "launching.md": {"plan-time": plan_time},
    DOCS / "loader.md": {"large": loader_large, "speed": loader_speed_table},
}


def render(text: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        content = table().replace("\\", r"\\") + "\n"
        text, count = re.subn(pattern, rf"\g<1>{content}\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(
                f"error: the document must have one <!-- {name} --> ... <!-- /{name} -->, has {count}"
            )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a document is out of date"
    )
    options = parser.parse_args()
    outdated = []
    for document, tables in DOCUMENTS.items():
        before = document.read_text(encoding="utf-8")
        after = render(before, tables)
        if not options.check:
            document.write_text(after, encoding="utf-8")
        elif before != after:
            outdated.append(document.name)
    if outdated:
        what = "is not what bench/results says; run python bench/render_readme.py"
        print(f"error: {', '.join(outdated)} {what}", file=sys.stderr)
    return int(bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
