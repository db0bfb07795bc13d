"""`report.html` from the summary and the figures: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

Summary = Mapping[str, Any]

_STYLE = """
:root { --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --trained: #0b6bcb; --untrained: #b86414; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 8px; }
p { margin: 0 0 12px; }
.muted { color: var(--muted); }
section, .verdict { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 20px 24px; margin-top: 20px; }
.verdict { border-left: 6px solid #2f855a; }
.verdict.bad { border-left-color: #c53030; }
.note { border-left: 6px solid #d9822b; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px 7px 0; }
th, td { border-bottom: 1px solid var(--line); }
th { font-weight: 600; } thead th { color: var(--muted); font-size: 14px; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.trained { color: var(--trained); font-weight: 700; } td.untrained { color: var(--untrained); }
td small { color: var(--muted); font-weight: 400; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
th small { color: var(--muted); font-weight: 400; }
.after { margin-top: 12px; }
pre { overflow-x: auto; background: #f5f7fa; border-radius: 6px; padding: 12px 16px; font-size: 13px; }
summary { cursor: pointer; font-weight: 600; margin-top: 16px; }
@media print { body { background: #fff; } section, .verdict { break-inside: avoid; } }
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="muted">$subtitle</p>
$verdict
$note
<section>
<h2>Trained against untrained</h2>
<p>$intro</p>
$results
</section>
$figures
<section>
<h2>Run</h2>
$facts
<details><summary>Configuration</summary><pre>$config</pre></details>
</section>
</main>
</body>
</html>
""")

# File, heading, explanation; `$names` are filled in by `_section`.
_FIGURES = (
    (
        "knn.png",
        "kNN accuracy over training",
        "Each validation image is classified by its $knn_k nearest training images in the encoder's feature "
        "space. The dashed line is the same encoder before training: only what lies above it was learned. "
        "Good: a rise that flattens late. Bad: no gap to the dashed line, or a fall after an early rise.",
    ),
    (
        "loss.png",
        "Losses",
        "Total loss = $formula. The prediction loss measures how far the views of an image are from their "
        "common centre, SIGReg how far the batch is from an isotropic Gaussian; the dashed line is what "
        "exact Gaussian samples score. Good: SIGReg comes down towards that line early and stays, the "
        "embedding std goes to 1, the prediction loss rises while the embeddings spread and then falls "
        "slowly. Bad: prediction loss and std fall to zero together (collapse), or SIGReg stays high.",
    ),
    (
        "projections.png",
        "Projections of the embeddings",
        "Validation embeddings projected on random directions. SIGReg asks for the dashed N(0, 1) density in "
        "every direction. Std is the spread along a direction, offset how far its mean is from 0. Good: the "
        "filled histogram follows the dashed curve, and so do the thin lines of single directions. Bad: "
        "needles (collapse), several humps (clusters), a very different width.",
    ),
    (
        "spectrum.png",
        "Eigenvalue spectrum",
        "Variance of the validation embeddings along their principal directions, log scale. The dashed line "
        "is a Gaussian sample of the same size: the best that can be expected. Good: the trained line lies "
        "close to it. Bad: a cliff after a few directions (dimensional collapse), or the whole line far "
        "below (full collapse).",
    ),
    (
        "views.png",
        "Augmented views",
        "What the encoder is trained on: a row for each image, a column for each view, at their relative "
        "sizes. All views of a row should get the same embedding. Good: one can tell that a row shows one "
        "object. Bad: black or flat tiles, colours beyond recognition, local views without the object.",
    ),
)

_INTRO = (
    "The untrained encoder has the same architecture and starting weights, with BatchNorm statistics "
    "measured on the training images. It is the baseline to beat: random features are already far above "
    "chance. Both are scored on the same images with the same protocol. Accuracies are top-1 in percent; "
    "± is one binomial standard error for this number of validation images."
)


def render(summary: Summary, folder: Path) -> str:
    """The page for `summary`, with those of the figures that lie in `folder` embedded."""
    title = f"LeJEPA pretraining: {_model_name(summary)}"
    classes = f"{summary['num_classes']} classes" if summary["num_classes"] else "no labels"
    subtitle = (
        f"{summary['steps']:,} steps, {summary['train_images']:,} training and {summary['val_images']:,} "
        f"validation images, {classes}, evaluated at {summary['image_size']} px, {summary['created']}"
    )
    state = "verdict bad" if summary["collapsed"] else "verdict"
    return _PAGE.substitute(
        title=_text(title),
        style=_STYLE,
        subtitle=_text(subtitle),
        verdict=f'<div class="{state}"><b>{_text(summary["verdict"])}</b></div>',
        note=_note(summary),
        intro=_text(_INTRO),
        results=_results(summary),
        figures="\n".join(
            _section(folder / name, heading, text, summary) for name, heading, text in _FIGURES
        ),
        facts=_facts(summary),
        config=_text(json.dumps(summary["config"], indent=2)),
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _model_name(summary: Summary) -> str:
    model = summary["config"].get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    return str(name) if name else "encoder"


def _note(summary: Summary) -> str:
    reason = summary["no_labels_because"]
    if not reason:
        return ""
    return (
        f'<section class="note"><h2>No kNN and no linear probe</h2><p>{_text(reason)} '
        "Everything on this page that needs no labels is complete.</p></section>"
    )


def _results(summary: Summary) -> str:
    rows = [
        _row(f"kNN accuracy, k = {summary['knn_k']}", summary, "knn_untrained", "knn_trained", percent=True),
        _row("Linear probe accuracy", summary, "linear_untrained", "linear_trained", percent=True),
        _row("Embedding std", summary, "embedding_std_untrained", "embedding_std", hint="1 is the target"),
        _row(
            "Effective rank",
            summary,
            "effective_rank_untrained",
            "effective_rank",
            hint=f"of at most {summary['effective_rank_limit']}",
        ),
        _row(
            "SIGReg of the validation embeddings",
            summary,
            "sigreg_val_untrained",
            "sigreg_val",
            hint=f"{summary['sigreg_val_gaussian']:.2f} for a Gaussian, "
            f"{summary['sigreg_val_all_zero']:.3g} if all were zero",
        ),
    ]
    floor = ""
    if summary["majority_class"] is not None:
        floor = (
            f'<p class="muted after">For comparison: guessing gives {summary["chance"]:.1f} %, '
            f"always answering the largest class {summary['majority_class']:.1f} %.</p>"
        )
    names = "".join(f'<th class="n">{name}</th>' for name in ("untrained", "trained", "difference"))
    head = f"<tr><th></th>{names}</tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>{floor}"


def _row(
    label: str, summary: Summary, before: str, after: str, *, percent: bool = False, hint: str = ""
) -> str:
    old, new = summary[before], summary[after]
    change = f"{new - old:+.1f}" if percent and old is not None and new is not None else ""
    if not percent and old is not None and new is not None:
        change = f"{new - old:+.3g}"
    small = f"<br><small>{_text(hint)}</small>" if hint else ""
    n = summary["val_images"]
    return (
        f'<tr><th>{_text(label)}{small}</th><td class="n untrained">{_number(old, percent, n)}</td>'
        f'<td class="n trained">{_number(new, percent, n)}</td><td class="n">{change or "-"}</td></tr>'
    )


def _number(value: float | None, percent: bool, n: int) -> str:
    if value is None:
        return "-"
    if not percent:
        return f"{value:.3g}"
    error = 100 * math.sqrt(max(0.0, value / 100 * (1 - value / 100)) / n)
    return f"{value:.1f} <small>± {error:.1f}</small>"


def _section(figure: Path, heading: str, text: str, summary: Summary) -> str:
    if not figure.exists():
        return ""
    filled = Template(text).substitute(knn_k=summary["knn_k"], formula=_formula(summary))
    data = base64.b64encode(figure.read_bytes()).decode("ascii")
    return (
        f"<section><h2>{_text(heading)}</h2><p>{_text(filled)}</p>"
        f'<img alt="{_text(heading)}" src="data:image/png;base64,{data}"></section>'
    )


def _formula(summary: Summary) -> str:
    """The loss in words, with the run's lambda where the configuration tells it."""
    loss = summary["config"].get("loss")
    loss = loss if isinstance(loss, Mapping) else {}
    weight = loss.get("lambd", "lambda")
    prediction = "prediction" if loss.get("form") == "additive" else f"(1 - {weight}) · prediction"
    return f"{prediction} + {weight} · SIGReg"


def _facts(summary: Summary) -> str:
    machine = summary["machine"]
    speed = summary["images_per_second"]
    rows = {
        "Training speed": f"{speed:,.0f} images/s" if speed is not None else "not recorded",
        "Seed": summary["seed"] if summary["seed"] is not None else "not recorded",
        "Dimensions": f"features {summary['feature_dim']}, embeddings {summary['embedding_dim']}",
        "Machine": ", ".join(
            [
                machine["processor"],
                f"{machine['cores']} cores",
                *([f"{machine['memory_gib']} GiB"] if machine["memory_gib"] else []),
                *machine["gpus"],
                machine["system"],
            ]
        ),
        "Versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    }
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows.items())
    return f"<table><tbody>{cells}</tbody></table>"
