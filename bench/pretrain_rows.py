"""Turn finished runs into rows of bench/results/pretrain.jsonl: python bench/pretrain_rows.py RUN [RUN ...]

Each row holds the report's summary of one run of train/pretrain.py, with the machine that this is called
on: call it where the runs were made.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchlib import RESULTS, append_rows, machine


def row_of(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "report" / "summary.json").read_text(encoding="utf-8"))
    return {"benchmark": "pretrain", **summary, **machine()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with report/summary.json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for pretrain.jsonl")
    options = parser.parse_args()
    for run in options.runs:
        if not (run / "report" / "summary.json").is_file():
            parser.error(f"runs: {run} has no report/summary.json; finish the run first")
    append_rows(options.out / "pretrain.jsonl", [row_of(run) for run in options.runs])
    print(f"rows: {options.out / 'pretrain.jsonl'}")


if __name__ == "__main__":
    main()
