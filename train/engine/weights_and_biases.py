"""Rows of metrics.jsonl sent to Weights & Biases, on request (`--wandb PROJECT`); else nothing is imported.

Where they go is up to wandb's own settings: `wandb login`, WANDB_ENTITY, WANDB_MODE=offline (to the run
folder alone; `wandb sync` sends it later). https://docs.wandb.ai/ref/python/init
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lejepa_fast.errors import RunError, UsageError, first_line
from lejepa_fast.train.config import Config, to_dict
from lejepa_fast.train.runtime.files import write_atomically

log = logging.getLogger("lejepa_fast.train")


def open_run(run_dir: Path, cfg: Config) -> WandbRun | None:
    """The run there of a configuration; None where it asks for none."""
    return None if cfg.wandb is None else WandbRun(run_dir, cfg.wandb, to_dict(cfg))


class WandbRun:
    """A run there for the run folder, the same one after a resume.

    UsageError where wandb is not installed, RunError where it refuses to start. What it refuses later is a
    warning: metrics.jsonl has all rows, and the training goes on.
    """

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UsageError(
                f"wandb: {error}; pip install 'lejepa_fast[wandb]', or leave out --wandb"
            ) from error
        identity = run_dir / "wandb-id.txt"
        if not identity.exists():
            name = secrets.token_hex(4).encode()
            write_atomically(identity, lambda file: file.write(name), way_out="choose another --out")
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                id=identity.read_text(),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
            )
        except Exception as error:  # its own kinds, which are not the same in all versions
            raise RunError(
                f"wandb: {first_line(error)}; run `wandb login`, set WANDB_MODE=offline, or leave out --wandb"
            ) from error
        # Rows have steps of their own, since wandb's count may not go back and a resumed run repeats some.
        self._run.define_metric("*", step_metric="step")

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers of a row, as `kind/name`."""
        with self._told():
            self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self, *, failed: bool) -> None:
        with self._told():
            self._run.finish(exit_code=int(failed))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning("wandb: %s", first_line(error))
