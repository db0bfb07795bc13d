"""Write the measured tables of README.md and docs/kernels.md: python bench/render_readme.py [--check]

Tables stand between `<!-- NAME -->` and `<!-- /NAME -->`; what is between is replaced. With --check
nothing is written, and the exit code is 1 when a document is not what the rows say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accuracy_bench import cells as error_cells
from benchlib import RESULTS
from sigreg_bench import BASELINE

README = Path(__file__).resolve().parents[1] / "README.md"
Row = dict[str, Any]


def read(name: str) -> list[Row]:
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


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
    """The reference CPU size: the last complete measurement of it."""
    size = {"V": 1, "N": 2048, "K": 512, "M": 1024, "J": 17}
    rows = latest([r for r in read("sigreg.jsonl") if all(r[k] == v for k, v in size.items())])
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


def pretrain_table() -> str:
    """The newest run of every seed, of the configuration that was run last."""
    everything = read("pretrain.jsonl")
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
    rows = read("sigreg_accuracy.jsonl")
    rows = latest([row for row in rows if row["kernels"] == "compiled"] or rows)
    header = ["", "J", *(f"\\|p\\| ~ {scale:g}" for scale in rows[0]["scales"])]
    table = [[row["variant"], str(row["J"]), *error_cells(row)] for row in rows]
    size = ", ".join(f"{name} = {value}" for name, value in rows[0]["size"].items())
    return markdown(header, table) + f"\n\n{size}, kernels {rows[0]['kernels']}. {origin(rows[0])}"


TABLES: dict[str, Callable[[], str]] = {"sigreg": sigreg_table, "pretrain": pretrain_table}
DOCUMENTS = {README: TABLES, README.parent / "docs" / "kernels.md": {"accuracy": accuracy_table}}


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
