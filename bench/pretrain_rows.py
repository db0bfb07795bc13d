"""Turn finished runs into rows of bench/results/pretrain.jsonl: python bench/pretrain_rows.py RUN [RUN ...]

A row holds the report's summary of a run, with this machine: call it where the runs were made.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchlib import Rows, command_line


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with report/summary.json")
    options = parser.parse_args(arguments)
    summaries = [run / "report" / "summary.json" for run in options.runs]
    for path in summaries:
        if not path.is_file():
            parser.error(f"runs: expected a finished run, got one without {path}")
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in summaries]
    Rows(options.out / "pretrain.jsonl", "pretrain").write(*rows)


if __name__ == "__main__":
    main()
