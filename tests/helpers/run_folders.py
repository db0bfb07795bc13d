"""Run folders as the trainer leaves them, written without a training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lejepa_fast.train import config
from lejepa_fast.train.config import Config


def write_run(
    folder: Path, cfg: Config, losses: list[float | None], *, steps: int | None = None, **summary: Any
) -> Path:
    """A run with a row of each loss, the last one at `steps`; with keywords, also report/summary.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config.write(dataclasses.replace(config.resolve(cfg), out=folder), folder)
    steps = steps or len(losses)
    rows: list[dict[str, Any]] = [{"kind": "run", "step": 0}]
    for i, loss in enumerate(losses, steps - len(losses) + 1):
        rows.append({"kind": "train", "step": i, "loss": loss, "prediction": 0.5, "sigreg": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (folder / "report").mkdir()
        summary = {"steps": steps, "state": "healthy", **summary}
        (folder / "report" / "summary.json").write_text(json.dumps(summary))
    return folder
