"""Finished runs side by side on one page. Reads run folders, trains and evaluates nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import flat
from lejepa_fast.train.report import plots
from lejepa_fast.train.report.report import render, replaced_folder
from lejepa_fast.train.report.results_table import TRAINED, UNTRAINED, Row, label_rows, shot_rows
from lejepa_fast.train.report.runs import RunRecord, differing, json_text, knn_at_the_ends, read_run

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
    "evaluation.temperature": "temperatures of kNN",
    "evaluation.linear_blocks": "blocks for the linear probe",
    "evaluation.draws": "draws of few labels",
    "evaluation.fine_tune": "epochs of fine-tuning",
}
# These matter where both runs were asked for the figures.
_ASKED_BY = {"evaluation.draws": "evaluation.few_shot", "evaluation.fine_tune": "evaluation.fine_tune"}
_FIGURES = (
    ("Embedding std (LeJEPA: target 1)", "embedding_std", ".3g"),
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
    configs = {name: flat(run.config) for name, run in runs.items()}
    settings = {
        key: {name: each.get(key) for name, each in configs.items()}
        for key in differing(list(configs.values()))
        if key not in _PLACES
    }
    found = {
        "not_comparable_because": _not_comparable(runs),
        "differing_settings": settings,
        "runs": {
            name: {"folder": str(run.folder), "state": run.state, **run.summary} for name, run in runs.items()
        },
    }
    curves = {name: [*run.rows, *knn_at_the_ends(run.summary)] for name, run in runs.items()}
    with replaced_folder(out / "comparison") as folder:
        plots.plot_curves(folder / "curves.png", curves, plots.RUNS)
        (folder / "compare.json").write_text(json_text(found), encoding="utf-8")
        lines = [(row.label, [row.with_spread(name) for name in runs]) for row in _rows(runs)]
        lines.append(("State", [run.state for run in runs.values()]))
        differ = [(key, list(values.values())) for key, values in settings.items()]
        page = render("comparison.html.j2", folder, found=found, lines=lines, settings=differ)
        (folder / "compare.html").write_text(page, encoding="utf-8")
    return out / "comparison" / "compare.html"


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


def _rows(runs: Mapping[str, RunRecord]) -> list[Row]:
    """The figures of the runs, those of the untrained encoders and the gain below each."""
    rows, untrained = [], {row.label: row for row in _measured(runs, UNTRAINED)}
    for row in _measured(runs, TRAINED):
        rows.append(row)
        twin = untrained.get(row.label)
        if twin is None or row.label.startswith("Always the mean"):  # which no encoder changes
            continue
        rows.append(replace(twin, label="- untrained"))
        pairs = {name: (value, twin.values.get(name)) for name, value in row.values.items()}
        gains = {name: a - b for name, (a, b) in pairs.items() if a is not None and b is not None}
        if gains and row.label.endswith(("(%)", "(R2)")):
            rows.append(Row("- gain", gains, form="+" + row.form))
    for label, key, form in _FIGURES:
        # Nothing draws embeddings of I-JEPA to a Gaussian.
        values = {
            name: None if key == "sigreg_val" and run.objective == "ijepa" else run.summary.get(key)
            for name, run in runs.items()
        }
        if any(value is not None for value in values.values()):
            rows.append(Row(label, values, form=form))
    return rows


def _measured(runs: Mapping[str, RunRecord], which: str) -> list[Row]:
    """The rows of the trained or of the untrained encoders."""
    suffix = "" if which == TRAINED else "_untrained"
    keys = {name: f"{name}_{which}" for name in ("knn", "linear", "fine_tuned")}
    keys |= {name: f"{name}{suffix}" for name in ("regression", "few_shot")}
    encoders = {
        name: {figure: run.summary.get(key) for figure, key in keys.items()} for name, run in runs.items()
    }
    images = {name: run.summary.get("val_images") for name, run in runs.items()}
    return [*label_rows(encoders, images=images), *shot_rows(encoders)]
