"""Rows of metrics.jsonl to Weights & Biases, on request (`--wandb PROJECT`); otherwise wandb is not imported.

wandb's own settings hold: `wandb login`, WANDB_ENTITY, WANDB_MODE=offline (writes to the run folder only;
`wandb sync` sends it later). https://docs.wandb.ai/ref/python/init
"""

import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lejepa_fast.errors import RunError, UsageError, first_line
from lejepa_fast.train.runtime.files import write_atomically

log = logging.getLogger("lejepa_fast.train")


class WandbRun:
    """A run at Weights & Biases for a run folder, the same one after a resume.

    UsageError if wandb is not installed, RunError if it refuses to start. Later failures of wandb are
    warnings: metrics.jsonl has all rows, and the training goes on.
    """

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            way_out = "pip install 'lejepa_fast[wandb]', or leave out --wandb"
            raise UsageError(f"wandb: {error}; {way_out}") from error
        identity = run_dir / "wandb-id.txt"
        if not identity.is_file():  # a pipe would wait for a writer
            name = secrets.token_hex(4).encode()
            write_atomically(identity, name, way_out="choose another --out")
        options = {"project": project, "name": run_dir.name, "id": identity.read_text(), "resume": "allow"}
        try:
            self._run = wandb.init(**options, dir=str(run_dir), config=dict(config))
        except Exception as error:  # wandb's own classes, which differ between versions
            raise RunError(
                f"wandb: {first_line(error)}; run `wandb login`, set WANDB_MODE=offline, or leave out --wandb"
            ) from error
        # wandb's own step may not go back, and a resumed run repeats some.
        self._run.define_metric("*", step_metric="step")

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers of a row, as `kind/name`."""
        row = {"step": step, **{f"{kind}/{name}": value for name, value in values.items()}}
        _warn_of_failure(lambda: self._run.log(row))

    def close(self, *, failed: bool) -> None:
        """End the run, as failed or finished."""
        _warn_of_failure(lambda: self._run.finish(exit_code=int(failed)))


def _warn_of_failure(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:
        log.warning("wandb: %s", first_line(error))
