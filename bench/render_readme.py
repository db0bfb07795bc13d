"""Write the measured tables of README.md and docs/: python bench/render_readme.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is between is replaced.
"""

import re
from collections.abc import Callable, Sequence
from string import Formatter

from architectures_bench import MODELS, counts
from benchlib import RESULTS, ROOT, Row, cells, read_rows
from domain_bench import summarize
from loader_bench import OURS, STABLE
from sigreg_variants import BASELINE, COMPILED, PACKAGES, STREAMING, TRITON

# Sizes that are no comparison with packages in common use.
_ALONE = ("cpu", "sweep", "custom", "large", "table 6", "largest N", "largest N = M", "share")
_SAME = ("case", "dtype", *"VNKMJ", "group", "date")  # of rows that took turns


def rows_of(name: str, **wanted: object) -> list[Row]:
    """Rows of a file with these values, without rehearsals; those of a GPU alone where there are any."""
    rows = [{"group": 0, "case": "cpu", **row} for row in read_rows(RESULTS / f"{name}.jsonl")]
    rows = [r for r in rows if all(r.get(k) == v for k, v in {"rehearsal": None, **wanted}.items())]
    return [row for row in rows if row["driver"]] or rows


def whole(rows: Sequence[Row]) -> Row:
    """The last of rows that a few calls measured part by part, with the command that measures all of them."""
    commands = [re.sub(r" --(?:models|seeds)(?: (?!--)\S+)+", "", row["command"]) for row in rows]
    return {**rows[-1], "command": max(commands, key=len)}


def markdown(header: Sequence[str], table: Sequence[Sequence[str]], *rows: Row) -> str:
    """A table, and below it where, with what and when each of `rows` was measured."""
    sentences = [any(len(line[i]) > 40 for line in table) for i in range(len(header))]  # figures go right
    lines = [header, ["---" if i == 0 or left else "---:" for i, left in enumerate(sentences)], *table]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text + "\n\n" + "; ".join(map(origin, rows))


def origin(row: Row) -> str:
    threads = f"{row['threads']} thread" + "s" * (row["threads"] != 1)
    text = "{device}, {0}, torch {torch}, triton {triton}, {date:.10}: `{command}`"
    return text.format(threads, **row)


def comparison() -> str:
    """Ours against others in the same measurement: packages, and on a GPU the authors' formula, too."""
    newest = {tuple(row[k] for k in (*_SAME[:-1], "variant")): row for row in rows_of("sigreg")}
    right = [row for row in newest.values() if row["correct"] and row["case"] not in _ALONE]
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
    loaders, measured = {row["contender"]: row for row in rows_of("loader", kind="peers")}, [right[-1]]
    if {OURS, STABLE} <= loaders.keys():
        theirs, its = (loaders[name]["images_per_s"] for name in (STABLE, OURS))
        what = "loading JPEGs, {views} crops, one worker".format(**loaders[OURS])
        name = f"{STABLE} {loaders[STABLE]['version']}: {theirs:.0f} images/s"
        table.append([what, name, f"**{its:.0f} images/s**", f"{its / theirs:.1f}x", ""])
        measured.append(loaders[OURS])
    header = ["forward + backward of the loss; the loader", "other", "lejepa_fast", "faster", "memory"]
    return markdown(header, table, *measured)


def simple(name: str, columns: dict[str, str], **wanted: object) -> str:
    """A line for each row that the last command and commit measured; a column is a format of the row."""
    rows = rows_of(name, **wanted)
    last = [row for row in rows if all(row[k] == rows[-1][k] for k in ("commit", "command"))]
    named = {
        name.split("[")[0] for form in columns.values() for _, name, *_ in Formatter().parse(form) if name
    }
    if missing := named - {key for row in last for key in row}:
        raise KeyError(f"{name}: no row has {', '.join(sorted(missing))}")
    return markdown(list(columns), list({line[0]: line for line in cells(last, columns)}.values()), rows[-1])


_PRETRAIN = {"seed": "{seed}"} | {
    f"{probe} {which}": f"{{{key}_{which}:.1f}} %"
    for key, probe in (("knn", "kNN"), ("linear", "linear"))
    for which in ("untrained", "trained")
}
_PRETRAIN["untrained `resnet14t`"] = "{backbones[resnet14t:untrained][knn]:.1f} %, "
_PRETRAIN["untrained `resnet14t`"] += "{backbones[resnet14t:untrained][linear]:.1f} %"
_CASE = "{model}, {images}, {strategy}, {activation_checkpointing}, {loader}"
_TRAIN = {
    "model, batch, `--parallel.strategy`, `--parallel.activation-checkpointing`, real files": _CASE,
    "images/s": "{images_per_second:,.0f}",
    "MFU": "{mfu:.1%}",
    "GiB": "{peak_memory_gib:.1f}",
    "data wait": "{data_wait:.0%}",
}
_ACCURACY = {"": "{variant}, J {J}"} | {
    f"projections ~ {scale}": f"{{value_errors[{i}]:.0e}} / {{gradient_errors[{i}]:.0e}}"
    for i, scale in enumerate(("1", "10", "100", "1e3", "1e4"))
}
_SPEED = {"loader": "{contender}", "images/s": "{images_per_s:,.0f}"}


def segmentation() -> str:
    """IoU of the newest run for each set, encoder and kind of principal components."""
    newest = {(row["set"], row["encoder"], row["pca"]): row for row in rows_of("segment")}
    cell = "{iou:.1f} ({random:.1f})".format
    table = []
    for (where, encoder, pca), row in newest.items():
        iou = row["iou"]
        if encoder == "constant" and pca == "joint":
            best = " / ".join(cell(**iou[key]) for key in ("all_foreground", "centered"))
            table.append([f"{where}: all foreground / centered disc", best, "", "", "", ""])
        elif encoder != "constant" and pca == "joint":
            maps = [cell(**iou[k]) if k in iou else "" for k in ("attention", "best_head", "low_attention")]
            each = newest[where, encoder, "per-image"]["iou"]["pca"]
            table.append([f"{where}: {encoder}", "", *maps, f"{cell(**iou['pca'])} / {cell(**each)}"])
    header = ["IoU, % (random pixels)", "constant", "attention", "best head", "low attention"]
    return markdown([*header, "PCA 1, joint / per image"], table, row)


def domain() -> str:
    """Accuracies with few labels, of the newest run for each set and seed."""
    newest = {(row["set"], row["settings"]["seed"]): row for row in rows_of("domain")}
    header, *lines = summarize([*newest.values()])
    return markdown(header, lines, whole([*newest.values()]))


def architectures() -> str:
    """How many models trained as the paper says, and which could not take part."""
    rows = {row["model"]: row for row in rows_of("architectures")}
    reasons = {name: row["error"].partition(": ")[2] for name, row in rows.items() if "error" in row}
    refused = "\n".join(f"- `{name}`: {reason.partition(';')[0]}" for name, reason in reasons.items())
    table = [["tried", f"{len(rows)} of {len(MODELS)}"]]
    table += [[name, str(count)] for name, count in counts([*rows.values()]).items()]
    machines = dict.fromkeys(row["device"] for row in rows.values())
    parts = ([row for row in rows.values() if row["device"] == machine] for machine in machines)
    text = markdown(["models", "count"], table, *map(whole, parts))
    return text + f"\n\nCannot take part:\n\n{refused}" * bool(refused)


def theory() -> str:
    """The statements, and whether the newest run of each experiment agrees."""
    newest = {row["experiment"]: row for row in rows_of("theory")}
    table = []
    for name, row in newest.items():
        figure = f"[{name}](../bench/results/theory_{name}.png)"
        table.append([figure, row["statement"], "yes" if row["holds"] else "no"])
    return markdown(["figure", "statement", "holds"], table, row)


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"comparison": comparison, "pretrain": lambda: simple("pretrain", _PRETRAIN)},
    "docs/kernels.md": {"accuracy": lambda: simple("sigreg_accuracy", _ACCURACY)},
    "docs/evaluation.md": {"architectures": architectures, "domain": domain},
    "docs/training.md": {"measured": lambda: simple("train", _TRAIN)},
    "docs/segmentation.md": {"iou": segmentation},
    "docs/theory.md": {"statements": theory},
    "docs/loader.md": {"speed": lambda: simple("loader", _SPEED, kind="speed")},
}


def render(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """`text` with these tables filled in; raises ValueError unless each has one place."""
    for name, table in tables.items():
        parts = re.split(rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)", text)
        if len(parts) != 4:
            raise ValueError(f"expected one <!-- {name} --> ... <!-- /{name} --> in the document")
        text = f"{parts[0]}{parts[1]}{table()}\n{parts[2]}{parts[3]}"
    return text


def main() -> None:
    for name, tables in DOCUMENTS.items():
        (ROOT / name).write_text(render((ROOT / name).read_text("utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
