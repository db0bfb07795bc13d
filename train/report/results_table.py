"""The table of results: a row for each figure, a column for each encoder, on pages and in a terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lejepa_fast.train.evaluation.collapse import sigreg_levels
from lejepa_fast.train.evaluation.protocol import EvalResult
from lejepa_fast.train.runtime.command import aligned

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
    """What stands after ±, where there is a value."""
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

    def with_spread(self, name: str) -> str:
        """The value of an encoder and its spread."""
        return f"{self.text(name)} ± {spread}" if (spread := self.spread(name)) else self.text(name)

    @property
    def difference(self) -> str:
        """Trained minus untrained, with its sign; "-" where either is missing."""
        before, after = self.values.get(UNTRAINED), self.values.get(TRAINED)
        return "-" if before is None or after is None else format(after - before, "+" + self.form)


def encoder_figures(result: EvalResult) -> dict[str, Any]:
    """What summary.json holds of an encoder, and the tables below show."""
    scores = None
    if result.regression is not None:
        scores = {name: score._asdict() for name, score in result.regression.items()}
    return {
        "knn": result.knn,
        "linear": result.linear,
        "fine_tuned": result.fine_tuned,
        "regression": scores,
        "few_shot": result.few_shot,
        "image_size": result.image_size,
        "feature_dim": result.features_val.shape[1],
    }


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy in percent over n images, by the rule of Agresti and Coull (1998): with two right and
    two wrong answers more, so that it is not 0 where all are right."""
    share = (accuracy / 100 * n + 2) / (n + 4)
    return 100 * (share * (1 - share) / (n + 4)) ** 0.5


def label_rows(
    encoders: Mapping[str, Mapping[str, Any]],
    *,
    knn: str = "kNN accuracy (%)",
    images: Mapping[str, int | None],
) -> list[Row]:
    """Rows of the figures that need labels: those that any encoder has.

    Args:
        encoders: figures of each, see `encoder_figures`. "regression" tells numbers from classes.
        knn: label of that row.
        images: of the validation of each encoder, for the standard errors of accuracies; None: without.
    """
    classes = {name: each for name, each in encoders.items() if each["regression"] is None}
    numbers = {name: each for name, each in encoders.items() if each["regression"] is not None}
    rows = []
    for key, label in (
        ("knn", knn),
        ("linear", "Linear probe accuracy (%)"),
        ("fine_tuned", "Fine-tuning (%)"),
    ):
        values = {name: each[key] for name, each in classes.items()}
        known = {name: value for name, value in values.items() if value is not None}
        errors = {name: standard_error(value, n) for name, value in known.items() if (n := images[name])}
        rows.append(Row(label, values, errors, form=".1f"))
    for key, label in {**PROBE_NAMES, "mean": "Always the mean"}.items():
        for figure, form in (("r2", ".3f"), ("mae", ".4g")):
            values = {name: each["regression"].get(key, {}).get(figure) for name, each in numbers.items()}
            rows.append(Row(f"{label} ({figure.upper()})", values, form=form))
    values = {name: each["fine_tuned"] for name, each in numbers.items()}
    rows.append(Row("Fine-tuning (R2)", values, form=".3f"))
    return [row for row in rows if any(value is not None for value in row.values.values())]


def shot_rows(encoders: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row for each number of labels and each probe: mean, and standard deviation over the draws.

    The encoders need not have the same counts and probes.
    """
    rows = []
    for numbers in (False, True):
        tables = {
            name: each["few_shot"]
            for name, each in encoders.items()
            if each["few_shot"] and (each["regression"] is not None) == numbers
        }
        for count in dict.fromkeys(count for table in tables.values() for count in table):
            labels = f"{count} label{'s' * (count != '1')}{'' if numbers or count == 'all' else ' per class'}"
            for key, probe in PROBE_NAMES.items():
                cells = {
                    name: table[count][key] for name, table in tables.items() if key in table.get(count, {})
                }
                if cells:
                    means, spreads = ({name: cell[i] for name, cell in cells.items()} for i in (0, 1))
                    spreads = {} if count == "all" else spreads
                    rows.append(Row(f"{labels}: {probe}", means, spreads, form=".3f" if numbers else ".1f"))
    return rows


def table_rows(results: Mapping[str, EvalResult]) -> tuple[list[Row], list[Row]]:
    """The rows for the encoders `results`, by name, and those of few labels.

    Encoders other than "untrained" and "trained" are backbones: they have no projector, so the figures of
    the embeddings are left out for them.
    """
    one = next(iter(results.values()))
    encoders = {name: encoder_figures(result) for name, result in results.items()}
    rows = label_rows(
        encoders, knn=f"kNN accuracy, k = {one.k} (%)", images=dict.fromkeys(results, one.n_val)
    )
    if TRAINED in results:
        one, ours = results[TRAINED], {name: results[name] for name in (UNTRAINED, TRAINED)}
        levels = sigreg_levels(one.n_val)
        rule = f"{levels.gaussian:.2f} for a Gaussian, {levels.collapsed:.3g} if all were zero"
        std = "Embedding std (target 1)" if one.gaussian else "Embedding std"
        figures = [(std, "embedding_std", ""), (f"Effective rank of {one.rank_limit}", "effective_rank", "")]
        if one.gaussian:
            figures.append((f"SIGReg of {one.n_val} validation images", "sigreg", rule))
        for label, key, hint in figures:
            rows.append(Row(label, {name: getattr(each, key) for name, each in ours.items()}, hint=hint))
    return rows, shot_rows(encoders)


def format_table(results: Mapping[str, EvalResult]) -> str:
    """The main figures of all encoders side by side, for a terminal; "untrained" and "trained" come first."""
    rows, few = table_rows(results)
    ours = TRAINED in results
    lines = [["", *results]]
    if ours:
        lines[0].insert(3, "difference")
    for row in [*rows, *few]:
        spreads = row.spreads if row in few else {}
        cells = [row.text(name) + (f" ± {row.spread(name)}" if name in spreads else "") for name in results]
        if ours:
            cells.insert(2, row.difference)
        lines.append([row.label, *cells])
    one = results[TRAINED] if ours else next(iter(results.values()))
    texts = [aligned(lines)]
    if one.chance is not None:
        texts.append(f"guessing: {one.chance:.1f} %, always the largest class: {one.majority:.1f} %")
    texts += filter(None, [one.no_labels_because, one.few_shot_note])
    return "\n".join([*texts, *([one.verdict.sentence] if ours else [])])
