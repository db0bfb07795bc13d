"""Selection of runs without labels: by loss / lambda^alpha, by effective rank and by RankMe.

LeJEPA's training loss tells how good the features are (arXiv 2511.08544): over runs of one model and one
length, loss / lambda^alpha with alpha about 0.4 ranks them nearly as their accuracy does; the smaller the
better. With labels that is measured, C(alpha) = Spearman(-loss / lambda^alpha, accuracy). The minus makes 1
the perfect ranking. RankMe (arXiv 2210.02885) and the effective rank are larger for the better run.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lejepa_fast.train.config import flat
from lejepa_fast.train.report.runs import RunRecord, differing

ALPHA = 0.4
ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
PROBES = ("linear", "knn")
RANKS = {"effective_rank": "effective rank", "rankme": "RankMe"}
LOSS, RANKME, NEITHER = "loss / lambda^alpha", "RankMe", "neither"
_NO_VERDICT = "the loss of I-JEPA follows its targets and is no verdict"

# What the loss of two runs may differ in and still be compared: what is being selected, and where it ran.
# Everything else in these sections changes the scale of the loss or what is predicted.
_SECTIONS = ("data", "crops", "model", "loss")
_COMPARABLE = {"loss.lambd", "loss.num_slices", "loss.impl", "model.drop_path", "data.workers"} | {
    f"data.{name}" for name in ("backend", "prefetch", "hw_decoder_load", "max_bad_fraction", "value_range")
}
# What the rank of two runs' embeddings depends on besides their quality.
_OF_RANKS = ("evaluation_data", "val_images", "image_size", "embedding_dim")


def select(runs: Sequence[RunRecord], alpha: float = ALPHA) -> dict[str, Any]:
    """Group the runs by what makes losses comparable, choose the rule, and rank them by it; collapsed runs
    and those without a figure come last.

    Args:
        runs: one or more.
        alpha: exponent of lambda.

    Returns:
        What select.json holds, NaN for figures that are not there:
        "rule": LOSS, RANKME or NEITHER, what to trust over all the runs; in a group it is LOSS.
        "warning": one line on what is not comparable and why; None if everything is.
        "alpha"; "correlations": with labels `correlate` over the largest group, by probe.
        "runs", the best first: "run", its folder; "group", from 0 on, whose losses are comparable; "steps",
        "state", "lambda", "loss", "score", the ranks and the accuracies; "places" by score (in its group) and
        by each rank (of all), from 1 on.
    """
    settings = [_loss_setting(run) for run in runs]
    keys = [json.dumps(setting, sort_keys=True) for setting in settings]
    rule, warning = _rule(runs, sorted(differing(settings)))
    rows: list[dict[str, Any]] = [
        {
            "run": str(run.folder),
            "group": list(dict.fromkeys(keys)).index(key),
            "steps": run.steps,
            "state": run.state,
            "lambda": run.lambd,
            "loss": run.loss,
            "score": score(run, alpha),
            **{name: run.figure(name) for name in RANKS},
            **{probe: run.figure(f"{probe}_trained") for probe in PROBES},
        }
        for run, key in zip(runs, keys, strict=True)
    ]
    for row in rows:
        better = {
            "score": sum(each["score"] < row["score"] for each in rows if each["group"] == row["group"]),
            **{name: sum(each[name] > row[name] for each in rows) for name in RANKS},
        }
        row["places"] = {name: None if math.isnan(row[name]) else n + 1 for name, n in better.items()}

    def order(row: dict[str, Any]) -> tuple[float, ...]:
        value = -row["rankme"] if rule == RANKME else row["score"]
        last = row["state"] == "collapsed" or math.isnan(value)
        return 0 if rule == RANKME else row["group"], last, math.inf if math.isnan(value) else value

    largest = max(keys, key=keys.count)
    members = [run for run, key in zip(runs, keys, strict=True) if key == largest]
    correlations = {probe: found for probe in PROBES if (found := correlate(members, probe, alpha))}
    rows.sort(key=order)
    return {"rule": rule, "warning": warning, "alpha": alpha, "runs": rows, "correlations": correlations}


def score(run: RunRecord, alpha: float) -> float:
    """loss / lambda^alpha; NaN where the rule does not hold: lambda = 0 and alpha above 0, or I-JEPA."""
    if run.objective == "ijepa":
        return math.nan
    return run.loss / run.lambd**alpha if run.lambd or not alpha else math.nan


def correlate(runs: Sequence[RunRecord], probe: str, alpha: float = ALPHA) -> dict[str, Any]:
    """C(alpha) over runs whose losses are comparable; {} with fewer than 3 of known lambda and accuracy.

    Returns:
        "runs": their number; "alphas" and "c": the curve; "c_at_alpha": C of the given alpha; "best_alpha"
        and "c_at_best": its maximum; "effective_rank" and "rankme": their Spearman correlation with the
        accuracy, None where runs lack the figure.
    """
    known = [
        run
        for run in runs
        if run.lambd and run.objective != "ijepa" and math.isfinite(run.figure(f"{probe}_trained"))
    ]
    if len(known) < 3:
        return {}
    accuracy = [run.figure(f"{probe}_trained") for run in known]
    curve = [spearman([-score(run, a) for run in known], accuracy) for a in ALPHAS]
    ranks = [(name, [run.figure(name) for run in known]) for name in RANKS]
    best = int(np.nanargmax(curve)) if np.isfinite(curve).any() else 0
    return {
        "runs": len(known),
        "alphas": list(ALPHAS),
        "c": curve,
        "c_at_alpha": spearman([-score(run, alpha) for run in known], accuracy),
        "best_alpha": ALPHAS[best],
        "c_at_best": curve[best],
        **{name: None if np.isnan(values).any() else spearman(values, accuracy) for name, values in ranks},
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN if all values are equal."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def _loss_setting(run: RunRecord) -> dict[str, Any]:
    """Everything that must be equal for two losses to be comparable."""
    every = flat(run.config)
    sections = set(_SECTIONS)
    if every["loss.center_from"] == "average":
        sections.add("average")
    if run.objective != "lejepa":
        sections |= {"objective", "masked"}
    found = {k: v for k, v in every.items() if k.partition(".")[0] in sections and k not in _COMPARABLE}
    return found | {"steps": run.steps, "finished": bool(run.summary)}


def _rule(runs: Sequence[RunRecord], names: Sequence[str]) -> tuple[str, str | None]:
    """The rule over all runs, and the warning, given the settings that make their losses differ."""
    ijepa = any(run.objective == "ijepa" for run in runs)
    if not names and not ijepa:
        return LOSS, None
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    problems = [f"the runs differ in {some}: their losses compare within a group only"] if names else []
    warning = "; ".join(problems + [_NO_VERDICT] * ijepa)
    model = [name for name in names if name == "objective" or name.startswith("model.")]
    others = [name for name in _OF_RANKS if len({run.summary.get(name) for run in runs}) > 1]
    if model or others or any(math.isnan(run.figure("rankme")) for run in runs):
        why = (model or others or ["no rankme in some summary.json"])[0]
        return NEITHER, f"{warning}, and RankMe does not compare them either ({why})"
    return RANKME, f"{warning}; RankMe compares over all of them"
