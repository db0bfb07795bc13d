"""Finished runs side by side on one page. Reads run folders, trains and evaluates nothing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lejepa_fast.errors import UsageError
from lejepa_fast.regular_files import open_regular
from lejepa_fast.train.config.settings import TIMM_KEYS
from lejepa_fast.train.report import plots
from lejepa_fast.train.report.report import render, replaced_folder, strict_json
from lejepa_fast.train.report.results_table import PROBE_NAMES, Row
from lejepa_fast.train.report.runs import flat
from lejepa_fast.train.runtime.files import read_rows

# Settings that do not change what is learned.
_PLACES = ("out", "resume", "log_every", "tensorboard", "wandb", "profile")
# What the figures of two runs must share to be compared.
_SHARED = {
    "evaluation_data": "images",
    "val_images": "numbers of validation images",
    "image_size": "image sizes in pixels",
    "knn_k": "numbers of neighbors",
}
_FIGURES = (
    ("Embedding std (target 1)", "embedding_std", ".3g"),
    ("Effective rank", "effective_rank", ".3g"),
    ("- untrained", "effective_rank_untrained", ".3g"),
    ("SIGReg of the validation images", "sigreg_val", ".3g"),
    ("Training speed (images/s)", "images_per_second", ",.0f"),
    ("Steps", "steps", ",d"),
    ("Image size (px)", "image_size", "d"),
    ("Validation images", "val_images", ",d"),
)


@dataclass(frozen=True)
class Run:
    """What a run folder says about a finished run."""

    path: Path
    summary: Mapping[str, Any]
    """report/summary.json."""
    settings: Mapping[str, Any]
    """config.json, its sections flattened: "loss.lambd"."""
    rows: Sequence[Mapping[str, Any]]
    """metrics.jsonl."""


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write `out/comparison/` with compare.html, compare.json and the curves, and return the page's path.

    Args:
        folders: run folders with config.json, metrics.jsonl and report/summary.json.
        out: an existing folder. An earlier out/comparison is replaced.

    Raises:
        UsageError: fewer than two runs, one twice, or a folder that is no finished run.
        RunError: the page cannot be written.
    """
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < max(2, len(paths)):
        given = " ".join(map(str, folders))
        raise UsageError(f"--compare: expected two or more different run folders, got {given}")
    short = [path.name for path in paths]
    names = [str(f) if short.count(p.name) > 1 else p.name for f, p in zip(folders, paths, strict=True)]
    runs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    differing = _differing({name: run.settings for name, run in runs.items()})
    found = {
        "not_comparable_because": _not_comparable(runs),
        "differing_settings": differing,
        "runs": {name: {"folder": str(run.path), **run.summary} for name, run in runs.items()},
    }
    found = strict_json(found)
    with replaced_folder(out / "comparison") as folder:
        curves = {name: [*run.rows, *_ends(run.summary)] for name, run in runs.items()}
        plots.plot_runs(folder / "curves.png", curves)
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
        (folder / "compare.json").write_text(text, encoding="utf-8")
        rows = _rows({name: run.summary for name, run in runs.items()})
        page = render("comparison.html.j2", folder, found=found, rows=rows)
        (folder / "compare.html").write_text(page, encoding="utf-8")
    return out / "comparison" / "compare.html"


def read_run(folder: Path) -> Run:
    """Read a run folder; UsageError, which names it, if it is none or its run has not finished."""
    config = _read_json(folder / "config.json", f"{folder} is no run folder")
    unfinished = f"the run {folder} has not finished"
    summary = _read_json(folder / "report" / "summary.json", unfinished)
    return Run(folder, summary, flat(config), read_rows(folder / "metrics.jsonl"))


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            values = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UsageError(f"--compare: {problem}: cannot read {path} ({reason})") from error
    if not isinstance(values, dict):
        raise UsageError(f"--compare: {problem}: {path} holds no JSON object")
    return values


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings that not all runs share, by name and run; None where a run does not record one."""
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    found = {}
    for key in keys:
        values = {name: each.get(key) for name, each in settings.items()}
        section = key.partition(".")[0]
        if section not in (*_PLACES, *TIMM_KEYS) and len({json.dumps(v) for v in values.values()}) > 1:
            found[key] = values
    return found


def _not_comparable(runs: Mapping[str, Run]) -> str | None:
    """A sentence about what the figures do not share; None if they can be compared."""
    parts = []
    for key, what in _SHARED.items():
        values = {name: run.summary.get(key) for name, run in runs.items()}
        if len(set(map(str, values.values()))) > 1:
            parts.append(f"{what} ({'; '.join(f'{name}: {value}' for name, value in values.items())})")
    problem = "The figures are not comparable: the runs were evaluated with different"
    return f"{problem} {' and '.join(parts)}." if parts else None


def _ends(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with kNN of the untrained encoder at step 0, and of the trained one at the last."""
    last = summary.get("steps", 0)
    return [
        {"kind": "eval", "step": step, "knn": summary.get(key)}
        for step, key in ((last, "knn_trained"), (0, "knn_untrained"))
    ]


def _rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The figures of the runs, each accuracy with its untrained twin."""
    rows = []

    def add(label: str, values: Mapping[str, Any], form: str) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if numbers:
            rows.append(Row(label, numbers, form=form))

    def of(key: str) -> dict[str, Any]:
        return {name: summary.get(key) for name, summary in summaries.items()}

    for title, key in (("kNN (%)", "knn"), ("Linear probe (%)", "linear"), ("Fine-tuning", "fine_tuned")):
        for kind, label in (("trained", title), ("untrained", "- untrained"), ("gain", "- gain")):
            add(label, of(f"{key}_{kind}"), "+.1f" if kind == "gain" else ".1f")
    tables = {key: of(key) for key in ("few_shot", "few_shot_untrained")}
    counts = dict.fromkeys(count for table in tables["few_shot"].values() for count in table or ())
    for count in counts:
        for probe in ("linear", "knn", "kernel", "fine_tuned"):
            for key, label in (
                ("few_shot", f"{count} labels per class: {PROBE_NAMES[probe]}"),
                ("few_shot_untrained", "- untrained"),
            ):
                cells = {name: (table or {}).get(count, {}).get(probe) for name, table in tables[key].items()}
                add(label, {name: cell and cell[0] for name, cell in cells.items()}, ".3g")
    for label, key, form in _FIGURES:
        add(label, of(key), form)
    return rows
