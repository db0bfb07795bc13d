"""The table of results: a row for each figure, a column for each encoder, on the page and in a terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lejepa_fast.train.evaluation.collapse import sigreg_levels
from lejepa_fast.train.evaluation.few_shot import Table
from lejepa_fast.train.evaluation.protocol import EvalResult

UNTRAINED, TRAINED = "untrained", "trained"
PROBE_NAMES = {
    "linear": "linear probe",
    "knn": "kNN",
    "knn_plain": "kNN, equal votes",
    "knn_radius": "neighbors in a radius",
    "nadaraya_watson": "Nadaraya-Watson",
    "kernel": "kernel ridge",
    "fine_tuned": "fine-tuning",
}


@dataclass(frozen=True)
class Row:
    """A figure of every encoder."""

    label: str
    values: Mapping[str, float | None]
    """By the name of the encoder; None where it was not measured."""
    spreads: Mapping[str, float] = field(default_factory=dict)
    """What the page prints after ±, where there is a value."""
    hint: str = ""
    """A second line under the label, on the page only."""
    form: str = ".3g"

    def text(self, name: str) -> str:
        """The value of an encoder, "-" where there is none."""
        value = self.values.get(name)
        return "-" if value is None else format(value, self.form)

    def spread(self, name: str) -> str:
        """What follows ± for an encoder; "" where there is nothing."""
        return format(self.spreads[name], self.form) if name in self.spreads else ""

    @property
    def difference(self) -> str:
        """Trained minus untrained, with its sign; "-" where either is missing."""
        before, after = self.values.get(UNTRAINED), self.values.get(TRAINED)
        return "-" if before is None or after is None else format(after - before, "+" + self.form)


def table_rows(results: Mapping[str, EvalResult]) -> list[Row]:
    """All rows for the encoders `results`, by name.

    Encoders other than "untrained" and "trained" are backbones: they have no projector, so the figures of
    the embeddings are left out for them.
    """
    one = next(iter(results.values()))
    rows = [
        _accuracy(f"kNN accuracy, k = {one.k} (%)", "knn", results),
        _accuracy("Linear probe accuracy (%)", "linear", results),
    ]
    if one.regression is not None:
        scores = {name: result.regression or {} for name, result in results.items()}
        rows = score_rows(
            {name: {key: score._asdict() for key, score in of.items()} for name, of in scores.items()}
        )
    if any(result.fine_tuned is not None for result in results.values()):
        label, row = (
            ("Fine-tuning (%)", _accuracy) if one.regression is None else ("Fine-tuning (R2)", _plain)
        )
        rows.append(row(label, "fine_tuned", results))
    ours = {name: results[name] for name in (UNTRAINED, TRAINED) if name in results}
    if ours:
        one = ours[TRAINED]
        levels = sigreg_levels(one.n_val)
        rule = f"{levels.gaussian:.2f} for a Gaussian, {levels.collapsed:.3g} if all were zero"
        std = "Embedding std (target 1)" if one.gaussian else "Embedding std"
        figures = [(std, "embedding_std", ""), (f"Effective rank of {one.rank_limit}", "effective_rank", "")]
        if one.gaussian:
            figures.append((f"SIGReg of {one.n_val} validation images", "sigreg", rule))
        for label, key, hint in figures:
            rows.append(Row(label, {name: getattr(each, key) for name, each in ours.items()}, hint=hint))
    return rows


def _accuracy(label: str, key: str, results: Mapping[str, EvalResult]) -> Row:
    """Accuracies in percent with one binomial standard error."""
    values = {name: getattr(result, key) for name, result in results.items()}
    spreads = {
        name: (value * (100 - value) / results[name].n_val) ** 0.5
        for name, value in values.items()
        if value is not None
    }
    return Row(label, values, spreads, form=".1f")


def _plain(label: str, key: str, results: Mapping[str, EvalResult]) -> Row:
    return Row(label, {name: getattr(result, key) for name, result in results.items()}, form=".3f")


def score_rows(scores: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[Row]:
    """R2 and mean absolute error of numbers: rows for each probe of `scores[encoder][probe]`, where they are
    called "r2" and "mae"."""
    rows = []
    for key, label in {**PROBE_NAMES, "mean": "Always the mean"}.items():
        found = {name: probes.get(key, {}) for name, probes in scores.items()}
        if any(found.values()):
            for figure, form in (("r2", ".3f"), ("mae", ".4g")):
                values = {name: score.get(figure) for name, score in found.items()}
                rows.append(Row(f"{label} ({figure.upper()})", values, form=form))
    return rows


def few_shot_rows(results: Mapping[str, EvalResult]) -> list[Row]:
    """A row for each number of labels and each probe: mean, and standard deviation over the draws."""
    tables = {name: result.few_shot for name, result in results.items() if result.few_shot}
    return shot_rows(tables, numbers=next(iter(results.values())).regression is not None)


def shot_rows(tables: Mapping[str, Table], *, numbers: bool) -> list[Row]:
    """`few_shot_rows` of the tables of encoders, which need not have the same counts and probes; `numbers`:
    the labels are numbers and not classes."""
    rows = []
    for count in dict.fromkeys(count for table in tables.values() for count in table):
        labels = f"{count} label{'s' * (count != '1')}{'' if numbers or count == 'all' else ' per class'}"
        for key, probe in PROBE_NAMES.items():
            cells = {name: table[count][key] for name, table in tables.items() if key in table.get(count, {})}
            if cells:
                means, spreads = ({name: cell[i] for name, cell in cells.items()} for i in (0, 1))
                spreads = {} if count == "all" else spreads
                rows.append(Row(f"{labels}: {probe}", means, spreads, form=".3f" if numbers else ".1f"))
    return rows


def format_table(results: Mapping[str, EvalResult]) -> str:
    """The main figures of all encoders side by side, for a terminal; "untrained" and "trained" come first."""
    ours, rows = TRAINED in results, table_rows(results)
    columns = [*results]
    if ours:
        columns.insert(2, "difference")
    few = few_shot_rows(results)
    label_width = max(34, *(len(row.label) + 1 for row in [*rows, *few]))
    widths = [max(18 if few else 12, len(name) + 2) for name in columns]
    lines = [" " * label_width + "".join(f"{name:>{n}}" for name, n in zip(columns, widths, strict=True))]
    for row in [*rows, *few]:
        texts = {
            name: row.text(name) + (f" ± {row.spread(name)}" if row in few and row.spreads else "")
            for name in results
        }
        cells = [row.difference if ours and i == 2 else texts[name] for i, name in enumerate(columns)]
        aligned = "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True))
        lines.append(f"{row.label:{label_width}}{aligned}")
    one = results[TRAINED] if ours else next(iter(results.values()))
    if one.chance is not None:
        lines.append(f"guessing: {one.chance:.1f} %, always the largest class: {one.majority:.1f} %")
    lines += filter(None, [one.no_labels_because, one.few_shot_note])
    return "\n".join([*lines, *([one.verdict.sentence] if ours else [])])
