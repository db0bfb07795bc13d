"""What run folders say: settings, training losses at the end, figures of the evaluation."""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lejepa_fast.errors import UsageError
from lejepa_fast.regular_files import open_regular
from lejepa_fast.train import config
from lejepa_fast.train.config.settings import TIMM_KEYS
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
    rows: Sequence[Mapping[str, Any]] = ()
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
        return float(value) if isinstance(value, (int, float)) else math.nan


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
    training = [row for row in rows if row["kind"] == "train"]
    try:
        losses = {name: loss_at_the_end(training, name) for name in ("loss", "prediction", "sigreg")}
    except ValueError as error:
        raise UsageError(f"{folder}: metrics.jsonl: {error}") from error
    steps, summary = max(row["step"] for row in training), _read_json(folder, "report/summary.json") or {}
    if summary:
        _check(summary, folder)
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


def _check(summary: Mapping[str, Any], folder: Path) -> None:
    import pydantic

    try:
        pydantic.TypeAdapter(_Summary).validate_json(json.dumps(summary))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" else f", got {reprlib.repr(first['input'])}"
        raise UsageError(f"{folder}: report/summary.json: {where}: {first['msg']}{got}") from error


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
