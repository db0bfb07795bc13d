"""What run folders say: settings, training losses at the end, figures of the evaluation."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lejepa_fast.errors import UsageError
from lejepa_fast.train import config
from lejepa_fast.train.runtime.files import read_rows

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
        return float(value) if isinstance(value, (int, float)) else math.nan


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. UsageError, which names it, if it has no settings or no finite training loss."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder}: expected a run folder, got one without config.json")
    settings = config.to_dict(config.load_json(path))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    try:
        losses = {name: loss_at_the_end(rows, name) for name in ("loss", "prediction", "sigreg")}
    except ValueError as error:
        raise UsageError(f"{folder}: metrics.jsonl: {error}") from error
    steps, summary = max(row["step"] for row in rows), _summary(folder)
    summary = summary if summary.get("steps") == steps else {}
    return RunRecord(folder, settings, steps, summary=summary, **losses)


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "report" / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder}: cannot read report/summary.json: {error}") from error
    return summary if isinstance(summary, dict) else {}


def loss_at_the_end(rows: list[dict[str, Any]], name: str = "loss") -> float:
    """The mean of a loss over the last tenth of the steps, where the learning rate is nearly 0, and over the
    last 5 rows at least: a row holds the loss of one batch, which is noisy.

    Args:
        rows: rows of kind "train" of a metrics.jsonl.
        name: "loss", "prediction" or "sigreg".

    Raises:
        ValueError: no row has a finite value.
    """
    values = {row["step"]: row[name] for row in rows if isinstance(row.get(name), (int, float))}
    steps = sorted(values)
    if not steps:
        raise ValueError(f"expected rows of the training with a finite {name!r}, got none")
    last = [step for step in steps if step > (1 - END_SHARE) * steps[-1]]
    last = last if len(last) >= END_ROWS else steps[-END_ROWS:]
    return math.fsum(values[step] for step in last) / len(last)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration by their dotted names, such as "loss.lambd"."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            found[name] = value
    return found
