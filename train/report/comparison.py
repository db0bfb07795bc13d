"""Finished runs side by side on one page. Reads run folders, trains and evaluates nothing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lejepa_fast.errors import UsageError
from lejepa_fast.train.report import plots
from lejepa_fast.train.report.report import render, replaced_folder, strict_json
from lejepa_fast.train.report.results_table import TRAINED, UNTRAINED, Row, score_rows, shot_rows
from lejepa_fast.train.report.runs import RunRecord, flat, read_run

# Settings that do not change what is learned.
_PLACES = ("out", "resume", "log_every", "tensorboard", "wandb", "profile")
# What the figures of two runs must share to be compared. The counts tell other shares held out as well, and
# numbers from classes.
_PATHS = {"evaluation_data": "images", "evaluation.labels": "labels"}
_SHARED = {
    **_PATHS,
    "val_images": "numbers of validation images",
    "probe_images": "numbers of images for the probes",
    "num_classes": "numbers of classes",
    "image_size": "image sizes in pixels",
    "knn_k": "numbers of neighbors",
    "evaluation.linear_blocks": "blocks for the linear probe",
    "evaluation.draws": "draws of few labels",
    "evaluation.fine_tune": "epochs of fine-tuning",
}
# These matter where both runs were asked for the figures.
_ASKED_BY = {"evaluation.draws": "evaluation.few_shot", "evaluation.fine_tune": "evaluation.fine_tune"}
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
    for run in runs.values():
        if not run.summary:
            problem = f"expected report/summary.json of step {run.steps}, its last"
            raise UsageError(f"--compare: the run {run.folder} has not finished: {problem}")
    found = {
        "not_comparable_because": _not_comparable(runs),
        "differing_settings": _differing({name: flat(run.config) for name, run in runs.items()}),
        "runs": {name: {"folder": str(run.folder), **run.summary} for name, run in runs.items()},
    }
    found = strict_json(found)
    with replaced_folder(out / "comparison") as folder:
        curves = {name: [*run.rows, *_ends(run.summary)] for name, run in runs.items()}
        plots.plot_runs(folder / "curves.png", curves)
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
        (folder / "compare.json").write_text(text, encoding="utf-8")
        # Nothing draws embeddings of I-JEPA to a Gaussian.
        without = {name: {"sigreg_val": None} for name, run in runs.items() if run.objective == "ijepa"}
        rows = _rows({name: {**run.summary, **without.get(name, {})} for name, run in runs.items()})
        page = render("comparison.html.j2", folder, found=found, rows=rows)
        (folder / "compare.html").write_text(page, encoding="utf-8")
    return out / "comparison" / "compare.html"


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings that not all runs share, by name and run; None where it does not exist."""
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    found = {}
    for key in keys:
        values = {name: each.get(key) for name, each in settings.items()}
        section = key.partition(".")[0]
        if section not in _PLACES and len({json.dumps(v) for v in values.values()}) > 1:
            found[key] = values
    return found


def _not_comparable(runs: Mapping[str, RunRecord]) -> str | None:
    """A sentence about what the figures do not share; None if they can be compared. What a run does not
    record, as older ones, is not compared."""
    parts, recorded = [], {name: flat(run.summary) for name, run in runs.items()}
    for key, what in _SHARED.items():
        asked = {
            name: each for name, each in recorded.items() if key not in _ASKED_BY or each.get(_ASKED_BY[key])
        }
        values = {name: each[key] for name, each in asked.items() if key in each}
        if len({Path(v).resolve() if key in _PATHS and v else v for v in values.values()}) > 1:
            said = (f"{name}: {'none' if value is None else value}" for name, value in values.items())
            parts.append(f"{what} ({'; '.join(said)})")
    problem = "The figures are not comparable: the runs were evaluated with different"
    return f"{problem} {' and '.join(parts)}." if parts else None


def _ends(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with kNN of the untrained encoder at step 0, and of the trained one at the last."""
    return [
        {"kind": "eval", "step": step, "knn": summary.get(key)}
        for step, key in ((summary["steps"], "knn_trained"), (0, "knn_untrained"))
    ]


def _rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The figures of the runs, those of the untrained encoders and the gain below each."""
    rows, untrained = [], {row.label: row for row in _measured(summaries, UNTRAINED)}
    for row in _measured(summaries, TRAINED):
        rows.append(row)
        if twin := untrained.get(row.label):
            rows.append(replace(twin, label="- untrained"))
            pairs = {name: (value, twin.values.get(name)) for name, value in row.values.items()}
            gains = {name: a - b for name, (a, b) in pairs.items() if a is not None and b is not None}
            if gains and row.label.endswith(("(%)", "(R2)")):
                rows.append(Row("- gain", gains, form="+" + row.form))
    rows += [Row(label, _of(summaries, key), form=form) for label, key, form in _FIGURES]
    return [row for row in rows if any(value is not None for value in row.values.values())]


def _of(summaries: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {name: summary.get(key) for name, summary in summaries.items()}


def _measured(summaries: Mapping[str, Mapping[str, Any]], which: str) -> list[Row]:
    """The rows that trained and untrained encoders both have, for one of them."""
    suffix = "" if which == TRAINED else "_untrained"
    scores = {name: each or {} for name, each in _of(summaries, f"regression{suffix}").items()}
    if suffix:  # the mean of the labels is that of all encoders
        scores = {name: {key: v for key, v in each.items() if key != "mean"} for name, each in scores.items()}
    numbers, classes = (
        {name: each for name, each in summaries.items() if (each.get("regression") is not None) == wanted}
        for wanted in (True, False)
    )
    rows = [
        Row("kNN (%)", _of(classes, f"knn_{which}"), form=".1f"),
        Row("Linear probe (%)", _of(classes, f"linear_{which}"), form=".1f"),
        Row("Fine-tuning (%)", _of(classes, f"fine_tuned_{which}"), form=".1f"),
        *score_rows(scores),
        Row("Fine-tuning (R2)", _of(numbers, f"fine_tuned_{which}"), form=".3f"),
    ]
    for some in (classes, numbers):
        tables = {name: table for name, table in _of(some, f"few_shot{suffix}").items() if table}
        rows += shot_rows(tables, numbers=some is numbers)
    return rows
