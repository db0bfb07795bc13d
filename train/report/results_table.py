"""The table of results: a row for each figure, a column for each encoder, on the page and in a terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lejepa_fast.train.evaluation.collapse import sigreg_levels
from lejepa_fast.train.evaluation.protocol import EvalResult

UNTRAINED, TRAINED = "untrained", "trained"


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
    ours = {name: results[name] for name in (UNTRAINED, TRAINED) if name in results}
    if ours:
        one = ours[TRAINED]
        levels = sigreg_levels(one.n_val)
        rule = f"{levels.gaussian:.2f} for a Gaussian, {levels.collapsed:.3g} if all were zero"
        for label, key, hint in (
            ("Embedding std (target 1)", "embedding_std", ""),
            (f"Effective rank of {one.rank_limit}", "effective_rank", ""),
            (f"SIGReg of {one.n_val} validation images", "sigreg", rule),
        ):
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


def format_table(results: Mapping[str, EvalResult]) -> str:
    """The main figures of all encoders side by side, for a terminal; "untrained" and "trained" come first."""
    ours, rows = TRAINED in results, table_rows(results)
    columns = [*results]
    if ours:
        columns.insert(2, "difference")
    label_width = max(34, *(len(row.label) + 1 for row in rows))
    widths = [max(12, len(name) + 2) for name in columns]
    lines = [" " * label_width + "".join(f"{name:>{n}}" for name, n in zip(columns, widths, strict=True))]
    for row in rows:
        cells = [row.difference if ours and i == 2 else row.text(name) for i, name in enumerate(columns)]
        aligned = "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True))
        lines.append(f"{row.label:{label_width}}{aligned}")
    one = results[TRAINED] if ours else next(iter(results.values()))
    if one.chance is not None:
        lines.append(f"guessing: {one.chance:.1f} %, always the largest class: {one.majority:.1f} %")
    if one.no_labels_because:
        lines.append(one.no_labels_because)
    return "\n".join([*lines, *([one.verdict.sentence] if ours else [])])
