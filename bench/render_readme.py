"""Write the measured tables of README.md and docs/: python bench/render_readme.py [--check]

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is between is replaced. With --check
nothing is written, and the exit code is 1 when a document is not what the rows say.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence

from benchlib import RESULTS, ROOT, Row, read_rows
from loader_contenders import OURS, STABLE
from sigreg_variants import BASELINE, COMPILED, PACKAGES, STREAMING, TRITON

_SAME = ("case", "dtype", *"VNKMJ", "date", "group")  # of rows that took turns


def rows_of(name: str, **wanted: object) -> list[Row]:
    """Rows of a file with these values, without rehearsals; those of a GPU alone where there are any."""
    rows = [row for row in read_rows(RESULTS / f"{name}.jsonl") if not row.get("rehearsal")]
    rows = [
        {"group": 0, "case": "cpu", **row} for row in rows if all(row.get(k) == v for k, v in wanted.items())
    ]
    return [row for row in rows if row["driver"]] or rows


def markdown(header: Sequence[str], table: Sequence[Sequence[str]], row: Row, **changes: str) -> str:
    """A table, and below it where, with what and when `row` was measured."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *table]
    origin = "{device}, {threads} threads, torch {torch}, triton {triton}, {date:.10}: `{command}`"
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{origin.format(**{**row, **changes})}"


def comparison() -> str:
    """Ours against others in the same measurement: packages, and on a GPU the authors' formula, too."""
    rows = rows_of("sigreg")
    # The newest of each; measurements of other sizes, such as a sweep's, are no comparison with a package.
    newest = {tuple(row[k] for k in (*_SAME[:-2], "group", "variant")): row for row in rows}
    right = [
        row for row in newest.values() if row["correct"] and row["case"] not in ("cpu", "sweep", "custom")
    ]
    ours = {tuple(row[k] for k in _SAME): row for row in right if row["variant"] in (STREAMING, TRITON)}
    table = []
    for row in right:
        mine = ours.get(tuple(row[k] for k in _SAME))
        if mine is None or row["variant"] not in (BASELINE, COMPILED, *PACKAGES):
            continue
        phase = "wall" if row["case"] == "minimal" else "forward_backward"
        theirs, its = row[phase]["median_ms"], mine[phase]["median_ms"]
        what = "loss of {V} x {N} embeddings of size {K}, {M} directions, {dtype}".format(**row)
        name = f"{row['variant']} {row.get('version', '')}".strip()
        times = [f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms" for ms in (theirs, its)]
        memory = "{:.0f} against {:.0f} MiB".format(*(r.get("peak_extra_mib", 0) for r in (row, mine)))
        table.append([what, f"{name}: {times[0]}", f"**{times[1]}**", f"{theirs / its:.1f}x", memory])
    loaders = {row["contender"]: row for row in rows_of("loader", kind="peers")}
    if {OURS, STABLE} <= loaders.keys():
        theirs, its = (loaders[name]["images_per_s"] for name in (STABLE, OURS))
        what = "loading JPEGs, {views} crops, one worker".format(**loaders[OURS])
        name = f"{STABLE} {loaders[STABLE]['version']}: {theirs:.0f} images/s"
        table.append([what, name, f"**{its:.0f} images/s**", f"{its / theirs:.1f}x", ""])
    header = ["forward + backward of the loss; the loader", "other", "lejepa_fast", "faster", "memory"]
    return markdown(header, table, right[-1])


def simple(name: str, columns: dict[str, str], **wanted: object) -> str:
    """A line for each row that the last command and commit measured; a column is a format of the row."""
    rows = rows_of(name, **wanted)
    rows = [
        row for row in rows if (row["commit"], row["command"]) == (rows[-1]["commit"], rows[-1]["command"])
    ]
    shown = [{k: float("nan") if v is None else v for k, v in row.items()} for row in rows]
    lines = [[cell.format(**row).replace("nan%", "-") for cell in columns.values()] for row in shown]
    return markdown(list(columns), list({line[0]: line for line in lines}.values()), rows[-1])


_PRETRAIN = {"seed": "{seed}"}
_PRETRAIN |= {"kNN untrained": "{knn_untrained:.1f} %", "kNN trained": "{knn_trained:.1f} %"}
_PRETRAIN |= {"linear untrained": "{linear_untrained:.1f} %", "linear trained": "{linear_trained:.1f} %"}
_TRAIN = {
    "case": "{model} x {images}, wrapper {strategy}, recomputed {activation_checkpointing}, files {loader}"
}
_TRAIN |= {"images/s": "{images_per_second:,.0f}", "MFU": "{mfu:.1%}", "GiB": "{peak_memory_gib:.1f}"}
_TRAIN |= {"data wait": "{data_wait:.0%}"}
_ACCURACY = {"": "{variant}, J {J}"}
for _index, _scale in enumerate(("1", "10", "100", "1e3", "1e4")):
    _cell = f"{{value_errors[{_index}]:.0e}} / {{gradient_errors[{_index}]:.0e}}"
    _ACCURACY[f"projections ~ {_scale}"] = _cell
_SPEED = {"loader": "{contender}", "images/s": "{images_per_s:,.0f}"}
_GOALS = {"target": "{target}", "wanted": "{wanted:g}", "measured": "{figure:.2f}", "met": "{met}"}
DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"comparison": comparison, "pretrain": functools.partial(simple, "pretrain", _PRETRAIN)},
    "docs/kernels.md": {"accuracy": functools.partial(simple, "sigreg_accuracy", _ACCURACY)},
    "docs/training.md": {"measured": functools.partial(simple, "train", _TRAIN)},
    "docs/loader.md": {
        "speed": functools.partial(simple, "loader", _SPEED, kind="speed"),
        "targets": functools.partial(simple, "loader", _GOALS, kind="target"),
    },
}


def render(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """`text` with these tables filled in; raises ValueError unless each has one place."""
    for name, table in tables.items():
        parts = re.split(rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)", text)
        if len(parts) != 4:
            raise ValueError(f"expected one <!-- {name} --> ... <!-- /{name} --> in the document")
        text = f"{parts[0]}{parts[1]}{table()}\n{parts[2]}{parts[3]}"
    return text


def main(arguments: Sequence[str]) -> int:
    code = 0
    for name, tables in DOCUMENTS.items():
        before = (ROOT / name).read_text(encoding="utf-8")
        after = render(before, tables)
        if "--check" not in arguments:
            (ROOT / name).write_text(after, encoding="utf-8")
        elif before != after:
            print(f"error: {name} is out of date; run python bench/render_readme.py", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
