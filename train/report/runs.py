"""What run folders say: settings, training losses at the end, figures of the evaluation."""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lejepa_fast.data.validation import validated
from lejepa_fast.errors import UsageError
from lejepa_fast.regular_files import open_regular
from lejepa_fast.train import config
from lejepa_fast.train.config.settings import TIMM_KEYS
from lejepa_fast.train.runtime.files import read_rows

Rows = Sequence[Mapping[str, Any]]

END_SHARE, END_ROWS = 0.1, 5


@dataclass(frozen=True)
class RunRecord:
    """A run folder, as `read_run` finds it."""

    folder: Path
    config: dict[str, Any]
    """The resolved configuration, as `config.to_dict`."""
    steps: int
    """Step of the last row of the training."""
    loss: float
    """Training loss at the end; see `loss_at_the_end`."""
    prediction: float
    sigreg: float
    """Its two terms at the end, not weighted."""
    summary: dict[str, Any]
    """report/summary.json; {} for a run that has not finished, or has been continued since."""
    rows: Rows = ()
    """metrics.jsonl."""

    @property
    def objective(self) -> str:
        """lejepa, ijepa or masked-lejepa."""
        return self.config["objective"]

    @property
    def lambd(self) -> float:
        """Weight of SIGReg."""
        return self.config["loss"]["lambd"]

    @property
    def state(self) -> str:
        """healthy, low rank or collapsed by the report's verdict, else unfinished."""
        return self.summary.get("state", "unfinished")

    def figure(self, name: str) -> float:
        """A number of the summary; NaN if it is not there, as accuracies without labels."""
        value = self.summary.get(name)
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class _Summary:
    """What is read of a summary.json, and its types; None for what was not measured."""

    __pydantic_config__: ClassVar = {"strict": True}

    steps: int
    state: str
    verdict: str = ""
    created: str = ""
    machine: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    image_size: int | None = None
    val_images: int | None = None
    knn_trained: float | None = None
    knn_untrained: float | None = None
    linear_trained: float | None = None
    linear_untrained: float | None = None
    fine_tuned_trained: float | None = None
    fine_tuned_untrained: float | None = None
    regression: dict[str, dict[str, float | None]] | None = None
    regression_untrained: dict[str, dict[str, float | None]] | None = None
    few_shot: dict[str, dict[str, tuple[float | None, float | None]]] | None = None
    few_shot_untrained: dict[str, dict[str, tuple[float | None, float | None]]] | None = None
    embedding_std: float | None = None
    effective_rank: float | None = None
    effective_rank_untrained: float | None = None
    rankme: float | None = None
    sigreg_val: float | None = None
    images_per_second: float | None = None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    UsageError, which names it, if it has no settings or no finite training loss, or if a file cannot be read.
    """
    found = _read_json(folder, "config.json")
    if found is None:
        raise UsageError(f"{folder}: expected a run folder, got one without config.json")
    own = {key: value for key, value in found.items() if key not in TIMM_KEYS}
    settings = config.to_dict(config.from_dict(own, f"{folder}: config.json"))
    rows = read_rows(folder / "metrics.jsonl")
    try:
        losses = {name: loss_at_the_end(rows, name) for name in ("loss", "prediction", "sigreg")}
    except ValueError as error:
        raise UsageError(f"{folder}: metrics.jsonl: {error}") from error
    steps = max(row["step"] for row in rows if row["kind"] == "train")
    summary = _read_json(folder, "report/summary.json") or {}
    if summary:
        validated(_Summary, summary, f"{folder}: report/summary.json: ")
    summary = summary if summary.get("steps") == steps else {}
    return RunRecord(folder, settings, steps, summary=summary, rows=rows, **losses)


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a file of a run folder; None if the file does not exist."""
    try:
        with open_regular(folder / name) as file:
            values = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UsageError(f"{folder}: cannot read {name} ({reason})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{folder}: {name}: expected a JSON object, got {reprlib.repr(values)}")
    return values


def series(rows: Rows, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, ascending, and finite values of `key` in rows of `kind`; of two rows of a step, the later."""
    points = {
        int(row["step"]): float(row[key])
        for row in rows
        if row["kind"] == kind and isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
    }
    steps = sorted(points)
    return np.array(steps, dtype=float), np.array([points[step] for step in steps])


def knn_at_the_ends(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with kNN of the untrained encoder at step 0, and of the trained one at the last."""
    return [
        {"kind": "eval", "step": step, "knn": summary.get(key)}
        for step, key in ((0, "knn_untrained"), (summary["steps"], "knn_trained"))
    ]


def loss_at_the_end(rows: Rows, name: str = "loss") -> float:
    """The mean of a loss over the last tenth of the steps, where the learning rate is nearly 0, and over the
    last 5 rows at least: a row holds the loss of one batch, which is noisy.

    Args:
        rows: of a metrics.jsonl.
        name: "loss", "prediction" or "sigreg".

    Raises:
        ValueError: no row has a finite value.
    """
    steps, values = series(rows, "train", name)
    if not len(steps):
        raise ValueError(f"expected rows of the training with a finite {name!r}, got none")
    count = max(END_ROWS, int((steps > (1 - END_SHARE) * steps[-1]).sum()))
    return math.fsum(values[-count:]) / len(values[-count:])


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the settings that are not the same everywhere."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({json.dumps(each.get(name)) for each in settings}) > 1]


def strict_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy for strict JSON: a number that is not finite becomes None, a path text."""
    return json.loads(json.dumps(values, default=str), parse_constant=lambda name: None)


def json_text(values: Mapping[str, Any]) -> str:
    """The text of a file with `strict_json` of the values."""
    return json.dumps(strict_json(values), indent=2) + "\n"
